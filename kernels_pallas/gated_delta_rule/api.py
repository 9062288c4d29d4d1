"""The public ops: check shapes, choose the implementation, attach gradients. README.md holds the derivation.

arXiv:2412.06464 eq. (10), with packed documents, grouped value heads and optional gates and L2 norm inside.
"""

import functools
import logging
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.gated_delta_rule import tiling
from kernels_pallas.gated_delta_rule.checks import (
    check_head_vectors,
    check_scalars,
    check_sequence,
    check_step,
)
from kernels_pallas.gated_delta_rule.chunked import FORGET, Sizes, chunked_backward, chunked_forward
from kernels_pallas.gated_delta_rule.reference import delta_step, reference, segment_masks
from kernels_pallas.gated_delta_rule.sequence import last_id_before, split_run

_LOG = logging.getLogger("kernels_pallas")


class _Options(NamedTuple):
    """What is fixed when the op is traced."""

    from_gates: bool
    beta_max: float
    qk_norm_eps: float | None
    inverse_precision: Any


class _Operands(NamedTuple):
    """What the op differentiates. `decay` and `write` are log α and β, or the raw a and b of the gates."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T G V"]
    decay: Float[Array, "B T G"]
    write: Float[Array, "B T G"]
    a_log: Float[Array, " G"] | None
    dt_bias: Float[Array, " G"] | None
    scale: Float[Array, ""]
    initial_state: Float[Array, "B G K V"] | None


class _Core(NamedTuple):
    """What every implementation takes: q and k normalised, q scaled, gates as log α and β, a state."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T G V"]
    log_decay: Float[Array, "B T G"]
    beta: Float[Array, "B T G"]
    initial_state: Float[Array, "B G K V"]


def _compute_dtype(*arrays: Array) -> Any:
    return jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32


def _select(keep: Array | None, x: Array, otherwise: float = 0.0) -> Array:
    """x where `keep` (B T), else `otherwise`; before anything is computed, so that a NaN has no gradient."""
    if keep is None:
        return x
    return jnp.where(jnp.expand_dims(keep, range(2, x.ndim)), x, jnp.asarray(otherwise, x.dtype))


def _l2_normalise(x: Array, eps: float | None) -> Array:
    if eps is None:
        return x
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + eps)


def _core(options: _Options, operands: _Operands, valid: Array | None, reset: Array | None) -> _Core:
    """Norm, gates, scale and documents, differentiated by JAX: the implementations know nothing of them.

    Padding becomes a token with β = 0 and log α = 0, a new document one with log α = `FORGET`.
    """
    x = operands
    dtype = _compute_dtype(x.q, x.k, x.v)
    q, k, decay, write = (_select(valid, y).astype(dtype) for y in (x.q, x.k, x.decay, x.write))
    if options.from_gates:
        assert x.a_log is not None
        assert x.dt_bias is not None
        rate, bias = (y.astype(dtype)[None, None, :] for y in (x.a_log, x.dt_bias))
        log_decay = -jnp.exp(rate) * jax.nn.softplus(decay + bias)
        beta = options.beta_max * jax.nn.sigmoid(write)
    else:
        log_decay, beta = decay, write
    log_decay, beta = _select(valid, log_decay), _select(valid, beta)
    if reset is not None:
        log_decay = _select(~reset, log_decay, FORGET)
    batch, _, value_heads, value_dim = x.v.shape
    state_shape = (batch, value_heads, x.k.shape[-1], value_dim)
    state = jnp.zeros(state_shape, dtype) if x.initial_state is None else x.initial_state.astype(dtype)
    core = _Core(
        q=_l2_normalise(q, options.qk_norm_eps) * x.scale.astype(dtype),
        k=_l2_normalise(k, options.qk_norm_eps),
        v=_select(valid, x.v),
        log_decay=log_decay,
        beta=beta,
        initial_state=state,
    )
    # Inside shard_map each array gets the varying axes of all: a scan's carry must have them from the start.
    zero = functools.reduce(jnp.add, (jnp.zeros_like(y, dtype=dtype, shape=()) for y in core))
    return jax.tree.map(lambda y: y + zero.astype(y.dtype), core)


def _sizes(options: _Options, core: _Core) -> Sizes:
    low_precision = core.v.dtype == jnp.bfloat16
    # HIGH is TF32 on a GPU and three bf16 passes on a TPU: one pass loses the gate gradients, which cancel.
    precision = jax.lax.Precision.HIGH if low_precision else jax.lax.Precision.HIGHEST
    chosen = options.inverse_precision
    batch, length, value_heads, value_dim = core.v.shape
    # Only speed hangs on the platform: what is compiled for another one than the default is as correct.
    chunk, block = tiling.chunk_and_block(
        batch, length, value_heads, max(core.k.shape[-1], value_dim), jax.default_backend()
    )
    return Sizes(chunk, block, precision, jax.lax.Precision.HIGHEST if chosen is None else chosen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    options: _Options, operands: _Operands, valid: Array | None, reset: Array | None
) -> tuple[Array, Array]:
    return _chunked_fwd(options, operands, valid, reset)[0]


def _chunked_fwd(options: _Options, operands: _Operands, valid: Array | None, reset: Array | None):
    core = _core(options, operands, valid, reset)
    o, final_state, states = chunked_forward(*core, _sizes(options, core))
    if core.v.dtype == jnp.bfloat16:
        states = states.astype(jnp.bfloat16)
    return (o.astype(core.v.dtype), final_state), (operands, valid, reset, states)


def _chunked_bwd(options: _Options, residuals: Any, cotangents: tuple[Array, Array]):
    operands, valid, reset, states = residuals
    # Recomputed rather than saved: only the operands as they came and the chunk states live in between.
    core, core_vjp = jax.vjp(lambda x: _core(options, x, valid, reset), operands)
    do, dfinal_state = cotangents
    gradients = chunked_backward(*core[:-1], states, do, dfinal_state, _sizes(options, core))
    matched = jax.tree.map(lambda g, y: g.astype(y.dtype), _Core(*gradients), core)
    return (*core_vjp(matched), None, None)


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _reference(
    options: _Options, operands: _Operands, valid: Array | None, reset: Array | None
) -> tuple[Array, Array]:
    # Without `reset`: the definition forgets by selection, not through a decay of zero.
    core = _core(options, operands, valid, None)
    o, final_state = reference(*core, valid, reset)
    return o.astype(core.v.dtype), final_state


_IMPLEMENTATIONS = {"chunked": _chunked, "reference": _reference}
_LATER = ("mosaic_gpu", "mosaic_tpu")


@functools.cache
def _log_choice(chosen: str, why: str) -> None:
    _LOG.info("gated_delta_rule: implementation=None takes %r: %s", chosen, why)


def _choose(implementation: str | None) -> str:
    if implementation is None:
        _log_choice("chunked", "the fastest form that runs on every platform")
        return "chunked"
    if implementation in _LATER:
        raise NotImplementedError(
            f"implementation={implementation!r} is not built yet. Use None, 'chunked' or 'reference'."
        )
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {sorted(_IMPLEMENTATIONS)}; got {implementation!r}. "
            "Use None for the best one that can."
        )
    return implementation


def _run(
    options: _Options,
    operands: _Operands,
    segment_ids: Array | None,
    return_final_state: bool,
    sequence_axis: str | None,
    implementation: str | None,
) -> tuple[Array, Array | None]:
    run = functools.partial(_IMPLEMENTATIONS[_choose(implementation)], options)
    before = None
    if sequence_axis is not None:
        run = split_run(run, sequence_axis, return_final_state)
        before = None if segment_ids is None else last_id_before(segment_ids, sequence_axis)
    masks = (None, None) if segment_ids is None else segment_masks(segment_ids, before)
    o, final_state = run(operands, *masks)
    return o, final_state if return_final_state else None


def _scale(scale: float | Array | None, key_dim: int, dtype: Any) -> Array:
    return jnp.asarray(1 / math.sqrt(key_dim) if scale is None else scale, dtype)


def gated_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T G V"],
    log_decay: Float[Array, "B T G"],
    beta: Float[Array, "B T G"],
    *,
    initial_state: Float[Array, "B G K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    qk_norm_eps: float | None = None,
    return_final_state: bool = False,
    sequence_axis: str | None = None,
    inverse_precision: jax.lax.PrecisionLike = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T G V"], Float[Array, "B G K V"] | None]:
    """The gated delta rule, S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ, o_t = scale · S_tᵀ q_t.

    Composes with jit, grad, vmap, jax.checkpoint and shard_map: over batch and heads as it is, over time by
    `sequence_axis`. Computes in float32 (float64 if q, k or v is); the gradient saves its inputs and one state
    per chunk (bfloat16 where v is) and recomputes the rest.

    Args:
        q: queries. G must be a multiple of H; key head h serves the value heads h·G/H … (h+1)·G/H − 1.
        k: keys, of length ≤ 1 (see `qk_norm_eps`) for a stable rule.
        v: values.
        log_decay: log α ≤ 0; −inf forgets all.
        beta: β, from 0 (writes nothing) to 2; above 1 the transition has negative eigenvalues.
        initial_state: the state before the first token; None is zero.
        segment_ids: packed documents, int32: a change resets the state; 0 is padding, which leaves o = 0 and
            the state as it is, and whose values (NaN too) are ignored. The initial state enters the first
            segment.
        scale: of the output; None is K^−½. A float or a (traced) scalar.
        qk_norm_eps: if set, q and k are L2-normalised inside: x / sqrt(Σ x² + eps).
        return_final_state: also return the state after the last valid token.
        sequence_axis: a mesh axis that is manual in the `shard_map` around: each device holds an equal part of T,
            in the order of the axis. `initial_state` and the final state are then the same on every device.
        inverse_precision: matmul precision of the triangular inverse; None is full float32.
        implementation: "chunked", "reference", or None for the best that can.

    Returns:
        o in the dtype of v, and the final state in float32 (float64), or None.

    Raises:
        ValueError: shapes or dtypes that do not fit, a value out of range, an unknown implementation.
        NotImplementedError: an implementation or option that is not built yet.
    """
    check_sequence(q, k, v, log_decay, beta, "log_decay", "beta", initial_state, segment_ids)
    check_scalars(scale, qk_norm_eps)
    dtype = _compute_dtype(q, k, v)
    operands = _Operands(
        q, k, v, log_decay, beta, None, None, _scale(scale, q.shape[-1], dtype), initial_state
    )
    options = _Options(False, 1.0, qk_norm_eps, inverse_precision)
    return _run(options, operands, segment_ids, return_final_state, sequence_axis, implementation)


def gated_delta_rule_from_gates(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T G V"],
    a: Float[Array, "B T G"],
    b: Float[Array, "B T G"],
    A_log: Float[Array, " G"],
    dt_bias: Float[Array, " G"],
    *,
    beta_max: float = 1.0,
    initial_state: Float[Array, "B G K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    qk_norm_eps: float | None = None,
    return_final_state: bool = False,
    sequence_axis: str | None = None,
    inverse_precision: jax.lax.PrecisionLike = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T G V"], Float[Array, "B G K V"] | None]:
    """The gated delta rule with its gates inside, in float32 whatever the dtype of a and b.

    log_decay = −exp(A_log) · softplus(a + dt_bias) and β = beta_max · sigmoid(b), as arXiv:2412.06464 takes
    them from Mamba 2 (arXiv:2405.21060). Everything else is as in `gated_delta_rule`.

    Args:
        q: queries.
        k: keys.
        v: values.
        a: raw step size of the decay.
        b: raw write strength.
        A_log: log of the decay rate of each value head.
        dt_bias: added to a.
        beta_max: the largest β, in (0, 2].
        initial_state: as in `gated_delta_rule`, like all that follow.
        segment_ids: packed documents.
        scale: of the output.
        qk_norm_eps: L2 norm inside.
        return_final_state: also return the final state.
        sequence_axis: mesh axis that T is split over.
        inverse_precision: matmul precision of the triangular inverse.
        implementation: "chunked", "reference" or None.

    Returns:
        o and the final state or None, as in `gated_delta_rule`.

    Raises:
        ValueError: shapes or dtypes that do not fit, a value out of range, an unknown implementation.
        NotImplementedError: an implementation or option that is not built yet.
    """
    check_sequence(q, k, v, a, b, "a", "b", initial_state, segment_ids)
    check_head_vectors(v, A_log=A_log, dt_bias=dt_bias)
    check_scalars(scale, qk_norm_eps, beta_max)
    dtype = _compute_dtype(q, k, v)
    operands = _Operands(q, k, v, a, b, A_log, dt_bias, _scale(scale, q.shape[-1], dtype), initial_state)
    options = _Options(True, float(beta_max), qk_norm_eps, inverse_precision)
    return _run(options, operands, segment_ids, return_final_state, sequence_axis, implementation)


def gated_delta_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B G V"],
    log_decay: Float[Array, "B G"],
    beta: Float[Array, "B G"],
    state: Float[Array, "B G K V"],
    *,
    scale: float | Float[Array, ""] | None = None,
    qk_norm_eps: float | None = None,
    active: Bool[Array, " B"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B G V"], Float[Array, "B G K V"]]:
    """One token of the gated delta rule, for decoding: equals `gated_delta_rule` with T = 1.

    Args:
        q: queries.
        k: keys.
        v: values.
        log_decay: log α ≤ 0.
        beta: β, from 0 to 2.
        state: the state before the token. A row that begins a new document must come as zeros.
        scale: of the output; None is K^−½.
        qk_norm_eps: if set, q and k are L2-normalised inside.
        active: False leaves a row's state as it is, with o = 0, whatever its other inputs hold.
        implementation: "chunked", "reference" or None; one token is computed the same way by all.

    Returns:
        o in the dtype of v, and the state after the token in float32 (float64).

    Raises:
        ValueError: shapes or dtypes that do not fit, a value out of range, an unknown implementation.
        NotImplementedError: an implementation that is not built yet.
    """
    check_step(q, k, v, log_decay, beta, state, active)
    check_scalars(scale, qk_norm_eps)
    _choose(implementation)
    dtype = _compute_dtype(q, k, v)
    step_q, step_k, step_v, step_decay, step_beta = (x[:, None] for x in (q, k, v, log_decay, beta))
    operands = _Operands(
        step_q, step_k, step_v, step_decay, step_beta, None, None, _scale(scale, q.shape[-1], dtype), state
    )
    valid = None if active is None else active[:, None]
    core = _core(_Options(False, 1.0, qk_norm_eps, None), operands, valid, None)
    q_BHK, k_BHK, v_BGV, log_decay_BG, beta_BG = (x[:, 0].astype(dtype) for x in core[:-1])
    o, stepped = delta_step(q_BHK, k_BHK, v_BGV, log_decay_BG, beta_BG, core.initial_state)
    if active is not None:
        # An inactive row already has β = 0 and α = 1; the output must not read its state.
        o = jnp.where(active[:, None, None], o, 0)
    return o.astype(v.dtype), stepped
