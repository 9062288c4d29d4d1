"""The training loop that runs and sweeps share: dispatch a step, then look at the one before."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train import mesh as meshes
from train.data import Batch
from train.step import Compiled, HParams, Metrics, TrainState

# Called with the number of the step (1 after the first) and its metrics as numpy values.
type Observer = Callable[[int, Metrics], None]
# Called with the state after a step and its number, when that step is done; may save or evaluate.
type AfterStep = Callable[[int, TrainState], None]


def run(
    compiled: Compiled,
    state: TrainState,
    hparams: HParams,
    batches: Iterable[Batch],
    *,
    first_step: int,
    last_step: int,
    observe: Observer,
    after_step: AfterStep | None = None,
) -> TrainState:
    """Trains from ``first_step`` (steps already taken) to ``last_step``.

    Metrics of a step are read after the next one is dispatched, so the device never waits for the
    host. The run ends early once every point has diverged: nothing can bring a NaN back.

    Args:
        compiled: jitted functions.
        state: state after ``first_step`` steps; it is donated.
        hparams: of the points.
        batches: the batches from ``first_step`` on.
        first_step: steps taken so far.
        last_step: steps to have taken at the end.
        observe: sees the metrics of every step, one step late.
        after_step: sees the state of every step.

    Returns:
        The last state.
    """
    waiting: tuple[int, Metrics] | None = None
    source = iter(batches)
    for step in range(first_step + 1, last_step + 1):
        batch = meshes.put_batch(compiled.mesh, next(source))
        state, metrics = compiled.step(state, batch, hparams)
        if waiting is not None:
            seen = _look(waiting, observe)
            if np.all(seen.diverged_at >= 0):
                return state
        waiting = (step, metrics)
        if after_step is not None:
            after_step(step, state)
    if waiting is not None:
        _look(waiting, observe)
    return state


def _look(waiting: tuple[int, Metrics], observe: Observer) -> Metrics:
    step, metrics = waiting
    values = jax.device_get(metrics)
    observe(step, values)
    return values


def mean_validation_loss(compiled: Compiled, state: TrainState, batches: Sequence[Batch]) -> np.ndarray:
    """Mean loss in nats per token over ``batches``, float64: a scalar, or one per point of a pack."""
    total: Any = 0.0
    tokens: Any = 0.0
    sums = [compiled.evaluate(state, meshes.put_batch(compiled.mesh, batch)) for batch in batches]
    for loss, count in jax.device_get(sums):
        total = total + np.asarray(loss, np.float64)
        tokens = tokens + np.asarray(count, np.float64)
    return np.asarray(total / tokens)


def divergence_step(diverged_at: int, val_loss: float | None, steps: int) -> int | None:
    """The step at which a run diverged, counted from 1, or None.

    Args:
        diverged_at: as in the state, which knows of steps whose own loss or gradient was not finite.
        val_loss: after the last step: the update of that step may be the one that went too far; None: not evaluated.
        steps: taken.
    """
    if diverged_at >= 0:
        return diverged_at + 1
    return None if val_loss is None or math.isfinite(val_loss) else steps


def stack_hparams(hparams: Sequence[HParams]) -> HParams:
    """A pack of hparams: every leaf gets a leading axis of points."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *hparams)


def as_seeds(seeds: Sequence[int]) -> jax.Array:
    """Seeds as the program's init takes them."""
    return jnp.asarray(np.asarray(seeds, np.int32))
