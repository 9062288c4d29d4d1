"""Inverse of a unit lower triangular matrix by doubling, README eq. (8).

Backward stable where the short series (I − A)(I + A²)(I + A⁴)… is not: on correlated keys its powers grow
like binomial coefficients and cancel, with an error of 6e10 at C = 64.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def unit_lower_inverse(
    strictly_lower: Float[Array, "*batch C C"],
    precision: jax.lax.PrecisionLike = jax.lax.Precision.HIGHEST,
) -> Float[Array, "*batch C C"]:
    """(I + A)⁻¹ for a strictly lower triangular A; C must be a power of two.

    From the inverses X₁, X₂ of two neighbouring diagonal blocks and the block A₂₁ under the first one follows
    the inverse of both together: [[X₁, 0], [−X₂ A₂₁ X₁, X₂]].

    Args:
        strictly_lower: A. Entries on and above the diagonal are never read.
        precision: of the matmuls.
    """
    *batch, size, _ = strictly_lower.shape
    assert size & (size - 1) == 0, size
    inverse = jnp.ones((*batch, size, 1, 1), strictly_lower.dtype)
    block = 1
    while block < size:
        pairs = size // (2 * block)
        tiled = strictly_lower.reshape(*batch, pairs, 2 * block, pairs, 2 * block)
        # The diagonal tiles, and of each its lower left quarter: (…, pairs, block, block).
        below = jnp.stack([tiled[..., p, block:, p, :block] for p in range(pairs)], axis=-3)
        upper, lower = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -jnp.matmul(jnp.matmul(lower, below, precision=precision), upper, precision=precision)
        inverse = jnp.concatenate(
            [
                jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1),
                jnp.concatenate([corner, lower], axis=-1),
            ],
            axis=-2,
        )
        block *= 2
    return inverse.reshape(strictly_lower.shape)
