"""`gdn train`: one model, with checkpoints, validation and a log; stopped anywhere, it goes on from there."""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train import loop
from train import mesh as meshes
from train.checkpoint import Checkpoints, abstract_like
from train.config import (
    DEFAULT_BASE_WIDTH,
    ModelOptions,
    OptimizerOptions,
    PresetName,
    check_learning_rate,
    check_preset_name,
)
from train.coordinates import measurement
from train.data import Batch, DataConfig, prepare, train_loader, validation_batches
from train.ledger import check_identity, code_version, make_writable, only_process, write_atomically
from train.step import Metrics, Program, TrainState, compile_program
from train.sweep import identity
from train.tuned import ChangeName, differences, plan, read_tuning, require_accepted

CONFIG_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
COORDINATES_FILE = "coordinates.jsonl"
DEFAULT_LEARNING_RATE = 2.0**-7


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """One training run, and where its log and checkpoints go."""

    out: pathlib.Path
    """Folder of checkpoints and log; a run that was stopped goes on from it."""
    width: int = 64
    """Model width."""
    learning_rate: float | None = None
    """Peak learning rate at the base width; by default 2^-7, or what --tuned-by found."""
    preset: PresetName | None = None
    """Parametrization; by default mup, or the one that --tuned-by found to transfer."""
    tuned_by: pathlib.Path | None = None
    """Folder of a sweep: its optimum, preset, optimizer, base sizes, data settings and steps are the defaults here."""
    accept_change: tuple[ChangeName, ...] = ()
    """With --tuned-by: in what this run may differ from the sweep, although that may move the optimum."""
    seed: int = 0
    """Seed of the initialisation; the data have their own."""
    steps: int = 200
    """Training steps; the schedule's length."""
    stop_at: int | None = None
    """Save and stop after this step of the schedule; run again without it to go on."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    validate_every: int = 100
    """Steps between validations; the last step is always validated."""
    coordinates_every: int = 0
    """Steps between rows of coordinates.jsonl, per layer: sizes of activations and of what updates do, saturation of
    the gates, coherence of their gradients. 0: none."""

    def __post_init__(self) -> None:
        for name in ("width", "steps", "checkpoint_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be positive; got {getattr(self, name)}.")
        if self.coordinates_every < 0:
            raise ValueError(f"--coordinates-every must be 0 or more; got {self.coordinates_every}.")
        if self.stop_at is not None and not 1 <= self.stop_at <= self.steps:
            raise ValueError(f"--stop-at must be from 1 to --steps ({self.steps}); got {self.stop_at}.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed must be in [0, 2^31); got {self.seed}.")
        if self.learning_rate is not None:
            check_learning_rate(self.learning_rate)
        if self.preset is not None:
            check_preset_name(self.preset, "--preset")
        if self.tuned_by is not None and self.learning_rate is not None:
            raise ValueError("--learning-rate is what --tuned-by gives; use one of the two.")
        if self.accept_change and self.tuned_by is None:
            raise ValueError(
                "--accept-change says in what a run may differ from --tuned-by; name that sweep."
            )


def run_training(
    options: TrainOptions,
    model: ModelOptions,
    optimizer: OptimizerOptions,
    data_config: DataConfig,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Trains to the end of the schedule, or to ``stop_at``.

    Args:
        options: of the run.
        model: the base model.
        optimizer: with its schedule.
        data_config: of the corpus.
        say: takes a line for the user.

    Returns:
        The summary: steps, tokens, ``val_loss`` (None when diverged or stopped early), ``diverged_at_step``.

    Raises:
        ValueError: anything wrong with options, corpus or folder; before any compilation.
    """
    model = model.with_base(DEFAULT_BASE_WIDTH)
    if options.tuned_by is None:
        data = prepare(data_config)
        learning_rate, preset = options.learning_rate or DEFAULT_LEARNING_RATE, options.preset or "mup"
    else:
        tuning = read_tuning(options.tuned_by, options.preset, options.width)
        now = identity(model, optimizer, data_config, None, options.steps)
        require_accepted(differences(tuning.config, now), options.accept_change, options.tuned_by)
        data = prepare(data_config)
        now = identity(model, optimizer, data_config, data, options.steps)
        changed = differences(tuning.config, now)
        require_accepted(changed, options.accept_change, options.tuned_by)
        for line in plan(tuning, options.width, now, changed):
            say(line)
        learning_rate, preset = tuning.learning_rate, tuning.preset
    program = Program(
        model.gdn_config(options.width, data.vocab_size, optimizer=optimizer.name), optimizer, options.steps
    )
    hparams = program.hparams(learning_rate, preset)
    devices = len(jax.devices())
    if data_config.batch_size % devices:
        raise ValueError(
            f"--data.batch-size must be a multiple of the {devices} devices there are; got {data_config.batch_size}. "
            f"Use {-(-data_config.batch_size // devices) * devices}."
        )
    make_writable(options.out)
    with only_process(options.out):
        run_identity = identity(model, optimizer, data_config, data, options.steps) | {
            "run": {
                "width": options.width,
                "learning_rate": learning_rate,
                "preset": preset,
                "seed": options.seed,
            }
        }
        check_identity(options.out, CONFIG_FILE, run_identity)
        return _train(options, program, hparams, data, data_config, run_identity, say)


def _train(
    options: TrainOptions,
    program: Program,
    hparams: Any,
    data: Any,
    data_config: DataConfig,
    run_identity: dict[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    mesh = meshes.make_mesh()
    compiled = compile_program(program, mesh, packed=False)
    checkpoints = Checkpoints(options.out / "checkpoints")
    seed = jnp.int32(options.seed)
    first = checkpoints.latest_step or 0
    last = options.stop_at or options.steps
    loader = train_loader(data, data_config)
    if first:
        like = abstract_like(jax.eval_shape(compiled.init, seed, hparams), meshes.replicated(mesh))
        state, position = checkpoints.restore(first, like)
        loader.set_state(position)
        say(f"going on from step {first} of {options.steps}")
    else:
        state = compiled.init(seed, hparams)
    if first >= last:
        checkpoints.close()
        say(f"already at step {first}; nothing to do")
        return _summary(options, data_config, compiled, state, data, write=first == options.steps)

    log = MetricsLog(options.out / METRICS_FILE, keep_until=first)
    tokens_per_step = data_config.batch_size * data_config.sequence_length
    held_out = validation_batches(data, data_config)
    coordinates = CoordinateLog.begin(options, program, hparams, held_out[0], first)
    clock = _Clock(tokens_per_step)

    def observe(step: int, metrics: Metrics) -> None:
        speed = clock.tick()
        row = {
            "step": step,
            "tokens": step * tokens_per_step,
            "loss": _finite(metrics.loss),
            "grad_norm": _finite(metrics.grad_norm),
            "learning_rate": float(metrics.learning_rate),
            "tokens_per_second": speed,
        }
        log.write(row)
        if step == first + 1 or step % max(1, options.steps // 20) == 0:
            say(f"step {step:>6}  loss {float(metrics.loss):.4f}  {speed or 0:,.0f} tokens/s")

    def after_step(step: int, state: TrainState) -> None:
        if step % options.validate_every == 0 and step != options.steps:
            loss = float(loop.mean_validation_loss(compiled, state, held_out))
            log.write({"step": step, "val_loss": _finite(loss)})
            say(f"step {step:>6}  validation {loss:.4f}")
        if coordinates is not None and (step % options.coordinates_every == 0 or step == options.steps):
            coordinates.write(step, state)
        if step % options.checkpoint_every == 0 or step == last:
            checkpoints.save(step, state, loader.get_state(), run_identity)

    state = loop.run(
        compiled,
        state,
        hparams,
        loader,
        first_step=first,
        last_step=last,
        observe=observe,
        after_step=after_step,
    )
    checkpoints.close()
    diverged = int(state.diverged_at) >= 0
    done = diverged or last == options.steps
    summary = _summary(options, data_config, compiled, state, data, write=done)
    if summary["diverged_at_step"]:
        say(f"diverged at step {summary['diverged_at_step']}: lower --learning-rate")
    log.close()
    if coordinates is not None:
        coordinates.close()
    return summary


def _summary(
    options: TrainOptions,
    data_config: DataConfig,
    compiled: Any,
    state: TrainState,
    data: Any,
    *,
    write: bool,
) -> dict[str, Any]:
    step, diverged_at = int(state.step), int(state.diverged_at)
    loss = (
        float(loop.mean_validation_loss(compiled, state, validation_batches(data, data_config)))
        if write
        else None
    )
    lost_at = loop.divergence_step(diverged_at, loss, step)
    summary = {
        "steps": step,
        "tokens": step * data_config.batch_size * data_config.sequence_length,
        "val_loss": loss if lost_at is None else None,
        "diverged_at_step": lost_at,
        "code_version": code_version(),
        "devices": len(jax.devices()),
    }
    if write:
        write_atomically(options.out / SUMMARY_FILE, json.dumps(summary, indent=1, sort_keys=True) + "\n")
    return summary


class MetricsLog:
    """JSON lines; what a stopped run logged beyond its last checkpoint is dropped when it goes on."""

    def __init__(self, path: pathlib.Path, keep_until: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    break
                if row["step"] <= keep_until:
                    kept.append(line + "\n")
        write_atomically(path, "".join(kept))
        self._file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class CoordinateLog:
    """Rows of `coordinates.measure`, as a training run goes on."""

    def __init__(self, measure: Callable[[TrainState], dict[str, Any]], log: MetricsLog) -> None:
        self._measure, self._log = measure, log

    @classmethod
    def begin(
        cls, options: TrainOptions, program: Program, hparams: Any, held_out: Batch, first: int
    ) -> "CoordinateLog | None":
        """The log of a run that goes on after ``first`` steps, or None where none is asked for."""
        if not options.coordinates_every:
            return None
        measure = measurement(program, options.seed, hparams, held_out)
        return cls(measure, MetricsLog(options.out / COORDINATES_FILE, keep_until=first))

    def write(self, step: int, state: TrainState) -> None:
        """Measures a state and adds its row."""
        self._log.write({"step": step, **self._measure(state)})

    def close(self) -> None:
        """Closes the file."""
        self._log.close()


class _Clock:
    """Tokens per second since the tick before; the first tick knows none."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens, self._before = tokens_per_step, None

    def tick(self) -> float | None:
        now = time.perf_counter()
        speed = None if self._before is None else round(self._tokens / (now - self._before), 1)
        self._before = now
        return speed


def _finite(value: Any) -> float | None:
    number = float(np.asarray(value))
    return number if math.isfinite(number) else None
