"""A sweep of width x preset x learning rate x seed: the plan, and its execution from a ledger.

Per width one compiled program serves every point. Points are packed: each device runs its share of a
pack, side by side under ``vmap`` on an accelerator, alone on a CPU, where packing does not pay. Packs
follow from the plan alone, never from what is left to do, so that a resumed sweep computes the same.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import pathlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from train import loop, processes
from train.config import ModelOptions, OptimizerOptions
from train.data import DataConfig, PreparedData, prepare, train_batch, validation_batches
from train.ledger import code_version, make_writable, only_process
from train.mesh import MeshShape, build_mesh
from train.rows import Rows, shared_rows
from train.step import Compiled, HParams, Metrics, Program, ahead_of_time, compile_program
from train.sweep_options import SweepOptions
from train.sweep_plan import Lane, describe, plan_sweep


@dataclasses.dataclass(frozen=True)
class Point:
    """One training run of a sweep."""

    preset: str
    width: int
    learning_rate: float
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        """As ``ledger.point_key`` of its row."""
        return (self.preset, self.width, self.learning_rate, self.seed)


def plan_points(options: SweepOptions, base_width: int) -> dict[int, list[Point]]:
    """The points of each width, in the order in which they are packed."""
    return {
        width: [
            Point(preset, width, rate, seed)
            for preset in options.presets
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

    def planned(self, lines: Sequence[str]) -> None:
        """Which width and points run where, before anything is compiled."""

    def begin(self, total_work: int, done_work: int) -> None:
        """Work is counted in units that are proportional to the time it takes."""

    def compiling(self, width: int, seconds: float | None) -> None:
        """A width's program is being compiled; with seconds: it is done."""

    def step(self, pack: Sequence[Point], step: int, losses: np.ndarray, work: int) -> None:
        """A pack has taken a step that was worth ``work``."""

    def finished(self, rows: Sequence[Mapping[str, Any]], skipped_work: int) -> None:
        """A pack is in the ledger; ``skipped_work`` was left out since all had diverged."""


class _OneAtATime(Progress):
    """Another progress, called by one lane at a time."""

    def __init__(self, inner: Progress) -> None:
        self._inner, self._lock = inner, threading.Lock()

    def planned(self, lines: Sequence[str]) -> None:
        with self._lock:
            self._inner.planned(lines)

    def begin(self, total_work: int, done_work: int) -> None:
        with self._lock:
            self._inner.begin(total_work, done_work)

    def compiling(self, width: int, seconds: float | None) -> None:
        with self._lock:
            self._inner.compiling(width, seconds)

    def step(self, pack: Sequence[Point], step: int, losses: np.ndarray, work: int) -> None:
        with self._lock:
            self._inner.step(pack, step, losses, work)

    def finished(self, rows: Sequence[Mapping[str, Any]], skipped_work: int) -> None:
        with self._lock:
            self._inner.finished(rows, skipped_work)


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
    """
    progress = progress or Progress()
    model = model.with_base(min(options.widths))
    assert model.base_width is not None, "with_base has set it"
    plan = plan_points(options, model.base_width)
    data = prepare(data_config)
    programs = {
        width: Program(
            model.gdn_config(width, data.vocab_size, optimizer=optimizer.name), optimizer, options.steps
        )
        for width in plan
    }
    hparams = {
        point: programs[width].hparams(point.learning_rate, point.preset)
        for width, points in plan.items()
        for point in points
    }
    with contextlib.ExitStack() as held:
        processes.on_first(lambda: _take_folder(options.out, held))
        config = identity(model, optimizer, data_config, data, options.steps)
        ledger = held.enter_context(shared_rows(options.out, config))
        _execute(
            options, model.regime, plan, programs, hparams, data, data_config, ledger, _OneAtATime(progress)
        )
        ledger.finish()
        if not processes.first():
            return []
        return [ledger.rows[point.key] for points in plan.values() for point in points]


def _take_folder(out: pathlib.Path, held: contextlib.ExitStack) -> None:
    make_writable(out)
    held.enter_context(only_process(out))


def identity(
    model: ModelOptions, optimizer: OptimizerOptions, data_config: DataConfig, data: PreparedData, steps: int
) -> dict[str, Any]:
    """What all points of a ledger share; JSON-able."""
    read = dataclasses.asdict(data_config)
    # Where the text lies does not matter, what it says does: the fingerprint covers it.
    del read["cache_dir"], read["corpus"]
    return {
        "model": dataclasses.asdict(model),
        "optimizer": dataclasses.asdict(optimizer),
        "data": read | {"fingerprint": data.fingerprint},
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
    ledger: Rows,
    progress: Progress,
) -> None:
    per_device = options.points_per_device or (1 if jax.default_backend() == "cpu" else 8)
    costs = {width: _relative_cost(program) for width, program in programs.items()}
    placed = plan_sweep(
        plan,
        costs,
        processes=jax.process_count(),
        devices=len(jax.local_devices()),
        per_device=per_device,
    )
    tokens = data_config.batch_size * data_config.sequence_length
    progress.planned(describe(placed, programs, costs, tokens, jax.devices()[0]))
    validation = validation_batches(data, data_config)
    lanes = [lane for lane in placed.lanes if lane.process == jax.process_index()]
    all_packs = {
        width: packs(placed.points[lane.process, width], placed.pack_size(lane))
        for lane in lanes
        for width in lane.widths
    }
    todo = {
        width: [pack for pack in of_width if any(p.key not in ledger.rows for p in pack)]
        for width, of_width in all_packs.items()
    }
    work = {width: costs[width] * len(of_width[0]) * options.steps for width, of_width in all_packs.items()}
    progress.begin(
        sum(work[width] * len(all_packs[width]) for width in work),
        sum(work[width] * (len(all_packs[width]) - len(todo[width])) for width in work),
    )
    shared = {
        "code_version": code_version(),
        "config_fingerprint": ledger.fingerprint,
        "regime": regime,
        "device": jax.devices()[0].device_kind,
    }
    batch = train_batch(data, data_config, 0)
    ended = threading.Event()

    def build(lane: Lane, width: int) -> tuple[Compiled, float]:
        start = time.perf_counter()
        devices = [jax.local_devices()[index] for index in lane.devices]
        mesh = build_mesh(MeshShape(sweep=len(devices)), devices)
        compiled = compile_program(programs[width], mesh, packed=True)
        pack = todo[width][0]
        seeds = loop.as_seeds([point.seed for point in pack])
        return ahead_of_time(compiled, seeds, _stacked(pack, hparams), batch), time.perf_counter() - start

    def run_lane(lane: Lane) -> None:
        left = [width for width in lane.widths if todo[width]]
        # Beside an accelerator the host's cores are idle: all widths compile at once. On a CPU they take turns.
        workers = 1 if jax.default_backend() == "cpu" else max(1, len(left))
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            ahead = {} if workers == 1 else {width: pool.submit(build, lane, width) for width in left}
            for width in left:
                progress.compiling(width, None)
                compiled, seconds = ahead.pop(width).result() if ahead else build(lane, width)
                progress.compiling(width, seconds)
                for pack in todo[width]:
                    if ended.is_set():
                        return
                    rows = _run_pack(
                        compiled,
                        programs[width],
                        pack,
                        hparams,
                        data,
                        data_config,
                        validation,
                        work[width] // options.steps,
                        progress,
                    )
                    for row in rows:
                        ledger.append(row | shared)

    if len(lanes) == 1:
        run_lane(lanes[0])
        return
    with concurrent.futures.ThreadPoolExecutor(max(1, len(lanes))) as pool:
        running = [pool.submit(run_lane, lane) for lane in lanes]
        try:
            for done in concurrent.futures.as_completed(running):
                done.result()
        finally:
            # One lane has failed, or the user has had enough: the others end with their packs.
            ended.set()


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
    progress: Progress,
) -> list[dict[str, Any]]:
    start = time.perf_counter()
    stacked = _stacked(pack, hparams)
    state = compiled.init(loop.as_seeds([point.seed for point in pack]), stacked)
    taken = 0

    def observe(step: int, metrics: Metrics) -> None:
        nonlocal taken
        taken = step
        progress.step(pack, step, np.asarray(metrics.loss), work)

    batches = (train_batch(data, data_config, step) for step in range(program.steps))
    state = loop.run(
        compiled, state, stacked, batches, first_step=0, last_step=program.steps, observe=observe
    )
    losses = loop.mean_validation_loss(compiled, state, validation)
    diverged_at = np.asarray(state.diverged_at)
    seconds = time.perf_counter() - start
    tokens = program.steps * data_config.batch_size * data_config.sequence_length
    rows = []
    for index, point in enumerate(pack):
        diverged = diverged_at[index] >= 0 or not math.isfinite(losses[index])
        rows.append(
            {
                "preset": point.preset,
                "optimizer": program.options.name,
                "base_width": program.config.base_axis_sizes["embed"],
                "width": point.width,
                "learning_rate": point.learning_rate,
                "seed": point.seed,
                "steps": program.steps,
                "tokens": tokens,
                "val_loss": None if diverged else float(losses[index]),
                "diverged_at_step": int(diverged_at[index]) + 1 if diverged_at[index] >= 0 else None,
                "seconds": round(seconds / len(pack), 3),
            }
        )
    progress.finished(rows, (program.steps - taken) * work)
    return rows


def _relative_cost(program: Program) -> int:
    """Multiplications per token, roughly: matrices, plus what does not grow as the square of the width."""
    config = program.config
    inner = 2 * config.num_key_heads * config.key_dim + 3 * config.num_value_heads * config.value_dim
    block = config.width * (inner + 3 * config.mlp_width)
    # Element-wise work and the delta rule cost as much as 6,000 columns more: 36 ms a step of 1,024 tokens at
    # width 64 and 185 at width 256 on two CPU cores; on an H100 time is all but proportional to the width.
    return config.num_layers * (block + 6000 * config.width) + config.width * config.vocab_size
