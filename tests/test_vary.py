"""Sweeps over more than the learning rate: the rows, the ledger, and what the report makes of them."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import tiny

from gdn_jax import mup
from gdn_jax.mup.spec import Role
from train import sweep_lanes
from train.ledger import Ledger, point_key
from train.report import analyse, read_rows
from train.step import Program
from train.sweep import run_sweep
from train.sweep_options import SweepOptions
from train.sweep_points import Point, plan_points

COMMITTED = pathlib.Path(__file__).parents[1] / "docs/results/adamw-heads"


def _options(folder, **changes):
    settings = {
        "out": folder / "out", "widths": (8,), "learning_rates": ("2^-5",), "presets": ("mup",), "steps": 3,
        "points_per_device": 3,
    }  # fmt: skip
    return SweepOptions(**(settings | changes))


def test_factors_act_on_their_roles_alone():
    program = Program(tiny.MODEL.gdn_config(16, 64), tiny.OPTIMIZER, 4)
    plain = program.hparams(0.01, "mup").rules
    factors = {"embedding_lr": 2.0, "gate_lr": 3.0, "init_scale": 5.0, "o_norm_lr": 7.0, "readout_lr": 9.0}
    changed = program.hparams(0.01, "mup", **factors).rules
    seen = set()
    for spec in mup.rules.spec_leaves(program.specs):
        before, after = plain.groups[spec.group], changed.groups[spec.group]
        rate = {
            Role.EMBEDDING: 2,
            Role.GATE_MATRIX: 3,
            Role.GATE_A_MATRIX: 3,
            Role.GATE_SCALAR: 3,
            Role.READOUT: 9,
            Role.HEAD_GAIN: 7,
        }.get(spec.role, 1)
        scale = 5 if spec.role in (Role.MATRIX, Role.GATE_MATRIX, Role.GATE_A_MATRIX) else 1
        np.testing.assert_allclose(after.lr_multiplier, before.lr_multiplier * rate, rtol=1e-6)
        np.testing.assert_allclose(after.init_std, before.init_std * scale, rtol=1e-6)
        seen.add((spec.role, rate))
    gains = {(Role.NORM_GAIN, 1), (Role.HEAD_GAIN, 7)}
    gates = {(Role.GATE_MATRIX, 3), (Role.GATE_A_MATRIX, 3), (Role.GATE_SCALAR, 3)}
    assert seen >= gains | gates | {(Role.EMBEDDING, 2), (Role.READOUT, 9), (Role.CONV, 1)}


def test_a_factor_on_a_readout_that_the_model_lacks_is_refused():
    tied = dataclasses.replace(tiny.MODEL, tie_embedding=True)
    program = Program(tied.gdn_config(16, 64), tiny.OPTIMIZER, 4)
    assert program.hparams(0.01, "mup", readout_lr=1.0) == program.hparams(0.01, "mup")
    with pytest.raises(ValueError, match="A tied one is the embedding: vary embedding_lr"):
        program.hparams(0.01, "mup", readout_lr=2.0)


def test_a_sweep_over_four_hyperparameters_compiles_once_and_never_repeats_a_default(tmp_path, monkeypatch):
    compiled = []
    real = sweep_lanes.ahead_of_time
    monkeypatch.setattr(sweep_lanes, "ahead_of_time", lambda *args: compiled.append(1) or real(*args))
    data = tiny.data_config(tmp_path)
    options = _options(
        tmp_path, vary=("weight_decay=0.1,0.9", "embedding_lr=1,4", "gate_lr=8", "init_scale=1,0.5")
    )
    rows = run_sweep(options, tiny.MODEL, tiny.OPTIMIZER, data)
    assert len(compiled) == 1
    assert len({row["val_loss"] for row in rows}) == len(rows) == 8
    # The decay of tiny.OPTIMIZER is 0.1.
    assert [(r["weight_decay"], r["embedding_lr"], r["gate_lr"], r["init_scale"]) for r in rows] == [
        (w, e, 8.0, i) for w in (0.1, 0.9) for e in (1.0, 4.0) for i in (0.5, 1.0)
    ]
    ledger = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert ledger == rows
    # Named with its default or not named at all: the same run, which is not made again.
    again = run_sweep(_options(tmp_path, vary=("gate_lr=8",)), tiny.MODEL, tiny.OPTIMIZER, data)
    defaults = {"weight_decay": 0.1, "embedding_lr": 1.0, "init_scale": 1.0}
    assert again == [row for row in rows if row | defaults == row]
    assert len(compiled) == 1


def test_committed_rows_keep_their_keys():
    config = json.loads((COMMITTED / "sweep.json").read_text())
    rows = [json.loads(line) for line in (COMMITTED / "rows.jsonl").read_text().splitlines()]
    ledger = Ledger(COMMITTED, config)
    assert len(ledger.rows) == len(rows) > 0
    row = rows[0]
    assert Point(row["preset"], row["width"], row["learning_rate"], row["seed"]).key in ledger.rows
    assert point_key(row | {"gate_lr": 1.0, "weight_decay": 0.0}, 0.0) == point_key(row)
    assert point_key(row | {"gate_lr": 2.0}) != point_key(row)


def test_a_rate_computed_in_another_way_is_the_same_point():
    """Ledgers hold 2^-8 as 2^-8.5 · 2^0.5, too, which differs in the last digit: it must not be run again."""
    row = {"preset": "mup", "width": 64, "learning_rate": 2.0**-8.5 * 2.0**0.5, "seed": 0}
    assert row["learning_rate"] != 2**-8
    assert Point("mup", 64, 2**-8, 0).key == point_key(row)
    assert Point("mup", 64, 2**-8 * 1.0001, 0).key != point_key(row)


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (
            "beta=1",
            "--vary must be NAME=VALUES with a name of weight_decay, embedding_lr, gate_lr, init_scale, "
            "o_norm_lr, readout_lr",
        ),
        ("gate_lr", "--vary must be NAME=VALUES"),
        ("gate_lr=0", "--vary gate_lr must be positive"),
        ("gate_lr=x", "--vary gate_lr must be numbers"),
    ],
)
def test_wrong_values(tmp_path, vary, message):
    with pytest.raises(ValueError, match=message):
        _options(tmp_path, vary=(vary,))
    with pytest.raises(ValueError, match="must name gate_lr once"):
        _options(tmp_path, vary=("gate_lr=1", "gate_lr=2"))


def _rows(tmp_path, **changes):
    """Planted: the best gate factor is 2^0.3 at every width, the best learning rate 2^-6 x decay^(1/4)."""
    plan = plan_points(_options(tmp_path, widths=(128, 256), **changes), 128)
    for point in (point for points in plan.values() for point in points):
        values = {"weight_decay": 0.0, "gate_lr": 1.0} | dict(point.varied)
        rate = (
            np.log2(point.learning_rate)
            + 6
            - (np.log2(values["weight_decay"]) / 4 if values["weight_decay"] else 0)
        )
        loss = 4 + 0.05 * rate**2 + 0.04 * (np.log2(values["gate_lr"]) - 0.3) ** 2
        yield {
            "preset": "mup", "optimizer": "adamw", "regime": "heads", "width": point.width,
            "learning_rate": point.learning_rate, "seed": 0, "steps": 4, "tokens": 400, "val_loss": float(loss),
            "diverged_at_step": None, "config_fingerprint": "f", "code_version": "v", "base_width": 128,
        } | dict(point.varied)  # fmt: skip


def test_one_learning_rate_is_no_abscissa(tmp_path):
    report = analyse(list(_rows(tmp_path, learning_rates=("2^-6",), vary=("gate_lr=2^-2..2^2",))))
    assert (report["abscissa"], report["varied"]) == ("gate_lr", ["gate_lr"])
    (preset,) = report["presets"].values()
    assert preset["optimum_log2_x"] == {"128": pytest.approx(0.3), "256": pytest.approx(0.3)}
    assert preset["transfers"] is True
    assert "the base width's gate LR factor costs" in report["verdict"]
    rows = list(_rows(tmp_path, learning_rates=("2^-9..2^-4",), vary=("gate_lr=2",)))
    assert "every run has gate_lr 2" in analyse(rows)["notes"]


def test_settings_stand_in_the_order_of_their_numbers(tmp_path):
    rows = list(_rows(tmp_path, learning_rates=("2^-9..2^-4",), vary=("gate_lr=16,4,0.5",)))
    assert list(analyse(rows)["presets"]) == ["mup, gate_lr 0.5", "mup, gate_lr 4", "mup, gate_lr 16"]


def test_each_decay_has_its_own_optimal_learning_rate(tmp_path):
    rows = list(_rows(tmp_path, learning_rates=("2^-9..2^-4",), vary=("weight_decay=0.0625,1",)))
    report = analyse(rows)
    assert (report["abscissa"], report["varied"]) == ("learning_rate", ["weight_decay"])
    places = {name: preset["optimum_log2_x"]["256"] for name, preset in report["presets"].items()}
    assert places == {"mup, weight_decay 0.0625": pytest.approx(-7), "mup, weight_decay 1": pytest.approx(-6)}


def test_rows_without_a_decay_have_the_configured_one_or_are_refused(tmp_path):
    rows = list(_rows(tmp_path, vary=("weight_decay=0.5",)))
    del rows[0]["weight_decay"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"keep sweep\.json beside"):
        read_rows(tmp_path / "rows.jsonl")
    (tmp_path / "sweep.json").write_text(json.dumps({"optimizer": {"weight_decay": 0.25}}))
    assert [row["weight_decay"] for row in read_rows(tmp_path / "rows.jsonl")] == [0.25, 0.5]


def test_no_decay_beside_another_is_reported(tmp_path):
    rows = list(_rows(tmp_path, vary=("weight_decay=0.5,0.125",)))
    del rows[0]["weight_decay"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sweep.json").write_text(json.dumps({"optimizer": {"weight_decay": 0.0}}))
    report = analyse(read_rows(tmp_path / "rows.jsonl"))
    assert report["abscissa"] == "learning_rate"
    assert set(report["presets"]) == {
        "mup, weight_decay 0",
        "mup, weight_decay 0.125",
        "mup, weight_decay 0.5",
    }
