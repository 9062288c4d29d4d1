"""Several processes on one host with gloo: each reads its rows, the first prints, and the losses are those of one."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny

from train.data import prepare, train_batch, train_loader
from train.distributed import is_cluster, start_processes
from train.mesh import MeshShape, build_mesh, process_rows

ROOT = pathlib.Path(__file__).parents[1]
# No cache: as in test_mesh.py.
PLATFORM = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}


# Gloo, a library of XLA's, speaks on every process, from several threads at once: their pieces may come in any order.
_GLOO = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |\d|\s"
)


def start(folder, command, processes, devices, *words, last=()):
    """The processes, and where each writes; every one has `devices` of its own, the last one words besides."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    line = [
        sys.executable, "-m", "train", command, "--model.layers", "1", "--model.key-dim", "8",
        "--model.value-dim", "8", "--model.base-width", "8", "--data.corpus", str(tiny.write_corpus(folder)),
        "--data.cache-dir", str(folder / "cache"), "--data.sequence-length", "16", "--data.batch-size", "8",
        "--data.validation-batches", "2", "--data.validation-fraction", "0.2", *words,
    ]  # fmt: skip
    # Compiling takes most of the time.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | PLATFORM | quick | {"XLA_FLAGS": flags}
    if processes > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    # Files, not pipes: a process whose pipe nobody reads stops, and the others wait for it.
    outputs = [folder / f"process{index}" for index in range(processes)]
    started = []
    for index, output in enumerate(outputs):
        with output.with_suffix(".out").open("w") as out, output.with_suffix(".err").open("w") as err:
            named = {"JAX_PROCESS_ID": str(index)} if processes > 1 else {}
            told = [*line, *(last if index == processes - 1 else ())]
            started.append(subprocess.Popen(told, env=environment | named, stdout=out, stderr=err))
    return started, outputs


def run(folder, command, processes, devices, *words):
    """stdout of each process."""
    started, outputs = start(folder, command, processes, devices, *words)
    codes = [process.wait(timeout=500) for process in started]
    assert not any(codes), "".join(output.with_suffix(".err").read_text() for output in outputs)
    printed = [output.with_suffix(".out").read_text() for output in outputs]
    return ["".join(x for x in text.splitlines(True) if _GLOO.sub("", x)) for text in printed]


def train(folder, out, processes, devices, *words):
    steps = ["--width", "16", "--steps", "10", "--out", str(folder / out)]
    return run(folder, "train", processes, devices, *steps, *words)


def losses(folder, out):
    rows = [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert sorted(found) == list(range(1, 11))
    return np.asarray([found[step] for step in sorted(found)])


@pytest.mark.slow
def test_stopped_by_two_processes_and_ended_by_one(tmp_path):
    """As many devices or fewer, another mesh, another number of processes: the same losses."""
    train(tmp_path, "whole", 1, 1)
    first, second = train(tmp_path, "parts", 2, 2, "--mesh.fsdp", "2", "--stop-at", "5")
    assert "step      5" in first or "step      1" in first
    assert second == ""
    train(tmp_path, "parts", 1, 2, "--mesh.tensor", "2")
    error = np.abs(losses(tmp_path, "parts") - losses(tmp_path, "whole")).max()
    print(f"2 processes of 2 devices, then 1 of 2: {error:.1e}")
    assert error <= 1e-5


@pytest.mark.long
def test_any_number_of_processes_and_devices(tmp_path):
    train(tmp_path, "1", 1, 1)
    for processes in (2, 4):
        _, *others = train(tmp_path, str(processes), processes, 4 // processes, "--mesh.fsdp", "2")
        assert not any(others)
        assert np.abs(losses(tmp_path, str(processes)) - losses(tmp_path, "1")).max() <= 1e-5
    for devices, stop_at in ((8, "3"), (4, "7"), (2, "10")):
        train(tmp_path, "fewer", 1, devices, "--stop-at", stop_at, "--mesh.fsdp", "2")
    assert np.abs(losses(tmp_path, "fewer") - losses(tmp_path, "1")).max() <= 1e-5


@pytest.mark.long
def test_a_sweep_of_two_processes(tmp_path):
    grid = ["--widths", "8", "16", "--learning-rates", "2^-6..2^-5", "--presets", "mup", "--steps", "3"]
    # Two devices each: points are split over them, too.
    _, other = run(tmp_path, "sweep", 2, 2, *grid, "--out", str(tmp_path / "two"))
    assert other == ""
    run(tmp_path, "sweep", 1, 1, *grid, "--out", str(tmp_path / "one"))
    rows = []
    for out in ("one", "two"):
        lines = (tmp_path / out / "rows.jsonl").read_text().splitlines()
        found = {(row["width"], row["learning_rate"]): row["val_loss"] for row in map(json.loads, lines)}
        assert len(found) == len(lines) == 6
        rows.append(found)
    assert rows[0].keys() == rows[1].keys()
    assert all(abs(rows[0][key] - rows[1][key]) <= 1e-6 for key in rows[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last", "codes", "said"),
    [
        (["--data.corpus", "missing.txt"], [1, 2], "process 1 failed: corpus must be"),
        (
            ["--learning-rate", "0.5"],
            [2, 2],
            "process 1 has another configuration than process 0 (run.learning_rate",
        ),
    ],
)
def test_a_process_that_fails_keeps_no_other_waiting(tmp_path, last, codes, said):
    words = ["--width", "16", "--steps", "10", "--out", str(tmp_path / "run")]
    started, outputs = start(tmp_path, "train", 2, 1, *words, last=last)
    assert [process.wait(timeout=100) for process in started] == codes
    assert said in outputs[0].with_suffix(".err").read_text()


def _wait(condition, started):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in started)
        time.sleep(0.01)


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.long
@pytest.mark.parametrize("told", [0, 1])
def test_one_of_two_processes_is_told_to_stop(tmp_path, told):
    """All stop at the same step of a run, and after the next step of a sweep; nothing is lost."""
    path, steps = tmp_path / "run/metrics.jsonl", ["--width", "16", "--steps", "3000"]
    started, outputs = start(tmp_path, "train", 2, 1, *steps, "--out", str(tmp_path / "run"))
    _wait(lambda: len(_rows(path)) > 20, started)
    started[told].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=60) for process in started] == [128 + signal.SIGTERM] * 2
    printed = outputs[0].with_suffix(".out").read_text()
    last = _rows(path)[-1]["step"]
    assert f"stopped by SIGTERM; the checkpoint of step {last} is kept" in printed

    grid = ["--widths", "8", "16", "--learning-rates", "2^-6..2^-5", "--presets", "mup", "--steps", "60"]
    started, _ = start(tmp_path, "sweep", 2, 1, *grid, "--out", str(tmp_path / "sweep"))
    rows = tmp_path / "sweep/rows.jsonl"
    _wait(lambda: len(_rows(rows)) > 0, started)
    started[told].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=60) for process in started] == [128 + signal.SIGTERM] * 2
    assert len(_rows(rows)) < 6
    assert list((tmp_path / "sweep/stopped").glob("*.pack"))
    run(tmp_path, "sweep", 2, 1, *grid, "--out", str(tmp_path / "sweep"))
    run(tmp_path, "sweep", 2, 1, *grid, "--out", str(tmp_path / "whole"))
    found, expected = (
        {
            (row["width"], row["learning_rate"]): row["val_loss"]
            for row in _rows(tmp_path / out / "rows.jsonl")
        }
        for out in ("sweep", "whole")
    )
    assert found == expected
    assert not list((tmp_path / "sweep/stopped").glob("*"))


def test_processes_read_their_rows_and_no_others(tmp_path):
    config = tiny.data_config(tmp_path)
    data = prepare(config)
    assert process_rows(build_mesh(MeshShape()), config.batch_size).tolist() == list(range(8))
    parts = [np.asarray([0, 1, 2]), np.asarray([3, 4, 5, 6, 7])]
    for step in (0, 3):
        whole = train_batch(data, config, step)
        loaders = [train_loader(data, config, step, rows) for rows in parts]
        pieces = [next(loader) for loader in loaders]
        for field, of_parts in zip(whole, zip(*pieces, strict=True), strict=True):
            np.testing.assert_array_equal(np.concatenate(of_parts), field)
        # A position, whatever was read of it.
        assert loaders[0].get_state() == loaders[1].get_state()


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, False),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-2]"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t1,t2", "JAX_PLATFORMS": "tpu,cpu"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t1,t2", "JAX_PLATFORMS": "cpu"}, False),
    ],
)
def test_clusters_are_told_from_lone_processes(environment, cluster):
    assert is_cluster(environment) == cluster


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "need all of .*; missing JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "from 0 to below JAX_NUM_PROCESSES; got 2 and 2",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES must be a number; got 'two'",
        ),
    ],
)
def test_processes_named_by_halves(environment, message):
    with pytest.raises(ValueError, match=message):
        start_processes(environment)
