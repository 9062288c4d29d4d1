"""Sweeps side by side: where what they do not share, such as the depth or the decay, moves the optimum."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from train.ledger import ROWS_FILE
from train.report_analysis import (
    Curve,
    Optimum,
    curves,
    find_optimum,
    interval,
    power_of_two,
    resampled_optimum,
)
from train.report_figure import signed
from train.report_rows import read_rows


@dataclasses.dataclass(frozen=True)
class _Found:
    curve: Curve
    optimum: Optimum

    @property
    def draws(self) -> tuple[np.ndarray, np.ndarray] | None:
        return resampled_optimum(self.curve, self.optimum)


def comparison(folders: Sequence[pathlib.Path]) -> str:
    """A Markdown table: the optimum of each preset and width in each sweep, and how far it is from the first sweep's.

    Args:
        folders: of the sweeps; a shift is given where the first has the same preset and width.

    Raises:
        ValueError: rows that make no report.
    """
    lines = [
        "| sweep | preset | width | optimum | octaves from the first | least loss (nats) |",
        "| --- " * 6 + "|",
    ]
    first: dict[tuple[str, int], _Found] = {}
    for folder in folders:
        found = {
            (preset, width): _Found(curve, find_optimum(curve))
            for preset, widths in curves(read_rows(folder / ROWS_FILE)).items()
            for width, curve in widths.items()
        }
        lines += [
            f"| {folder.name} | `{preset}` | {width} | {' | '.join(_cells(one, first.get((preset, width))))} |"
            for (preset, width), one in found.items()
        ]
        first = first or found
    return "\n".join(lines)


def _cells(found: _Found, first: _Found | None) -> tuple[str, str, str]:
    place, minimum = found.optimum.log2_x, found.optimum.minimum
    if place is None or minimum is None:
        return f"none: {found.optimum.reason}", "—", "—"
    draws, seeds = found.draws, len(found.optimum.seeds)
    where = f"{power_of_two(place)}{_bracket(None if draws is None else interval(draws[0], seeds))}"
    # A bootstrap's variance is short by (seeds - 1) / seeds.
    error = None if draws is None else float(np.nanstd(draws[1])) * (seeds / (seeds - 1)) ** 0.5
    loss = f"{minimum:.4f}" + ("" if error is None else f" ± {error:.4f}")
    if first is None or first.optimum.log2_x is None:
        return where, "—", loss
    bounds = None
    if draws is not None and first.draws is not None and first.optimum.seeds == found.optimum.seeds:
        bounds = interval(draws[0] - first.draws[0], seeds)
    return where, signed(place - first.optimum.log2_x) + _bracket(bounds), loss


def _bracket(bounds: Sequence[float] | None) -> str:
    return f" [{signed(bounds[0])}, {signed(bounds[1])}]" if bounds else ""
