"""The training loop that runs and sweeps share: dispatch a step, then look at the one before."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train import mesh as meshes
from train.data import Batch
from train.interrupts import StopRequests
from train.step import Compiled, HParams, Metrics, TrainState

# Called with the number of the step (1 after the first) and its metrics as numpy values.
type Observer = Callable[[int, Metrics], None]
# Called with the number of a step, the state after it, which is known to be sound, and whether the run stops there; may
# save or evaluate.
type AfterStep = Callable[[int, TrainState, bool], None]
# Called when no point can go on: with the number of the step, its batch on the devices, and the state before it.
# Whether to leave the step out and go on.
type Diverged = Callable[[int, Batch, TrainState], bool]


class _Dispatched(NamedTuple):
    step: int
    batch: Batch
    metrics: Metrics


def run(
    compiled: Compiled,
    state: TrainState,
    hparams: HParams,
    batches: Iterable[Batch],
    *,
    first_step: int,
    last_step: int,
    observe: Observer,
    due: Callable[[int], bool] = lambda step: False,
    after_step: AfterStep = lambda step, state, stopping: None,
    diverged: Diverged = lambda step, batch, state: False,
    stop: StopRequests | None = None,
) -> TrainState:
    """Trains from ``first_step`` (steps already taken) to ``last_step``.

    Metrics of a step are read after the next one is dispatched, so the device never waits for the
    host, except where ``after_step`` is due. A step that was not finite changes nothing, nor does the one that was
    dispatched before it was noticed.

    Args:
        compiled: jitted functions.
        state: state after ``first_step`` steps; it is donated.
        hparams: of the points.
        batches: the batches from ``first_step`` on.
        first_step: steps taken so far.
        last_step: steps to have taken at the end.
        observe: sees the metrics of every step, one step late.
        due: the steps after which ``after_step`` is called.
        after_step: sees the state of steps that are due, and of the one at which the run stops.
        diverged: decides whether a run goes on once every point has diverged; by default it ends.
        stop: ends the run early.

    Returns:
        The last state.

    Raises:
        Stopped: ``stop`` said so; ``after_step`` has seen the state.
    """
    source = iter(batches)
    waiting: _Dispatched | None = None

    def look(seen: _Dispatched) -> bool:
        """Whether some point goes on."""
        values = jax.device_get(seen.metrics)
        observe(seen.step, values)
        return not np.all(values.diverged_at >= 0)

    def leave_out(seen: _Dispatched) -> TrainState | None:
        if not diverged(seen.step, seen.batch, state):
            return None
        return state._replace(step=state.step + 1, diverged_at=state.diverged_at * 0 - 1)

    step = first_step
    while step < last_step:
        batch = meshes.put_batch(compiled.mesh, next(source))
        step += 1
        state, metrics = compiled.step(state, batch, hparams)
        if waiting is not None and not look(waiting):
            if (without := leave_out(waiting)) is None:
                return state
            # This step found the state of the one left out, and did nothing.
            state, metrics = compiled.step(without, batch, hparams)
        waiting = _Dispatched(step, batch, metrics)
        stopping = stop is not None and stop.tick()
        if stopping or due(step) or step == last_step:
            if not look(waiting):
                if (without := leave_out(waiting)) is None:
                    return state
                state = without
            waiting = None
            if stopping or due(step):
                after_step(step, state, stopping)
        if stopping:
            assert stop is not None
            raise stop.stopped
    return state


def mean_validation_loss(
    compiled: Compiled, state: TrainState, batches: Sequence[Batch], stop: StopRequests | None = None
) -> np.ndarray:
    """Mean loss in nats per token over ``batches``, float64: a scalar, or one per point of a pack.

    Raises:
        Stopped: ``stop`` said so.
    """
    total: Any = 0.0
    tokens: Any = 0.0
    sums: list[Any] = []
    for batch in batches:
        sums.append(compiled.evaluate(state, meshes.put_batch(compiled.mesh, batch)))
        if stop is not None:
            # As in training, one batch late: so no process is further ahead of another than `stop` allows for.
            jax.block_until_ready(sums[-2:-1])
            if stop.tick():
                raise stop.stopped
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
