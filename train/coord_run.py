"""`gdn coord-check`: measures widths, judges the slopes, writes coord.json and coord.png."""

import dataclasses
import json
import pathlib
import time
from typing import Any

from train.config import ModelOptions, OptimizerOptions, PresetName, check_learning_rate, check_preset_name
from train.data import DataConfig, prepare, train_batch
from train.ledger import make_writable
from train.rates import Rate

ROWS_FILE = "coord_rows.jsonl"
_AT_STEPS = (0, 2, 10)


@dataclasses.dataclass(frozen=True)
class CoordOptions:
    """What is measured, and where the results go."""

    out: pathlib.Path
    """Folder of coord.json, coord.png and the measurements."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """At least 4 widths that span at least 8x; the smallest is the base."""
    presets: tuple[PresetName, ...] = ()
    """Parametrizations; by default mup, which must pass, and the controls that must fail: sp, and under SGD with
    growing head dims mup_standard."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the initialisation; at least 3, and mostly 5 for a standard error of 0.05."""
    learning_rate: Rate = None
    """At the base width, as 0.01 or 2^-7, near its optimum (a tiny one would pass anything); by default 2^-8, for SGD
    2^-2."""

    def __post_init__(self) -> None:
        widths = sorted(set(self.widths))
        if len(widths) < 4 or widths[0] < 64 or widths[-1] < 8 * widths[0]:
            raise ValueError(
                f"--widths must be at least 4, from 64 on, and span 8x; got {' '.join(map(str, self.widths))}. "
                "Use 64 128 256 512."
            )
        if len(set(self.seeds)) < 3:
            raise ValueError(f"--seeds must be at least 3; got {len(set(self.seeds))}. Use 0 1 2.")
        for preset in self.presets:
            check_preset_name(preset)
        if self.learning_rate is not None:
            check_learning_rate(self.learning_rate)


def _refuse_unused(model: ModelOptions, optimizer: OptimizerOptions) -> None:
    """The check fixes what would hide a wrong slope; ValueError where the user asks for something else."""
    if model.compute_dtype != "float32" or model.tie_embedding:
        raise ValueError(
            "coord-check measures a float32 model with an untied embedding; leave --model.compute-dtype and "
            "--model.tie-embedding away."
        )
    if optimizer != OptimizerOptions(name=optimizer.name, momentum=optimizer.momentum):
        raise ValueError(
            "coord-check trains without schedule, clip or weight decay and with its own epsilon; of the "
            "--optimizer options it takes --optimizer and --optimizer.momentum only."
        )


def run_coord_check(
    options: CoordOptions,
    model: ModelOptions,
    optimizer: OptimizerOptions,
    data_config: DataConfig,
    console: Any,
) -> int:
    """Returns the exit code: 0 when muP passes and every control fails, else 1.

    Raises:
        ValueError: anything wrong with options, corpus or folder; before any compilation.
    """
    from gdn_jax.mup.coord_check import Tokens, measure
    from train.coord_report import coord_table, write_coord_report

    _refuse_unused(model, optimizer)
    data = prepare(data_config, lambda line: console.print(line, soft_wrap=True, highlight=False))
    base = model.with_base(min(options.widths))
    configs = {width: base.gdn_config(width, data.vocab_size) for width in sorted(set(options.widths))}
    make_writable(options.out)
    rate = options.learning_rate or (2.0**-2 if optimizer.name == "sgd" else 2.0**-8)
    gates_differ = optimizer.name == "sgd" and model.regime == "head_dim"
    presets = options.presets or ("mup", "sp", *(("mup_standard",) if gates_differ else ()))
    # One batch, trained on and measured on: on another one, what training adds is mostly noise at these few steps,
    # and noise of a sum over width shrinks with width.
    probe = Tokens(*train_batch(data, data_config, 0))
    batches = [probe] * max(_AT_STEPS)
    rows = []
    for width, config in configs.items():
        start = time.perf_counter()
        for preset in presets:
            rows += [
                row | {"regime": model.regime, "learning_rate": rate, "value_heads": config.num_value_heads}
                for row in measure(
                    config,
                    preset=preset,
                    optimizer=optimizer.name,
                    learning_rate=rate,
                    seeds=sorted(set(options.seeds)),
                    batches=batches,
                    probe=probe,
                    at_steps=_AT_STEPS,
                    momentum=optimizer.momentum,
                )
            ]
        console.print(f"width {width} measured in {time.perf_counter() - start:.0f} s")
    (options.out / ROWS_FILE).write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    analysis = write_coord_report(rows, options.out)
    console.print(coord_table(analysis))
    console.print(f"picture: {options.out / 'coord.png'}")
    return 0 if analysis["passed"] else 1
