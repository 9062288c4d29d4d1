"""The picture of a sweep, looked at pixel by pixel."""

import json

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from train.report import write_report
from train.report_figure import width_colours


def test_a_curve_of_a_narrow_range_of_losses_is_drawn_inside_its_panel(tmp_path):
    """Losses within 0.01 nats make a panel in which a nat is many pixels: clipping must not overflow."""
    rows = [
        {
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
        }
        for log2_x in np.arange(-9, -4.9, 0.5)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(tmp_path)
    picture = imread(tmp_path / "transfer.png")[..., :3]
    (colour,) = width_colours(1)
    drawn = np.abs(picture - np.array(to_rgb(colour))).max(axis=-1) < 0.02
    height, width = drawn.shape
    # The panel lies below the legend and the caption; a curve crosses most of its columns.
    panel = drawn[round(0.26 * height) : round(0.88 * height), round(0.1 * width) : round(0.98 * width)]
    assert panel.any(axis=0).mean() > 0.8
