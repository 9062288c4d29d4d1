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
    # A of eq. (5), T = (I + A)⁻¹, and P = E ⊙ q kᵀ.
    a: Float[Array, "N B H R C C"]
    inverse: Float[Array, "N B H R C C"]
    scores: Float[Array, "N B H R C C"]


def _to_chunks(x: Array, chunk: int, key_heads: int) -> Array:
    """(B, T, heads, ·) → (N, B, H, R, C, ·), the last chunk filled with zeros: β = 0 and log α = 0 do nothing."""
    batch, length, heads, *rest = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(batch, -1, chunk, key_heads, heads // key_heads, *rest)
    return jnp.moveaxis(x, (1, 2), (0, 4))


def _from_chunks(x: Array, length: int) -> Array:
    """(N, B, H, R, C, ·) → (B, T, heads, ·): the inverse of `_to_chunks`."""
    x = jnp.moveaxis(x, (0, 4), (1, 2))
    batch, chunks, chunk, key_heads, groups = x.shape[:5]
    return x.reshape(batch, chunks * chunk, key_heads * groups, *x.shape[5:])[:, :length]


def _t(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _log_decay_sums(log_decay: Float[Array, "*n C"]) -> tuple[Array, Array]:
    """γ as (coarse, fine), whose differences stay exact after a large decay: README, "Sums of log decays"."""
    log_decay = jnp.maximum(log_decay, FORGET)
    coarse = jnp.round(log_decay / _GRID) * _GRID
    return jnp.cumsum(coarse, axis=-1), jnp.cumsum(log_decay - coarse, axis=-1)


def _prepare(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    beta: Array,
    chunk: int,
    dtype,
    precision,
    inverse_precision,
) -> Chunks:
    key_heads = q.shape[2]
    q_NBHRCK, k_NBHRCK, v_NBHRCV, log_decay_NBHRC, beta_NBHRC = (
        _to_chunks(x, chunk, key_heads).astype(dtype) for x in (q, k, v, log_decay, beta)
    )
    coarse, fine = _log_decay_sums(log_decay_NBHRC)
    difference = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    causal = jnp.tri(chunk, dtype=bool)
    # Masked before exp: above the diagonal the exponents are positive and would overflow.
    causal = jnp.broadcast_to(causal, difference.shape)
    decay_between = jnp.exp(jnp.where(causal, difference, -jnp.inf))
    beta_NBHRC1 = beta_NBHRC[..., None]
    gram = jnp.matmul(k_NBHRCK, _t(k_NBHRCK), precision=precision)
    a = jnp.tril(beta_NBHRC1 * decay_between * gram, -1)
    return Chunks(
        q=q_NBHRCK,
        k=k_NBHRCK,
        v=v_NBHRCV,
        beta=beta_NBHRC1,
        decay_in=jnp.exp(coarse + fine)[..., None],
        decay_out=_t(decay_between[..., -1:, :]),
        decay_across=jnp.exp(coarse + fine)[..., -1:, None],
        decay_between=decay_between,
        a=a,
        inverse=unit_lower_inverse(a, inverse_precision),
        scores=decay_between * jnp.matmul(q_NBHRCK, _t(k_NBHRCK), precision=precision),
    )


def chunked_forward(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T G V"],
    log_decay: Float[Array, "B T G"],
    beta: Float[Array, "B T G"],
    initial_state: Float[Array, "B G K V"],
    *,
    chunk: int,
    precision: jax.lax.PrecisionLike,
    inverse_precision: jax.lax.PrecisionLike,
) -> tuple[Float[Array, "B T G V"], Float[Array, "B G K V"], Float[Array, "N B H R K V"]]:
    """(o, final state, the states that enter the chunks), computed in the dtype of `initial_state`."""
    dtype = initial_state.dtype
    x = _prepare(q, k, v, log_decay, beta, chunk, dtype, precision, inverse_precision)
    batch, value_heads, key_dim, value_dim = initial_state.shape
    # Eq. (6): what a chunk writes is u − w S.
    u = jnp.matmul(x.inverse, x.beta * x.v, precision=precision)
    w = jnp.matmul(x.inverse, x.beta * x.decay_in * x.k, precision=precision)
    k_out = x.decay_out * x.k

    def advance(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        u_n, w_n, k_out_n, decay_n = inputs
        written = u_n - jnp.matmul(w_n, state, precision=precision)
        # Eq. (9).
        following = decay_n * state + jnp.matmul(_t(k_out_n), written, precision=precision)
        return following, (state, written)

    first = initial_state.reshape(batch, q.shape[2], -1, key_dim, value_dim)
    final, (states, written) = jax.lax.scan(advance, first, (u, w, k_out, x.decay_across))
    # Eq. (7).
    o = x.decay_in * jnp.matmul(x.q, states, precision=precision)
    o = o + jnp.matmul(x.scores, written, precision=precision)
    return _from_chunks(o, v.shape[1]), final.reshape(initial_state.shape), states


def chunked_backward(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T G V"],
    log_decay: Float[Array, "B T G"],
    beta: Float[Array, "B T G"],
    states: Float[Array, "N B H R K V"],
    do: Float[Array, "B T G V"],
    dfinal_state: Float[Array, "B G K V"],
    *,
    chunk: int,
    precision: jax.lax.PrecisionLike,
    inverse_precision: jax.lax.PrecisionLike,
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Cotangents of q, k, v, log_decay, beta and initial_state, in the dtype of `dfinal_state`."""
    dtype = dfinal_state.dtype
    length, key_heads = q.shape[1], q.shape[2]
    x = _prepare(q, k, v, log_decay, beta, chunk, dtype, precision, inverse_precision)
    states = states.astype(dtype)
    do = _to_chunks(do.astype(dtype), chunk, key_heads)

    def dot(a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, precision=precision)

    missing = x.v - x.decay_in * dot(x.k, states)
    written = dot(x.inverse, x.beta * missing)
    w = dot(x.inverse, x.beta * x.decay_in * x.k)
    k_out = x.decay_out * x.k
    dwritten_inside = dot(_t(x.scores), do)
    dstate_inside = dot(_t(x.q), x.decay_in * do)

    def retreat(dstate: Array, inputs: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        dwritten_n, dstate_n, w_n, k_out_n, decay_n = inputs
        dwritten = dwritten_n + dot(k_out_n, dstate)
        preceding = decay_n * dstate + dstate_n - dot(_t(w_n), dwritten)
        return preceding, (dstate, dwritten)

    last = dfinal_state.reshape(states.shape[1:])
    dfirst, (dstates, dwritten) = jax.lax.scan(
        retreat, last, (dwritten_inside, dstate_inside, w, k_out, x.decay_across), reverse=True
    )
    drhs = dot(_t(x.inverse), dwritten)
    da = -jnp.tril(dot(drhs, _t(written)), -1)
    dscores = dot(do, _t(written))
    # d of the raw products q kᵀ and k kᵀ, which the R value heads share.
    dqk = jnp.sum(x.decay_between * dscores, axis=3, keepdims=True)
    dgram = jnp.sum(x.beta * x.decay_between * da, axis=3, keepdims=True)
    do_state = x.decay_in * dot(do, _t(states))
    dk_in = -x.beta * x.decay_in * dot(drhs, _t(states))
    dk_out = x.decay_out * dot(written, _t(dstates))
    dq = dot(dqk, x.k) + jnp.sum(do_state, axis=3, keepdims=True)
    dk = dot(_t(dqk), x.q) + dot(dgram + _t(dgram), x.k) + jnp.sum(dk_in + dk_out, axis=3, keepdims=True)

    # Gates, eq. (15): log α_j takes the share of every pair that it lies between. Summed as it stands: the usual
    # row sums less column sums cancel, and A_log and dt_bias, sums over all of T, pile up what is left.
    after = jnp.triu(jnp.ones((chunk, chunk), dtype))
    share = jnp.matmul(after, da * x.a + dscores * x.scores, precision=jax.lax.Precision.HIGHEST)
    in_share = jnp.sum(do_state * x.q + dk_in * x.k, axis=-1)
    out_share = jnp.sum(dk_out * x.k, axis=-1)
    dlog_decay = (
        jnp.sum(jnp.tril(share, -1), axis=-1)
        + jnp.cumsum(in_share[..., ::-1], axis=-1)[..., ::-1]
        + (jnp.cumsum(out_share, axis=-1) - out_share)
        + jnp.sum(x.decay_across * dstates * states, axis=(-1, -2))[..., None]
    )
    gram = dot(x.k, _t(x.k))
    dbeta = jnp.sum(drhs * missing, axis=-1) + jnp.sum(da * x.decay_between * gram, axis=-1)
    batch, _, value_heads, _ = v.shape
    return (
        _from_chunks(dq, length),
        _from_chunks(dk, length),
        _from_chunks(x.beta * drhs, length),
        _from_chunks(dlog_decay, length),
        _from_chunks(dbeta, length),
        dfirst.reshape(dfinal_state.shape),
    )
