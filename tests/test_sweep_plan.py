"""Where the points of a sweep run: lanes, shares of processes, and the same rows from eight devices at once."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import campaign_runs
import jax
import pytest
import tiny

from train.config import ModelOptions, OptimizerOptions
from train.step import Program
from train.sweep_plan import Lane, describe, plan_sweep, points_that_fit

ROOT = pathlib.Path(__file__).parents[1]
WIDTHS = {64: list("abcdefgh"), 128: list("ijklmnop"), 256: list("qrstuvwx")}
COSTS = {64: 1, 128: 2, 256: 4}
EACH = {count: dict.fromkeys((8, 16, 64, 128, 256), count) for count in (1, 8)}


def test_widths_run_at_the_same_time_where_devices_are_enough():
    plan = plan_sweep(WIDTHS, COSTS, processes=1, devices=8, per_device=EACH[1])
    assert [lane.widths for lane in plan.lanes] == [(64,), (128,), (256,)]
    # Each device once, the widest width on the most of them.
    assert sorted(index for lane in plan.lanes for index in lane.devices) == list(range(8))
    assert [len(lane.devices) for lane in plan.lanes] == [2, 2, 4]
    assert plan.pack_size(plan.lanes[2], 256) == 4
    assert plan.points[0, 128] == WIDTHS[128]


def test_otherwise_one_after_another_on_all():
    assert plan_sweep(WIDTHS, COSTS, processes=1, devices=2, per_device=EACH[1]).lanes == [
        Lane(0, (0, 1), (64, 128, 256))
    ]
    one = plan_sweep({64: ["a"]}, COSTS, processes=1, devices=8, per_device=EACH[1])
    assert one.lanes == [Lane(0, tuple(range(8)), (64,))]
    # A narrow width is not worth a device of its own for as long as a wide one runs on the rest.
    uneven = plan_sweep(
        {64: ["a"], 256: list("bcdefghi")}, {64: 1, 256: 4}, processes=1, devices=8, per_device=EACH[1]
    )
    assert uneven.lanes == [Lane(0, tuple(range(8)), (64, 256))]


def test_processes_share_the_cost_and_no_lane_spans_two():
    plan = plan_sweep(WIDTHS, COSTS, processes=4, devices=2, per_device=EACH[1])
    shares = [
        sum(COSTS[width] * len(points) for (owner, width), points in plan.points.items() if owner == process)
        for process in range(4)
    ]
    assert max(shares) - min(shares) <= 4
    placed = [point for points in plan.points.values() for point in points]
    assert sorted(placed) == [point for points in WIDTHS.values() for point in points]
    for lane in plan.lanes:
        assert set(lane.devices) <= {0, 1}
        assert all(plan.points[lane.process, width] for width in lane.widths)


def test_more_processes_than_points():
    plan = plan_sweep({64: ["a"]}, {64: 1}, processes=4, devices=1, per_device=EACH[8])
    assert [lane.process for lane in plan.lanes] == [2]
    # Not 8: nobody would be served.
    assert plan.pack_size(plan.lanes[0], 64) == 1


def test_packs_are_of_one_size():
    plan = plan_sweep({64: list(range(50))}, {64: 1}, processes=1, devices=2, per_device=EACH[8])
    # 4 packs of 14, not 3 of 16 and one of 2.
    assert plan.pack_size(plan.lanes[0], 64) == 14


def test_what_is_left_of_a_sweep_is_not_filled_up_to_a_whole_pack():
    plan = plan_sweep({64: list(range(50))}, {64: 1}, processes=1, devices=2, per_device=EACH[8])
    (lane,) = plan.lanes
    # After one, two and three of the packs of 14: the same packs as without a stop.
    assert [plan.pack_size(lane, 64, left) for left in (36, 22, 8)] == [14, 14, 14]
    # Other points: as few as two devices can share, and packs of one size again.
    assert [plan.pack_size(lane, 64, left) for left in (1, 5, 17, 49)] == [2, 6, 10, 14]


def test_as_many_points_as_fit_into_an_accelerator():
    class Device:
        platform, limit = "gpu", 2**30

        def memory_stats(self):
            return {"bytes_limit": self.limit}

    programs = {
        width: Program(tiny.MODEL.gdn_config(width, 257), tiny.OPTIMIZER, steps=9) for width in (8, 16)
    }
    fit = points_that_fit(programs, 1024, Device())
    assert fit[8] > fit[16] > 8
    Device.limit = 2**34
    assert points_that_fit(programs, 1024, Device())[8] in range(16 * fit[8], 16 * (fit[8] + 1))
    Device.limit = 1
    assert points_that_fit(programs, 1024, Device()) == {8: 1, 16: 1}
    assert points_that_fit(programs, 1024, jax.devices()[0]) == {8: 1, 16: 1}


# GiB of a point as XLA counts arguments and temporaries for an H100: four layers, 8,192 tokens, vocabulary 8,192.
@pytest.mark.parametrize(
    ("regime", "width", "counted"),
    [("heads", 256, 0.832), ("heads", 1024, 2.678), ("head_dim", 128, 0.713), ("head_dim", 1024, 2.954)],
)
def test_unrolled_points_fit_by_the_compilers_count(regime, width, counted, monkeypatch):
    monkeypatch.setattr("train.sweep_plan.unrolled", lambda num_layers: True)
    heads = {"key_dim": 64, "value_dim": 64}
    dims = {"key_dim": 16, "value_dim": 32, "key_heads": 6, "value_heads": 6}
    options = heads if regime == "heads" else dims
    model = ModelOptions(layers=4, base_width=128, regime=regime, compute_dtype="bfloat16", **options)

    class Device:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": int(1000 * counted * 2**30)}

    program = Program(model.gdn_config(width, 8192), OptimizerOptions(), steps=9)
    # No more than fit, of a thousand; and no fewer than the part of the memory that is used, less 14 %.
    assert 780 < points_that_fit({width: program}, 8192, Device())[width] <= 1000


def test_the_plan_says_where_how_much_and_how_long():
    programs = {
        width: Program(tiny.MODEL.gdn_config(width, 257), tiny.OPTIMIZER, steps=100) for width in (8, 16)
    }
    plan = plan_sweep(
        {8: list("ab"), 16: list("cd")}, {8: 1, 16: 2}, processes=1, devices=4, per_device=EACH[1]
    )
    lines = describe(plan, programs, {8: 100_000, 16: 200_000}, 1024, jax.devices()[0])
    assert lines[0].startswith("width 8: 2 points on devices 0 to 1, in 1 pack; about 0.0")
    assert lines[1].startswith("width 16: 2 points on devices 2 to 3, in 1 pack; about 0.0")
    assert lines[1].endswith(" GiB a device, 1 s")


_CHILD = """
import json, pathlib, sys, threading
sys.path.insert(0, sys.argv[2])
import jax, tiny
from train.sweep import run_sweep
from train.sweep_options import SweepOptions
from train.sweep_points import Progress
folder = pathlib.Path(sys.argv[1])
events = []
class Seen(Progress):
    def say(self, line):
        events.append(["said", line])
    def compiling(self, width, seconds):
        events.append(["compiling", width])
    def step(self, pack, step, losses, work):
        events.append([pack[0].width, threading.current_thread().name])
options = SweepOptions(
    out=folder / f"on{len(jax.devices())}", widths=tuple(map(int, sys.argv[3].split())), presets=("mup",), steps=3,
    learning_rates=(sys.argv[4],),
)
rows = run_sweep(options, tiny.MODEL, tiny.OPTIMIZER, tiny.data_config(folder), Seen())
print(json.dumps([events, rows]))
"""


def _sweep(folder, devices, widths, rates):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        # Compiling takes most of the time.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder), str(ROOT / "tests"), widths, rates],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("devices", "widths", "rates", "points"),
    [(4, "8 16", "2^-5..2^-4.5", 2), pytest.param(8, "8 16 32", "2^-7..2^-3.5", 8, marks=pytest.mark.long)],
)
@pytest.mark.slow
def test_widths_on_sub_meshes_at_once_give_the_rows_of_one_device(tmp_path, devices, widths, rates, points):
    _, alone = _sweep(tmp_path, 1, widths, rates)
    events, together = _sweep(tmp_path, devices, widths, rates)
    count = len(widths.split())
    # Printed before anything is compiled.
    assert [event[0] for event in events[: count + 1]] == ["said"] * count + ["compiling"]
    steps = [tuple(event) for event in events if event[0] not in ("said", "compiling")]
    assert len({thread for _, thread in steps}) == count
    assert len(alone) == len(together) == count * points
    for row, other in zip(alone, together, strict=True):
        for key in row.keys() - {"seconds", "val_loss"}:
            assert row[key] == other[key], key
        assert other["val_loss"] == pytest.approx(row["val_loss"], abs=1e-6)


@pytest.mark.long
def test_lanes_that_are_told_to_stop_keep_their_packs(tmp_path):
    """Two widths at the same time on two devices each; the same rows as without the signal."""
    campaign_runs.data_words(tmp_path)
    environment = campaign_runs.environment() | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    rows = []
    for out, told in (("whole", False), ("stopped", True)):
        words = [
            sys.executable, "-m", "train", "sweep", "--out", str(tmp_path / out), "--widths", "8", "16",
            "--presets", "mup", "--learning-rates", "2^-5..2^-4.5", "--steps", "2000", "--model.layers", "1",
            "--model.base-width", "8", "--model.key-dim", "8", "--model.value-dim", "8",
            *campaign_runs.data_words(tmp_path),
        ]  # fmt: skip
        if told:
            process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            # Both widths: each has a thread of its own.
            for _ in range(2):
                while "compiled in" not in process.stdout.readline():
                    assert process.poll() is None
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
            assert process.returncode == 128 + signal.SIGTERM
            assert len(list((tmp_path / out / "stopped").glob("*.pack"))) == 2
        subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
        found = [json.loads(line) for line in (tmp_path / out / "rows.jsonl").read_text().splitlines()]
        rows.append(sorted([row["width"], row["learning_rate"], row["val_loss"]] for row in found))
    assert len(rows[0]) == 4
    assert rows[0] == rows[1]
