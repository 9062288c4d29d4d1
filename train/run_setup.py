"""What a run of `gdn train` is, worked out and checked before any device has work: data, program, mesh, identity."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from train.config import DEFAULT_BASE_WIDTH, ModelOptions, OptimizerOptions
from train.data import DataConfig, PreparedData, prepare
from train.mesh import MeshOptions, MeshShape, choose_mesh
from train.step import HParams, Program
from train.sweep import identity
from train.train_options import DEFAULT_LEARNING_RATE, TrainOptions
from train.tuned import differences, plan, read_tuning, require_accepted


@dataclasses.dataclass(frozen=True)
class RunSetup:
    """A run that is about to begin.

    Attributes:
        program: of its width.
        hparams: of its one point.
        data: as its corpus was prepared.
        data_config: of the corpus.
        shape: of its mesh.
        identity: what must not change when it goes on; JSON-able. The mesh may.
    """

    program: Program
    hparams: HParams
    data: PreparedData
    data_config: DataConfig
    shape: MeshShape
    identity: dict[str, Any]


def set_up(
    options: TrainOptions,
    model: ModelOptions,
    optimizer: OptimizerOptions,
    data_config: DataConfig,
    mesh: MeshOptions,
    say: Callable[[str], None],
) -> RunSetup:
    """Checks the options of a run against each other, its corpus, its sweep and the devices there are.

    Raises:
        ValueError: anything wrong with them.
    """
    model = model.with_base(DEFAULT_BASE_WIDTH)
    data, learning_rate, preset, factors = _what_to_run(options, model, optimizer, data_config, say)
    program = Program(
        model.gdn_config(options.width, data.vocab_size, optimizer=optimizer.name),
        optimizer,
        options.steps,
        options.accumulate,
    )
    shape = choose_mesh(
        mesh,
        len(jax.devices()),
        program.config,
        data_config.batch_size,
        data_config.sequence_length,
        options.accumulate,
    )
    run: dict[str, Any] = {
        "width": options.width,
        "learning_rate": learning_rate,
        "preset": preset,
        "seed": options.seed,
        "accumulate": options.accumulate,
    }
    if factors:
        run["factors"] = dict(factors)
    return RunSetup(
        program,
        program.hparams(learning_rate, preset, **factors),
        data,
        data_config,
        shape,
        identity(model, optimizer, data_config, data, options.steps) | {"run": run},
    )


def _what_to_run(
    options: TrainOptions,
    model: ModelOptions,
    optimizer: OptimizerOptions,
    data_config: DataConfig,
    say: Callable[[str], None],
) -> tuple[PreparedData, float, str, Mapping[str, float]]:
    """Data, learning rate, preset, factors on the rules: as asked for, or what the sweep of ``tuned_by`` found."""
    if options.tuned_by is None:
        learning_rate, preset = options.learning_rate or DEFAULT_LEARNING_RATE, options.preset or "mup"
        return prepare(data_config, say), learning_rate, preset, {}
    tuning = read_tuning(options.tuned_by, options.preset, options.width)
    now = identity(model, optimizer, data_config, None, options.steps)
    require_accepted(differences(tuning.config, now), options.accept_change, options.tuned_by)
    data = prepare(data_config, say)
    now = identity(model, optimizer, data_config, data, options.steps)
    changed = differences(tuning.config, now)
    require_accepted(changed, options.accept_change, options.tuned_by)
    for line in plan(tuning, options.width, now, changed):
        say(line)
    return data, tuning.learning_rate, tuning.preset, tuning.factors
