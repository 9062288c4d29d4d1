"""The picture of a sweep, looked at pixel by pixel."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from report_cases import basin, ledger, row

from train.report import write_report
from train.report_analysis import curves
from train.report_figure import _limits, seed_range, unsigned, width_colours


def bowl(log2_x, **more):
    """A row of a sweep whose losses are a shallow parabola around 2^-7."""
    return row(**{"learning_rate": 2.0**log2_x, "val_loss": 4.0 + 1e-3 * (log2_x + 7) ** 2} | more)


def drawn_picture(rows, folder):
    write_report(ledger(folder, rows))
    return imread(folder / "transfer.png")[..., :3]


def test_a_curve_of_a_narrow_range_of_losses_is_drawn_inside_its_panel(tmp_path):
    """Losses within 0.01 nats make a panel in which a nat is many pixels: clipping must not overflow."""
    picture = drawn_picture([bowl(log2_x) for log2_x in np.arange(-9, -4.9, 0.5)], tmp_path)
    (colour,) = width_colours(1)
    drawn = np.abs(picture - np.array(to_rgb(colour))).max(axis=-1) < 0.02
    height, width = drawn.shape
    # The panel lies below the legend and the caption; a curve crosses most of its columns.
    panel = drawn[round(0.26 * height) : round(0.88 * height), round(0.1 * width) : round(0.98 * width)]
    assert panel.any(axis=0).mean() > 0.8


def test_the_highest_of_few_sound_points_is_drawn_and_one_that_blew_up_is_not():
    """A 0.85 quantile alone cuts off the end of a curve of six points."""
    losses = {-9: 4.10, -8.5: 4.04, -8: 4.0, -7.5: 4.01, -7: 4.04, -6.5: 4.18}
    rows = [bowl(log2_x, val_loss=loss) for log2_x, loss in losses.items()]
    bottom, top = _limits(curves(rows))
    assert bottom < 4.0
    assert 4.18 < top < 4.25
    _, top = _limits(curves([*rows, bowl(-6, val_loss=6.0)]))
    assert 4.18 < top < 4.5


def test_names_with_factors_end_within_their_panels(tmp_path):
    """A title that reaches into the next panel's, or out of the picture, cannot be read."""
    rows = [
        bowl(log2_x, embedding_lr=factor, gate_lr=factor)
        for log2_x in np.arange(-9, -4.9, 0.5)
        for factor in (0.25, 0.5, 0.75)
    ]
    picture = drawn_picture(rows, tmp_path)
    height, width, _ = picture.shape
    # Titles are the only ink between the legend and the captions.
    titles = (picture.min(axis=-1) < 0.5)[round(0.14 * height) : round(0.22 * height)].any(axis=0)
    ink = np.flatnonzero(titles)
    assert ink[-1] < 0.985 * width
    assert np.sum(np.diff(ink) > 0.01 * width) == 2, "three titles, apart from each other"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0158, "0.016"), (-0.0162, "−0.016"), (-0.0003, "0.000"), (-1.0, "−1.000")]
)
def test_numbers_without_a_plus(value, text):
    assert unsigned(value, 3) == text


def test_width_colours_darken_with_width_so_that_grey_keeps_them_apart():
    for count in (2, 3, 4, 5, 6):
        luminance = [float(np.dot(colour[:3], (0.2126, 0.7152, 0.0722))) for colour in width_colours(count)]
        assert luminance == sorted(luminance, reverse=True)
        assert min(-np.diff(luminance)) > 0.05


@pytest.mark.parametrize("presets", [1, 3, 4, 6])
def test_figure_of_any_number_of_presets(tmp_path, presets):
    names = ["mup", "mup_standard", "paper_code", "sp", "sp_constant", "sp_embedding"][:presets]
    rows = [r for i, n in enumerate(names) for r in basin(n, -0.4 * i, grid=(-9, -5), diverged_above=-5.4)]
    assert list(write_report(ledger(tmp_path / "x", rows))["presets"]) == names


def test_figure_of_runs_that_all_diverged(tmp_path):
    report = write_report(ledger(tmp_path / "x", basin("sp", 0.0, diverged_above=-20, seeds=2)))
    assert report["runs_diverged"] == report["runs"] == 78


def test_legend_of_every_mark_fits_into_the_picture(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("train.report_figure.save", lambda figure, path: drawn.append(figure))
    # Four widths, optima fitted and not reached, points off the scale, ranges of seeds.
    widths = (128, 256, 512, 1024)
    rows = basin("mup", 0.0, widths=widths, seeds=2) + basin(
        "sp", -3.0, widths=widths, grid=(-9, -5), seeds=2
    )
    write_report(ledger(tmp_path / "x", rows))
    (figure,) = drawn
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 8
    assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_a_lone_seed_has_no_range():
    rows = basin("mup", 0.0, grid=(-10, -6), seeds=3, noise=0.01)
    ends = {min(row["learning_rate"] for row in rows), max(row["learning_rate"] for row in rows)}
    rows = [row for row in rows if row["seed"] == 0 or row["learning_rate"] not in ends]
    below, above = seed_range(curves(rows)["mup"][64])
    assert np.isnan(below[[0, -1]]).all()
    assert np.isnan(above[[0, -1]]).all()
    assert (below[1:-1] >= 0).all()
    assert (above[1:-1] > 0).any()
