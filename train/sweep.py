"""A sweep of width x preset x learning rate x seed: the plan, and its execution from a ledger.

Per width one compiled program serves every point. Points are packed: each device runs its share of a pack, side by
side on an accelerator, alone on a CPU. The ledger takes a pack as a whole, so that a resumed sweep computes the same.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gdn_jax.mup.rules import HEAD_DIM_VERSIONS
from train import processes
from train.config import ModelOptions, OptimizerOptions
from train.data import DataConfig, PreparedData, prepare
from train.faults import disk_full_said
from train.interrupts import Stopped, StopRequests
from train.ledger import make_writable, only_process
from train.rows import shared_rows
from train.step import Program
from train.sweep_lanes import run_lanes
from train.sweep_options import SweepOptions
from train.sweep_points import OneAtATime, Point, Progress, plan_points


def run_sweep(
    options: SweepOptions,
    model: ModelOptions,
    optimizer: OptimizerOptions,
    data_config: DataConfig,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Runs what the ledger in ``options.out`` does not hold yet.

    Returns:
        The rows of the plan, in its order; of several processes the first has them.

    Raises:
        ValueError: anything wrong with the options, the corpus or the folder; before any compilation.
        Stopped: SIGTERM or SIGUSR1 came; the same call goes on from there.
        RunFailedError: the disk is full.
    """
    progress = progress or Progress()
    model = model.with_base(min(options.widths))
    assert model.base_width is not None, "with_base has set it"
    plan = plan_points(options, model.base_width, optimizer.weight_decay)
    with StopRequests(in_step=False) as stop, disk_full_said(options.out, lambda: "the rows so far are kept"):
        return _run_plan(options, model, optimizer, data_config, plan, stop, progress)


def _run_plan(
    options: SweepOptions,
    model: ModelOptions,
    optimizer: OptimizerOptions,
    data_config: DataConfig,
    plan: Mapping[int, Sequence[Point]],
    stop: StopRequests,
    progress: Progress,
) -> list[dict[str, Any]]:
    with stop.at_once():
        data = prepare(data_config, progress.say)
    programs = {
        width: Program(
            model.gdn_config(width, data.vocab_size, optimizer=optimizer.name), optimizer, options.steps
        )
        for width in plan
    }
    hparams = {
        point: programs[width].hparams(point.learning_rate, point.preset, **dict(point.varied))
        for width, points in plan.items()
        for point in points
    }
    with contextlib.ExitStack() as held:
        processes.on_first(lambda: _take_folder(options.out, held))
        config = identity(model, optimizer, data_config, data, options.steps)
        ledger = held.enter_context(shared_rows(options.out, config))
        try:
            run_lanes(
                options,
                model.regime,
                plan,
                programs,
                hparams,
                data,
                data_config,
                ledger,
                stop,
                OneAtATime(progress),
            )
        except Stopped:
            # All processes were told to stop: their last rows are on the way.
            ledger.finish(stop)
            raise
        ledger.finish(stop)
        if not processes.first():
            return []
        return [ledger.rows[point.key] for points in plan.values() for point in points]


def _take_folder(out: pathlib.Path, held: contextlib.ExitStack) -> None:
    make_writable(out)
    held.enter_context(only_process(out))


def identity(
    model: ModelOptions,
    optimizer: OptimizerOptions,
    data_config: DataConfig,
    data: PreparedData | None,
    steps: int,
) -> dict[str, Any]:
    """What all points of a ledger share; JSON-able. Without `data` (not read yet) it lacks their fingerprint."""
    read, sizes = dataclasses.asdict(data_config), dataclasses.asdict(model)
    # Where the text lies does not matter: the fingerprint says what it is.
    del read["cache_dir"], read["corpus"]
    return {
        # Recomputing changes no result: always as the first ledgers have it.
        "model": {k: v for k, v in sizes.items() if (k, v) != ("base_layers", None)} | {"remat": False},
        "optimizer": dataclasses.asdict(optimizer),
        "data": read | ({} if data is None else {"fingerprint": data.fingerprint}),
        "steps": steps,
        # Absent where head counts grow, whose rules are those of the first ledgers.
        **({"rules": HEAD_DIM_VERSIONS[optimizer.name]} if model.regime == "head_dim" else {}),
    }
