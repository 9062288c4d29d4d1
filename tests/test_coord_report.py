"""The report of a coordinate check against rows with planted slopes."""

import io
import json
import math
import random

import numpy as np
import pytest
import tiny
from rich.console import Console

from train.config import ModelOptions, OptimizerOptions
from train.coord_bounds import QUANTITIES
from train.coord_figure import _labelled
from train.coord_report import analyse_coord, print_coord, write_coord_report
from train.coord_run import CoordOptions, run_coord_check

UPDATES = (
    "embedding",
    "readout",
    "final_norm/gain",
    "layers/mixer_norm/gain",
    "layers/mixer/o_norm/gain",
    "layers/mixer/conv_q/kernel",
    "layers/mixer/q/kernel",
    "layers/mixer/b/kernel",
    "layers/mixer/A_log",
)
WIDTHS = (64, 128, 256, 512)


def true_slope(preset, optimizer, regime, kind, quantity):
    """What theory says of the presets; 0 is right but for what a rule lets fade."""
    if regime == "head_dim" and (kind, quantity) in (("absolute", "gate_a"), ("absolute", "gate_b")):
        return -0.5
    if regime == "head_dim" and optimizer == "sgd" and quantity == "layers/mixer/o_norm/gain":
        return -1.0
    if (preset, kind) == ("sp", "change") and (optimizer == "adamw" or regime == "head_dim"):
        return 0.8
    frozen = "gain" in quantity or "conv" in quantity
    if frozen and (preset, optimizer, regime, kind) == ("sp", "sgd", "heads", "update"):
        return -1.0
    if (preset, optimizer, quantity) == ("mup_standard", "sgd", "layers/mixer/b/kernel"):
        return 0.5
    return -1.0 if kind == "gradient" else 0.0


def measured(
    optimizer="adamw",
    regime="heads",
    *,
    presets=("mup", "sp"),
    widths=WIDTHS,
    seeds=3,
    noise=0.02,
    planted=None,
):
    """`planted` maps (preset, kind, quantity) to another slope."""
    rng = np.random.default_rng(0)
    rows = []
    for preset in presets:
        for kind, names in (
            ("absolute", QUANTITIES),
            ("change", QUANTITIES),
            ("update", UPDATES),
            ("gradient", ("q", "v", "gate_a", "gate_b", "o")),
        ):
            for quantity in names:
                slope = (planted or {}).get(
                    (preset, kind, quantity), true_slope(preset, optimizer, regime, kind, quantity)
                )
                for step in (0, 2, 10) if kind == "absolute" else (2, 10):
                    rows += [
                        {
                            "preset": preset,
                            "optimizer": optimizer,
                            "regime": regime,
                            "width": width,
                            "seed": seed,
                            "step": step,
                            "kind": kind,
                            "quantity": quantity,
                            "size": float(0.3 * (width / 64) ** slope * 2 ** (noise * rng.normal())),
                        }
                        for width in widths
                        for seed in range(seeds)
                    ]
    return rows


def entry(analysis, preset, kind, quantity, step=10):
    key = (preset, kind, quantity, step)
    return next(e for e in analysis["entries"] if (e["preset"], e["kind"], e["quantity"], e["step"]) == key)


def test_planted_slopes_are_recovered():
    analysis = analyse_coord(measured())
    assert entry(analysis, "sp", "change", "q")["slope"] == pytest.approx(0.8, abs=0.02)
    assert entry(analysis, "mup", "change", "q")["slope"] == pytest.approx(0.0, abs=0.02)
    assert entry(analysis, "mup", "gradient", "q")["slope"] == pytest.approx(-1.0, abs=0.02)
    assert entry(analysis, "mup", "gradient", "q")["verdict"] == "reported"
    exact = analyse_coord(measured(noise=0.0))
    assert entry(exact, "sp", "change", "v")["slope"] == pytest.approx(0.8, abs=1e-6)
    assert entry(exact, "sp", "change", "v")["standard_error"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "regime", "presets"),
    [
        ("adamw", "heads", ("mup", "sp")),
        ("adamw", "head_dim", ("mup", "sp", "paper_code")),
        ("sgd", "heads", ("mup", "sp")),
        ("sgd", "head_dim", ("mup", "sp", "mup_standard")),
    ],
)
def test_right_slopes_and_wrong_controls_pass(optimizer, regime, presets):
    analysis = analyse_coord(measured(optimizer, regime, presets=presets))
    assert analysis["problems"] == []
    assert analysis["passed"] is True, analysis["verdict"]
    assert {c["preset"] for c in analysis["controls"]} == set(presets) - {"mup", "paper_code"}


@pytest.mark.parametrize(
    ("kind", "quantity", "slope"),
    [
        ("absolute", "state", -0.5),
        ("absolute", "residual", 0.15),
        ("change", "v", 0.3),
        ("change", "v", -0.3),
        ("change", "residual", 0.15),
        ("update", "layers/mixer/A_log", -1.0),
    ],
)
def test_one_wrong_slope_of_mup_is_noticed(kind, quantity, slope):
    analysis = analyse_coord(measured(planted={("mup", kind, quantity): slope}))
    assert analysis["passed"] is False
    assert entry(analysis, "mup", kind, quantity)["verdict"] == "fail"
    assert analysis["checks"][0]["mup"] == "fail"
    assert {name.split(" ")[0] for name in analysis["checks"][0]["mup_failed"]} == {quantity}
    assert quantity in analysis["verdict"]


@pytest.mark.parametrize(
    ("kind", "quantity", "slope"),
    [
        # As a matrix starts, and as if nothing had been learned; too much of what fades.
        ("absolute", "gate_b", 0.0),
        ("absolute", "gate_b", -0.8),
        ("change", "gate_a", -0.6),
        ("change", "gate_a", 0.3),
        # By the rule of the other gains.
        ("update", "layers/mixer/o_norm/gain", 0.0),
    ],
)
def test_what_a_rule_lets_fade_must_fade_as_it_says(kind, quantity, slope):
    presets = ("mup", "sp", "mup_standard")
    analysis = analyse_coord(
        measured("sgd", "head_dim", presets=presets, planted={("mup", kind, quantity): slope})
    )
    assert analysis["passed"] is False
    assert {name.split(" ")[0] for name in analysis["checks"][0]["mup_failed"]} == {quantity}


def test_where_head_counts_grow_gates_must_not_fade():
    fading = analyse_coord(measured(planted={("mup", "absolute", "gate_b"): -0.5}))
    assert {name.split(" ")[0] for name in fading["checks"][0]["mup_failed"]} == {"gate_b"}


def test_reported_quantities_do_not_decide():
    planted = {
        ("mup", "change", "logits"): 0.9,
        ("mup", "change", "o"): 0.9,
        ("mup", "change", "log_decay"): 0.9,
        ("mup", "update", "readout"): 1.0,
    }
    assert analyse_coord(measured(regime="head_dim", planted=planted))["passed"] is True
    # With heads growing, o is judged; still none of the others.
    failed = analyse_coord(measured(planted=planted))["checks"][0]["mup_failed"]
    assert [name.split(":")[0] for name in failed] == ["o (change, step 2", "o (change, step 10"]


def test_log_decay_is_judged_with_16_heads():
    planted = {("mup", "change", "log_decay"): 0.9}
    for heads, verdict in ((8, "reported"), (16, "fail")):
        rows = [row | {"value_heads": heads * row["width"] // 64} for row in measured(planted=planted)]
        assert entry(analyse_coord(rows), "mup", "change", "log_decay")["verdict"] == verdict
    # Where head dims grow it fades with W_a x, in no straight line.
    rows = [row | {"value_heads": 16} for row in measured(regime="head_dim", planted=planted)]
    assert entry(analyse_coord(rows), "mup", "change", "log_decay")["verdict"] == "reported"


def test_labels_of_widths_keep_apart():
    assert _labelled([256, 512, 768, 1024, 2048, 4096]) == {256, 512, 1024, 2048, 4096}
    assert _labelled([256, 384, 512, 640, 1024, 1280, 1536, 2048, 2560, 4096]) == {256, 512, 1024, 2048, 4096}
    assert _labelled([64, 128, 256, 512]) == {64, 128, 256, 512}


@pytest.mark.parametrize(
    ("optimizer", "regime", "planted"),
    [
        ("adamw", "heads", ("sp", "change", "gate_b")),
        ("sgd", "heads", ("sp", "update", "layers/mixer/conv_q/kernel")),
        ("sgd", "head_dim", ("sp", "change", "residual")),
        ("sgd", "head_dim", ("mup_standard", "update", "layers/mixer/b/kernel")),
    ],
)
def test_a_control_that_passes_spoils_the_check(optimizer, regime, planted):
    presets = ("mup", "sp", "mup_standard")
    analysis = analyse_coord(measured(optimizer, regime, presets=presets, planted={planted: 0.0}))
    assert analysis["checks"][0]["mup"] == "pass"
    assert analysis["checks"][0]["controls_fail"] is False
    assert analysis["passed"] is False
    kept = [(c["preset"], c["kind"], c["quantity"]) for c in analysis["controls"] if not c["fails"]]
    assert kept == [planted]
    assert "do not" in analysis["verdict"]


def test_controls_must_be_there():
    analysis = analyse_coord(measured(presets=("mup",)))
    assert analysis["passed"] is False
    assert "adamw, heads, sp: not measured" in analysis["problems"]
    analysis = analyse_coord(measured("sgd", "head_dim"))
    assert analysis["passed"] is False
    assert "sgd, head_dim, mup_standard: not measured" in analysis["problems"]


def test_an_uncertain_slope_is_no_pass():
    analysis = analyse_coord(measured(noise=0.4))
    assert analysis["passed"] is False
    verdicts = {e["verdict"] for e in analysis["entries"] if e["preset"] == "mup" and e["kind"] != "gradient"}
    assert "inconclusive" in verdicts
    uncertain = [e for e in analysis["entries"] if e["verdict"] in ("pass", "fail")]
    assert all(e["standard_error"] <= 0.05 for e in uncertain)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"widths": (64, 128, 256)}, "widths 64, 128, 256; it takes at least 4"),
        ({"widths": (64, 96, 128, 192)}, "spanning 8 times"),
        ({"widths": (32, 64, 128, 256)}, "from 64 up"),
        ({"seeds": 2}, "2 seeds; it takes at least 3"),
    ],
)
def test_a_measurement_that_is_too_small_proves_nothing(changes, problem):
    analysis = analyse_coord(measured(**changes))
    assert analysis["passed"] is False
    assert any(problem in p for p in analysis["problems"])


def test_what_was_not_measured_does_not_pass():
    rows = measured()
    for missing, problem in (
        (lambda r: r["kind"] == "change" and r["quantity"] == "state", "change size of state not measured"),
        (lambda r: r["kind"] == "update", "no parameter updates"),
        (lambda r: r["step"] == 0, "step 0 not measured"),
        (lambda r: r["quantity"] == "q" and r["kind"] == "change" and r["width"] > 128, "widths 64, 128;"),
    ):
        analysis = analyse_coord([row for row in rows if row["preset"] == "sp" or not missing(row)])
        assert analysis["passed"] is False
        assert any(problem in p for p in analysis["problems"]), problem


@pytest.mark.parametrize(
    ("size", "remark"), [(0.0, "exactly zero at width 128"), (float("nan"), "not finite")]
)
def test_zero_and_not_finite_sizes_fail_mup_and_excuse_no_control(size, remark, tmp_path):
    rows = measured()
    for row in rows:
        if (row["kind"], row["quantity"], row["width"]) == ("change", "q", 128) and row["step"] in (2, 10):
            row["size"] = size
    analysis = write_coord_report(rows, tmp_path / "x")
    assert entry(analysis, "mup", "change", "q")["verdict"] == "fail"
    assert remark in entry(analysis, "mup", "change", "q")["remark"]
    (control,) = (c for c in analysis["controls"] if c["quantity"] == "q")
    assert control["fails"] is False
    assert analysis["passed"] is False


def test_same_rows_same_bytes_in_any_order(tmp_path):
    rows = measured(seeds=2)
    write_coord_report(rows, tmp_path / "a")
    random.Random(0).shuffle(rows)
    analysis = write_coord_report(rows, tmp_path / "b")
    for name in ("coord.json", "coord.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "coord.json").read_text()) == analysis


def test_figure_and_table_of_many_presets(tmp_path):
    presets = ("mup", "mup_standard", "paper_code", "sp", "sp_constant")
    rows = measured("sgd", "head_dim", presets=presets) + measured()
    analysis = write_coord_report(rows, tmp_path)
    assert (tmp_path / "coord.png").stat().st_size > 50_000
    text = io.StringIO()
    print_coord(analysis, Console(file=text, width=80))
    shown = text.getvalue()
    assert "layers/mixer/conv_q/kernel" in shown, "no name is cut, however narrow the terminal"
    assert "must fail: yes" in shown
    assert "must fail: NO" not in shown
    assert "Coordinate check passed." in shown


@pytest.mark.parametrize(
    ("planted", "code"),
    [({}, 0), ({("mup", "change", "v"): 0.3}, 1), ({("sp", "change", "gate_b"): 0.0}, 1)],
    ids=["right", "mup_fails", "a_control_passes"],
)
def test_exit_code(planted, code, tmp_path, monkeypatch):
    rows = measured(planted=planted)

    monkeypatch.setattr("gdn_jax.mup.coord_check.measure", measure_from(rows))
    returned, _ = checked(tmp_path, seeds=(0, 1, 2))
    assert returned == code
    assert (tmp_path / "out/coord.png").is_file()


def measure_from(rows, calls=None, most=math.inf):
    """Stands for `measure`: takes ``rows``; the call after ``most`` is interrupted."""
    calls = [] if calls is None else calls

    def measure(config, *, preset, seeds, **_):
        points = [(config.width, preset, seed) for seed in seeds]
        if len(calls) == most:
            raise KeyboardInterrupt
        calls.append(points)
        return [row for row in rows if (row["width"], row["preset"], row["seed"]) in points]

    return measure


def checked(tmp_path, learning_rate=None, **options):
    text = io.StringIO()
    check = CoordOptions(tmp_path / "out", learning_rate=learning_rate, **options)
    data = tiny.data_config(tmp_path)
    code = run_coord_check(check, ModelOptions(), OptimizerOptions(), data, Console(file=text, width=200))
    return code, text.getvalue()


def test_a_check_that_was_stopped_goes_on_and_takes_more_seeds(tmp_path, monkeypatch):
    rows, first, second, third = measured(seeds=4), [], [], []
    monkeypatch.setattr("gdn_jax.mup.coord_check.measure", measure_from(rows, first, most=7))
    with pytest.raises(KeyboardInterrupt):
        checked(tmp_path, seeds=(0, 1, 2))
    monkeypatch.setattr("gdn_jax.mup.coord_check.measure", measure_from(rows, second))
    returned, said = checked(tmp_path, seeds=(0, 1, 2))
    assert returned == 0
    assert "going on: 7 of 24 models are measured already\n" in said
    assert len(second) == 24 - 7
    assert not [point for point in second if point in first]
    at_once = tmp_path / "at_once"
    write_coord_report([row for row in rows if row["seed"] < 3], at_once)
    assert (tmp_path / "out/coord.json").read_bytes() == (at_once / "coord.json").read_bytes()
    monkeypatch.setattr("gdn_jax.mup.coord_check.measure", measure_from(rows, third))
    checked(tmp_path, seeds=(0, 1, 2, 3))
    assert {seed for ((_, _, seed),) in third} == {3}


def test_a_folder_of_another_check_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("gdn_jax.mup.coord_check.measure", measure_from(measured()))
    checked(tmp_path, seeds=(0, 1, 2))
    with pytest.raises(ValueError, match=r"another configuration \(learning_rate 0.00390625 -> 0.0078125\)"):
        checked(tmp_path, seeds=(0, 1, 2), learning_rate=2.0**-7)
    with (tmp_path / "out/coord_rows.jsonl").open("a") as file:
        file.write('{"width": 64}\n')
    with pytest.raises(ValueError, match=r"is damaged .*choose another --out"):
        checked(tmp_path, seeds=(0, 1, 2))
    (tmp_path / "out/coord_config.json").unlink()
    with pytest.raises(ValueError, match=r"has coord_rows\.jsonl but no coord_config\.json"):
        checked(tmp_path, seeds=(0, 1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantity": "qq"}, "quantity must be one of embedding"),
        ({"kind": "size"}, "kind must be one of absolute, .*; got 'size'"),
        ({"regime": "a"}, "regime must be one of heads, head_dim"),
        ({"optimizer": "adam"}, "optimizer must be one of adamw, sgd"),
    ],
)
def test_unknown_words_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        analyse_coord([measured()[0] | change])


def test_no_rows_missing_keys_and_repetitions_are_refused():
    row = measured()[0]
    with pytest.raises(ValueError, match="has no rows"):
        analyse_coord([])
    with pytest.raises(ValueError, match="row 1 lacks size"):
        analyse_coord([{key: value for key, value in row.items() if key != "size"}])
    with pytest.raises(ValueError, match="row 2 repeats"):
        analyse_coord([row, row])
