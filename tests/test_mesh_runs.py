"""Whole runs on meshes, of one process and of several: the same as on one device, whatever they survive on the way."""

import collections
import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny

ROOT = pathlib.Path(__file__).parents[1]


def run(folder, processes, devices, **given):
    """The summary of the first process; every process has `devices` of its own."""
    # Here, so that no two processes write it at a time.
    tiny.write_corpus(folder)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    # Level 1, as in test_mesh.py.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=1"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    # As in test_mesh.py.
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if processes > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    line = [sys.executable, str(ROOT / "tests/mesh_runs.py"), str(folder), json.dumps(given)]
    started = []
    for index in range(processes):
        named = {"JAX_PROCESS_ID": str(index)} if processes > 1 else {}
        # Files, not pipes: a process whose pipe nobody reads stops, and the others wait for it.
        with (folder / f"out.{index}").open("w") as out, (folder / f"err.{index}").open("w") as err:
            started.append(subprocess.Popen(line, env=environment | named, stdout=out, stderr=err))
    codes = [process.wait(timeout=500) for process in started]
    errors = "".join((folder / f"err.{index}").read_text() for index in range(processes))
    assert not any(codes), errors
    return json.loads((folder / "out.0").read_text().splitlines()[-1])


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def losses(folder, out, steps):
    found = {row["step"]: row["loss"] for row in rows(folder, f"{out}/metrics.jsonl") if "loss" in row}
    assert sorted(found) == list(range(1, steps + 1))
    return np.asarray([np.nan if found[step] is None else found[step] for step in sorted(found)])


def rows_read(folder, out):
    """Step -> digests of all rows that any process read for it, sorted."""
    read = collections.defaultdict(list)
    for path in folder.glob(f"{out}.rows.*"):
        for step, digests in rows(folder, path.name):
            read[step] += digests
    return {step: sorted(digests) for step, digests in read.items()}


EVERYTHING = {
    "accumulate": 2, "coordinates_every": 2, "validate_every": 3, "steps": 6, "nan_policy": "skip", "poison": 4
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, run(folder, 1, 1, out="alone", mesh={}, **EVERYTHING)


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [
        (2, 2, {"fsdp": 2, "sequence": 2}),
        pytest.param(1, 4, {"fsdp": 2, "tensor": 2}, marks=pytest.mark.long),
        pytest.param(2, 1, {"data": 2}, marks=pytest.mark.long),
    ],
)
@pytest.mark.slow
def test_parts_of_a_batch_nans_and_coordinates_on_a_mesh(alone, processes, devices, mesh):
    folder, expected = alone
    out = f"{processes}x{devices}"
    summary = run(folder, processes, devices, out=out, mesh=mesh, **EVERYTHING)
    assert summary["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-5)
    assert summary["diverged_at_step"] is None
    np.testing.assert_allclose(losses(folder, out, 6), losses(folder, "alone", 6), rtol=0, atol=1e-5)
    (fault,), (known,) = (rows(folder, f"{name}/not-finite.jsonl") for name in (out, "alone"))
    assert (fault["step"], fault["where"], fault["name"]) == (4, "batch", "loss_mask")
    assert known["batch"]["rows_not_finite"] == [4]
    # Each process spoils one of its own rows.
    assert len(fault["batch"]["rows_not_finite"]) == processes
    for row, other in zip(
        *(rows(folder, f"{name}/coordinates.jsonl") for name in (out, "alone")), strict=True
    ):
        assert row["step"] == other["step"]
        for name, sizes in row["absolute"].items():
            # Sums in another order.
            np.testing.assert_allclose(sizes, other["absolute"][name], rtol=2e-5, err_msg=name)
    assert rows_read(folder, out) == rows_read(folder, "alone")


@pytest.mark.long
def test_other_devices_and_other_processes_in_50_steps(tmp_path):
    """8 devices, then 4, then 2; and 2 processes, then 1: the same curve from the same rows, each read once."""
    run(tmp_path, 1, 1, out="whole", mesh={}, steps=50)
    for devices, stop_at, mesh in (
        (8, 17, {"fsdp": 2, "tensor": 2}),
        (4, 34, {"fsdp": 4}),
        (2, 50, {"sequence": 2}),
    ):
        run(tmp_path, 1, devices, out="devices", mesh=mesh, steps=50, stop_at=stop_at)
    for processes, stop_at in ((2, 25), (1, 50)):
        run(tmp_path, processes, 2, out="processes", mesh={"fsdp": 2}, steps=50, stop_at=stop_at)
    expected = losses(tmp_path, "whole", 50)
    for out in ("devices", "processes"):
        errors = np.abs(losses(tmp_path, out, 50) - expected)
        print(f"{out}: {errors[:10].max():.1e} after 10 steps, {errors.max():.1e} after 50")
        assert errors[:10].max() <= 1e-5
        assert errors.max() <= 1e-4
        assert rows_read(tmp_path, out) == rows_read(tmp_path, "whole")
