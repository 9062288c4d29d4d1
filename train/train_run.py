"""`gdn train`: one model, with checkpoints, validation and a log; stopped anywhere, it goes on from there."""

import contextlib
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from train import loop, processes
from train import mesh as meshes
from train.checkpoint import Checkpoints
from train.config import (
    DEFAULT_BASE_WIDTH,
    ModelOptions,
    OptimizerOptions,
    PresetName,
    check_learning_rate,
    check_preset_name,
)
from train.data import DataConfig, prepare, train_loader, validation_batches
from train.ledger import check_identity, code_version, make_writable, only_process, write_atomically
from train.mesh import MeshOptions
from train.step import Metrics, Program, TrainState, compile_program
from train.sweep import identity

CONFIG_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """One training run, and where its log and checkpoints go."""

    out: pathlib.Path
    """Folder of checkpoints and log; a run that was stopped goes on from it."""
    width: int = 64
    """Model width."""
    learning_rate: float = 2.0**-7
    """Peak learning rate at the base width."""
    preset: PresetName = "mup"
    """Parametrization."""
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

    def __post_init__(self) -> None:
        for name in ("width", "steps", "checkpoint_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be positive; got {getattr(self, name)}.")
        if self.stop_at is not None and not 1 <= self.stop_at <= self.steps:
            raise ValueError(f"--stop-at must be from 1 to --steps ({self.steps}); got {self.stop_at}.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed must be in [0, 2^31); got {self.seed}.")
        check_learning_rate(self.learning_rate)
        check_preset_name(self.preset, "--preset")


def run_training(
    options: TrainOptions,
    model: ModelOptions,
    optimizer: OptimizerOptions,
    data_config: DataConfig,
    say: Callable[[str], None] = lambda text: None,
    mesh_options: MeshOptions = MeshOptions(),
) -> dict[str, Any]:
    """Trains to the end of the schedule, or to ``stop_at``.

    Args:
        options: of the run.
        model: the base model.
        optimizer: with its schedule.
        data_config: of the corpus.
        say: takes a line for the user.
        mesh_options: devices along each axis; a run may go on over other ones.

    Returns:
        The summary: steps, tokens, ``val_loss`` (None when diverged or stopped early), ``diverged_at_step``.

    Raises:
        ValueError: anything wrong with options, corpus or folder; before any compilation.
    """
    model = model.with_base(DEFAULT_BASE_WIDTH)
    data = prepare(data_config)
    program = Program(
        model.gdn_config(options.width, data.vocab_size, optimizer=optimizer.name), optimizer, options.steps
    )
    hparams = program.hparams(options.learning_rate, options.preset)
    shape = meshes.choose_mesh(
        mesh_options,
        len(jax.devices()),
        program.config,
        data_config.batch_size,
        data_config.sequence_length,
    )
    with contextlib.ExitStack() as held:
        run_identity = identity(model, optimizer, data_config, data, options.steps) | {
            "run": {
                "width": options.width,
                "learning_rate": options.learning_rate,
                "preset": options.preset,
                "seed": options.seed,
            }
        }
        processes.on_first(lambda: _take_folder(options.out, run_identity, held))
        mesh = meshes.build_mesh(shape)
        return _train(options, program, hparams, data, data_config, mesh, run_identity, say)


def _take_folder(out: pathlib.Path, run_identity: dict[str, Any], held: contextlib.ExitStack) -> None:
    make_writable(out)
    held.enter_context(only_process(out))
    check_identity(out, CONFIG_FILE, run_identity)


def _train(
    options: TrainOptions,
    program: Program,
    hparams: Any,
    data: Any,
    data_config: DataConfig,
    mesh: Mesh,
    run_identity: dict[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    compiled = compile_program(program, mesh, packed=False)
    checkpoints = Checkpoints(options.out / "checkpoints")
    seed = np.int32(options.seed)
    say = say if processes.first() else lambda text: None
    first = checkpoints.latest_step or 0
    last = options.stop_at or options.steps
    rows = meshes.process_rows(mesh, data_config.batch_size)
    loader = train_loader(data, data_config, rows=rows)
    if first:
        like = meshes.abstract(jax.eval_shape(compiled.init, seed, hparams), program.state_sharding(mesh))
        state, position = checkpoints.restore(first, like)
        loader.set_state(position)
        say(f"going on from step {first} of {options.steps}")
    else:
        state = compiled.init(seed, hparams)
    if first >= last:
        checkpoints.close()
        say(f"already at step {first}; nothing to do")
        return _summary(options, data_config, compiled, state, data, write=first == options.steps)

    log = MetricsLog(options.out / METRICS_FILE, keep_until=first) if processes.first() else None
    tokens_per_step = data_config.batch_size * data_config.sequence_length
    held_out = validation_batches(data, data_config, rows)
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
        if log is not None:
            log.write(row)
        if step == first + 1 or step % max(1, options.steps // 20) == 0:
            say(f"step {step:>6}  loss {float(metrics.loss):.4f}  {speed or 0:,.0f} tokens/s")

    def after_step(step: int, state: TrainState) -> None:
        if step % options.validate_every == 0 and step != options.steps:
            loss = float(loop.mean_validation_loss(compiled, state, held_out))
            if log is not None:
                log.write({"step": step, "val_loss": _finite(loss)})
            say(f"step {step:>6}  validation {loss:.4f}")
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
    if diverged:
        say(f"diverged at step {summary['diverged_at_step']}: lower --learning-rate")
    if log is not None:
        log.close()
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
    loss = None
    if write:
        rows = meshes.process_rows(compiled.mesh, data_config.batch_size)
        loss = float(loop.mean_validation_loss(compiled, state, validation_batches(data, data_config, rows)))
    summary = {
        "steps": step,
        "tokens": step * data_config.batch_size * data_config.sequence_length,
        "val_loss": None if loss is None or diverged_at >= 0 else _finite(loss),
        "diverged_at_step": diverged_at + 1 if diverged_at >= 0 else None,
        "code_version": code_version(),
        "devices": len(jax.devices()),
    }
    if write and processes.first():
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
