"""Where a sweep keeps the packs that a signal stopped half way; the ledger has those that came to their end."""

import hashlib
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from train.ledger import fingerprint
from train.step import TrainState

_LOG = logging.getLogger(__name__)


class TrainedPack(NamedTuple):
    """A pack on its devices, the steps that it has taken and the seconds that they took."""

    state: TrainState
    steps: int
    seconds: float


class _Hashed:
    """Writes into a file, and knows the SHA-256 of what it wrote."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self._file.write(content)


class StoppedPacks:
    """A folder with a file for each pack that was stopped: the SHA-256 of what follows, then arrays as npy.

    These are the steps, the seconds and the leaves of the state. They are written and read one by one: a pack fills
    a device's memory, and the host has not several times as much to spare, nor much time after a signal. Of places
    that repeat the last point nothing is kept, so a pack may be filled up to another size when it goes on.

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
            fresh: a new state of the pack, on its devices; the first axis of every leaf is the points.
        """
        last = len(set(keys)) - 1
        places = [min(index, last) for index in range(len(keys))]
        path = self._of(keys)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return TrainedPack(fresh, 0, 0.0)
        with file:
            digest = file.readline().strip()
            begin = file.tell()
            if hashlib.file_digest(file, "sha256").hexdigest().encode() != digest:
                _LOG.warning("%s is damaged: its points are trained from the start", path)
                return TrainedPack(fresh, 0, 0.0)
            file.seek(begin)
            steps, seconds = int(np.load(file)), float(np.load(file))
            state = jax.tree.map(lambda like: jax.device_put(np.load(file)[places], like.sharding), fresh)
        return TrainedPack(state, steps, seconds)

    def save(self, keys: Sequence[tuple[Any, ...]], pack: TrainedPack) -> None:
        """Keeps a pack; it is on disk when this returns."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._of(keys)
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                # The digest's place.
                file.write(bytes(hashlib.sha256().digest_size * 2) + b"\n")
                hashed = _Hashed(file)
                np.save(hashed, np.asarray(pack.steps))
                np.save(hashed, np.asarray(pack.seconds))
                for leaf in jax.tree.leaves(pack.state):
                    np.save(hashed, np.asarray(leaf)[: len(set(keys))])
                file.seek(0)
                file.write(hashed.digest.hexdigest().encode())
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)

    def forget(self, keys: Sequence[tuple[Any, ...]]) -> None:
        """The pack is in the ledger."""
        self._of(keys).unlink(missing_ok=True)

    def _of(self, keys: Sequence[tuple[Any, ...]]) -> pathlib.Path:
        return self._folder / f"{fingerprint([self._config, *map(list, dict.fromkeys(keys))])}.pack"
