"""How the Hopper kernels want what they read: whole chunks, gates with time last, states transposed.

q, k, v, o and their gradients stay (B, T, heads, dim): the copy engine picks one head's tokens out of that. The
gates, small arrays, are laid out anew, (B, G, T), by the first kernel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.gated_delta_rule.mosaic_gpu_kernel import CHUNK, GATE_HEADS, Plan

# Of a state that has lost more than that between a chunk and the end of its part, nothing is looked for there: 5e-20 of
# it. The kernels round a state to 2^-9 of itself before they multiply by it.
_UNSEEN_LOG2 = -64.0


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


def whole_gates(plan: Plan, x: Array) -> Array:
    """log α or β (B, T, G) in float32, with zeros up to whole chunks: nothing is forgotten there, nor written.

    And up to a multiple of `GATE_HEADS` heads.
    """
    filling = ((0, 0), (0, plan.length - x.shape[1]), (0, -x.shape[2] % GATE_HEADS))
    return jnp.pad(x.astype(jnp.float32), filling)


def whole_lengths(plan: Plan, one_over: Array) -> Array:
    """(B, H, T) with ones up to whole chunks."""
    missing = plan.length - one_over.shape[2]
    return jnp.pad(one_over, ((0, 0), (0, 0), (0, missing)), constant_values=1.0)


def scales(plan: Plan, lengths: Lengths | None) -> list[Array]:
    """The scale over the length of q, (B, G, T); none where q has no norm."""
    if lengths is None:
        return []
    return [plan.scale * jnp.repeat(whole_lengths(plan, lengths.q), plan.share, axis=1)]


class Visible(NamedTuple):
    """What the ends of a part can still see of its chunks, int32; `mosaic_gpu_kernel` says how each is read.

    One array for each direction, since each would be a launch.

    Attributes:
        forward: first chunk of every program of `summary_body`, and then with what the part's chain begins, for every
            piece, (B, G, P · pieces, pairs + 1).
        backward: last chunks of every piece that `backward_walk_body` skips, and then with what the part's chain
            begins, (B, G, P · pieces, 2).
    """

    forward: Array
    backward: Array


def visible(plan: Plan, gamma: Array, *, has_state: bool, save_states: bool) -> Visible:
    """What of a part need not be walked to know the states that enter the parts, and their cotangents.

    In between a state loses nearly all: with keys of length 1 and β to 2 it grows by nothing, and 2 to `_UNSEEN_LOG2`
    of it is left.

    Args:
        plan: of the launches.
        gamma: sums of log₂ α from a chunk's start, (B, G, T).
        has_state: whether a state enters the first part.
        save_states: whether there will be gradients.
    """
    count, size = plan.part_chunks, plan.piece_chunks
    totals = gamma.reshape(*gamma.shape[:2], plan.parts, 1, 1, count, CHUNK)[..., -1]
    chunk, other = jnp.indices((count, count))
    # Decays between a chunk and the end of its part, and the beginning of it: (B, G, P, 2, N).
    between = jnp.stack([other > chunk, other < chunk])[None, None, None]
    decays = jnp.sum(jnp.where(between, totals, 0.0), axis=-1)
    # Number of first (last) chunks that leave (ask) nothing there: (B, G, P, 1).
    counts = jnp.sum(decays <= _UNSEEN_LOG2, axis=-1, keepdims=True, dtype=jnp.int32)
    gone, back_gone = counts[:, :, :, 0], counts[:, :, :, 1]
    alive = decays[:, :, :, 0, :1] + totals[:, :, :, 0, 0, :1] > _UNSEEN_LOG2
    part, piece = (x[None, None] for x in jnp.indices((plan.parts, plan.pieces)))
    from_end = plan.pieces - 1 - piece
    # States are not asked for at the end of the last part, nor cotangents at the beginning of the first one.
    is_first, is_last = part == 0, part == plan.parts - 1
    carries = alive if has_state else alive & ~is_first[..., :1]
    local = jnp.where(is_last, size, jnp.clip(gone - piece * size, 0, size))
    # Whether what enters a piece is seen at the end of its part, or what leaves it at the beginning.
    seen = jnp.where(piece == 0, carries, piece * size > gone) & ~is_last
    back_seen = jnp.where(from_end == 0, alive, from_end * size > back_gone) & ~is_first
    maps = jnp.where(seen | back_seen if save_states else seen, 0, size)
    of_slabs = [local] * plan.slabs + [maps] * (plan.key_dim // CHUNK)
    of_slabs += [jnp.full_like(local, size)] * (2 * plan.summary_pairs - len(of_slabs))
    of_pairs = [jnp.minimum(x, y) for x, y in zip(of_slabs[::2], of_slabs[1::2], strict=True)]
    starts = jnp.where(carries, 0, gone // size + 1)
    back_skipped = jnp.where(is_first, size, jnp.clip(back_gone - from_end * size, 0, size))
    back_starts = jnp.where(alive, 0, back_gone // size + 1)

    def together(columns: list[Array]) -> Array:
        whole = jnp.stack([jnp.broadcast_to(x, local.shape) for x in columns], axis=-1)
        return whole.reshape(*gamma.shape[:2], plan.parts * plan.pieces, len(columns))

    return Visible(together([*of_pairs, starts]), together([back_skipped, back_starts]))


def turned(plan: Plan, state: Array) -> Array:
    """(B, G, K, V) → (B, G, V, K), with zeros up to the kernels' sizes."""
    padding = ((0, 0), (0, 0), (0, plan.key_dim - state.shape[2]), (0, plan.value_dim - state.shape[3]))
    return jnp.pad(state.astype(jnp.float32), padding).swapaxes(2, 3)
