"""Where a sweep keeps the packs that a signal stopped half way; the ledger has those that came to their end."""

import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax

from train.checkpoint import Checkpoints
from train.interrupts import Stopped
from train.ledger import fingerprint
from train.step import TrainState


class StoppedPacks:
    """A folder of checkpoints, one for each pack that was stopped.

    Args:
        out: the sweep's folder.
        config_fingerprint: of its ledger; a pack stopped under another one is not found.
    """

    def __init__(self, out: pathlib.Path, config_fingerprint: str) -> None:
        self._folder, self._config = out / "stopped", config_fingerprint

    def restore(self, keys: Sequence[tuple[Any, ...]], fresh: TrainState) -> tuple[TrainState, int]:
        """State and steps taken of a pack: where it was stopped, or ``fresh`` and 0.

        Args:
            keys: of the pack's points, in its order.
            fresh: a new state of the pack, on its devices.
        """
        folder = self._of(keys)
        if not folder.exists():
            return fresh, 0
        try:
            checkpoints = Checkpoints(folder, keep=1)
        except ValueError:
            # None is sound: the pack begins anew.
            return fresh, 0
        if (step := checkpoints.newest) is None:
            checkpoints.close()
            return fresh, 0
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fresh)
        state, _ = checkpoints.restore(step, like)
        checkpoints.close()
        return state, step

    def save(self, keys: Sequence[tuple[Any, ...]], step: int, state: TrainState) -> None:
        """Keeps a pack; it is on disk when this returns."""
        checkpoints = Checkpoints(self._of(keys), keep=1)
        checkpoints.save(
            step, state, {"step": step}, {"config": self._config, "points": list(map(list, keys))}
        )
        checkpoints.close()

    def saved_when_stopped[T](
        self, keys: Sequence[tuple[Any, ...]], step: int, state: TrainState, fn: Callable[[], T]
    ) -> T:
        """What ``fn`` gives; the pack is kept when it is stopped."""
        try:
            return fn()
        except Stopped:
            self.save(keys, step, state)
            raise

    def forget(self, keys: Sequence[tuple[Any, ...]]) -> None:
        """The pack is in the ledger."""
        shutil.rmtree(self._of(keys), ignore_errors=True)

    def _of(self, keys: Sequence[tuple[Any, ...]]) -> pathlib.Path:
        return self._folder / fingerprint([self._config, *map(list, keys)])
