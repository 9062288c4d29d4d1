#!/usr/bin/env python3
"""Runs every mesh axis on the accelerators of one host: do they agree with one device, and what do they lose?

    python3 scripts/check_devices.py --devices 2 --width 1024

Prints JSON lines: for each axis the largest difference of the losses from one device (float32, 10 steps), then the
efficiency of the data, fsdp and sweep axes (bfloat16): the time of a step on one device, divided by that of twice the
work on two. Exit code 1 if an axis disagrees by more than 1e-5, data is below 0.92 or sweep below 0.97.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from train import loop
from train import mesh as meshes
from train.config import ModelOptions, OptimizerOptions
from train.data import Batch
from train.mesh import MeshShape
from train.step import Compiled, Program, compile_program

TOLERANCE = 1e-5
# Low: Adam turns the rounding of a gradient that is nearly 0 into a whole step.
RATE = 2**-12
AXES = ("data", "fsdp", "tensor", "sequence", "sweep")
TIMED = ("data", "fsdp", "sweep")
LEAST = {"data": 0.92, "sweep": 0.97}
# As many ids as bytes have, rounded up so that a tensor axis splits them as well.
VOCAB = 264


def program(width: int, dtype: str) -> Program:
    """Four layers at a width."""
    options = ModelOptions(layers=4, key_dim=64, value_dim=64, base_width=256, compute_dtype=dtype)  # pyright: ignore[reportArgumentType]
    return Program(options.gdn_config(width, VOCAB), OptimizerOptions(), steps=100)


def batches(count: int, rows: int, length: int) -> list[Batch]:
    """Tokens that a model can learn something of: each is near the one before."""
    rng = np.random.default_rng(0)
    result = []
    for _ in range(count):
        tokens = np.cumsum(rng.integers(-2, 3, (rows, length + 1)), axis=1) % VOCAB
        tokens = tokens.astype(np.int32)
        segments = np.ones((rows, length), np.int32)
        result.append(Batch(tokens[:, :-1], tokens[:, 1:], segments, np.ones((rows, length), np.float32)))
    return result


class Ready(NamedTuple):
    """Functions of a mesh, and what they are called with."""

    compiled: Compiled
    batches: list[Batch]
    seeds: Any
    hparams: Any


def ready(width: int, dtype: str, shape: MeshShape, points: int, data: list[Batch]) -> Ready:
    """For `points` on each device of the sweep axis, 0: not packed; batches are on the devices."""
    mesh = meshes.build_mesh(shape, jax.devices()[: shape.devices])
    of_width = program(width, dtype)
    compiled = compile_program(of_width, mesh, packed=points > 0)
    if not points:
        hparams, seeds = of_width.hparams(RATE, "mup"), np.int32(0)
    else:
        # Point 0 is the run of one device.
        count = points * shape.sweep
        hparams = loop.stack_hparams([of_width.hparams(RATE / (1 + index), "mup") for index in range(count)])
        seeds = loop.as_seeds(range(count))
    placed = [meshes.put_batch(mesh, batch) for batch in data]
    return Ready(compiled, placed, seeds, hparams)


def losses(run: Ready) -> np.ndarray:
    """Of a step with each batch; of point 0 where there are several."""
    state = run.compiled.init(run.seeds, run.hparams)
    found = []
    for batch in run.batches:
        state, metrics = run.compiled.step(state, batch, run.hparams)
        found.append(np.asarray(metrics.loss).ravel()[0])
    return np.asarray(found)


def step_seconds(run: Ready) -> float:
    """Median of 5 times 10 steps, after 5 that do not count."""
    state = run.compiled.init(run.seeds, run.hparams)
    for _ in range(5):
        state, _ = run.compiled.step(state, run.batches[0], run.hparams)
    jax.block_until_ready(state)
    times = []
    for _ in range(5):
        before = time.perf_counter()
        for _ in range(10):
            state, _ = run.compiled.step(state, run.batches[0], run.hparams)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - before) / 10)
    return statistics.median(times)


def main() -> int:
    """Prints what it measures; 1 where something is not as it must be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--rows", type=int, default=16, help="sequences of each device where time is taken")
    parser.add_argument("--points", type=int, default=4, help="points of each device where time is taken")
    parser.add_argument("--only", choices=("agreement", "efficiency"), help="one half of the check")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES)
    given = parser.parse_args()
    n = given.devices
    if len(jax.devices()) < n:
        parser.error(f"--devices must be at most the {len(jax.devices())} devices there are; got {n}.")
    print(json.dumps({"device": jax.devices()[0].device_kind} | vars(given)), flush=True)
    one, rows, points = MeshShape(), given.rows, given.points

    few, failed = batches(10, 8, given.length), False

    def over(axis: str) -> MeshShape:
        return dataclasses.replace(one, **{axis: n})

    def exact(shape: MeshShape, points: int) -> np.ndarray:
        # No TF32: the order of sums is to be all that differs.
        with jax.default_matmul_precision("highest"):
            return losses(ready(given.width, "float32", shape, points, few))

    def seconds(shape: MeshShape, points: int, rows: int) -> float:
        return step_seconds(ready(given.width, "bfloat16", shape, points, batches(1, rows, given.length)))

    agreement = () if given.only == "efficiency" else given.axes
    timed = () if given.only == "agreement" else [axis for axis in given.axes if axis in TIMED]
    expected = exact(one, 0) if agreement else None
    for axis in agreement:
        error = float(np.abs(exact(over(axis), int(axis == "sweep")) - expected).max())
        agrees = bool(error <= TOLERANCE)
        failed |= not agrees
        print(json.dumps({"axis": axis, "difference": error, "agrees": agrees}), flush=True)
    alone: dict[int, float] = {}
    for axis in timed:
        on_each = points if axis == "sweep" else 0
        if on_each not in alone:
            alone[on_each] = seconds(one, on_each, rows)
        together = seconds(over(axis), on_each, rows if axis == "sweep" else rows * n)
        efficiency = alone[on_each] / together
        good = efficiency >= LEAST.get(axis, 0.0)
        failed |= not good
        row = {
            "axis": axis,
            "one_device_s": round(alone[on_each], 5),
            "all_devices_s": round(together, 5),
            "efficiency": round(efficiency, 4),
            "least": LEAST.get(axis),
            "good": good,
        }
        print(json.dumps(row), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
