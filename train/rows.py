"""The ledger of a sweep, as one of several lanes and processes sees it.

The first process alone writes the file; the others send it their rows through the key-value store of
``jax.distributed``, so that a pod's hosts need no file system that they share.
"""

import contextlib
import json
import pathlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from train import processes
from train.ledger import Ledger, fingerprint, point_key

_KEY = "gdn/rows"
# A message takes as long as the packs of a process before it.
_POLL_MS = 60_000


class Rows:
    """Rows that are finished; adding one is safe from any thread."""

    def __init__(self, rows: dict[tuple[Any, ...], dict[str, Any]], config_fingerprint: str) -> None:
        self.rows, self.fingerprint = rows, config_fingerprint
        self._lock = threading.Lock()

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row; the first process has it on disk when this returns."""
        with self._lock:
            self._write(row)

    def _write(self, row: dict[str, Any]) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Waits, in the first process, for the rows of the others."""


class _First(Rows):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger.rows, ledger.fingerprint)
        self._ledger = ledger
        self._others = [
            threading.Thread(target=self._receive, args=(process,), daemon=True)
            for process in range(1, jax.process_count())
        ]
        for thread in self._others:
            thread.start()

    def _write(self, row: dict[str, Any]) -> None:
        self._ledger.append(row)

    def _receive(self, process: int) -> None:
        number = 0
        while True:
            try:
                text = processes.store().blocking_key_value_get(f"{_KEY}/{process}/{number}", _POLL_MS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error):
                    continue
                raise
            row = json.loads(text)
            if row is None:
                return
            self.append(row)
            number += 1

    def finish(self) -> None:
        for thread in self._others:
            thread.join()


class _Other(Rows):
    _sent = 0

    def _write(self, row: dict[str, Any]) -> None:
        if (key := point_key(row)) not in self.rows:
            self.rows[key] = row
            self._send(row)

    def _send(self, row: dict[str, Any] | None) -> None:
        text = json.dumps(row)
        processes.store().key_value_set(f"{_KEY}/{jax.process_index()}/{self._sent}", text)
        self._sent += 1

    def finish(self) -> None:
        self._send(None)


@contextlib.contextmanager
def shared_rows(folder: pathlib.Path, config: Mapping[str, Any]) -> Iterator[Rows]:
    """The ledger in a folder, for all processes; from the main thread of each.

    Raises:
        ValueError: the folder holds another configuration, or a damaged line.
    """
    opened: list[Ledger] = []

    def read() -> list[dict[str, Any]]:
        opened.append(Ledger(folder, config))
        return list(opened[0].rows.values())

    done = processes.on_first(read)
    if opened:
        yield _First(opened[0])
    else:
        yield _Other({point_key(row): row for row in done}, fingerprint(config))
