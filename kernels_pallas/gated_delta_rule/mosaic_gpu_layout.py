"""How the Hopper kernels want what they read: whole chunks, gates with time last, states transposed.

q, k, v, o and their gradients stay (B, T, heads, dim): the copy engine picks one head's tokens out of that. The
gates, small arrays, are laid out anew, (B, G, T).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.gated_delta_rule.mosaic_gpu_kernel import CHUNK, Plan

_LOG2_E = math.log2(math.e)
# 2 to it is 0 in float32, and sums of 64 of it are still exact to 1e-3: what forgets, forgets all.
_FORGET_LOG2 = -160.0
# β = 0 would lose what dβ is divided by. The root of this, times a cosine of keys, is still a normal float16
# number, and less than this writes nothing that bfloat16 could hold.
_LEAST_BETA = 2.0**-24


class Lengths(NamedTuple):
    """One over the lengths of q and k, which the kernels then divide by: (B, H, T) float32."""

    q: Array
    k: Array


def norms_inside(q: Array) -> bool:
    """Whether the kernels divide q and k by their lengths themselves.

    Not in float16: what eq. (27) has in place of V' is as large as keys are short, and would overflow.
    """
    return q.dtype == jnp.bfloat16


def inverse_lengths(
    q: Float[Array, "B T H K"], k: Float[Array, "B T H K"], eps: float | None
) -> Lengths | None:
    """What the kernels need for the norms of q and k; None where they do not do them."""
    if eps is None or not norms_inside(q):
        return None

    def one_over(x: Array) -> Array:
        squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)
        return jax.lax.rsqrt(squares + eps).transpose(0, 2, 1)

    return Lengths(one_over(q), one_over(k))


def whole(plan: Plan, x: Array, dim: int) -> Array:
    """(B, T, heads, ·) with zeros up to whole chunks and `dim`; nothing moves where nothing is missing."""
    return jnp.pad(x, ((0, 0), (0, plan.length - x.shape[1]), (0, 0), (0, dim - x.shape[3])))


def gates(plan: Plan, log_decay: Array, beta: Array, lengths: Lengths | None) -> tuple[Array, list[Array]]:
    """(B, T, G) each → log₂ α, and √β, both (B, G, T) float32.

    With `lengths` also √β over the length of k, and the scale over that of q, (B, G, T).
    """
    missing = plan.length - log_decay.shape[1]
    filling = ((0, 0), (0, missing), (0, 0))
    log2 = jnp.maximum(jnp.pad(log_decay, filling).astype(jnp.float32) * _LOG2_E, _FORGET_LOG2)
    root = jnp.sqrt(jnp.maximum(jnp.pad(beta, filling).astype(jnp.float32), _LEAST_BETA))
    log2, root = (x.transpose(0, 2, 1) for x in (log2, root))
    if lengths is None:
        return log2, [root]
    q, k = (
        jnp.repeat(jnp.pad(x, ((0, 0), (0, 0), (0, missing)), constant_values=1.0), plan.share, axis=1)
        for x in lengths
    )
    return log2, [root, root * k, plan.scale * q]


def skipped(plan: Plan, log2: Array, *, backward: bool) -> Array:
    """How many of the first chunks of each part leave nothing where it ends, (B, G, P) int32.

    Backward, of the last chunks: how many ask nothing of the state that enters the part. In between a state loses all:
    with keys of length 1 and β to 2 it grows by nothing, and 2 to `_FORGET_LOG2` of it is 0 in float32.
    """
    totals = jnp.sum(log2.reshape(*log2.shape[:2], plan.parts, 1, plan.part_chunks, CHUNK), axis=-1)
    between = jnp.tri(plan.part_chunks, k=-1, dtype=jnp.bool_)
    between = between if backward else between.T
    decays = jnp.sum(jnp.where(between[None, None, None], totals, 0.0), axis=-1)
    return jnp.sum((decays <= _FORGET_LOG2).astype(jnp.int32), axis=-1)


def turned(plan: Plan, state: Array) -> Array:
    """(B, G, K, V) → (B, G, V, K), with zeros up to the kernels' sizes."""
    padding = ((0, 0), (0, 0), (0, plan.key_dim - state.shape[2]), (0, plan.value_dim - state.shape[3]))
    return jnp.pad(state.astype(jnp.float32), padding).swapaxes(2, 3)
