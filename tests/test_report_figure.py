"""The picture of a sweep, looked at pixel by pixel."""

import json

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from train.report import write_report
from train.report_analysis import curves
from train.report_figure import _limits, unsigned, width_colours


def bowl(log2_x, **more):
    """A row of a sweep whose losses are a shallow parabola around 2^-7."""
    return {
        "preset": "mup",
        "optimizer": "adamw",
        "regime": "heads",
        "width": 64,
        "learning_rate": 2.0**log2_x,
        "seed": 0,
        "steps": 400,
        "tokens": 819_200,
        "val_loss": 4.0 + 1e-3 * (log2_x + 7) ** 2,
        "diverged_at_step": None,
        "config_fingerprint": "f0",
        "code_version": "v1",
        "base_width": 64,
        **more,
    }


def drawn_picture(rows, folder):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(folder)
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
