"""The public ops: check shapes, gather operands, run the best implementation. README.md holds the derivation.

arXiv:2412.06464 eq. (10), with packed documents, grouped value heads and optional gates and L2 norm inside.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.gated_delta_rule import mosaic_tpu_step
from kernels_pallas.gated_delta_rule.checks import (
    check_head_vectors,
    check_scalars,
    check_sequence,
    check_step,
)
from kernels_pallas.gated_delta_rule.choice import choose, run
from kernels_pallas.gated_delta_rule.implementations import Operands, Options, compute_dtype, core_of
from kernels_pallas.gated_delta_rule.reference import delta_step


def _scale(scale: float | Array | None, key_dim: int) -> tuple[float | None, Array | None]:
    """A scale as what is known now, for the options, or as an operand."""
    if isinstance(scale, Array):
        return None, scale
    return (1 / math.sqrt(key_dim) if scale is None else float(scale)), None


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
    per chunk (bfloat16 where v is, on Hopper GPUs in the dtype of v; named "gated_delta_rule_states" for checkpoint
    policies) and recomputes the rest.

    Args:
        q: queries. G must be a multiple of H; key head h serves the value heads h·G/H … (h+1)·G/H − 1.
        k: keys, of length ≤ 1 (see `qk_norm_eps`) for a stable rule.
        v: values.
        log_decay: log α ≤ 0; −inf forgets all.
        beta: β, from 0 (writes nothing) to 2; above 1 the transition has negative eigenvalues.
        initial_state: the state before the first token; None is zero.
        segment_ids: packed documents, int32: a change resets the state; 0 is padding, which leaves o = 0 and
            the state as it is, and whose values (NaN too) are ignored. The initial state enters the first
            segment. Other values must be finite: one that is not spreads through its chunk and past a reset, but in
            "reference".
        scale: of the output; None is K^−½. A float or a (traced) scalar.
        qk_norm_eps: if set, q and k are L2-normalised inside: x / sqrt(Σ x² + eps).
        return_final_state: also return the state after the last valid token.
        sequence_axis: a mesh axis that is manual in the `shard_map` around: each device holds an equal part of T,
            in the order of the axis. `initial_state` and the final state are then the same on every device.
        inverse_precision: matmul precision of the triangular inverse; None is full float32, but in the TPU kernels
            one bfloat16 pass for bfloat16 inputs. The GPU kernels have float16 passes and refuse any other.
        implementation: "chunked", "reference", "mosaic_tpu" (TPUs), "mosaic_gpu" (Hopper GPUs, bfloat16 or float16), or
            None for the best that can.

    Returns:
        o in the dtype of v, and the final state in float32 (float64), or None.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown implementation, operands split over a mesh axis of type
            Explicit; outside `jax.jit` and the like, where values are known, one out of range.
        NotImplementedError: an implementation or option that is not built yet.
    """
    check_sequence(q, k, v, log_decay, beta, "log_decay", "beta", initial_state, segment_ids)
    check_scalars(scale, qk_norm_eps)
    known_scale, scale = _scale(scale, q.shape[-1])
    operands = Operands(q, k, v, log_decay, beta, None, None, scale, initial_state)
    options = Options(False, 1.0, qk_norm_eps, inverse_precision, known_scale)
    return run(options, operands, segment_ids, return_final_state, sequence_axis, implementation)


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
        implementation: as in `gated_delta_rule`.

    Returns:
        o and the final state or None, as in `gated_delta_rule`.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown implementation, operands split over a mesh axis of type
            Explicit; outside `jax.jit` and the like, where values are known, one out of range.
        NotImplementedError: an implementation or option that is not built yet.
    """
    check_sequence(q, k, v, a, b, "a", "b", initial_state, segment_ids)
    check_head_vectors(v, A_log=A_log, dt_bias=dt_bias)
    check_scalars(scale, qk_norm_eps, beta_max)
    known_scale, scale = _scale(scale, q.shape[-1])
    operands = Operands(q, k, v, a, b, A_log, dt_bias, scale, initial_state)
    options = Options(True, float(beta_max), qk_norm_eps, inverse_precision, known_scale)
    return run(options, operands, segment_ids, return_final_state, sequence_axis, implementation)


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
        active: False leaves a row's state, if it is finite, as it is, with o = 0, whatever its other inputs hold.
        implementation: "mosaic_tpu", one kernel, which changes the state in place: donate it, or hand it on in a
            loop, lest it be copied first. All others compute one token the same way. None: the kernel on TPUs.

    Returns:
        o in the dtype of v, and the state after the token in float32 (float64).

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown implementation, operands split over a mesh axis of type
            Explicit; outside `jax.jit` and the like, where values are known, one out of range.
        NotImplementedError: an implementation that is not built yet.
    """
    check_step(q, k, v, log_decay, beta, state, active)
    check_scalars(scale, qk_norm_eps)
    dtype = compute_dtype(q, k, v)
    step_q, step_k, step_v, step_decay, step_beta = (x[:, None] for x in (q, k, v, log_decay, beta))
    known_scale, scale = _scale(scale, q.shape[-1])
    operands = Operands(step_q, step_k, step_v, step_decay, step_beta, None, None, scale, state)
    kernel = choose(implementation, operands) == "mosaic_tpu"
    if kernel and (why_not := mosaic_tpu_step.refusal(state)):
        if implementation is not None:
            raise NotImplementedError(f"implementation={implementation!r}: {why_not}. Use None or 'chunked'.")
        kernel = False
    valid = None if active is None else active[:, None]
    core = core_of(Options(False, 1.0, qk_norm_eps, None, known_scale), operands, valid, None)
    q_BHK, k_BHK, v_BGV, log_decay_BG, beta_BG = (x[:, 0].astype(dtype) for x in core[:-1])
    one_token = mosaic_tpu_step.step if kernel else delta_step
    o, stepped = one_token(q_BHK, k_BHK, v_BGV, log_decay_BG, beta_BG, core.initial_state)
    if active is not None:
        # An inactive row already has β = 0 and α = 1; the output must not read its state.
        o = jnp.where(active[:, None, None], o, 0)
    return o.astype(v.dtype), stepped
