"""`gdn train`: one model, with checkpoints, validation and a log; stopped anywhere, it goes on from there."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from train import loop, processes
from train import mesh as meshes
from train.checkpoint import Checkpoints
from train.config import KeepOptions, ModelOptions, OptimizerOptions
from train.coordinates import CoordinateLog, measurement
from train.data import Batch, DataConfig, train_loader, validation_batches
from train.diagnose import diagnose, sentence
from train.faults import disk_full_said
from train.flops import peak_flops, train_flops_per_token
from train.interrupts import Stopped, StopRequests
from train.ledger import (
    check_identity,
    code_version,
    fingerprint,
    make_writable,
    only_process,
    read_config,
    write_atomically,
)
from train.mesh import MeshOptions
from train.metrics_log import Clock, MetricsLog, finite_or_none
from train.profiling import Profile
from train.run_setup import RunSetup, set_up
from train.step import Compiled, Metrics, TrainState, ahead_of_time, compile_program
from train.trackers import open_trackers
from train.train_options import TrainOptions

CONFIG_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
COORDINATES_FILE = "coordinates.jsonl"
NOT_FINITE_FILE = "not-finite.jsonl"


def run_training(
    options: TrainOptions,
    model: ModelOptions,
    optimizer: OptimizerOptions,
    data_config: DataConfig,
    say: Callable[[str], None] = lambda text: None,
    keep: KeepOptions = KeepOptions(),
    mesh: MeshOptions = MeshOptions(),
) -> dict[str, Any]:
    """Trains to the end of the schedule, or to ``stop_at``.

    Args:
        options: of the run.
        model: the base model.
        optimizer: with its schedule.
        data_config: of the corpus.
        say: takes a line for the user.
        keep: what is kept, and what is done about faults.
        mesh: devices along each axis; a run may go on over other ones.

    Returns:
        The summary: steps, tokens, ``val_loss`` (None when diverged or stopped early), ``diverged_at_step``.

    Raises:
        ValueError: anything wrong with options, corpus or folder; before any compilation.
        Stopped: SIGTERM or SIGUSR1 came; everything is saved.
        RunFailedError: the disk is full; the last checkpoint is as it was.
    """
    with StopRequests() as stop:
        with stop.at_once():
            # Of a pod's processes one says what all of them do.
            told = say if processes.first() else lambda text: None
            setup = set_up(options, model, optimizer, data_config, mesh, told)
        with contextlib.ExitStack() as held:
            run = _Run(options, keep, setup, meshes.build_mesh(setup.shape), stop, say)
            held.enter_context(disk_full_said(options.out, run.kept))
            processes.require_equal(setup.identity)
            run.begun = processes.on_first(
                lambda: _take_folder(options.out, setup.identity, keep.allow_changes, held)
            )
            return run.train()


def _take_folder(
    out: pathlib.Path, run_identity: dict[str, Any], changes: bool, held: contextlib.ExitStack
) -> bool:
    """Whether the folder said before what it was begun with."""
    make_writable(out)
    held.enter_context(only_process(out))
    begun = (out / CONFIG_FILE).exists()
    if not changes:
        check_identity(out, CONFIG_FILE, run_identity, option="--allow-changes")
    elif begun:
        # Written anew once a checkpoint was restored; a damaged one is said before anything is compiled.
        read_config(out / CONFIG_FILE)
    return begun


@dataclasses.dataclass
class _Run:
    """A run that owns its folder."""

    options: TrainOptions
    keep: KeepOptions
    setup: RunSetup
    mesh: Mesh
    stop: StopRequests
    say_anywhere: Callable[[str], None]
    checkpoints: Checkpoints | None = None
    begun: bool = False

    def say(self, text: str) -> None:
        """A line for the user, once however many processes there are."""
        if processes.first():
            self.say_anywhere(text)

    @property
    def rows(self) -> np.ndarray:
        """The rows of each batch that this process reads."""
        return meshes.process_rows(self.mesh, self.setup.data_config.batch_size)

    def _held_out(self) -> list[Batch]:
        return validation_batches(self.setup.data, self.setup.data_config, self.rows)

    def kept(self) -> str:
        """What is safe, a clause."""
        if self.checkpoints is None or self.checkpoints.newest is None:
            return "no checkpoint was written yet"
        return f"the checkpoint of step {self.checkpoints.newest} is kept"

    def train(self) -> dict[str, Any]:
        """To the end of the schedule, or to ``stop_at``; the summary."""
        options = self.options
        with self.stop.at_once():
            checkpoints = Checkpoints(
                options.out / "checkpoints", self.keep.keep, self.keep.keep_best, self.say
            )
        self.checkpoints = checkpoints
        first, last = checkpoints.newest or 0, options.stop_at or options.steps
        self._require_same(checkpoints, first)
        if first == options.steps and (summary := processes.on_first(self._finished)) is not None:
            checkpoints.close()
            self.say(f"already at step {first}, the last; nothing to do")
            return summary
        try:
            compiled, state, position = self._begin(checkpoints, first)
            if self.keep.allow_changes:
                # Not before: a checkpoint of another model must leave the folder as it was.
                processes.on_first(
                    lambda: check_identity(options.out, CONFIG_FILE, self.setup.identity, changes=True)
                )
            if first >= last:
                self.say(f"already at step {first}; nothing to do")
            else:
                state = self._steps(checkpoints, compiled, state, position, first, last)
            checkpoints.wait()
            return self._summary(compiled, state, done=max(first, last) == options.steps)
        except Stopped as stopped:
            checkpoints.wait()
            self.say(f"stopped by {stopped}; {self.kept()}")
            raise
        finally:
            checkpoints.abandon()

    def _finished(self) -> dict[str, Any] | None:
        """The summary of a run that came to its end, where it was written and is sound."""
        try:
            summary = json.loads((self.options.out / SUMMARY_FILE).read_text())
        except (OSError, ValueError):
            return None
        sound = isinstance(summary, dict) and {"val_loss", "diverged_at_step"} <= summary.keys()
        return summary if sound and summary.get("steps") == self.options.steps else None

    def _require_same(self, checkpoints: Checkpoints, first: int) -> None:
        """ValueError where the checkpoint is of another configuration and that cannot be, or is not, asked for."""
        out, steps = self.options.out, self.options.steps
        if not first or checkpoints.config_fingerprint(first) == fingerprint(self.setup.identity):
            return
        if self.keep.allow_changes and first < steps:
            return
        checkpoints.close()
        if self.keep.allow_changes:
            raise ValueError(
                f"{out} is at step {first}, and --steps is {steps}: none is left to train with other options; give "
                "more --steps, or another --out."
            )
        if not self.begun:
            # This command has written it, and it describes no checkpoint here.
            processes.on_first(lambda: (out / CONFIG_FILE).unlink())
        raise ValueError(
            f"{out} has a checkpoint of another configuration than "
            f"{f'{CONFIG_FILE} says' if self.begun else 'this one'}; choose another --out, or --allow-changes to go "
            "on from it."
        )

    def _begin(self, checkpoints: Checkpoints, first: int) -> tuple[Compiled, TrainState, Any]:
        """The compiled functions, the state after ``first`` steps, and the position in the data."""
        program, hparams = self.setup.program, self.setup.hparams
        jitted = compile_program(program, self.mesh, packed=False)
        # Of numpy: every process may give it to a program of all devices.
        seed = np.int32(self.options.seed)
        shape = (self.setup.data_config.batch_size, self.setup.data_config.sequence_length)
        batch: Any = Batch._make(
            jax.ShapeDtypeStruct(shape, dtype) for dtype in (*[np.int32] * 3, np.float32)
        )
        compiled = self.stop.compile(lambda: ahead_of_time(jitted, seed, hparams, batch, init=first == 0))
        if not first:
            return compiled, compiled.init(seed, hparams), None
        like = meshes.abstract(jax.eval_shape(program.init, seed, hparams), program.state_sharding(self.mesh))
        state, position = checkpoints.restore(first, like)
        self.say(f"going on from step {first} of {self.options.steps}")
        return compiled, state, position

    def _steps(
        self,
        checkpoints: Checkpoints,
        compiled: Compiled,
        state: TrainState,
        position: Any,
        first: int,
        last: int,
    ) -> TrainState:
        options, stop, setup = self.options, self.stop, self.setup
        loader = train_loader(setup.data, setup.data_config, rows=self.rows)
        if position is not None:
            loader.set_state(position)
        held_out = self._held_out()

        def open_log(name: str) -> MetricsLog | None:
            return MetricsLog(options.out / name, keep_until=first) if processes.first() else None

        log = open_log(METRICS_FILE)
        if log is not None:
            checkpoints.scores.update(log.val_losses)
        tokens_per_step = setup.data_config.batch_size * setup.data_config.sequence_length
        clock = Clock(tokens_per_step)
        flops, peak = train_flops_per_token(setup.program.config), peak_flops(jax.devices()[0])
        coordinates = None
        if options.coordinates_every:
            # All its rows, on every process.
            (batch, *_) = validation_batches(setup.data, setup.data_config)
            measure = measurement(setup.program, self.mesh, options.seed, setup.hparams, batch)
            coordinates = CoordinateLog(measure, open_log(COORDINATES_FILE))
        profile = Profile(options.profile_steps, options.out / "profile")

        trackers = (
            open_trackers(options.log_to, options.out, first, setup.identity) if processes.first() else []
        )

        def write(row: dict[str, Any]) -> None:
            for taker in (log, *trackers):
                if taker is not None:
                    taker.write(row)

        def observe(step: int, metrics: Metrics) -> None:
            checkpoints.check()
            if profile.seen(step):
                self.say(f"step {step:>6}  trace written to {options.out / 'profile'}")
            speed = clock.tick()
            row = {
                "step": step,
                "tokens": step * tokens_per_step,
                "loss": finite_or_none(metrics.loss),
                "grad_norm": finite_or_none(metrics.grad_norm),
                "learning_rate": float(metrics.learning_rate),
                "tokens_per_second": speed,
            }
            if peak is not None and speed is not None:
                row["mfu"] = round(speed * flops / (peak * compiled.mesh.size), 4)
            write(row)
            if step == first + 1 or step % max(1, options.steps // 20) == 0:
                self.say(f"step {step:>6}  loss {float(metrics.loss):.4f}  {speed or 0:,.0f} tokens/s")

        def validates(step: int) -> bool:
            return step % options.validate_every == 0 and step != options.steps

        # A kill during a save costs the steps since the save before, and those taken while it was written.
        half = max(1, options.checkpoint_every // 2)

        def saves(step: int) -> bool:
            return step % half == 0 or step == last

        def save(step: int, state: TrainState) -> None:
            # Not the loader's own position: it may have read on.
            at = train_loader(setup.data, setup.data_config, start_step=step).get_state()
            checkpoints.save(step, state, at, setup.identity)
            if options.checkpoint_every == 1:
                checkpoints.wait()

        def validate(step: int, state: TrainState) -> None:
            loss = float(loop.mean_validation_loss(compiled, state, held_out, stop))
            checkpoints.scores[step] = loss
            write({"step": step, "val_loss": finite_or_none(loss)})
            self.say(f"step {step:>6}  validation {loss:.4f}")

        def writes_coordinates(step: int) -> bool:
            every = options.coordinates_every
            return coordinates is not None and (step % every == 0 or step == options.steps)

        def after_step(step: int, state: TrainState, stopping: bool) -> None:
            if coordinates is not None and writes_coordinates(step):
                coordinates.write(step, state)
            if saves(step) or (stopping and not validates(step)):
                save(step, state)
            if validates(step):
                try:
                    validate(step, state)
                except Stopped:
                    # Made up for when the run goes on.
                    save(step, state)
                    raise

        def save_before(step: int, found: TrainState) -> None:
            # As it was before anything was noticed.
            save(step - 1, found._replace(diverged_at=found.diverged_at * 0 - 1))

        def diverged(step: int, batch: Batch, before: TrainState) -> bool:
            try:
                report = stop.compile(lambda: diagnose(setup.program, compiled.mesh, step, before, batch))
            except Stopped:
                save_before(step, before)
                raise
            if processes.first():
                with (options.out / NOT_FINITE_FILE).open("a") as file:
                    file.write(json.dumps(report) + "\n")
            # Without sound parameters no step will be finite: nothing to go on with, and nothing to save.
            sound = report["where"] != "parameters"
            skip = self.keep.nan_policy == "skip" and sound
            self.say(f"{sentence(report)}; {'left out' if skip else 'the run ends'}")
            if sound and not skip:
                save_before(step, before)
            return skip

        try:
            if first and processes.on_first(
                lambda: validates(first) and (log is None or first not in log.validated)
            ):
                validate(first, state)
            return loop.run(
                compiled,
                state,
                setup.hparams,
                profile.batches(loader, first),
                first_step=first,
                last_step=last,
                observe=observe,
                due=lambda step: saves(step) or validates(step) or writes_coordinates(step),
                after_step=after_step,
                diverged=diverged,
                stop=stop,
            )
        finally:
            profile.close()
            if log is not None:
                log.close()
            if coordinates is not None:
                coordinates.close()
            for tracker in trackers:
                tracker.close()

    def _summary(self, compiled: Compiled, state: TrainState, *, done: bool) -> dict[str, Any]:
        data_config = self.setup.data_config
        step, diverged_at = int(state.step), int(state.diverged_at)
        loss = None
        if done and diverged_at < 0:
            loss = float(loop.mean_validation_loss(compiled, state, self._held_out(), self.stop))
        lost_at = loop.divergence_step(diverged_at, loss, step)
        if lost_at is not None:
            self.say(f"diverged at step {lost_at}: lower --learning-rate")
        summary = {
            "steps": step,
            "tokens": step * data_config.batch_size * data_config.sequence_length,
            "val_loss": loss if lost_at is None else None,
            "diverged_at_step": lost_at,
            "code_version": code_version(),
            "devices": len(jax.devices()),
        }
        if (done or lost_at is not None) and processes.first():
            write_atomically(
                self.options.out / SUMMARY_FILE, json.dumps(summary, indent=1, sort_keys=True) + "\n"
            )
        return summary
