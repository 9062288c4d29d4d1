"""The picture of a coordinate check: how the change from initialisation scales with width, per quantity."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from train.coord_bounds import QUANTITIES
from train.report_figure import STYLE, WIDTH_INCHES, save, signed

_COLUMNS = 4
# Colour, line and marker per preset: apart in hue, in lightness and in shape.
_LOOKS = {"mup": ("#1b3f77", "-", "o"), "sp": ("#d9772b", "--", "s"), "mup_standard": ("#3d8f83", "-.", "^")}
_OTHERS = (("#8a5aa8", ":", "D"), ("#7d7d7d", ":", "v"), ("#b0873c", ":", "P"))
_MAX_OCTAVES = 6.0

Rows = Sequence[Mapping[str, Any]]


def _looks(presets: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    others = [preset for preset in presets if preset not in _LOOKS]
    spare = {preset: _OTHERS[index % len(_OTHERS)] for index, preset in enumerate(others)}
    return {preset: _LOOKS.get(preset) or spare[preset] for preset in presets}


def plot_coord(rows: Rows, analysis: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draw `coord.png`: per quantity its change against width, log-log, relative to the narrowest.

    Presets share each panel, slopes stand above it, the grey wedge holds the slopes that `mup` may have. One
    block of panels per optimizer and regime, at the last step measured; parameter updates are among them
    where a control is judged by them.
    """
    blocks = []
    for check in analysis["checks"]:
        here = [row for row in rows if _within(row, check) and _usable(row["size"])]
        last = max((row["step"] for row in here if row["kind"] == "change"), default=0)
        here = [row for row in here if row["step"] == last]
        there = {(row["kind"], row["quantity"]) for row in here}
        judged = [(c["kind"], c["quantity"]) for c in analysis["controls"] if _within(c, check)]
        panels = [("change", quantity) for quantity in QUANTITIES]
        panels += [panel for panel in judged if panel[0] == "update"]
        blocks.append((check, last, here, [panel for panel in panels if panel in there]))
    lines = [max(1, math.ceil(len(panels) / _COLUMNS)) for *_, panels in blocks]
    head, row_height, foot = 0.95, 1.62, 0.45
    heights = [head + row_height * count + foot for count in lines]
    style: dict[Any, Any] = STYLE | {"font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH_INCHES, sum(heights)))
        FigureCanvasAgg(figure)
        parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, (check, last, here, panels), count, height in zip(
            parts, blocks, lines, heights, strict=True
        ):
            grid = part.subplots(count, _COLUMNS, sharex=True, sharey=True, squeeze=False)
            top, bottom = 1 - (head + 0.12) / height, foot / height
            part.subplots_adjust(left=0.075, right=0.985, top=top, bottom=bottom, wspace=0.1, hspace=0.62)
            _block(part, grid, check, last, here, panels, analysis, height)
        save(figure, path)


def _within(row: Mapping[str, Any], check: Mapping[str, Any]) -> bool:
    return all(row[key] == check[key] for key in ("optimizer", "regime"))


def _usable(size: Any) -> bool:
    return size is not None and math.isfinite(size) and size > 0


def _labelled(widths: Sequence[int]) -> set[int]:
    """Of the ticks of an axis those whose labels do not run into each other: one of four digits is a sixth of it."""
    kept = [widths[-1]]
    for width in widths[-2::-1]:
        if math.log2(kept[-1] / width) >= math.log2(widths[-1] / widths[0]) / 5:
            kept.append(width)
    return set(kept)


def _block(
    part: Any,
    grid: Any,
    check: Mapping[str, Any],
    last: int,
    rows: Rows,
    panels: Sequence[tuple[str, str]],
    analysis: Mapping[str, Any],
    height: float,
) -> None:
    presets = sorted({row["preset"] for row in rows})
    looks = _looks(presets)
    widths = sorted({row["width"] for row in rows}) or [1, 2]
    labelled = _labelled(widths)
    reach = 1.0
    for index, panel in enumerate(grid.flat):
        if index >= len(panels):
            panel.set_visible(False)
            continue
        kind, quantity = panels[index]
        panel.axhline(0, color="#999999", lw=0.8, zorder=1)
        entries = {
            e["preset"]: e
            for e in analysis["entries"]
            if (e["kind"], e["quantity"], e["step"]) == (kind, quantity, last) and _within(e, check)
        }
        mup = entries.get("mup")
        if mup and mup["bound"] is not None and mup["verdict"] != "reported":
            octaves = np.log2(np.array(widths) / widths[0])
            low, high = (mup["expected"] + sign * mup["bound"] for sign in (-1, 1))
            panel.fill_between(widths, low * octaves, high * octaves, color="#dcdcdc", lw=0, zorder=0.8)
        for preset in presets:
            own = [
                row
                for row in rows
                if (row["preset"], row["kind"], row["quantity"]) == (preset, kind, quantity)
            ]
            if own:
                reach = max(reach, _lines(panel, own, looks[preset]))
        _heading(panel, _title(kind, quantity), presets, entries, looks)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_locator(FixedLocator(widths))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x in labelled else ""))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.tick_params(length=2.5, labelsize=8.5)
        if index + _COLUMNS >= len(panels):
            panel.tick_params(labelbottom=True)
            panel.set_xlabel("width", fontsize=9.5, labelpad=1)
    reach = min(reach, _MAX_OCTAVES) + 0.35
    step = 1 if reach < 2.6 else 2
    ticks = range(-int(reach) // step * step, int(reach) + 1, step)
    grid.flat[0].set_ylim(-reach, reach)
    grid.flat[0].yaxis.set_major_locator(FixedLocator([tick for tick in ticks if abs(tick) <= reach]))
    grid.flat[0].yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: f"×{2**y:g}" if y >= 0 else f"×1/{2**-y:g}")
    )
    setting = f"{check['optimizer']}, regime {check['regime']}, step {last}"
    title = f"Change from initialisation, relative to the narrowest width: {setting}"
    part.text(0.012, 1 - 0.27 / height, title, fontsize=11.5, fontweight="bold")
    handles: list[Any] = [
        Line2D([], [], color=colour, ls=line, marker=marker, ms=5, lw=1.7, label=preset)
        for preset, (colour, line, marker) in looks.items()
    ]
    handles.append(Patch(color="#dcdcdc", label="slopes allowed to mup"))
    part.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.005, 1 - 0.32 / height),
        ncols=len(handles),
        fontsize=9.5,
        handletextpad=0.45,
        columnspacing=1.2,
        handlelength=2.4,
        borderaxespad=0.2,
    )


def _title(kind: str, quantity: str) -> str:
    """`layers/mixer/conv_q/kernel` as `Δ conv_q`: what owns a kernel or gain."""
    parts = quantity.split("/")
    return quantity if kind == "change" else f"Δ {parts[-2] if len(parts) > 1 else quantity}"


def _lines(panel: Axes, rows: Rows, look: tuple[str, str, str]) -> float:
    """Seeds as dots, their geometric mean as a line; returns the farthest point in octaves."""
    colour, line, marker = look
    widths = np.array(sorted({row["width"] for row in rows}))
    means = np.array([np.mean([math.log2(r["size"]) for r in rows if r["width"] == w]) for w in widths])
    seeds = np.array([math.log2(row["size"]) for row in rows]) - means[0]
    panel.plot([r["width"] for r in rows], seeds, marker, color=colour, ms=2.4, alpha=0.45, mew=0, zorder=2)
    panel.plot(
        widths,
        means - means[0],
        line,
        color=colour,
        marker=marker,
        ms=4.2,
        mec="white",
        mew=0.4,
        lw=1.6,
        zorder=3,
    )
    return float(np.abs(seeds).max())


def _heading(
    panel: Axes, quantity: str, presets: Sequence[str], entries: Mapping[str, Any], looks: Mapping[str, Any]
) -> None:
    """Name of the quantity, and below it the slopes in the order and colour of the legend."""
    panel.set_title(quantity, loc="left", fontsize=10.5, fontweight="bold", pad=14)
    named = len(presets) <= 2
    for index, preset in enumerate(presets):
        entry = entries.get(preset)
        slope = "—" if entry is None or entry["slope"] is None else signed(entry["slope"])
        panel.text(
            index / max(len(presets), 2 if named else 3),
            1.045,
            f"{preset} {slope}" if named else slope,
            transform=panel.transAxes,
            # Five at the size of four would touch.
            fontsize=9 * min(1.0, 4 / len(presets)),
            color=looks[preset][0],
        )
