"""How the kernels take `vmap`: a batch of calls is one call of a longer batch."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array


def folding_vmap(call: Callable[..., list[Array]], batch_axes: Sequence[int]) -> Callable[..., list[Array]]:
    """`call`, which under `vmap` gets the mapped axis and the batch as one.

    Args:
        call: of arrays that have the batch as their first axis, to a list of arrays that have it somewhere.
        batch_axes: where each result has it.
    """
    wrapped = jax.custom_batching.custom_vmap(call)

    @wrapped.def_vmap
    def fold(size: int, batched: Sequence[bool], *arrays: Array) -> tuple[list[Array], list[bool]]:
        whole = [
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip(arrays, batched, strict=True)
        ]
        results = wrapped(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        apart = [
            jnp.moveaxis(x.reshape(*x.shape[:at], size, -1, *x.shape[at + 1 :]), at, 0)
            for x, at in zip(results, batch_axes, strict=True)
        ]
        return apart, [True] * len(apart)

    return wrapped
