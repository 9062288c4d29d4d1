"""Widths as data: axis names, their sizes, and their ratios to a base model.

A parameter's scaling follows from how much each of its axes has grown since the base model
(arXiv:2203.03466, appendix B); nothing is inferred from shapes or from parameter names.
"""

import logging
from collections.abc import Mapping

EMBED = "embed"
KEY_HEADS = "key_heads"
VALUE_HEADS = "value_heads"
KEY_DIM = "key_dim"
VALUE_DIM = "value_dim"
MLP = "mlp"
VOCAB = "vocab"
CONV = "conv"
LAYERS = "layers"

type AxisSizes = Mapping[str, int]
type AxisRatios = Mapping[str, float]

_INNER_WIDTHS = {
    "key width": (KEY_HEADS, KEY_DIM),
    "value width": (VALUE_HEADS, VALUE_DIM),
    "MLP width": (MLP,),
}
# The table assumes that every inner width grows with the model; off by more than this, its factors
# are still computed per axis, but transfer is no longer what the sources claim.
_INNER_WIDTH_TOLERANCE = 0.10
_already_said: set[str] = set()


def axis_ratios(sizes: AxisSizes, base_sizes: AxisSizes) -> dict[str, float]:
    """Ratio ``size / base size`` of every axis.

    Args:
        sizes: axis name to size, of the model at hand.
        base_sizes: the same axes of the base model (the one that was tuned).

    Raises:
        ValueError: an axis of ``sizes`` is missing from ``base_sizes``, or a size is not positive.
    """
    missing = sorted(set(sizes) - set(base_sizes))
    if missing:
        raise ValueError(f"base_sizes must name every axis of sizes; missing {', '.join(missing)}.")
    for which, table in (("sizes", sizes), ("base_sizes", base_sizes)):
        for axis, size in table.items():
            if size <= 0:
                raise ValueError(f"{which}[{axis!r}] must be positive; got {size}.")
    ratios = {axis: size / base_sizes[axis] for axis, size in sizes.items()}
    _say_if_inner_widths_lag(ratios)
    return ratios


def _say_if_inner_widths_lag(ratios: AxisRatios) -> None:
    if EMBED not in ratios:
        return
    for name, axes in _INNER_WIDTHS.items():
        if any(axis not in ratios for axis in axes):
            continue
        grown = product(ratios, axes)
        if abs(grown / ratios[EMBED] - 1) > _INNER_WIDTH_TOLERANCE:
            text = (
                f"the {name} has grown {grown:.3g}-fold since the base model and embed {ratios[EMBED]:.3g}-fold;"
                " learning rates are known to transfer when both grow alike."
            )
            if text not in _already_said:
                _already_said.add(text)
                logging.getLogger("gdn_jax").warning(text)


def product(ratios: AxisRatios, axes: tuple[str, ...]) -> float:
    """Product of the ratios of ``axes``; 1 for none. An axis that has no ratio is an error."""
    result = 1.0
    for axis in axes:
        if axis not in ratios:
            raise ValueError(f"no size is known for axis {axis!r}; known: {', '.join(sorted(ratios))}.")
        result *= ratios[axis]
    return result
