"""A sequence split over the devices of a manual mesh axis: a layer above every implementation.

README.md, "Sequence split", derives it; comments cite its equation numbers. The devices exchange states and one
segment id per row, nothing of the length of the sequence; gradients are JAX's own, through the exchange.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def _axis_size(axis: str) -> int:
    try:
        return jax.lax.axis_size(axis)
    except NameError:
        raise ValueError(
            f"sequence_axis must be a mesh axis that is manual where the op is called; got {axis!r}, which is "
            f"not. Call it inside jax.shard_map(…, axis_names={{…, {axis!r}}}), or use None and a whole sequence."
        ) from None


def _from_before(x: Array, axis: str, distance: int) -> Array:
    """x of the device `distance` places before this one along `axis`; zeros where there is none."""
    pairs = [(i, i + distance) for i in range(_axis_size(axis) - distance)]
    return jax.lax.ppermute(x, axis, pairs)


def _last_valid(segment_ids: Int[Array, "B T"]) -> Int[Array, " B"]:
    """The last id ≠ 0 of each row, 0 where there is none."""
    # Of a row without any, argmax takes the first of the reversed row: a 0.
    last = segment_ids.shape[1] - 1 - jnp.argmax(segment_ids[:, ::-1] != 0, axis=1)
    return jnp.take_along_axis(segment_ids, last[:, None], axis=1)[:, 0]


def last_id_before(segment_ids: Int[Array, "B T"], axis: str) -> Int[Array, " B"]:
    """The last valid segment id on all devices before this one, 0 where there is none."""
    _axis_size(axis)
    ids_BD = jax.lax.all_gather(_last_valid(segment_ids), axis, axis=1)
    earlier = jnp.arange(ids_BD.shape[1]) < jax.lax.axis_index(axis)
    return _last_valid(jnp.where(earlier[None, :], ids_BD, 0))


def _entering_state(
    local: Float[Array, "B G K V"], transition: Float[Array, "B G K K"], axis: str
) -> Float[Array, "B G K V"]:
    """The state that enters each device's part, but for what its own run began with: README eq. (18).

    Args:
        local: S_local, the state after the device's part if zeros enter it.
        transition: M, which takes what enters the part to its end.
        axis: the mesh axis.
    """
    devices, value_dim = _axis_size(axis), local.shape[-1]
    # First to the next device; then over 1, 2, 4, … until the span of each reaches back to device 0. A device with
    # nothing before it receives zeros, which map any state to none: so no end is special.
    spans = [2**i for i in range(max(devices - 2, 0).bit_length())]
    for step, distance in enumerate([1, *spans]):
        # After the last step nobody asks for M again.
        more = step < len(spans)
        received = _from_before(
            jnp.concatenate([local, transition], axis=-1) if more else local, axis, distance
        )
        if step > 0:
            received = jnp.matmul(transition, received, precision=jax.lax.Precision.HIGHEST)
            received = received.at[..., :value_dim].add(local)
        local, transition = received[..., :value_dim], received[..., value_dim:]
    return local


def split_run(
    run: Callable[..., tuple[Array, Array]], axis: str, return_final_state: bool
) -> Callable[..., tuple[Array, Array | None]]:
    """`run(operands, valid, reset)` over a sequence of which each device along `axis` holds a part.

    Args:
        run: an implementation: (operands, valid, reset) → (o, final state).
        axis: a manual mesh axis; device 0 holds the first tokens.
        return_final_state: whether the state after the last device's part is sent to all.
    """
    devices = _axis_size(axis)

    def split(operands: Any, valid: Array | None, reset: Array | None) -> tuple[Array, Array | None]:
        v, state = operands.v, operands.initial_state
        batch, _, value_heads, value_dim = v.shape
        key_dim = operands.k.shape[-1]
        first = jax.lax.axis_index(axis) == 0
        # Eq. (16): K more values, all zero, whose state begins as the identity.
        dtype = jnp.float32 if state is None else state.dtype
        identity = jnp.broadcast_to(jnp.eye(key_dim, dtype=dtype), (batch, value_heads, key_dim, key_dim))
        if state is None:
            start = jnp.zeros((batch, value_heads, key_dim, value_dim), dtype)
        else:
            start = jnp.where(first, state, 0)
        wide_o, wide_state = run(
            operands._replace(
                v=jnp.pad(v, ((0, 0),) * 3 + ((0, key_dim),)),
                initial_state=jnp.concatenate([start, identity], axis=-1),
            ),
            valid,
            reset,
        )
        local, transition = wide_state[..., :value_dim], wide_state[..., value_dim:]
        entering = _entering_state(local, transition, axis)
        # Eq. (17). HIGH, as inside the implementations: one bf16 pass of a TPU would be coarser than o.
        precision = jax.lax.Precision.HIGH if v.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
        readers = wide_o[..., value_dim:].astype(entering.dtype)
        o = wide_o[..., :value_dim].astype(entering.dtype) + jnp.einsum(
            "btgk,bgkv->btgv", readers, entering, precision=precision
        )
        if not return_final_state:
            return o.astype(v.dtype), None
        leaving = local + jnp.matmul(transition, entering, precision=jax.lax.Precision.HIGHEST)
        last = jax.lax.axis_index(axis) == devices - 1
        # A sum of one state and zeros, so that shard_map knows it to be the same on every device.
        return o.astype(v.dtype), jax.lax.psum(jnp.where(last, leaving, 0), axis)

    return split
