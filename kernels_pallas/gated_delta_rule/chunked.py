"""The gated delta rule in chunks of C tokens (WY form) in plain JAX: every platform, any T, K, V.

`README.md` derives it; comments cite its equation numbers. Arrays are laid out (N, B, H, R, C, ·): N chunks
first, for the scan; R = G/H value heads of a key head, a 1 where an array has no value heads. Between chunks
only the state is carried; everything else is a batched matmul over all chunks at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.gated_delta_rule.triangular import unit_lower_inverse

# exp of anything below is exactly 0 in float32 and in float64, so a smaller log decay is none: clipping there
# changes no result, lets −inf mean "forget", and bounds the sums of `_log_decay_sums`.
FORGET = -1000.0
# Log decays are summed as a multiple of this plus a rest: 64 · 1000 · 2⁸ < 2²⁴, so the first sum is exact.
_GRID = 2.0**-8


class Chunks(NamedTuple):
    """What forward and backward both need of the inputs, per chunk, in the compute dtype."""

    q: Float[Array, "N B H 1 C K"]
    k: Float[Array, "N B H 1 C K"]
    v: Float[Array, "N B H R C V"]
    beta: Float[Array, "N B H R C 1"]
    # e^{γ_i}, e^{γ_C − γ_i}, e^{γ_C}: from the chunk's start to a token, from a token to its end, across it.
    decay_in: Float[Array, "N B H R C 1"]
    decay_out: Float[Array, "N B H R C 1"]
    decay_across: Float[Array, "N B H R 1 1"]
    # E_ij = e^{γ_i − γ_j} for i ≥ j, else 0.
    decay_between: Float[Array, "N B H R C C"]
    # k kᵀ, A of eq. (5), T = (I + A)⁻¹, and P = E ⊙ q kᵀ.
    gram: Float[Array, "N B H 1 C C"]
    a: Float[Array, "N B H R C C"]
    inverse: Float[Array, "N B H R C C"]
    scores: Float[Array, "N B H R C C"]


class Sizes(NamedTuple):
    """How the work is cut, and how precisely its matmuls are done. Changes no result beyond rounding."""

    # C, a power of two.
    chunk: int
    # Tokens whose temporaries live at once, a multiple of C: all of T on an accelerator, few in a CPU's cache.
    block: int
    precision: jax.lax.PrecisionLike
    inverse_precision: jax.lax.PrecisionLike


def _to_chunks(x: Array, sizes: Sizes, key_heads: int) -> Array:
    """(B, T, heads, ·) → (N, B, H, R, C, ·)."""
    batch, _, heads, *rest = x.shape
    x = x.reshape(batch, -1, sizes.chunk, key_heads, heads // key_heads, *rest)
    return jnp.moveaxis(x, (1, 2), (0, 4))


def _from_chunks(x: Array, length: int) -> Array:
    """(blocks, N, B, H, R, C, ·) → (B, T, heads, ·): the inverse of `_to_chunks`."""
    x = x.reshape(-1, *x.shape[2:])
    x = jnp.moveaxis(x, (0, 4), (1, 2))
    batch, chunks, chunk, key_heads, groups = x.shape[:5]
    return x.reshape(batch, chunks * chunk, key_heads * groups, *x.shape[5:])[:, :length]


def _fill(x: Array, sizes: Sizes) -> Array:
    """Zeros up to whole blocks: tokens with β = 0 and log α = 0 do nothing."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % sizes.block)) + ((0, 0),) * (x.ndim - 2))


def _block(x: Array, index: Array, sizes: Sizes) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * sizes.block, sizes.block, axis=1)


def _t(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _log_decay_sums(log_decay: Float[Array, "*n C"]) -> tuple[Array, Array]:
    """γ as (coarse, fine), whose differences stay exact after a large decay: README, "Sums of log decays"."""
    log_decay = jnp.maximum(log_decay, FORGET)
    coarse = jnp.round(log_decay / _GRID) * _GRID
    return jnp.cumsum(coarse, axis=-1), jnp.cumsum(log_decay - coarse, axis=-1)


def _prepare(operands: tuple[Array, ...], dtype: jnp.dtype, sizes: Sizes) -> Chunks:
    key_heads = operands[0].shape[2]
    q, k, v, log_decay, beta = (_to_chunks(x, sizes, key_heads).astype(dtype) for x in operands)
    coarse, fine = _log_decay_sums(log_decay)
    difference = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    causal = jnp.broadcast_to(jnp.tri(sizes.chunk, dtype=bool), difference.shape)
    # Masked before exp: above the diagonal the exponents are positive and would overflow.
    decay_between = jnp.exp(jnp.where(causal, difference, -jnp.inf))
    beta = beta[..., None]
    gram = jnp.matmul(k, _t(k), precision=sizes.precision)
    a = jnp.tril(beta * decay_between * gram, -1)
    return Chunks(
        q=q,
        k=k,
        v=v,
        beta=beta,
        decay_in=jnp.exp(coarse + fine)[..., None],
        decay_out=_t(decay_between[..., -1:, :]),
        decay_across=jnp.exp(coarse + fine)[..., -1:, None],
        decay_between=decay_between,
        gram=gram,
        a=a,
        inverse=unit_lower_inverse(a, sizes.inverse_precision),
        scores=decay_between * jnp.matmul(q, _t(k), precision=sizes.precision),
    )


def chunked_forward(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T G V"],
    log_decay: Float[Array, "B T G"],
    beta: Float[Array, "B T G"],
    initial_state: Float[Array, "B G K V"],
    sizes: Sizes,
) -> tuple[Float[Array, "B T G V"], Float[Array, "B G K V"], Float[Array, "blocks N B H R K V"]]:
    """(o, final state, the states that enter the chunks), computed in the dtype of `initial_state`."""
    batch, _, key_dim, value_dim = initial_state.shape
    filled = tuple(_fill(x, sizes) for x in (q, k, v, log_decay, beta))

    def dot(a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, precision=sizes.precision)

    def advance(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        u, w, k_out, decay_across = inputs
        written = u - dot(w, state)
        # Eq. (8).
        return decay_across * state + dot(_t(k_out), written), (state, written)

    def block(state: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
        x = _prepare(tuple(_block(y, index, sizes) for y in filled), initial_state.dtype, sizes)
        # Eq. (6): what a chunk writes is u − w S.
        u = dot(x.inverse, x.beta * x.v)
        w = dot(x.inverse, x.beta * x.decay_in * x.k)
        state, (states, written) = jax.lax.scan(advance, state, (u, w, x.decay_out * x.k, x.decay_across))
        # Eq. (7).
        return state, (x.decay_in * dot(x.q, states) + dot(x.scores, written), states)

    first = initial_state.reshape(batch, q.shape[2], -1, key_dim, value_dim)
    final, (o, states) = jax.lax.scan(block, first, jnp.arange(filled[0].shape[1] // sizes.block))
    return _from_chunks(o, v.shape[1]), final.reshape(initial_state.shape), states


def chunked_backward(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T G V"],
    log_decay: Float[Array, "B T G"],
    beta: Float[Array, "B T G"],
    states: Float[Array, "blocks N B H R K V"],
    do: Float[Array, "B T G V"],
    dfinal_state: Float[Array, "B G K V"],
    sizes: Sizes,
) -> tuple[Array, ...]:
    """Cotangents of q, k, v, log_decay, beta and initial_state, in the dtype of `dfinal_state`."""
    dtype = dfinal_state.dtype
    filled = tuple(_fill(x, sizes) for x in (q, k, v, log_decay, beta, do))
    after = jnp.triu(jnp.ones((sizes.chunk, sizes.chunk), dtype))

    def dot(a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, precision=sizes.precision)

    def shared(x: Array) -> Array:
        # What the R value heads of a key head add up to.
        return jnp.sum(x, axis=3, keepdims=True)

    def retreat(dstate: Array, inputs: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        dwritten_inside, dstate_inside, w, k_out, decay_across = inputs
        dwritten = dwritten_inside + dot(k_out, dstate)
        # Eq. (11).
        return decay_across * dstate + dstate_inside - dot(_t(w), dwritten), (dstate, dwritten)

    def block(dstate: Array, inputs: tuple[Array, Array]) -> tuple[Array, tuple[Array, ...]]:
        index, states = inputs
        states = states.astype(dtype)
        *operands, do = (_block(y, index, sizes) for y in filled)
        x = _prepare(tuple(operands), dtype, sizes)
        do = _to_chunks(do, sizes, q.shape[2]).astype(dtype)
        missing = x.v - x.decay_in * dot(x.k, states)
        written = dot(x.inverse, x.beta * missing)
        w = dot(x.inverse, x.beta * x.decay_in * x.k)
        dwritten_inside = dot(_t(x.scores), do)
        dstate_inside = dot(_t(x.q), x.decay_in * do)
        inputs_by_chunk = (dwritten_inside, dstate_inside, w, x.decay_out * x.k, x.decay_across)
        dstate, (dstates, dwritten) = jax.lax.scan(retreat, dstate, inputs_by_chunk, reverse=True)

        # Eq. (12) and (13).
        drhs = dot(_t(x.inverse), dwritten)
        da = -jnp.tril(dot(drhs, _t(written)), -1)
        dscores = dot(do, _t(written))
        # Eq. (14): by way of the raw products q kᵀ and k kᵀ, and of the states.
        dqk = shared(x.decay_between * dscores)
        da_decayed = x.decay_between * da
        dgram = shared(x.beta * da_decayed)
        dq_in = x.decay_in * dot(do, _t(states))
        dk_in = -x.beta * x.decay_in * dot(drhs, _t(states))
        dk_out = x.decay_out * dot(written, _t(dstates))
        dq = dot(dqk, x.k) + shared(dq_in)
        dk = dot(_t(dqk), x.q) + dot(dgram + _t(dgram), x.k) + shared(dk_in + dk_out)

        # Eq. (15): log α_j takes the share of every pair that it lies between. Summed as it stands: the usual
        # row sums less column sums cancel, and A_log and dt_bias, sums over all of T, pile up what is left.
        share = jnp.matmul(after, da * x.a + dscores * x.scores, precision=jax.lax.Precision.HIGHEST)
        in_share = jnp.sum(dq_in * x.q + dk_in * x.k, axis=-1)
        out_share = jnp.sum(dk_out * x.k, axis=-1)
        dlog_decay = (
            jnp.sum(jnp.tril(share, -1), axis=-1)
            + jnp.cumsum(in_share[..., ::-1], axis=-1)[..., ::-1]
            + (jnp.cumsum(out_share, axis=-1) - out_share)
            + jnp.sum(x.decay_across * dstates * states, axis=(-1, -2))[..., None]
        )
        dbeta = jnp.sum(drhs * missing, axis=-1) + jnp.sum(da_decayed * x.gram, axis=-1)
        return dstate, (dq, dk, x.beta * drhs, dlog_decay, dbeta)

    last = dfinal_state.reshape(states.shape[2:])
    indices = jnp.arange(states.shape[0])
    dfirst, gradients = jax.lax.scan(block, last, (indices, states), reverse=True)
    return (*(_from_chunks(x, v.shape[1]) for x in gradients), dfirst.reshape(dfinal_state.shape))
