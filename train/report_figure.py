"""The picture of a sweep: loss against learning rate, a curve per width, presets side by side."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

from train.report_analysis import Curve, curves
from train.vary import WORDS

# Sized for a page 900 pixels wide: 9 inches there are 100 pixels an inch, so 10 points are 14 pixels.
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.labelsize": 10.5,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "text.color": "#1a1a1a",
    "axes.labelcolor": "#1a1a1a",
    "legend.frameon": False,
    "path.simplify": False,
}
WIDTH_INCHES = 9.0
DOTS_PER_INCH = 200
# Marker and size per width, sizes chosen to look alike.
MARKERS = (("o", 4.8), ("s", 4.5), ("D", 4.2), ("^", 6.0), ("v", 6.0), ("P", 6.0), ("X", 6.0), ("h", 5.6))
Style = tuple[Any, tuple[str, float]]
# Mean width of a bold letter, in font sizes.
_BOLD_EM = 0.68
# Height of one row of crosses, as a fraction of the panel.
_STRIP = 0.045


def width_colours(count: int) -> list[tuple[float, float, float, float]]:
    """Colours from narrow to wide, ordered in lightness: apart in grey and to the colour-blind."""
    # Beyond 0.84 viridis is too pale on white.
    places = np.linspace(0.84, 0.05, count) if count > 1 else [0.3]
    return [matplotlib.colormaps["viridis"](x) for x in places]


def save(figure: Figure, path: pathlib.Path) -> None:
    """Write the figure as PNG, without the metadata that would make equal pictures differ."""
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None}, facecolor="white")


def amount(tokens: int | float) -> str:
    """`6291456` as `6.29 M`."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{letter}"
    return f"{tokens:g}"


def signed(value: float) -> str:
    """Two decimals with a sign, typographic minus; no sign before a zero."""
    text = f"{value:+.2f}".replace("-", "−")
    return "0.00" if text in ("+0.00", "−0.00") else text


def unsigned(value: float, decimals: int) -> str:
    """`value` with a typographic minus where it is negative; a regret is, where the fit lies above a run."""
    text = f"{value:.{decimals}f}".replace("-", "−")
    return text if text.strip("−0.") else text.removeprefix("−")


def _limits(by_preset: Mapping[str, Mapping[int, Curve]]) -> tuple[float, float]:
    """Loss range that shows every minimum and the walls of a typical basin."""
    basins = [curve for widths in by_preset.values() for curve in widths.values() if curve.loss.size]
    if not basins:
        return 0.0, 1.0
    best = np.array([curve.loss.min() for curve in basins])
    rises = np.concatenate(
        [
            curve.loss[np.abs(curve.log2_x - curve.log2_x[curve.loss.argmin()]) <= 2.1] - curve.loss.min()
            for curve in basins
        ]
    )
    rises = rises[rises > 0]
    typical = float(np.quantile(rises, 0.85)) if rises.size else 0.0
    # What is not much higher is shown as well: few sound points have no room for outliers.
    wall = float(rises[rises <= 2 * typical].max(initial=typical))
    # A single exploding curve must not flatten all basins.
    wall = min(wall, 1.5 * max(float(np.ptp(best)), 4 * float(np.median(rises)) if rises.size else 0.0))
    span = float(np.ptp(best)) + max(wall, 0.02)
    top = min(float(best.min()) + span, max(float(curve.loss.max()) for curve in basins))
    span = max(top - float(best.min()), 0.02)
    lowest = min(float(np.min(curve.loss - np.nan_to_num(seed_range(curve)[0]))) for curve in basins)
    return lowest - 0.07 * span, top + 0.05 * span


def plot(rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draw `transfer.png` for the rows of one sweep and their report (`report.analyse`)."""
    by_preset = curves(rows)
    what = WORDS[report["abscissa"]]
    widths = report["widths"]
    styles: dict[int, Style] = {
        width: (colour, MARKERS[index % len(MARKERS)])
        for index, (width, colour) in enumerate(zip(widths, width_colours(len(widths)), strict=True))
    }
    bottom, top = _limits(by_preset)
    diverged = sorted({w for p in by_preset.values() for w, curve in p.items() if curve.diverged})
    strip = _STRIP * (len(diverged) + 0.4) if diverged else 0.0
    # Four panels: two and two; otherwise up to three in a row.
    columns = 2 if len(by_preset) == 4 else min(3, len(by_preset))
    lines = math.ceil(len(by_preset) / columns)
    several = len(report["seeds"]) > 1
    above = beyond = False
    with matplotlib.rc_context(STYLE):
        # Three columns have captions of two lines.
        space = 1.2 + 0.17 * (columns > 2)
        height = space + 0.1 + 3.4 * lines
        figure = Figure(figsize=(WIDTH_INCHES, height))
        FigureCanvasAgg(figure)
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        figure.subplots_adjust(
            left=0.088,
            right=0.985,
            top=1 - space / height,
            bottom=0.52 / height,
            wspace=0.06,
            hspace=0.42 + 0.08 * (columns > 2),
        )
        # All titles as large as the longest name, with its factors, may be in its panel.
        title_size = min(
            STYLE["axes.titlesize"],
            72 * 0.88 * WIDTH_INCHES / columns / (_BOLD_EM * max(map(len, by_preset))),
        )
        for empty in grid.flat[len(by_preset) :]:
            empty.set_visible(False)
        for index, (name, widths_drawn) in enumerate(by_preset.items()):
            panel = grid.flat[index]
            preset = report["presets"][name]
            panel.set_ylim(bottom, top + (top - bottom) * strip / (1 - strip))
            for width, curve in widths_drawn.items():
                above |= _curve(panel, curve, styles[width], several, top)
                beyond |= _optimum(panel, preset, width, curve, styles[width][0], bottom)
            _diverged(panel, widths_drawn, diverged, styles, strip)
            panel.set_title(
                name, loc="left", fontweight="bold", fontsize=title_size, pad=32 if columns > 2 else 19
            )
            panel.text(
                0,
                1.025,
                _caption(preset, columns > 2),
                transform=panel.transAxes,
                fontsize=8.5 if columns > 2 else 9.5,
                color="#444444",
            )
            panel.set_xlabel(what)
            panel.tick_params(length=3, labelbottom=True)
            if index % columns == 0:
                panel.set_ylabel("validation loss (nats per token)")
        _x_axis(grid.flat[0], by_preset)
        # None inside the strip of the diverged runs.
        places = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(bottom, top)
        ticks = [tick for tick in places if bottom <= tick <= top]
        grid.flat[0].set_yticks(ticks)
        _header(figure, report, styles, height, above, beyond)
        save(figure, path)


def seed_range(curve: Curve) -> np.ndarray:
    """How far the seeds reach below and above each point `[2, points]`; NaN, which draws nothing, where there is one.

    A point is a mean with the seeds' effects taken out: a lone seed does not lie on it, and is no range.
    """
    losses = [list(by_seed.values()) for by_seed in curve.by_seed]
    below = [
        loss - min(own) if len(own) > 1 else np.nan for loss, own in zip(curve.loss, losses, strict=True)
    ]
    above = [
        max(own) - loss if len(own) > 1 else np.nan for loss, own in zip(curve.loss, losses, strict=True)
    ]
    return np.maximum(np.array([below, above]), 0.0)


def _curve(panel: Axes, curve: Curve, style: Style, several: bool, top: float) -> bool:
    """Draw one curve up to `top`; true if some of it lies above."""
    colour, (marker, size) = style
    if not curve.loss.size:
        return False
    artists: list[Artist] = []
    if several:
        bars = panel.errorbar(
            curve.log2_x,
            curve.loss,
            seed_range(curve),
            fmt="none",
            ecolor=colour,
            elinewidth=1.0,
            capsize=2.2,
            capthick=1.0,
        )
        artists += [artist for part in bars.lines[1:] for artist in part]
    artists += panel.plot(
        curve.log2_x,
        curve.loss,
        color=colour,
        lw=1.7,
        marker=marker,
        ms=size,
        mec="white",
        mew=0.5,
        zorder=3,
    )
    # Not into the strip of the diverged runs. No larger than the panel: Agg counts pixels in 32 bits.
    bottom = panel.get_ylim()[0]
    for artist in artists:
        artist.set_clip_path(Rectangle((0, bottom), 1, top - bottom, transform=panel.get_yaxis_transform()))
    beyond = curve.log2_x[curve.loss > top]
    if beyond.size:
        below = ScaledTranslation(0, -5 / 72, panel.figure.dpi_scale_trans)
        panel.plot(
            beyond,
            [top] * beyond.size,
            ls="",
            marker="$\\uparrow$",
            color=colour,
            ms=7,
            mew=0.3,
            zorder=4,
            transform=panel.transData + below,
        )
    return bool(beyond.size)


def _optimum(
    panel: Axes, preset: Mapping[str, Any], width: int, curve: Curve, colour: Any, bottom: float
) -> bool:
    """Star and guide for an optimum; an arrow towards it where it lies beyond the curve (then true)."""
    place = preset["optimum_log2_x"][str(width)]
    if place is not None:
        loss = preset["minimum_nats"][str(width)]
        panel.plot([place, place], [bottom, loss], color=colour, lw=0.9, ls=(0, (4, 2)), zorder=2)
        panel.plot(place, loss, "*", mfc="white", mec=colour, mew=1.3, ms=12.5, zorder=6)
        return False
    side = preset["edge_side"].get(str(width), 0)
    if not curve.loss.size or not side:
        return False
    best = int(curve.loss.argmin())
    panel.annotate(
        "",
        (curve.log2_x[best], curve.loss[best]),
        (side * 19, 0),
        textcoords="offset points",
        arrowprops={
            "arrowstyle": "<|-",
            "color": colour,
            "lw": 1.5,
            "shrinkA": 0,
            "shrinkB": 5,
            "mutation_scale": 11,
        },
        zorder=6,
        annotation_clip=False,
    )
    return True


def _diverged(
    panel: Axes, widths: Mapping[int, Curve], rows: Sequence[int], styles: Mapping[int, Style], strip: float
) -> None:
    """Crosses in a strip along the top edge, one row of it per width, so that none hides another."""
    if not strip:
        return
    panel.add_patch(
        Rectangle((0, 1 - strip), 1, strip, transform=panel.transAxes, color="#f0f0f0", lw=0, zorder=0.5)
    )
    panel.text(
        0.012, 1 - strip / 2, "diverged", transform=panel.transAxes, fontsize=9, color="#555555", va="center"
    )
    across = blended_transform_factory(panel.transData, panel.transAxes)
    for width, curve in widths.items():
        if curve.diverged:
            level = [1 - _STRIP * (rows.index(width) + 0.7)] * len(curve.diverged)
            panel.plot(curve.diverged, level, "x", color=styles[width][0], ms=5.5, mew=1.7, transform=across)


def _x_axis(panel: Axes, by_preset: Mapping[str, Mapping[int, Curve]]) -> None:
    places = [x for p in by_preset.values() for curve in p.values() for x in (*curve.log2_x, *curve.diverged)]
    low, high = min(places), max(places)
    panel.set_xlim(low - 0.35, high + 0.35)
    panel.xaxis.set_major_locator(MultipleLocator(1 if high - low <= 8 else 2))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"$2^{{{x:g}}}$"))


def _caption(preset: Mapping[str, Any], narrow: bool) -> str:
    drift, interval, regret = (
        preset[key] for key in ("drift_octaves_per_doubling", "drift_interval", "regret_nats")
    )
    missing = "one width only" if len(preset["optimum_log2_x"]) == 1 else "an optimum is missing"
    said = [f"no drift: {missing}"]
    if drift is not None:
        said = [f"drift {signed(drift)} octave/doubling"]
        if interval:
            said[0] += f" [{signed(interval[0])}, {signed(interval[1])}]"
    if preset["regret_diverged"]:
        said.append("regret: diverged")
    elif regret is not None:
        said.append(f"regret {unsigned(regret, 3)}{' nats' if narrow else ''}")
    return ("\n" if narrow else ", ").join(said)


def _header(
    figure: Figure,
    report: Mapping[str, Any],
    styles: Mapping[int, Style],
    height: float,
    above: bool,
    beyond: bool,
) -> None:
    title = f"{report['optimizer']}, regime {report['regime']}, {amount(report['tokens'])} tokens a run"
    figure.text(
        0.012,
        1 - 0.26 / height,
        f"Loss against {WORDS[report['abscissa']]}: {title}",
        fontsize=12.5,
        fontweight="bold",
    )
    handles = [
        Line2D(
            [], [], color=colour, marker=marker, ms=size + 1, lw=1.7, mec="white", mew=0.5, label=str(width)
        )
        for width, (colour, (marker, size)) in styles.items()
    ]
    handles[0].set_label(f"width {next(iter(styles))}")
    dark: dict[str, Any] = {"ls": "", "color": "#333333"}
    handles.append(Line2D([], [], marker="*", ms=11, mfc="white", mew=1.2, label="fitted optimum", **dark))
    if beyond:
        handles.append(
            Line2D([], [], marker="$\\rightarrow$", ms=11, mew=0.4, label="optimum not reached", **dark)
        )
    if above:
        handles.append(Line2D([], [], marker="$\\uparrow$", ms=8, mew=0.3, label="off the scale", **dark))
    if len(report["seeds"]) > 1:
        handles.append(Line2D([], [], marker="|", ms=9, mew=1, label="range of the seeds", **dark))
    sizes = (9.5, 9.0, 8.5, 8.0, 7.5)
    for size in sizes:
        legend = figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.005, 1 - 0.33 / height),
            ncols=len(handles),
            fontsize=size,
            handletextpad=0.35,
            columnspacing=1.1,
            handlelength=1.6,
            borderaxespad=0.2,
        )
        # With every mark in it, it is wider than the picture.
        if size == sizes[-1] or legend.get_window_extent().x1 <= figure.bbox.x1:
            break
        legend.remove()
