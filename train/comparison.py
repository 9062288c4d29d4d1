"""Sweeps side by side: where what they do not share, such as the depth or the decay, moves the optimum."""

import collections
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from train.ledger import ROWS_FILE
from train.report_analysis import (
    Curve,
    Optimum,
    curves,
    find_optimum,
    interval,
    resampled_optimum,
    standard_error,
)
from train.report_figure import signed
from train.report_rows import read_rows


class _Found(NamedTuple):
    curve: Curve
    optimum: Optimum
    # As `resampled_optimum` gives them.
    draws: tuple[np.ndarray, np.ndarray] | None


def _find(curve: Curve) -> _Found:
    optimum = find_optimum(curve)
    return _Found(curve, optimum, resampled_optimum(curve, optimum))


def _shift_interval(found: _Found, first: _Found) -> list[float] | None:
    """Of the distance of two optima: both are resampled alike, over the seeds that both have."""
    seeds = tuple(sorted(set(found.optimum.seeds) & set(first.optimum.seeds)))
    draws, of_first = (
        resampled_optimum(one.curve, dataclasses.replace(one.optimum, seeds=seeds)) for one in (found, first)
    )
    return None if draws is None or of_first is None else interval(draws[0] - of_first[0], len(seeds))


def comparison(folders: Sequence[pathlib.Path]) -> str:
    """A Markdown table: the optimum of each preset and width in each sweep, and how far it is from the first sweep's.

    Presets that only one of the sweeps has are left out.

    Args:
        folders: of the sweeps; a shift is given where the first has the same preset and width, and its interval where
            both have five seeds in common.

    Raises:
        ValueError: rows that make no report.
    """
    lines = [
        "| sweep | preset | width | optimum | octaves from the first | least loss (nats) |",
        "| --- " * 6 + "|",
    ]
    first: dict[tuple[str, int], _Found] | None = None
    sweeps = [(folder, curves(read_rows(folder / ROWS_FILE))) for folder in folders]
    times_run = collections.Counter(preset for _, presets in sweeps for preset in presets)
    for folder, presets in sweeps:
        found = {
            (preset, width): _find(curve)
            for preset, widths in presets.items()
            if times_run[preset] > 1
            for width, curve in widths.items()
        }
        lines += [
            f"| {folder.name} | `{preset}` | {width} | {' | '.join(_cells(one, (first or {}).get((preset, width))))} |"
            for (preset, width), one in found.items()
        ]
        first = found if first is None else first
    return "\n".join(lines)


def _cells(found: _Found, first: _Found | None) -> tuple[str, str, str]:
    _, optimum, draws = found
    if optimum.log2_x is None:
        return f"none: {optimum.reason}", "—", "—"
    seeds = len(optimum.seeds)
    where = f"2^{optimum.log2_x:.2f}{bracket(None if draws is None else interval(draws[0], seeds))}"
    error = None if draws is None else standard_error(draws[1], seeds)
    loss = f"{optimum.minimum:.4f}" + ("" if error is None else f" ± {error:.4f}")
    if first is None or first.optimum.log2_x is None:
        return where, "—", loss
    shift = signed(optimum.log2_x - first.optimum.log2_x)
    return where, shift + bracket(_shift_interval(found, first)), loss


def bracket(bounds: Sequence[float] | None) -> str:
    """An interval behind a number, or nothing."""
    return f" [{signed(bounds[0])}, {signed(bounds[1])}]" if bounds else ""
