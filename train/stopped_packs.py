"""Where a sweep keeps the packs that a signal stopped half way; the ledger has those that came to their end."""

import hashlib
import io
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from train.ledger import fingerprint
from train.step import TrainState

_LOG = logging.getLogger(__name__)

# Beside the arrays of the state, which are named by their number.
_STEPS = "steps"
_SECONDS = "seconds"


class TrainedPack(NamedTuple):
    """A pack on its devices, the steps that it has taken and the seconds that they took."""

    state: TrainState
    steps: int
    seconds: float


class StoppedPacks:
    """A folder with a file for each pack that was stopped: the SHA-256 of what follows, then the arrays as npz.

    A pack lies on devices of one process, which reads and writes it alone; any thread of it may.

    Args:
        out: the sweep's folder.
        config_fingerprint: of its ledger; a pack stopped under another one is not found.
    """

    def __init__(self, out: pathlib.Path, config_fingerprint: str) -> None:
        self._folder, self._config = out / "stopped", config_fingerprint

    def restore(self, keys: Sequence[tuple[Any, ...]], fresh: TrainState) -> TrainedPack:
        """A pack where it was stopped; ``fresh`` at step 0 where none was, or it is damaged.

        Args:
            keys: of the pack's points, in its order.
            fresh: a new state of the pack, on its devices.
        """
        try:
            digest, _, content = self._of(keys).read_bytes().partition(b"\n")
        except FileNotFoundError:
            return TrainedPack(fresh, 0, 0.0)
        if hashlib.sha256(content).hexdigest().encode() != digest:
            _LOG.warning("%s is damaged: its points are trained from the start", self._of(keys))
            return TrainedPack(fresh, 0, 0.0)
        leaves, structure = jax.tree.flatten(fresh)
        with np.load(io.BytesIO(content)) as saved:
            kept = [saved[str(index)] for index in range(len(leaves))]
            steps, seconds = int(saved[_STEPS]), float(saved[_SECONDS])
        placed = [jax.device_put(x, like.sharding) for x, like in zip(kept, leaves, strict=True)]
        return TrainedPack(jax.tree.unflatten(structure, placed), steps, seconds)

    def save(self, keys: Sequence[tuple[Any, ...]], pack: TrainedPack) -> None:
        """Keeps a pack; it is on disk when this returns."""
        arrays = {str(index): np.asarray(x) for index, x in enumerate(jax.tree.leaves(pack.state))}
        arrays |= {_STEPS: np.asarray(pack.steps), _SECONDS: np.asarray(pack.seconds)}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
        content = buffer.getvalue()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._of(keys)
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)

    def forget(self, keys: Sequence[tuple[Any, ...]]) -> None:
        """The pack is in the ledger."""
        self._of(keys).unlink(missing_ok=True)

    def _of(self, keys: Sequence[tuple[Any, ...]]) -> pathlib.Path:
        return self._folder / f"{fingerprint([self._config, *map(list, keys)])}.npz"
