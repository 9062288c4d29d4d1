#!/usr/bin/env python3
"""Runs every mesh axis on the accelerators of one host: do they agree with one device, and what do they lose?

    python3 scripts/check_devices.py --devices 2 --width 1024

Prints JSON lines: for each axis the largest difference of the losses from one device (float32, 10 steps), then the
efficiency of the data and sweep axes (bfloat16): the time of a step on one device, divided by that of twice the work
on two. Exit code 1 if an axis disagrees by more than 1e-5, data is below 0.92 or sweep below 0.97.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from train import loop
from train import mesh as meshes
from train.config import ModelOptions, OptimizerOptions
from train.data import Batch
from train.mesh import MeshShape
from train.step import Program, compile_program

TOLERANCE = 1e-5
# Low: Adam turns the rounding of a gradient that is nearly 0 into a whole step.
RATE = 2**-12
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


def start(width: int, dtype: str, shape: MeshShape, points: int) -> tuple[Any, Any, Any]:
    """Compiled functions, state and hparams; `points` on each device of the sweep axis, 0: not packed."""
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
    return compiled, compiled.init(seeds, hparams), hparams


def losses(width: int, shape: MeshShape, length: int) -> np.ndarray:
    """Of ten steps in float32; of point 0 where there are several."""
    compiled, state, hparams = start(width, "float32", shape, 1 if shape.sweep > 1 else 0)
    found = []
    for batch in batches(10, 8, length):
        state, metrics = compiled.step(state, meshes.put_batch(compiled.mesh, batch), hparams)
        found.append(np.asarray(metrics.loss).ravel()[0])
    return np.asarray(found)


def step_seconds(width: int, shape: MeshShape, points: int, rows: int, length: int) -> float:
    """Median of 5 times 10 steps, after 5 that do not count."""
    compiled, state, hparams = start(width, "bfloat16", shape, points)
    (batch,) = batches(1, rows, length)
    placed = meshes.put_batch(compiled.mesh, batch)
    for _ in range(5):
        state, _ = compiled.step(state, placed, hparams)
    jax.block_until_ready(state)
    times = []
    for _ in range(5):
        before = time.perf_counter()
        for _ in range(10):
            state, _ = compiled.step(state, placed, hparams)
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
    given = parser.parse_args()
    n = given.devices
    if len(jax.devices()) < n:
        parser.error(f"--devices must be at most the {len(jax.devices())} devices there are; got {n}.")
    print(json.dumps({"device": jax.devices()[0].device_kind} | vars(given)), flush=True)
    failed = False
    one = MeshShape()
    # No TF32: the order of sums is to be all that differs.
    with jax.default_matmul_precision("highest"):
        expected = losses(given.width, one, given.length)
        for axis in ("data", "fsdp", "tensor", "sequence", "sweep"):
            found = losses(given.width, dataclasses.replace(one, **{axis: n}), given.length)
            error = float(np.abs(found - expected).max())
            agrees = bool(error <= TOLERANCE)
            failed |= not agrees
            print(json.dumps({"axis": axis, "difference": error, "agrees": agrees}), flush=True)
    rows, points = given.rows, given.points
    for axis, alone, together in (
        ("data", (0, rows), (0, rows * n)),
        ("fsdp", (0, rows), (0, rows * n)),
        ("sweep", (points, rows), (points, rows)),
    ):
        before = step_seconds(given.width, one, alone[0], alone[1], given.length)
        after = step_seconds(
            given.width, dataclasses.replace(one, **{axis: n}), together[0], together[1], given.length
        )
        efficiency = before / after
        good = efficiency >= LEAST.get(axis, 0.0)
        failed |= not good
        print(
            json.dumps(
                {
                    "axis": axis,
                    "one_device_s": round(before, 5),
                    "all_devices_s": round(after, 5),
                    "efficiency": round(efficiency, 4),
                    "least": LEAST.get(axis),
                    "good": good,
                }
            ),
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
