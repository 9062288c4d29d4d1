"""The lanes of a sweep, as `train.sweep_plan` places them: each trains its packs on devices of its own."""

import concurrent.futures
import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from train import loop
from train.data import DataConfig, PreparedData, train_batch, validation_batches
from train.interrupts import COMPILE_THREAD, Stopped, StopRequests
from train.ledger import code_version
from train.mesh import MeshShape, build_mesh, points_sharding, put_batch
from train.rows import Rows
from train.step import Compiled, HParams, Metrics, Program, TrainState, ahead_of_time, compile_program
from train.stopped_packs import StoppedPacks, TrainedPack
from train.sweep_options import SweepOptions
from train.sweep_plan import Lane, describe, plan_sweep, points_that_fit
from train.sweep_points import Point, Progress, packs
from train.vary import default_values


def run_lanes(
    options: SweepOptions,
    regime: str,
    plan: Mapping[int, Sequence[Point]],
    programs: Mapping[int, Program],
    hparams: Mapping[Point, HParams],
    data: PreparedData,
    data_config: DataConfig,
    ledger: Rows,
    stop: StopRequests,
    progress: Progress,
) -> None:
    """Trains what the ledger does not hold of this process's points; lanes run at the same time.

    Args:
        options: of the sweep.
        regime: of the model, for the rows.
        plan: points by width.
        programs: by width.
        hparams: by point.
        data: prepared.
        data_config: they were prepared with.
        ledger: takes the rows.
        stop: ends it early.
        progress: is told, from any thread.

    Raises:
        Stopped: ``stop`` said so; what was half done is kept.
    """
    costs = {width: _relative_cost(program) for width, program in programs.items()}
    tokens = data_config.batch_size * data_config.sequence_length
    per_device = points_that_fit(programs, tokens, jax.local_devices()[0])
    if options.points_per_device is not None:
        per_device = dict.fromkeys(programs, options.points_per_device)
    placed = plan_sweep(
        plan,
        costs,
        processes=jax.process_count(),
        devices=len(jax.local_devices()),
        per_device=per_device,
    )
    for line in describe(placed, programs, costs, tokens, jax.devices()[0]):
        progress.say(line)
    validation = validation_batches(data, data_config)
    lanes = [lane for lane in placed.lanes if lane.process == jax.process_index()]
    # What the ledger lacks is packed anew: after a kill these are the packs that were left, since the ledger takes a
    # pack as a whole; and more seeds or rates of a sweep that was finished repeat nothing.
    todo: dict[int, list[list[Point]]] = {}
    total = done = 0
    for lane in lanes:
        for width in lane.widths:
            points = placed.points[lane.process, width]
            left = [point for point in points if point.key not in ledger.rows]
            todo[width] = packs(left, placed.pack_size(lane, width, len(left))) if left else []
            total += costs[width] * options.steps * len(points)
            done += costs[width] * options.steps * (len(points) - len(left))
    progress.begin(total, done)
    shared = {
        "code_version": code_version(),
        "config_fingerprint": ledger.fingerprint,
        "regime": regime,
        "device": jax.devices()[0].device_kind,
    } | default_values(options.varied(), programs[next(iter(plan))].options.weight_decay)
    batch = train_batch(data, data_config, 0)
    stopped, ended = StoppedPacks(options.out, ledger.fingerprint), threading.Event()

    def build(lane: Lane, width: int) -> tuple[Compiled, float]:
        start = time.perf_counter()
        devices = [jax.local_devices()[index] for index in lane.devices]
        mesh = build_mesh(MeshShape(sweep=len(devices)), devices)
        compiled = compile_program(programs[width], mesh, packed=True)
        seeds, stacked = _placed(compiled, todo[width][0], hparams)
        return ahead_of_time(compiled, seeds, stacked, put_batch(mesh, batch)), time.perf_counter() - start

    def run_lane(lane: Lane) -> None:
        left = [width for width in lane.widths if todo[width]]
        # Beside an accelerator the host's cores are idle: the next width compiles while one runs. One at a time, since
        # four at once take 227 s on an H100 where one alone takes 48 s.
        pool = concurrent.futures.ThreadPoolExecutor(1, COMPILE_THREAD)
        try:
            on_cpu = jax.default_backend() == "cpu"
            ahead = {} if on_cpu else {width: pool.submit(build, lane, width) for width in left}
            for width in left:
                progress.compiling(width, None)
                make = ahead.pop(width).result if ahead else functools.partial(build, lane, width)
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
                        costs[width] * len(set(pack)),
                        stopped,
                        stop,
                        ended,
                        progress,
                    )
                    ledger.append([shared | row for row in rows])
                    stopped.forget([point.key for point in pack])
        finally:
            # A compilation that a signal left behind is not waited for.
            pool.shutdown(wait=False, cancel_futures=True)

    with _short_turns():
        _run_all(lanes, run_lane, ended)


def _run_all(lanes: Sequence[Lane], run_lane: Callable[[Lane], None], ended: threading.Event) -> None:
    if len(lanes) == 1:
        run_lane(lanes[0])
        return
    with concurrent.futures.ThreadPoolExecutor(max(1, len(lanes)), "lane") as pool:
        running = [pool.submit(run_lane, lane) for lane in lanes]
        stopped: Stopped | None = None
        try:
            for done in concurrent.futures.as_completed(running):
                try:
                    done.result()
                except Stopped as error:
                    # The others keep their packs, and end, at their own next step; that one of them failed says more.
                    stopped = error
        except BaseException:
            # One lane has failed, or the user has had enough.
            ended.set()
            raise
        if stopped is not None:
            raise stopped


@contextlib.contextmanager
def _short_turns() -> Iterator[None]:
    """A thread that traces the next width gives way after 0.5 ms, not 5.

    A step asks for the interpreter about ten times; at 5 ms each the accelerator waits for it.
    """
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def _placed(
    compiled: Compiled, pack: Sequence[Point], hparams: Mapping[Point, HParams]
) -> tuple[jax.Array, HParams]:
    """Seeds and hparams on the lane's devices: of several processes none may split what only its host holds."""
    seeds = loop.as_seeds([point.seed for point in pack])
    stacked = loop.stack_hparams([hparams[point] for point in pack])
    return jax.device_put((seeds, stacked), points_sharding(compiled.mesh))


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
    ended: threading.Event,
    progress: Progress,
) -> list[dict[str, Any]]:
    start = time.perf_counter()
    seeds, stacked = _placed(compiled, pack, hparams)
    keys = [point.key for point in pack]
    fresh = compiled.init(seeds, stacked)
    state, first, seconds_before = stopped.restore(keys, fresh)
    taken = first

    def seconds() -> float:
        return seconds_before + time.perf_counter() - start

    def keep(step: int, state: TrainState, stopping: bool) -> None:
        stopped.save(keys, TrainedPack(state, step, seconds()))

    def observe(step: int, metrics: Metrics) -> None:
        nonlocal taken
        taken = step
        if ended.is_set():
            raise concurrent.futures.CancelledError
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
        after_step=keep,
        stop=stop,
    )
    try:
        losses = loop.mean_validation_loss(compiled, state, validation, stop)
    except Stopped:
        keep(program.steps, state, stopping=True)
        raise
    diverged_at = np.asarray(state.diverged_at)
    seconds_each = round(seconds() / len(pack), 3)
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
                "seconds": seconds_each,
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
