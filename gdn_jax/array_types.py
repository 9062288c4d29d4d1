"""Glossary of axis letters and array aliases used in every signature of this package.

``B`` batch, ``T`` time, ``H`` key heads, ``G`` value heads, ``K`` key head dim, ``V`` value head dim,
``D`` model width, ``F`` MLP width, ``L`` layers, ``vocab`` vocabulary. In bodies a suffix spells the
axes of a local array: ``state_BGKV``.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

type Tokens = Int[Array, "B T"]
type SegmentIds = Int[Array, "B T"]
type Activations = Float[Array, "B T D"]
type Logits = Float[Array, "B T vocab"]

# Sees every intermediate value by name and returns the value to go on with; see ``mup.coord_check``.
type Tap = Callable[[str, jax.Array], jax.Array]

# Made for the tap's eyes: the op computes its own, and nothing goes on with what the tap returns.
SEEN_ONLY = frozenset({"log_decay", "beta", "state"})


def no_tap(name: str, value: jax.Array) -> jax.Array:
    """The tap that looks at nothing: returns ``value`` as it is."""
    del name
    return value
