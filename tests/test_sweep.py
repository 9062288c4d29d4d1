"""The sweep: grids, packs, the ledger, what a kill leaves behind."""

import dataclasses
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import pytest
import tiny

from train import loop
from train.interrupts import Stopped, StopRequests
from train.ledger import Ledger, check_identity, only_process
from train.rates import parse_rates
from train.report import write_report
from train.rows import _First
from train.step import TrainState
from train.stopped_packs import StoppedPacks, TrainedPack
from train.sweep import run_sweep
from train.sweep_lanes import _run_all
from train.sweep_options import SweepOptions
from train.sweep_plan import Lane
from train.sweep_points import Point, Progress, packs, plan_points

ROOT = pathlib.Path(__file__).parents[1]


def _options(folder, **changes):
    settings = {
        "out": folder / "out",
        "widths": (8, 16),
        "learning_rates": ("2^-6", "2^-5"),
        "presets": ("mup", "sp"),
        "steps": 4,
    }
    return SweepOptions(**(settings | changes))


def _without_timing(row):
    return {key: value for key, value in row.items() if key != "seconds"}


def test_rates():
    assert parse_rates(("2^-3",)) == (0.125,)
    assert parse_rates(("2^-3..2^-2",)) == (0.125, 2**-2.5, 0.25)
    assert parse_rates(("0.1", "0.01", "0.1")) == (0.01, 0.1)
    # Ranges that begin on a half octave meet those that do not, exactly.
    assert set(parse_rates(("2^-8.5..2^-3.5",))) <= set(parse_rates(("2^-9..2^-3",)))
    assert parse_rates(("0.01..0.02",)) == pytest.approx((0.01, 0.01 * 2**0.5, 0.02), rel=1e-15)
    # No further than the end.
    assert parse_rates(("2^-8..2^-7.2",)) == (2**-8, 2**-7.5)
    assert parse_rates(("0.01..0.017",))[-1] < 0.017
    for wrong, message in (
        ("0", "positive and finite; got 0"),
        ("-1", "positive and finite; got -1"),
        ("nan", "positive and finite"),
        ("1e", "must be numbers"),
        ("2^-2..2^-3", "must ascend"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_rates((wrong,))


def test_grids_shift_and_are_replaced(tmp_path):
    options = _options(
        tmp_path, widths=(8, 16, 32), shifts=("sp=-1",), grids=("mup@16=2^-9..2^-8,0.5", "*@8=2^-7")
    )
    assert options.grid("sp", 32, 8) == (2**-8, 2**-7)
    assert options.grid("mup", 32, 8) == (2**-6, 2**-5)
    assert options.grid("mup", 16, 8) == (2**-9, 2**-8.5, 2**-8, 0.5)
    assert options.grid("sp", 8, 8) == (2**-7,)


def test_packs_follow_from_the_plan_and_are_full(tmp_path):
    plan = plan_points(_options(tmp_path, seeds=(0, 1)), base_width=8)
    assert list(plan) == [8, 16]
    assert len(plan[8]) == 8
    assert plan[8][1] == Point("mup", 8, 2**-6, 1)
    cut = packs(plan[8], 3)
    assert [len(pack) for pack in cut] == [3, 3, 3]
    assert cut[2][1] == cut[2][2] == plan[8][-1]
    assert packs([], 3) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": ()}, "--widths must name at least one"),
        ({"widths": (8, 8)}, "--widths must not repeat"),
        ({"widths": (-8,)}, "--widths must be positive; got -8"),
        ({"seeds": (-1,)}, "--seeds must be in"),
        ({"steps": 0}, "--steps must be positive; got 0"),
        ({"points_per_device": 0}, "--points-per-device must be positive"),
        ({"presets": ()}, "--presets must name at least one"),
        ({"learning_rates": ("0",)}, "--learning-rates must be positive"),
        ({"shifts": ("sp",)}, "--shifts must be PRESET=OCTAVES"),
        ({"shifts": ("paper_code=1",)}, "--shifts must name a preset of --presets"),
        ({"grids": ("sp=2",)}, "--grids must be PRESET@WIDTH=RATES"),
        ({"grids": ("sp@64=2",)}, "--grids must name a width"),
    ],
)
def test_wrong_options(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        _options(tmp_path, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    options = _options(folder)
    rows = run_sweep(options, tiny.MODEL, tiny.OPTIMIZER, tiny.data_config(folder))
    return folder, options, rows


def test_rows(finished):
    _, options, rows = finished
    assert [(r["width"], r["preset"], r["learning_rate"]) for r in rows] == [
        (w, p, lr) for w in (8, 16) for p in ("mup", "sp") for lr in (2**-6, 2**-5)
    ]
    on_disk = [json.loads(line) for line in (options.out / "rows.jsonl").read_text().splitlines()]
    assert on_disk == rows
    row = rows[-1]
    assert row["steps"] == 4
    assert row["tokens"] == 4 * 8 * 16
    assert row["optimizer"] == "adamw"
    assert row["regime"] == "heads"
    assert row["base_width"] == 8
    assert row["diverged_at_step"] is None
    assert 1 < row["val_loss"] < 5.6
    assert {"code_version", "config_fingerprint", "device", "seconds"} <= row.keys()
    at_base = {(r["preset"], r["learning_rate"]): r["val_loss"] for r in rows if r["width"] == 8}
    assert at_base["mup", 2**-5] == at_base["sp", 2**-5]


def test_packed_points_give_the_same_rows(finished):
    folder, _, rows = finished
    again = run_sweep(
        _options(folder, out=folder / "packed", points_per_device=3),
        tiny.MODEL,
        tiny.OPTIMIZER,
        tiny.data_config(folder),
    )
    for row, other in zip(rows, again, strict=True):
        assert other["val_loss"] == pytest.approx(row["val_loss"], abs=1e-5)


def test_a_finished_point_is_not_repeated_and_half_a_line_is_not_trusted(finished):
    folder, options, rows = finished
    path = options.out / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    # The last point of width 8 half written, those of width 16 not yet run.
    path.write_text("".join(lines[:3]) + lines[3][:40])

    class Count(Progress):
        packs = 0

        def finished(self, rows, skipped_work):
            self.packs += 1

    count = Count()
    again = run_sweep(options, tiny.MODEL, tiny.OPTIMIZER, tiny.data_config(folder), count)
    assert count.packs == 5
    assert list(map(_without_timing, again)) == list(map(_without_timing, rows))
    assert len(path.read_text().splitlines()) == 8


def test_more_seeds_repeat_nothing(finished):
    folder, options, _ = finished
    out = folder / "seeds"
    shutil.copytree(options.out, out)

    class Count(Progress):
        packs = ()

        def finished(self, rows, skipped_work):
            self.packs += (sorted((row["preset"], row["learning_rate"], row["seed"]) for row in rows),)

    count = Count()
    # Seeds follow each other in the plan: packs of it would hold a finished point and a new one.
    rows = run_sweep(
        _options(folder, out=out, widths=(8,), seeds=(0, 1), points_per_device=2),
        tiny.MODEL,
        tiny.OPTIMIZER,
        tiny.data_config(folder),
        count,
    )
    assert len(rows) == 8
    assert count.packs == (
        [("mup", 2**-6, 1), ("mup", 2**-5, 1)],
        [("sp", 2**-6, 1), ("sp", 2**-5, 1)],
    )
    assert len((out / "rows.jsonl").read_text().splitlines()) == 12


def test_an_attempt_that_ran_nothing_binds_no_folder(tmp_path):
    Ledger(tmp_path, {"a": 1})
    Ledger(tmp_path, {"a": 2})
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped/some.pack").write_bytes(b"half of a run")
    with pytest.raises(ValueError, match="a 2 -> 3"):
        Ledger(tmp_path, {"a": 3})


def test_a_ledger_of_another_configuration_is_refused(finished):
    folder, options, _ = finished
    with pytest.raises(ValueError, match=r"another configuration \(data.batch_size 8 -> 4\)"):
        run_sweep(options, tiny.MODEL, tiny.OPTIMIZER, tiny.data_config(folder, batch_size=4))


def test_a_damaged_line_is_named(tmp_path):
    check_identity(tmp_path, "sweep.json", {"a": 1})
    (tmp_path / "rows.jsonl").write_text('{"preset": "mup"}\n')
    with pytest.raises(ValueError, match="line 1 is no row"):
        Ledger(tmp_path, {"a": 1})


def test_rows_without_their_configuration_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(ValueError, match="choose an empty folder"):
        Ledger(tmp_path, {"a": 1})


def test_one_process_at_a_time(tmp_path):
    with only_process(tmp_path), pytest.raises(ValueError, match="in use by another gdn process"):
        with only_process(tmp_path):
            pass


def test_diverged_points_do_not_stop_the_others(tmp_path):
    options = _options(tmp_path, widths=(8,), presets=("mup",), learning_rates=("2^-5", "1e38"))
    fine, diverged = run_sweep(options, tiny.MODEL, tiny.OPTIMIZER, tiny.data_config(tmp_path))
    assert fine["val_loss"] is not None
    assert diverged["val_loss"] is None
    assert diverged["diverged_at_step"] in (2, 3)


def test_a_last_step_that_goes_too_far_is_a_divergence(tmp_path):
    """Loss and gradient of the only step are those of the start; its update is what overflows."""
    options = _options(tmp_path, widths=(8,), presets=("mup",), learning_rates=("2^-5", "1e38"), steps=1)
    fine, diverged = run_sweep(options, tiny.MODEL, tiny.OPTIMIZER, tiny.data_config(tmp_path))
    assert (fine["val_loss"] is not None, fine["diverged_at_step"]) == (True, None)
    assert (diverged["val_loss"], diverged["diverged_at_step"]) == (None, 1)
    assert write_report(options.out)["runs_diverged"] == 1


@pytest.mark.slow
def test_killed_three_times_it_ends_with_the_same_rows(finished):
    """kill -9 at three moments: after the first row, after the third, and while it compiles or trains."""
    folder, _, rows = finished
    out = folder / "killed"
    corpus = tiny.write_corpus(folder)
    words = [
        sys.executable, "-m", "train", "sweep", "--out", str(out), "--widths", "8", "16",
        "--learning-rates", "2^-6", "2^-5", "--steps", "4",
        "--model.layers", "1", "--model.key-dim", "8", "--model.value-dim", "8",
        "--optimizer.weight-decay", "0.1",
        "--data.corpus", str(corpus), "--data.cache-dir", str(folder / "cache"),
        "--data.sequence-length", "16", "--data.batch-size", "8", "--data.validation-batches", "2",
        "--data.validation-fraction", "0.2",
    ]  # fmt: skip
    # One device and no optimizations, as here: otherwise it is the same up to rounding, not the same bits.
    as_here = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | as_here
    path = out / "rows.jsonl"

    def count():
        return len(path.read_text().splitlines()) if path.exists() else 0

    for wanted in (1, 3, 5):
        process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while count() < wanted and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert count() >= wanted
    subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
    killed = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(killed) == 8
    # The order of the plan, in which one process would have written them.
    assert list(map(_without_timing, killed)) == list(map(_without_timing, rows))
    assert (out / "transfer.png").exists()


def test_told_to_stop_while_it_validates_it_trains_no_step_twice(finished, tmp_path, monkeypatch):
    folder, options, rows = finished
    options = dataclasses.replace(options, out=tmp_path / "out", widths=(8,))
    validate, trained = loop.mean_validation_loss, []

    def told_to_stop(compiled, state, batches, stop):
        signal.raise_signal(signal.SIGTERM)
        return validate(compiled, state, batches, stop)

    monkeypatch.setattr(loop, "mean_validation_loss", told_to_stop)
    with pytest.raises(Stopped):
        run_sweep(options, tiny.MODEL, tiny.OPTIMIZER, tiny.data_config(folder))
    monkeypatch.setattr(loop, "mean_validation_loss", validate)
    train = loop.run

    def seen(*arguments, first_step, **more):
        trained.append(first_step)
        return train(*arguments, first_step=first_step, **more)

    monkeypatch.setattr(loop, "run", seen)
    again = run_sweep(options, tiny.MODEL, tiny.OPTIMIZER, tiny.data_config(folder))
    assert max(trained) == options.steps
    expected = [row for row in rows if row["width"] == 8]
    assert list(map(_without_timing, again)) == list(map(_without_timing, expected))


def _packed_state(*values):
    points = jnp.array(values)
    return TrainState({"w": jnp.outer(points, jnp.ones(3))}, {}, (), points, -points)


def test_a_stopped_pack_goes_on_filled_up_to_another_size(tmp_path):
    stopped = StoppedPacks(tmp_path, "config")
    first, last = (("mup", 8, rate, 0, ()) for rate in (0.01, 0.02))
    stopped.save([first, last, last, last], TrainedPack(_packed_state(1, 2, 2, 2), 5, 1.5))
    for keys, expected in (([first, last], [1, 2]), ([first, last, last], [1, 2, 2])):
        restored, *told = stopped.restore(keys, _packed_state(*[0] * len(keys)))
        assert restored.params["w"].tolist() == [[value] * 3 for value in expected]
        assert (restored.step.tolist(), told) == (expected, [5, 1.5])
    assert stopped.restore([last], _packed_state(0)).steps == 0
    stopped.forget([first, last])
    assert not list((tmp_path / "stopped").iterdir())


def test_a_damaged_stopped_pack_begins_anew_and_is_named(tmp_path, caplog):
    stopped, keys = StoppedPacks(tmp_path, "config"), [("mup", 8, 0.01, 0, ())]

    stopped.save(keys, TrainedPack(_packed_state(7), 5, 1.5))
    (path,) = (tmp_path / "stopped").iterdir()
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(bytes(content))
    fresh = _packed_state(0)
    restored, *told = stopped.restore(keys, fresh)
    assert restored is fresh
    assert told == [0, 0.0]
    assert "is damaged: its points are trained from the start" in caplog.text


def test_a_row_that_the_first_process_cannot_write_ends_the_sweep(tmp_path, monkeypatch):
    """The thread that receives the rows of another process tells of it; nobody is told that all is finished."""
    told = {}

    class Store:
        def blocking_key_value_get(self, key, timeout):
            return json.dumps([{"width": 16}])

        def key_value_set(self, key, value):
            told[key] = value

    def full(ledger, rows):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("train.processes.store", Store)
    monkeypatch.setattr("train.processes.require_no_failure", lambda: None)
    monkeypatch.setattr(Ledger, "append", full)
    rows = _First(Ledger(tmp_path, {"steps": 1}))
    with pytest.raises(OSError, match="No space left"):
        rows.finish(StopRequests(in_step=False))
    assert not told


def test_a_lane_that_fails_is_heard_beside_one_that_was_stopped():
    stopped = threading.Event()

    def run_lane(lane):
        if lane.widths == (16,):
            stopped.set()
            raise Stopped(signal.SIGTERM)
        stopped.wait()
        time.sleep(0.2)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        _run_all([Lane(0, (0,), (16,)), Lane(0, (1,), (32,))], run_lane, threading.Event())
