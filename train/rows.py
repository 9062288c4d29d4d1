"""The ledger of a sweep, as one of several lanes and processes sees it.

The first process alone writes the file; the others send it their rows through the key-value store of
``jax.distributed``, so that a pod's hosts need no file system that they share.
"""

import contextlib
import json
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from train import processes
from train.interrupts import StopRequests
from train.ledger import Ledger, fingerprint, point_key

_KEY = "gdn/rows"
_FINISHED = f"{_KEY}/finished"
# A message takes as long as the packs of a process before it.
_POLL_MS = 60_000
# How often a process that waits for the others looks for signals.
_ASK_EVERY_S = 0.2


class Rows:
    """Rows that are finished; adding one is safe from any thread."""

    def __init__(self, rows: dict[tuple[Any, ...], dict[str, Any]], config_fingerprint: str) -> None:
        self.rows, self.fingerprint = rows, config_fingerprint
        self._lock = threading.Lock()

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds the rows of a pack; the first process has them on disk, in one write, when this returns."""
        with self._lock:
            self._write(rows)

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        raise NotImplementedError

    def finish(self, stop: StopRequests) -> None:
        """Waits until the first process has the rows of all; a signal meanwhile is told to the others."""


class _First(Rows):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger.rows, ledger.fingerprint)
        self._ledger = ledger
        self._failure: Exception | None = None
        self._others = [
            threading.Thread(target=self._receive, args=(process,), daemon=True)
            for process in range(1, jax.process_count())
        ]
        for thread in self._others:
            thread.start()

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        self._ledger.append(rows)

    def _receive(self, process: int) -> None:
        try:
            self._receive_all(process)
        except Exception as error:
            # Nobody looks at a thread; `finish` raises it.
            self._failure = error

    def _receive_all(self, process: int) -> None:
        number = 0
        while True:
            try:
                text = processes.store().blocking_key_value_get(f"{_KEY}/{process}/{number}", _POLL_MS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error):
                    continue
                raise
            rows = json.loads(text)
            if rows is None:
                return
            self.append(rows)
            number += 1

    def finish(self, stop: StopRequests) -> None:
        for thread in self._others:
            while thread.is_alive():
                thread.join(_ASK_EVERY_S)
                processes.require_no_failure()
                stop.tick()
        if self._failure is not None:
            raise self._failure
        if self._others:
            processes.store().key_value_set(_FINISHED, "1")


class _Other(Rows):
    def __init__(self, rows: list[dict[str, Any]], config: Mapping[str, Any]) -> None:
        self._weight_decay = config["optimizer"]["weight_decay"]
        super().__init__({self._key(row): row for row in rows}, fingerprint(config))
        self._sent = 0

    def _key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return point_key(row, self._weight_decay)

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows |= {self._key(row): row for row in rows}
        self._send(rows)

    def _send(self, rows: Sequence[dict[str, Any]] | None) -> None:
        text = json.dumps(rows)
        processes.store().key_value_set(f"{_KEY}/{jax.process_index()}/{self._sent}", text)
        self._sent += 1

    def finish(self, stop: StopRequests) -> None:
        self._send(None)
        # Not gone before: the runtime would take that for a crash of the whole.
        while not self._is_finished():
            processes.require_no_failure()
            stop.tick()

    def _is_finished(self) -> bool:
        try:
            processes.store().blocking_key_value_get(_FINISHED, int(_ASK_EVERY_S * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return False
            raise
        return True


@contextlib.contextmanager
def shared_rows(folder: pathlib.Path, config: Mapping[str, Any]) -> Iterator[Rows]:
    """The ledger in a folder, for all processes; from the main thread of each.

    Raises:
        ValueError: the folder, or another process, has another configuration, or there is a damaged line.
    """
    processes.require_equal(config)
    opened: list[Ledger] = []

    def read() -> list[dict[str, Any]]:
        opened.append(Ledger(folder, config))
        return list(opened[0].rows.values())

    done = processes.on_first(read)
    if opened:
        yield _First(opened[0])
    else:
        yield _Other(done, config)
