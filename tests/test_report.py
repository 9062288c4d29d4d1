"""The sweep report against rows whose truth is planted."""

import errno
import io
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from report_cases import BASE_OPTIMUM, WIDTHS, basin, half_octaves, ledger, row
from rich.console import Console

from train.faults import RunFailedError
from train.report import analyse, read_rows, table, write_report


def test_planted_optima_drift_and_regret_are_recovered_exactly():
    report = analyse(basin("mup", 0.0) + basin("sp", -1.0))
    mup, sp = report["presets"]["mup"], report["presets"]["sp"]
    for index, width in enumerate(WIDTHS):
        assert mup["optimum_log2_x"][str(width)] == pytest.approx(BASE_OPTIMUM, abs=1e-6)
        assert sp["optimum_log2_x"][str(width)] == pytest.approx(BASE_OPTIMUM - index, abs=1e-6)
        assert mup["minimum_nats"][str(width)] == pytest.approx(4 - 0.2 * index, abs=1e-6)
    assert (mup["drift_octaves_per_doubling"], sp["drift_octaves_per_doubling"]) == pytest.approx(
        (0, -1), abs=1e-6
    )
    assert (mup["shift_octaves"], sp["shift_octaves"]) == pytest.approx((0, -2), abs=1e-6)
    # The run stands 0.2 octave beside the optimum of -7.3, two octaves beside that of sp.
    assert mup["regret_run"]["log2_x"] == -7.5
    assert mup["regret_run"]["distance_octaves"] == pytest.approx(-0.2, abs=1e-6)
    assert mup["regret_nats"] == pytest.approx(0.05 * 0.2**2, abs=1e-6)
    assert sp["regret_nats"] == pytest.approx(0.05 * 1.8**2, abs=1e-6)
    assert (mup["transfers"], sp["transfers"]) == (True, False)
    assert (mup["proxy_from_width"], sp["proxy_from_width"]) == (128, None)
    assert mup["edge_minima"] == sp["edge_minima"] == []
    assert report["widths"] == [64, 128, 256]
    assert report["seeds"] == [0]


def test_fewer_than_five_seeds_give_no_interval():
    for seeds, there in ((4, False), (5, True)):
        preset = analyse(basin("mup", -0.1, seeds=seeds, noise=0.01))["presets"]["mup"]
        assert [interval is not None for interval in preset["interval"].values()] == [there] * 3
        assert (preset["drift_interval"] is not None) is there
        assert (preset["regret_standard_error"] is not None) is there
        assert preset["drift_octaves_per_doubling"] == pytest.approx(-0.1, abs=0.1)
    for width, (low, high) in preset["interval"].items():
        assert low < preset["optimum_log2_x"][width] < high
    low, high = preset["drift_interval"]
    assert low < preset["drift_octaves_per_doubling"] < high


def test_offsets_that_all_learning_rates_of_a_seed_share_leave_no_uncertainty():
    """Resampling seeds per learning rate, not jointly, would blow the intervals up."""
    rows = basin("mup", 0.0, seeds=5)
    for r in rows:
        r["val_loss"] += 0.3 * r["seed"]
    for low, high in analyse(rows)["presets"]["mup"]["interval"].values():
        assert high - low < 1e-5


def test_intervals_of_five_seeds_cover_about_95_percent():
    rng = np.random.default_rng(1)
    template = basin("mup", 0.0, widths=(128, 256), grid=(-9.0, -5.5), seeds=5)
    covered = []
    for _ in range(150):
        rows = [r | {"val_loss": r["val_loss"] + 0.003 * rng.normal()} for r in template]
        preset = analyse(rows)["presets"]["mup"]
        for interval in preset["interval"].values():
            if interval:
                covered.append(interval[0] <= BASE_OPTIMUM <= interval[1])
    # 1,000 trials gave 0.936, plain percentiles 0.858; 300 have a standard error of 0.014.
    assert len(covered) == 300
    assert np.mean(covered) > 0.9


def test_seeds_only_near_the_optimum_do_not_bias_it():
    """Seed 0 alone was lucky: a plain mean would put the minimum where only seed 0 ran."""
    rows = basin("mup", 0.0, seeds=5)
    rows = [r for r in rows if r["seed"] == 0 or abs(np.log2(r["learning_rate"]) - -7.5) < 1.01]
    for r in rows:
        r["val_loss"] -= 1.0 if r["seed"] == 0 else 0.0
    preset = analyse(rows)["presets"]["mup"]
    assert list(preset["optimum_log2_x"].values()) == pytest.approx([BASE_OPTIMUM] * 3, abs=1e-5)
    assert None not in preset["interval"].values()


def test_a_run_that_blew_up_is_not_charged_to_its_seed():
    """With it in the seed's effect, rates that only this seed ran would seem better by a share of it."""
    rows = basin("mup", 0.0, seeds=5)
    rows = [r for r in rows if not r["seed"] or abs(np.log2(r["learning_rate"]) + 7.5) < 1.01]
    expected = analyse(rows)["presets"]["mup"]["best_run"]["64"]
    for r in rows:
        if r["seed"] == 0 and r["learning_rate"] == 2.0**-6.5:
            r["val_loss"] += 1.4
    assert analyse(rows)["presets"]["mup"]["best_run"]["64"] == pytest.approx(expected, abs=1e-6)


def test_learning_rates_without_a_common_seed_cannot_be_compared():
    rows = [row(learning_rate=2.0**-k, seed=k % 2) for k in range(4, 12)]
    with pytest.raises(ValueError, match="mup, width 64: some learning rates share no seed"):
        analyse(rows)


@pytest.mark.parametrize(
    ("grid", "end", "side"), [((-11.0, -9.0), "highest", 1), ((-6.5, -4.0), "lowest", -1)]
)
def test_a_minimum_on_the_grids_edge_is_no_number(grid, end, side):
    report = analyse(basin("mup", 0.0, grid=grid))
    preset = report["presets"]["mup"]
    assert preset["edge_minima"] == [64, 128, 256]
    assert list(preset["optimum_log2_x"].values()) == [None] * 3
    assert list(preset["edge_side"].values()) == [side] * 3
    assert end in preset["reason"]["64"]
    assert preset["drift_octaves_per_doubling"] is None
    assert preset["regret_nats"] is None
    assert preset["transfers"] is None
    assert "no optimum at widths 64, 128 and 256" in report["verdict"]


def test_a_single_edge_minimum_withholds_the_drift():
    preset = analyse(basin("sp", -1.0, grid=(-9.5, -5.0)))["presets"]["sp"]
    assert preset["edge_minima"] == [256]
    assert preset["optimum_log2_x"]["128"] == pytest.approx(BASE_OPTIMUM - 1, abs=1e-6)
    assert preset["drift_octaves_per_doubling"] is None
    assert preset["drift_reason"] == "no optimum at width 256"


def test_too_few_points_near_the_best_are_no_optimum():
    """Whole-octave grids, and neighbours that diverged."""
    coarse = analyse(basin("mup", 0.0, step=1.0))["presets"]["mup"]
    assert coarse["optimum_log2_x"]["64"] is None
    assert "half-octave" in coarse["reason"]["64"]
    assert coarse["edge_minima"] == []
    diverged = analyse(basin("mup", 0.0, diverged_above=-6.8))["presets"]["mup"]
    assert diverged["optimum_log2_x"]["64"] is None
    assert "not counting 1 that diverged or blew up" in diverged["reason"]["64"]
    assert diverged["diverged_log2_x"]["64"][0] == -6.5
    at_the_brink = analyse(basin("mup", 0.0, diverged_above=-7.4))["presets"]["mup"]
    assert at_the_brink["edge_minima"] == [64, 128, 256]
    assert "largest that did not diverge" in at_the_brink["reason"]["64"]


def test_one_diverged_seed_makes_its_learning_rate_diverged():
    rows = basin("mup", 0.0, seeds=3)
    for r in rows:
        if r["learning_rate"] == 2.0**-6 and r["seed"] == 1:
            r.update(val_loss=None, diverged_at_step=5)
    preset = analyse(rows)["presets"]["mup"]
    assert preset["diverged_log2_x"] == {"64": [-6.0], "128": [-6.0], "256": [-6.0]}
    # Beyond the octave: the fit does not need it.
    assert preset["optimum_log2_x"]["64"] == pytest.approx(BASE_OPTIMUM, abs=1e-6)


def test_all_diverged_and_a_concave_curve_are_no_optimum():
    preset = analyse(basin("mup", 0.0, diverged_above=-20))["presets"]["mup"]
    assert preset["reason"]["64"] == "every learning rate diverged"
    assert preset["best_run"]["64"] is None
    # The best point hangs below an otherwise concave curve.
    preset = analyse(half_octaves(4.0, 4.3, 3.99, 4.3, 4.0))["presets"]["mup"]
    assert preset["edge_minima"] == [64]
    assert "no minimum among its points" in preset["reason"]["64"]


def test_a_minimum_far_from_the_best_point_is_no_optimum():
    """Two points on each side of the best one, one beyond the minimum: another window would have another minimum."""
    rows = half_octaves(3.812, 3.811, 3.81, 3.97, 4.2)
    preset = analyse(rows)["presets"]["mup"]
    assert preset["optimum_log2_x"]["64"] is None
    assert "around 2^-7 has its minimum at 2^-7.53, and 1 of its points beyond" in preset["reason"]["64"]
    # A quarter octave further there are two.
    rows.append(row(learning_rate=2.0**-7.75, val_loss=3.811))
    assert analyse(rows)["presets"]["mup"]["optimum_log2_x"]["64"] == pytest.approx(-7.51, abs=0.02)


def test_a_run_that_blew_up_is_not_fitted():
    """It ended in a number, which would pull the quadratic under all that ran."""
    rows = half_octaves(3.91, 3.85, 3.81, 3.85, 5.37)
    preset = analyse(rows)["presets"]["mup"]
    assert preset["optimum_log2_x"]["64"] is None
    assert "1 above (not counting 1 that diverged or blew up)" in preset["reason"]["64"]
    assert preset["edge_minima"] == []
    # On a finer grid the others are enough, and a run that merely ends higher is fitted.
    rows.append(row(learning_rate=2.0**-6.75, val_loss=3.82))
    assert analyse(rows)["presets"]["mup"]["optimum_log2_x"]["64"] == pytest.approx(-7.0, abs=0.05)
    rows[-2] = row(learning_rate=2.0**-6, val_loss=4.0)
    assert analyse(rows)["presets"]["mup"]["fit_rms_nats"]["64"] < 0.02
    # One of five seeds is enough, though their mean is 0.39 nats up.
    rows = [row(**r | {"seed": s}) for r in rows[:5] for s in range(5)]
    rows[-1]["val_loss"] += 1.0
    assert "1 above (not counting 1" in analyse(rows)["presets"]["mup"]["reason"]["64"]
    # One between the best and a sound one does not count for it.
    rows = [row(learning_rate=2.0 ** (-8 + i / 4), val_loss=4.0 - i / 50) for i in range(5)]
    rows += [row(learning_rate=2.0**-6.5, val_loss=5.37), row(learning_rate=2.0**-6, val_loss=4.0)]
    assert "1 above (not counting 1" in analyse(rows)["presets"]["mup"]["reason"]["64"]


def test_regret_of_a_diverged_run_is_said_and_a_missing_run_is_not_made_up():
    rows = basin("sp", -1.0)
    for r in rows:
        if r["width"] == 256 and r["learning_rate"] > 2.0**-7.8:
            r.update(val_loss=None, diverged_at_step=5)
    report = analyse(rows)
    preset = report["presets"]["sp"]
    assert preset["regret_nats"] is None
    assert preset["regret_diverged"] is True
    assert preset["transfers"] is False
    assert "diverges at width 256" in report["verdict"]
    short = [r for r in basin("sp", -1.0) if r["width"] != 256 or r["learning_rate"] < 2.0**-7.8]
    preset = analyse(short)["presets"]["sp"]
    assert preset["regret_nats"] is None
    assert preset["regret_diverged"] is False
    assert "no run at width 256 within half an octave of 2^-7.3" in preset["regret_reason"]


def test_learning_rates_typed_with_two_digits_are_half_octaves():
    rows = [r | {"learning_rate": float(f"{r['learning_rate']:.1e}")} for r in basin("mup", 0.0)]
    preset = analyse(rows)["presets"]["mup"]
    # The losses were planted at exact places, so typing moves the optimum, but by no more than these.
    assert list(preset["optimum_log2_x"].values()) == pytest.approx([BASE_OPTIMUM] * 3, abs=0.05)


def test_base_width_note_tells_agreement_and_disagreement():
    rows = basin("mup", 0.0) + basin("sp", -1.0)
    assert "so are their losses" in analyse(rows)["notes"][0]
    rows[0]["val_loss"] += 0.1
    assert "differ by up to 0.1000 nats" in analyse(rows)["notes"][0]


def test_same_rows_same_bytes_in_any_order(tmp_path):
    rows = basin("mup", -0.05, seeds=5, noise=0.01, diverged_above=-5.4) + basin(
        "sp", -1.0, seeds=5, noise=0.01
    )
    write_report(ledger(tmp_path / "a", rows))
    shuffled = rows + rows[:3]
    random.Random(0).shuffle(shuffled)
    report = write_report(ledger(tmp_path / "b", shuffled))
    for name in ("report.json", "transfer.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "b" / "report.json").read_text()) == report
    assert (tmp_path / "a" / "transfer.png").read_bytes().startswith(b"\x89PNG")


def test_table_and_verdict_read_well():
    report = analyse(
        basin("mup", 0.0, grid=(-10, -6)) + basin("sp", -1.0, grid=(-10, -6), diverged_above=-6.4)
    )
    text = io.StringIO()
    Console(file=text, width=160).print(table(report))
    shown = text.getvalue()
    assert "6.35e-03" in shown  # 2^-7.3
    assert "Transfer over width" in shown
    assert report["verdict"][:60] in shown
    verdict = report["verdict"]
    assert verdict.startswith(
        "Over widths 64, 128 and 256 (adamw, regime heads, 819 k tokens a run, 1 seed, no interval), "
    )
    assert "the optimum of mup transfers, moving 0.00 octave per doubling" in verdict
    assert "sp has no drift to state (no optimum at width 256)" in verdict
    assert verdict.endswith("widths up to 64 are narrower than the theory speaks of.")
    # Seeds that a fit of another width lacks are none of its own.
    more = basin("mup", 0.0, seeds=2) + basin("mup", 0.0, seeds=3, widths=(64,))
    assert "2 to 3 seeds, no interval" in analyse(more)["verdict"]


def test_a_half_written_last_line_is_left_out(tmp_path):
    directory = ledger(tmp_path / "x", [row(), row(seed=1)])
    path = directory / "rows.jsonl"
    whole = path.read_bytes()
    for cut in (1, 20, 100):
        path.write_bytes(whole + json.dumps(row(seed=2)).encode()[:cut])
        assert [r["seed"] for r in read_rows(path)] == [0, 1]
    # Cut inside a letter of two bytes.
    path.write_bytes(whole + '{"preset": "µ'.encode()[:-1])
    assert len(read_rows(path)) == 2
    path.write_bytes(whole + b'{"preset\n' + whole)
    with pytest.raises(ValueError, match="line 3, is not JSON"):
        read_rows(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no finished run yet"),
        ([{"preset": "mup"}], "row 1 lacks optimizer, regime"),
        ([row(), row(optimizer="sgd", seed=1)], r"different optimizer \(adamw, sgd\)"),
        ([row(), row(regime="head_dim", seed=1)], "different regime"),
        ([row(), row(steps=3, seed=1)], "different steps"),
        ([row(), row(tokens=3, seed=1)], "different tokens"),
        ([row(), row(config_fingerprint="f1", seed=1)], "different config_fingerprint"),
        ([row(), row(base_width=32, seed=1)], "different base_width"),
        ([row(), row(val_loss=4.5)], "twice, with val_loss 4.0 and 4.5"),
        ([row(learning_rate=0.0)], "learning_rate must be positive and finite; got 0.0"),
        ([row(learning_rate=float("nan"))], "learning_rate must be positive"),
        ([row(preset=3)], "preset must be a name and seed a whole number; got 3 and 0"),
        ([row(seed=[1])], "seed a whole number; got 'mup'"),
        ([row(width="64")], "width must be a number; got '64'"),
        ([row(val_loss=float("nan"))], "val_loss must be a finite number"),
        ([row(val_loss=None)], "must be null exactly where diverged_at_step is not"),
        ([row(diverged_at_step=3)], "must be null exactly where diverged_at_step is not"),
    ],
)
def test_rows_that_cannot_be_judged_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_rows(ledger(tmp_path / "x", rows) / "rows.jsonl")
    with pytest.raises(ValueError, match=message):
        analyse(rows)


def test_a_full_disk_is_one_clear_line_and_leaves_the_report(tmp_path, monkeypatch):
    folder = ledger(tmp_path / "x", basin("mup", 0.0))
    write_report(folder)
    before = (folder / "report.json").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("train.ledger.os.replace", full)
    with pytest.raises(RunFailedError, match=r"no space left in .*; the rows are as they were"):
        write_report(folder)
    assert [path.name for path in sorted(folder.iterdir())] == ["report.json", "rows.jsonl", "transfer.png"]
    assert (folder / "report.json").read_bytes() == before


def test_a_missing_ledger_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="does not exist; name the folder that `gdn sweep --out` wrote"):
        write_report(tmp_path)


def test_reports_need_no_jax():
    unwanted = "{'jax', 'matplotlib.pyplot'} & sys.modules.keys()"
    code = f"import sys, train.report, train.coord_report; assert not {unwanted}"
    subprocess.run([sys.executable, "-c", code], check=True)
