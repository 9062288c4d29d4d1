"""`gdn coord-check`: measures widths, judges the slopes, writes coord.json and coord.png."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from train.config import ModelOptions, OptimizerOptions, PresetName, check_learning_rate, check_preset_name
from train.data import DataConfig, prepare, train_batch
from train.faults import disk_full_said
from train.ledger import check_identity, code_version, make_writable, only_process, write_atomically
from train.rates import Rate

ROWS_FILE = "coord_rows.jsonl"
CONFIG_FILE = "coord_config.json"
_AT_STEPS = (0, 2, 10)


@dataclasses.dataclass(frozen=True)
class CoordOptions:
    """What is measured, and where the results go."""

    out: pathlib.Path
    """Folder of coord.json, coord.png and the measurements; a check that was stopped goes on from it."""
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


def _refuse_uneven_heads(configs: Mapping[int, Any]) -> None:
    """Each width starts with the base's decays, repeated over its heads; ValueError where that leaves a rest."""
    for width, config in configs.items():
        base = config.base or config
        if config.num_value_heads % base.num_value_heads:
            raise ValueError(
                f"--widths: {width} has {config.num_value_heads} value heads, no multiple of the "
                f"{base.num_value_heads} of the base width {base.width}; use multiples of {base.width}."
            )


def run_coord_check(
    options: CoordOptions,
    model: ModelOptions,
    optimizer: OptimizerOptions,
    data_config: DataConfig,
    console: Any,
) -> int:
    """Measures what the folder does not hold yet; a kill costs one model.

    Returns:
        The exit code: 0 when muP passes and every control fails, else 1.

    Raises:
        ValueError: anything wrong with options, corpus or folder; before any compilation.
    """
    from gdn_jax.mup.coord_check import Tokens
    from train.coord_report import print_coord, write_coord_report
    from train.sweep import identity

    _refuse_unused(model, optimizer)
    data = prepare(data_config, lambda line: console.print(line, soft_wrap=True, highlight=False))
    base = model.with_base(min(options.widths))
    configs = {width: base.gdn_config(width, data.vocab_size) for width in sorted(set(options.widths))}
    _refuse_uneven_heads(configs)
    rate = options.learning_rate or (2.0**-2 if optimizer.name == "sgd" else 2.0**-8)
    config = identity(base, optimizer, data_config, data, max(_AT_STEPS)) | {"learning_rate": rate}
    make_writable(options.out)
    # One batch, trained on and measured on: on another one, what training adds is mostly noise at these few steps,
    # and noise of a sum over width shrinks with width.
    probe = Tokens(*train_batch(data, data_config, 0))
    shared = {"regime": model.regime, "learning_rate": rate, "code_version": code_version()}
    with only_process(options.out), disk_full_said(options.out, lambda: "the measurements so far are kept"):
        known = _rows_so_far(options.out, config)
        rows = _measure_missing(options, configs, optimizer, probe, shared, known, console)
        analysis = write_coord_report(rows, options.out)
    print_coord(analysis, console)
    console.print(f"picture: {options.out / 'coord.png'}", soft_wrap=True)
    return 0 if analysis["passed"] else 1


def _rows_so_far(out: pathlib.Path, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    path = out / ROWS_FILE
    if path.exists() and not (out / CONFIG_FILE).exists():
        raise ValueError(f"{out} has {ROWS_FILE} but no {CONFIG_FILE}; choose an empty folder as --out.")
    check_identity(out, CONFIG_FILE, config)
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            _point(row)
        return rows
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); choose another --out.") from error


def _measure_missing(
    options: CoordOptions,
    configs: Mapping[int, Any],
    optimizer: OptimizerOptions,
    probe: Any,
    shared: dict[str, Any],
    known: list[dict[str, Any]],
    console: Any,
) -> list[dict[str, Any]]:
    """Rows of all that is asked for, of which ``known`` are on disk already; new ones go there model by model."""
    import jax

    from gdn_jax.mup.coord_check import measure
    from train.step import quick_options

    # With autotuning an H200 measured no width in 340 s where it takes 30 s without.
    quick = quick_options(jax.default_backend())
    gates_differ = optimizer.name == "sgd" and shared["regime"] == "head_dim"
    presets = options.presets or ("mup", "sp", *(("mup_standard",) if gates_differ else ()))
    by_width = {
        width: [(width, preset, seed) for preset in presets for seed in sorted(set(options.seeds))]
        for width in configs
    }
    asked = {point for points in by_width.values() for point in points}
    done = asked & {_point(row) for row in known}
    if done:
        versions = {row.get("code_version") for row in known if _point(row) in done}
        other = ", some by another code version" if versions - {shared["code_version"]} else ""
        console.print(f"going on: {len(done)} of {len(asked)} models are measured already{other}")
    lines = [json.dumps(row, sort_keys=True) + "\n" for row in known]
    for width, points in by_width.items():
        start = time.perf_counter()
        missing = [point for point in points if point not in done]
        for _, preset, seed in missing:
            new = [
                row | shared | {"value_heads": configs[width].num_value_heads}
                for row in measure(
                    configs[width],
                    preset=preset,
                    optimizer=optimizer.name,
                    learning_rate=shared["learning_rate"],
                    seeds=[seed],
                    batches=[probe] * max(_AT_STEPS),
                    probe=probe,
                    at_steps=_AT_STEPS,
                    momentum=optimizer.momentum,
                    compiler_options=quick,
                )
            ]
            known += new
            lines += [json.dumps(row, sort_keys=True) + "\n" for row in new]
            write_atomically(options.out / ROWS_FILE, "".join(lines))
        if missing:
            console.print(f"width {width} measured in {time.perf_counter() - start:.0f} s")
    return [row for row in known if _point(row) in asked]


def _point(row: Mapping[str, Any]) -> tuple[int, str, int]:
    return row["width"], row["preset"], row["seed"]
