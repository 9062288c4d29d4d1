"""What the public ops run: norm, gates and documents around an implementation, its gradient, and the choice of one.

Every implementation is a function (options, operands, valid, reset) → (o, final state) with gradients of its own.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jaxtyping import Array, Float

from kernels_pallas.gated_delta_rule import mosaic_gpu, mosaic_gpu_layout, mosaic_tpu, tiling
from kernels_pallas.gated_delta_rule.chunked import FORGET, Sizes, chunked_backward, chunked_forward
from kernels_pallas.gated_delta_rule.reference import reference

# What the backward pass saves beside its inputs, for `jax.checkpoint_policies.save_only_these_names`.
STATES = "gated_delta_rule_states"


class Options(NamedTuple):
    """What is fixed when the op is traced."""

    from_gates: bool
    beta_max: float
    qk_norm_eps: float | None
    inverse_precision: Any
    # Of the output, unless it is among the operands.
    scale: float | None


class Operands(NamedTuple):
    """What the op differentiates. `decay` and `write` are log α and β, or the raw a and b of the gates."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T G V"]
    decay: Float[Array, "B T G"]
    write: Float[Array, "B T G"]
    a_log: Float[Array, " G"] | None
    dt_bias: Float[Array, " G"] | None
    scale: Float[Array, ""] | None
    initial_state: Float[Array, "B G K V"] | None


class _Core(NamedTuple):
    """What every implementation takes: q and k normalised, q scaled, gates as log α and β, a state."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T G V"]
    log_decay: Float[Array, "B T G"]
    beta: Float[Array, "B T G"]
    initial_state: Float[Array, "B G K V"]


def compute_dtype(*arrays: Array) -> Any:
    """float64 if any is, else float32."""
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


def _gate_values(
    options: Options, x: Operands, decay: Array, write: Array, valid: Array | None, reset: Array | None
) -> tuple[Array, Array]:
    """log α and β. Padding becomes a token with β = 0 and log α = 0, a new document one with log α = `FORGET`."""
    if options.from_gates:
        assert x.a_log is not None
        assert x.dt_bias is not None
        rate, bias = (y.astype(decay.dtype)[None, None, :] for y in (x.a_log, x.dt_bias))
        log_decay = -jnp.exp(rate) * jax.nn.softplus(decay + bias)
        beta = options.beta_max * jax.nn.sigmoid(write)
    else:
        log_decay, beta = decay, write
    log_decay, beta = _select(valid, log_decay), _select(valid, beta)
    if reset is not None:
        log_decay = _select(~reset, log_decay, FORGET)
    return log_decay, beta


def core_of(options: Options, operands: Operands, valid: Array | None, reset: Array | None) -> _Core:
    """Norm, gates, scale and documents, differentiated by JAX: the implementations know nothing of them."""
    x = operands
    dtype = compute_dtype(x.q, x.k, x.v)
    q, k, decay, write = (_select(valid, y).astype(dtype) for y in (x.q, x.k, x.decay, x.write))
    log_decay, beta = _gate_values(options, x, decay, write, valid, reset)
    batch, _, value_heads, value_dim = x.v.shape
    state_shape = (batch, value_heads, x.k.shape[-1], value_dim)
    state = jnp.zeros(state_shape, dtype) if x.initial_state is None else x.initial_state.astype(dtype)
    core = _Core(
        q=_l2_normalise(q, options.qk_norm_eps)
        * jnp.asarray(options.scale if x.scale is None else x.scale, dtype),
        k=_l2_normalise(k, options.qk_norm_eps),
        v=_select(valid, x.v),
        log_decay=log_decay,
        beta=beta,
        initial_state=state,
    )
    # Inside shard_map each array gets the varying axes of all: a scan's carry must have them from the start.
    zero = functools.reduce(jnp.add, (jnp.zeros_like(y, dtype=dtype, shape=()) for y in core))
    return jax.tree.map(lambda y: y + zero.astype(y.dtype), core)


def _sizes(options: Options, core: _Core) -> Sizes:
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
    options: Options, operands: Operands, valid: Array | None, reset: Array | None
) -> tuple[Array, Array]:
    return _chunked_fwd(options, operands, valid, reset)[0]


def _chunked_fwd(options: Options, operands: Operands, valid: Array | None, reset: Array | None):
    core = core_of(options, operands, valid, reset)
    o, final_state, states = chunked_forward(*core, _sizes(options, core))
    if core.v.dtype == jnp.bfloat16:
        states = states.astype(jnp.bfloat16)
    return (o.astype(core.v.dtype), final_state), (operands, valid, reset, checkpoint_name(states, STATES))


def _chunked_bwd(options: Options, residuals: Any, cotangents: tuple[Array, Array]):
    operands, valid, reset, states = residuals
    # Recomputed rather than saved: only the operands as they came and the chunk states live in between.
    core, core_vjp = jax.vjp(lambda x: core_of(options, x, valid, reset), operands)
    do, dfinal_state = cotangents
    gradients = chunked_backward(*core[:-1], states, do, dfinal_state, _sizes(options, core))
    matched = jax.tree.map(lambda g, y: g.astype(y.dtype), _Core(*gradients), core)
    return (*core_vjp(matched), None, None)


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


class _KernelCore(NamedTuple):
    """What the kernels take: q, k and v as they came, gates as float32 log α and β."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T G V"]
    log_decay: Float[Array, "B T G"]
    beta: Float[Array, "B T G"]
    initial_state: Float[Array, "B G K V"] | None


def _kernel_core(
    options: Options, x: Operands, valid: Array | None, reset: Array | None, *, prepare: bool = False
) -> _KernelCore:
    """With `prepare` norm and padding are done here: for kernels that do neither."""
    if prepare:
        q, k, v = (_select(valid, y) for y in (x.q, x.k, x.v))
        q, k = (_l2_normalise(y.astype(jnp.float32), options.qk_norm_eps).astype(y.dtype) for y in (q, k))
        x = x._replace(q=q, k=k, v=v)
    decay, write = (_select(valid, y).astype(jnp.float32) for y in (x.decay, x.write))
    log_decay, beta = _gate_values(options, x, decay, write, valid, reset)
    state = None if x.initial_state is None else x.initial_state.astype(jnp.float32)
    core = _KernelCore(x.q, x.k, x.v, log_decay, beta, state)
    # Inside shard_map every array must vary over the mesh axes that any of them varies over.
    varying = frozenset().union(*(jax.typeof(y).manual_axis_type.varying for y in jax.tree.leaves(core)))

    def vary(y: Array) -> Array:
        missing = tuple(varying - jax.typeof(y).manual_axis_type.varying)
        return jax.lax.pcast(y, missing, to="varying") if missing else y

    return jax.tree.map(vary, core)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tpu_kernels(
    options: Options, operands: Operands, valid: Array | None, reset: Array | None
) -> tuple[Array, Array]:
    core = _kernel_core(options, operands, valid, reset)
    plan = _tpu_plan(options, core, valid)
    o, final_state, _ = mosaic_tpu.forward(plan, *core[:-1], valid, core.initial_state, save_states=False)
    return o, final_state


def _tpu_plan(options: Options, core: _KernelCore, valid: Array | None) -> mosaic_tpu.Plan:
    assert options.scale is not None
    return mosaic_tpu.make_plan(
        core.q,
        core.v,
        scale=options.scale,
        qk_norm_eps=options.qk_norm_eps,
        inverse_precision=options.inverse_precision,
        padded=valid is not None,
    )


def _tpu_kernels_fwd(options: Options, operands: Operands, valid: Array | None, reset: Array | None):
    core = _kernel_core(options, operands, valid, reset)
    plan = _tpu_plan(options, core, valid)
    o, final_state, states = mosaic_tpu.forward(plan, *core[:-1], valid, core.initial_state, save_states=True)
    return (o, final_state), (operands, valid, reset, checkpoint_name(states, STATES))


def _tpu_kernels_bwd(options: Options, residuals: Any, cotangents: tuple[Array, Array]):
    operands, valid, reset, states = residuals
    core, core_vjp = jax.vjp(lambda x: _kernel_core(options, x, valid, reset), operands)
    do, dfinal_state = cotangents
    gradients = mosaic_tpu.backward(
        _tpu_plan(options, core, valid),
        *core[:-1],
        valid,
        states,
        do,
        dfinal_state,
        has_state=core.initial_state is not None,
    )
    return (*core_vjp(_KernelCore(*gradients)), None, None)


_tpu_kernels.defvjp(_tpu_kernels_fwd, _tpu_kernels_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gpu_kernels(
    options: Options, operands: Operands, valid: Array | None, reset: Array | None
) -> tuple[Array, Array]:
    return _gpu_run(options, operands, valid, reset, save_states=False)[0]


def _gpu_core(options: Options, operands: Operands, valid: Array | None, reset: Array | None) -> _KernelCore:
    """What the kernels take; norms that they do themselves are left to them."""
    inside = options.qk_norm_eps is not None and mosaic_gpu_layout.norms_inside(operands.q)
    if inside:
        options = options._replace(qk_norm_eps=None)
    return _kernel_core(options, operands, valid, reset, prepare=True)


def _gpu_run(
    options: Options, operands: Operands, valid: Array | None, reset: Array | None, *, save_states: bool
) -> tuple[tuple[Array, Array], Any]:
    assert options.scale is not None
    core = _gpu_core(options, operands, valid, reset)
    lengths = mosaic_gpu_layout.inverse_lengths(core.q, core.k, options.qk_norm_eps)
    plan = mosaic_gpu.make_plan(core.q, core.v, scale=options.scale, normed=lengths is not None)
    o, final_state, saved = mosaic_gpu.forward(
        plan, *core[:-1], core.initial_state, lengths, save_states=save_states
    )
    return (o, final_state), (saved, lengths)


def _gpu_kernels_fwd(options: Options, *arguments: Any):
    operands, valid, reset = custom_vjp_primal_tree_values(arguments)
    results, saved = _gpu_run(options, operands, valid, reset, save_states=True)
    saved = jax.tree.map(lambda x: checkpoint_name(x, STATES), saved)
    return results, (operands, valid, reset, saved)


def _gpu_kernels_bwd(options: Options, residuals: Any, cotangents: tuple[Any, Any]):
    operands, valid, reset, (saved, lengths) = residuals
    assert options.scale is not None
    core, core_vjp = jax.vjp(lambda x: _gpu_core(options, x, valid, reset), operands)
    plan = mosaic_gpu.make_plan(core.q, core.v, scale=options.scale, normed=lengths is not None)
    # Nobody asked for, or nobody differentiated, what has a symbolic zero.
    do, dfinal_state = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    do = jnp.zeros_like(core.v) if do is None else do
    gradients = mosaic_gpu.backward(plan, *core[:3], core.initial_state, lengths, saved, do, dfinal_state)
    return (*core_vjp(_KernelCore(*gradients)), None, None)


_gpu_kernels.defvjp(_gpu_kernels_fwd, _gpu_kernels_bwd, symbolic_zeros=True)


def _reference(
    options: Options, operands: Operands, valid: Array | None, reset: Array | None
) -> tuple[Array, Array]:
    # Without `reset`: the definition forgets by selection, not through a decay of zero.
    core = core_of(options, operands, valid, None)
    o, final_state = reference(*core, valid, reset)
    return o.astype(core.v.dtype), final_state


def _known_scale_and_few_columns(kernels: Any, most: int) -> Any:
    """An implementation of kernels whose scale is known when they are traced and that take V up to `most`."""

    def run(
        options: Options, operands: Operands, valid: Array | None, reset: Array | None
    ) -> tuple[Array, Array]:
        scale, state = operands.scale, operands.initial_state
        if scale is not None:
            o, final_state = run(options._replace(scale=1.0), operands._replace(scale=None), valid, reset)
            return (o * scale).astype(o.dtype), final_state
        parts = [
            kernels(
                options,
                operands._replace(
                    v=operands.v[..., start : start + most],
                    initial_state=None if state is None else state[..., start : start + most],
                ),
                valid,
                reset,
            )
            for start in range(0, operands.v.shape[-1], most)
        ]
        o, final_state = (jnp.concatenate(x, axis=-1) for x in zip(*parts, strict=True))
        return o, final_state

    return run


IMPLEMENTATIONS = {
    "chunked": _chunked,
    "reference": _reference,
    "mosaic_tpu": _known_scale_and_few_columns(_tpu_kernels, mosaic_tpu.MAX_DIM),
    "mosaic_gpu": _known_scale_and_few_columns(_gpu_kernels, mosaic_gpu.MAX_DIM),
}
