"""A sweep of width x preset x learning rate x seed: the plan, and its execution from a ledger.

Per width one compiled program serves every point. Points are packed: each device runs its share of a pack, side by
side on an accelerator, alone on a CPU. Packs follow from the plan alone, so that a resumed sweep computes the same.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from train import loop
from train.config import ModelOptions, OptimizerOptions
from train.data import DataConfig, PreparedData, prepare, train_batch, validation_batches
from train.faults import disk_full_said
from train.interrupts import StopRequests
from train.ledger import Ledger, code_version, make_writable, only_process
from train.mesh import SWEEP, make_mesh
from train.step import Compiled, HParams, Metrics, Program, ahead_of_time, compile_program
from train.stopped_packs import StoppedPacks
from train.sweep_options import SweepOptions
from train.vary import Varied, combinations, default_values


@dataclasses.dataclass(frozen=True)
class Point:
    """One training run of a sweep."""

    preset: str
    width: int
    learning_rate: float
    seed: int
    varied: Varied = ()

    @property
    def key(self) -> tuple[Any, ...]:
        """As ``ledger.point_key`` of its row."""
        return (self.preset, self.width, self.learning_rate, self.seed, self.varied)


def plan_points(options: SweepOptions, base_width: int, weight_decay: float = 0.0) -> dict[int, list[Point]]:
    """The points of each width, in the order of their packs; ``weight_decay`` is the configured one."""
    settings = combinations(options.varied(), weight_decay)
    return {
        width: [
            Point(preset, width, rate, seed, setting)
            for preset in options.presets
            for setting in settings
            for rate in options.grid(preset, width, base_width)
            for seed in options.seeds
        ]
        for width in sorted(options.widths)
    }


def packs(points: Sequence[Point], size: int) -> list[list[Point]]:
    """Consecutive packs of ``size``; the last is filled up with its own last point."""
    cut = [list(chunk) for chunk in itertools.batched(points, size)]
    cut[-1] += [cut[-1][-1]] * (size - len(cut[-1]))
    return cut


class Progress:
    """What the sweep tells its caller; the command line shows it as a bar. Does nothing by itself."""

    def begin(self, total_work: int, done_work: int) -> None:
        """Work is counted in units that are proportional to the time it takes."""

    def compiling(self, width: int, seconds: float | None) -> None:
        """A width's program is being compiled; with seconds: it is done."""

    def step(self, pack: Sequence[Point], step: int, losses: np.ndarray, work: int) -> None:
        """A pack has taken a step that was worth ``work``."""

    def finished(self, rows: Sequence[Mapping[str, Any]], skipped_work: int) -> None:
        """A pack is in the ledger; ``skipped_work`` was left out since all had diverged."""


def run_sweep(
    options: SweepOptions,
    model: ModelOptions,
    optimizer: OptimizerOptions,
    data_config: DataConfig,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Runs what the ledger in ``options.out`` does not hold yet.

    Returns:
        The rows of the plan, in its order.

    Raises:
        ValueError: anything wrong with the options, the corpus or the folder; before any compilation.
        Stopped: SIGTERM or SIGUSR1 came; the same call goes on from there.
        RunFailedError: the disk is full.
    """
    progress = progress or Progress()
    model = model.with_base(min(options.widths))
    assert model.base_width is not None, "with_base has set it"
    plan = plan_points(options, model.base_width, optimizer.weight_decay)
    with StopRequests() as stop, disk_full_said(options.out, lambda: "the rows so far are kept"):
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
        data = prepare(data_config)
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
    make_writable(options.out)
    with only_process(options.out):
        ledger = Ledger(options.out, identity(model, optimizer, data_config, data, options.steps))
        _execute(options, model.regime, plan, programs, hparams, data, data_config, ledger, stop, progress)
        return [ledger.rows[point.key] for points in plan.values() for point in points]


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
    }


def _execute(
    options: SweepOptions,
    regime: str,
    plan: Mapping[int, Sequence[Point]],
    programs: Mapping[int, Program],
    hparams: Mapping[Point, HParams],
    data: PreparedData,
    data_config: DataConfig,
    ledger: Ledger,
    stop: StopRequests,
    progress: Progress,
) -> None:
    per_device = options.points_per_device or (1 if jax.default_backend() == "cpu" else 8)
    mesh = make_mesh(sweep=len(jax.devices()), data=1)
    size = per_device * mesh.shape[SWEEP]
    validation = validation_batches(data, data_config)
    todo = {
        width: [pack for pack in packs(points, size) if any(p.key not in ledger.rows for p in pack)]
        for width, points in plan.items()
    }
    work = {width: _relative_cost(program) * size for width, program in programs.items()}
    count = {width: len(packs(points, size)) for width, points in plan.items()}
    progress.begin(
        sum(work[width] * count[width] * options.steps for width in plan),
        sum(work[width] * (count[width] - len(todo[width])) * options.steps for width in plan),
    )
    shared = {
        "code_version": code_version(),
        "config_fingerprint": ledger.fingerprint,
        "regime": regime,
        "device": jax.devices()[0].device_kind,
    } | default_values(options.varied(), programs[next(iter(plan))].options.weight_decay)
    left = [width for width in plan if todo[width]]
    batch = train_batch(data, data_config, 0)

    def build(width: int) -> tuple[Compiled, float]:
        start = time.perf_counter()
        compiled = compile_program(programs[width], mesh, packed=True)
        pack = todo[width][0]
        seeds = loop.as_seeds([point.seed for point in pack])
        return ahead_of_time(compiled, seeds, _stacked(pack, hparams), batch), time.perf_counter() - start

    # Beside an accelerator the host's cores are idle: the next width compiles while one runs. One at a time, since four
    # at once take 227 s on an H100 where one alone takes 48 s.
    pool = concurrent.futures.ThreadPoolExecutor(1)
    stopped = StoppedPacks(options.out, ledger.fingerprint)
    try:
        ahead = {} if jax.default_backend() == "cpu" else {width: pool.submit(build, width) for width in left}
        for width in left:
            progress.compiling(width, None)
            make = ahead.pop(width).result if ahead else functools.partial(build, width)
            compiled, seconds = stop.compile(make)
            progress.compiling(width, seconds)
            for pack in todo[width]:
                rows = _run_pack(
                    compiled,
                    programs[width],
                    pack,
                    hparams,
                    data,
                    data_config,
                    validation,
                    work[width],
                    stopped,
                    stop,
                    progress,
                )
                for row in rows:
                    ledger.append(shared | row)
                stopped.forget([point.key for point in pack])
    finally:
        # A compilation that a signal left behind is not waited for.
        pool.shutdown(wait=False, cancel_futures=True)


def _stacked(pack: Sequence[Point], hparams: Mapping[Point, HParams]) -> HParams:
    return loop.stack_hparams([hparams[point] for point in pack])


def _run_pack(
    compiled: Compiled,
    program: Program,
    pack: Sequence[Point],
    hparams: Mapping[Point, HParams],
    data: PreparedData,
    data_config: DataConfig,
    validation: Sequence[Any],
    work: int,
    stopped: StoppedPacks,
    stop: StopRequests,
    progress: Progress,
) -> list[dict[str, Any]]:
    start = time.perf_counter()
    stacked = _stacked(pack, hparams)
    keys = [point.key for point in pack]
    fresh = compiled.init(loop.as_seeds([point.seed for point in pack]), stacked)
    state, first = stopped.restore(keys, fresh)
    taken = first

    def observe(step: int, metrics: Metrics) -> None:
        nonlocal taken
        taken = step
        progress.step(pack, step, np.asarray(metrics.loss), work)

    batches = (train_batch(data, data_config, step) for step in range(first, program.steps))
    state = loop.run(
        compiled,
        state,
        stacked,
        batches,
        first_step=first,
        last_step=program.steps,
        observe=observe,
        after_step=functools.partial(stopped.save, keys),
        stop=stop,
    )
    losses = stopped.saved_when_stopped(
        keys, program.steps, state, lambda: loop.mean_validation_loss(compiled, state, validation, stop)
    )
    diverged_at = np.asarray(state.diverged_at)
    seconds = time.perf_counter() - start
    tokens = program.steps * data_config.batch_size * data_config.sequence_length
    rows = []
    for index, point in enumerate(pack):
        lost_at = loop.divergence_step(int(diverged_at[index]), float(losses[index]), program.steps)
        rows.append(
            {
                "preset": point.preset,
                "optimizer": program.options.name,
                "base_width": program.config.base_axis_sizes["embed"],
                "width": point.width,
                "learning_rate": point.learning_rate,
                "seed": point.seed,
                **dict(point.varied),
                "steps": program.steps,
                "tokens": tokens,
                "val_loss": float(losses[index]) if lost_at is None else None,
                "diverged_at_step": lost_at,
                "seconds": round(seconds / len(pack), 3),
            }
        )
    progress.finished(rows, (program.steps - taken + first) * work)
    return rows


def _relative_cost(program: Program) -> int:
    """Multiplications per token, roughly: matrices, plus what does not grow as the square of the width."""
    config = program.config
    inner = 2 * config.num_key_heads * config.key_dim + 3 * config.num_value_heads * config.value_dim
    block = config.width * (inner + 3 * config.mlp_width)
    # Element-wise work and the delta rule cost as much as 6,000 columns more: 36 ms a step of 1,024 tokens at
    # width 64 and 185 at width 256 on two CPU cores; on an H100 time is all but proportional to the width.
    return config.num_layers * (block + 6000 * config.width) + config.width * config.vocab_size
