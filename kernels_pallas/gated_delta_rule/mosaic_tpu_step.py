"""One token on a TPU: a kernel that reads a state once and writes it once, which is all that a step has to move.

XLA passes over the state twice before it writes (README, "One step on a TPU"): what a state recalls has to be known
before it changes. Here a state waits in VMEM in between. All is float32, README eq. (1) and (2), on the vector units: a
product with one row would leave the MXU idle.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels_pallas.gated_delta_rule import tiling
from kernels_pallas.gated_delta_rule.batching import folding_vmap
from kernels_pallas.gated_delta_rule.reference import delta_step


def refusal(state: Array) -> str | None:
    """Why the kernel cannot take these states, or None."""
    size, most = 4 * state.shape[2] * state.shape[3], tiling.TPU_VMEM_BYTES // 8
    return f"a head's state must be at most {most} bytes; got {size}" if size > most else None


def _heads(value_heads: int, share: int, state_bytes: int) -> int:
    """Value heads of a program: whole key heads or a part of one; as many as the VMEM takes."""
    return max(
        heads
        for heads in range(1, value_heads + 1)
        if value_heads % heads == 0
        and (heads % share == 0 or share % heads == 0)
        and (heads == 1 or heads * state_bytes <= tiling.TPU_STEP_BYTES)
    )


def _kernel(
    share: int, q_ref: Any, k_ref: Any, v_ref: Any, gates_ref: Any, state_ref: Any, o_ref: Any, next_ref: Any
) -> None:
    """q, k (·, K), v, o (heads, V), gates (heads, 2) as α and β, states (heads, K, V), behind axes of one."""
    q_columns, k_columns = jnp.transpose(q_ref[0, 0]), jnp.transpose(k_ref[0, 0])
    v, gates = v_ref[0, 0], gates_ref[0, 0]
    for h in range(v.shape[0]):
        key_head = h // share
        q, k = (x[:, key_head : key_head + 1] for x in (q_columns, k_columns))
        state = gates[h : h + 1, :1] * state_ref[0, h]
        recalled = jnp.sum(k * state, axis=0, keepdims=True)
        state = state + k * (gates[h : h + 1, 1:] * (v[h : h + 1] - recalled))
        next_ref[0, h] = state
        o_ref[0, 0, h : h + 1] = jnp.sum(q * state, axis=0, keepdims=True)


def _launch(q: Array, k: Array, v: Array, gates: Array, state: Array) -> list[Array]:
    batch, value_heads, key_dim, value_dim = state.shape
    share = value_heads // q.shape[1]
    heads = _heads(value_heads, share, 4 * key_dim * value_dim)
    keys, groups = max(1, heads // share), value_heads // heads
    # Groups on an axis of their own: a block must be whole along its last two axes.
    q, k = (x.reshape(batch, -1, keys, key_dim) for x in (q, k))
    v, gates = v.reshape(batch, groups, heads, value_dim), gates.reshape(batch, groups, heads, 2)
    key = pl.BlockSpec((1, 1, keys, key_dim), lambda b, g: (b, g * heads // share // keys, 0, 0))
    gate = pl.BlockSpec((1, 1, heads, 2), lambda b, g: (b, g, 0, 0))
    value = pl.BlockSpec((1, 1, heads, value_dim), lambda b, g: (b, g, 0, 0))
    states = pl.BlockSpec((1, heads, key_dim, value_dim), lambda b, g: (b, g, 0, 0))
    varying = jax.typeof(state).manual_axis_type
    o, stepped = pl.pallas_call(
        functools.partial(_kernel, share),
        grid=(batch, groups),
        in_specs=[key, key, value, gate, states],
        out_specs=[value, states],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x in (v, state)],
        # The state changes in place: a loop that decodes copies none.
        input_output_aliases={4: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 2, vmem_limit_bytes=tiling.TPU_VMEM_BYTES
        ),
        name="gated_delta_step",
    )(q, k, v, gates, state)
    return [o.reshape(batch, value_heads, value_dim), stepped]


@jax.custom_vjp
def step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B G V"],
    log_decay: Float[Array, "B G"],
    beta: Float[Array, "B G"],
    state: Float[Array, "B G K V"],
) -> tuple[Float[Array, "B G V"], Float[Array, "B G K V"]]:
    """`reference.delta_step` of float32 operands; its gradient is that one's."""
    gates = jnp.stack([jnp.exp(log_decay), beta], axis=-1)
    o, stepped = folding_vmap(_launch, [0, 0])(q, k, v, gates, state)
    return o, stepped


def _step_fwd(*operands: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    return step(*operands), operands


def _step_bwd(operands: tuple[Array, ...], cotangents: tuple[Array, Array]) -> tuple[Array, ...]:
    return jax.vjp(delta_step, *operands)[1](cotangents)


step.defvjp(_step_fwd, _step_bwd)
