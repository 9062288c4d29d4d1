"""A slope and its error, and the table of the coordinate check: which bound holds for what."""

import math

import numpy as np
import pytest

from train.coord_analysis import slope_of
from train.coord_bounds import bound_for, update_sort


@pytest.mark.parametrize(
    ("kind", "quantity", "optimizer", "regime", "step", "low", "high"),
    [
        ("absolute", "q", "adamw", "heads", 0, -0.05, 0.05),
        ("absolute", "q", "adamw", "heads", 10, -0.10, 0.10),
        ("absolute", "gate_a", "adamw", "heads", 0, -0.05, 0.05),
        ("absolute", "gate_a", "muon", "head_dim", 0, -0.60, -0.40),
        ("absolute", "gate_b", "adamw", "head_dim", 10, -0.60, 0.10),
        ("change", "q", "adamw", "head_dim", 2, -0.20, 0.20),
        ("change", "gate_b", "adamw", "heads", 2, -0.20, 0.20),
        ("change", "gate_b", "adamw", "head_dim", 2, -0.45, 0.20),
        ("change", "gate_b", "muon", "head_dim", 10, -0.45, 0.20),
        ("change", "mixer_output", "adamw", "heads", 2, -0.10, 0.10),
        ("change", "mixer_output", "adamw", "head_dim", 2, -0.20, 0.20),
        ("change", "mixer_output", "adamw", "head_dim", 10, -0.10, 0.10),
        ("absolute", "mixer_output", "adamw", "head_dim", 0, -0.05, 0.05),
        ("absolute", "mixer_output", "adamw", "head_dim", 2, -0.20, 0.20),
        ("absolute", "mixer_output", "adamw", "head_dim", 10, -0.10, 0.10),
        ("absolute", "state", "sgd", "head_dim", 0, -0.10, 0.10),
        ("absolute", "state", "sgd", "heads", 0, -0.05, 0.05),
        ("change", "gate_a", "sgd", "heads", 2, -0.20, 0.20),
        ("change", "gate_a", "sgd", "heads", 10, -0.15, 0.15),
        ("change", "state", "sgd", "heads", 10, -0.35, 0.35),
        ("change", "beta", "sgd", "head_dim", 10, -0.45, 0.25),
        ("change", "k", "sgd", "head_dim", 2, -0.45, 0.45),
        ("update", "layers/mixer/q/kernel", "sgd", "heads", 10, -0.25, 0.25),
        ("update", "layers/mixer/q/kernel", "sgd", "head_dim", 10, -0.45, 0.45),
        ("update", "layers/mixer/o_norm/gain", "sgd", "head_dim", 10, -1.25, -0.75),
        ("update", "layers/mixer/o_norm/gain", "adamw", "head_dim", 10, -0.25, 0.25),
    ],
)
def test_bounds_of_the_table(kind, quantity, optimizer, regime, step, low, high):
    bound = bound_for(kind, quantity, optimizer, regime, step)
    assert bound.limit is not None
    assert (bound.expected - bound.limit, bound.expected + bound.limit) == pytest.approx((low, high))


def test_gradients_have_no_bound():
    assert bound_for("gradient", "q", "sgd", "heads", 10).limit is None


def test_the_gain_that_heads_share_is_no_control():
    assert update_sort("layers/mixer/o_norm/gain") is None
    assert update_sort("final_norm/gain") == "gain"
    assert update_sort("layers/mixer/q/kernel") is None


def test_standard_error_is_that_of_repeated_experiments():
    rng = np.random.default_rng(2)
    widths = [w for w in (64, 128, 256, 512) for _ in range(3)]
    fits = [slope_of(widths, (2 ** (0.1 * rng.normal(size=12))).tolist()) for _ in range(400)]
    spread = np.std([slope for slope, _ in fits])
    # The larger of two estimates: never short, a fifth too wide at most.
    assert 0.95 * spread < np.mean([error for _, error in fits if error]) < 1.25 * spread


def test_a_bent_line_is_uncertain_however_many_seeds():
    """Every seed shares the bend: taking them for independent would call this slope certain."""
    errors: list[float] = []
    for seeds in (3, 300):
        widths = [w for w in (64, 128, 256, 512) for _ in range(seeds)]
        _, error = slope_of(widths, [2 ** (0.1 * (math.log2(w / 64) - 1.5) ** 2) for w in widths])
        assert error is not None
        errors.append(error)
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)
    assert errors[0] > 0.05
