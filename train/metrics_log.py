"""The log of a run: JSON lines, and how fast it goes."""

import json
import math
import pathlib
import time
from typing import Any

import numpy as np

from train.ledger import write_atomically


class MetricsLog:
    """JSON lines; what a stopped run logged beyond its last checkpoint is dropped when it goes on.

    Args:
        path: of the file.
        keep_until: the step that the run goes on from.
    """

    def __init__(self, path: pathlib.Path, keep_until: int) -> None:
        self.val_losses: dict[int, float] = {}
        """Finite validation losses by step, as far as logged."""
        self.validated: set[int] = set()
        """Steps whose validation loss is logged, finite or not."""
        kept = []
        if path.exists():
            for line in path.read_text(errors="replace").splitlines():
                try:
                    row = json.loads(line)
                    sound = row["step"] <= keep_until
                except (ValueError, TypeError, KeyError):
                    # Torn, or damaged; the rows behind it are not.
                    continue
                if sound:
                    kept.append(line + "\n")
                    self._note(row)
        write_atomically(path, "".join(kept))
        # Unbuffered: a row that a full disk refuses is not tried again, without a handler, when the file is closed.
        self._file = path.open("ab", buffering=0)

    def _note(self, row: dict[str, Any]) -> None:
        if "val_loss" in row:
            self.validated.add(row["step"])
        if row.get("val_loss") is not None:
            self.val_losses[row["step"]] = row["val_loss"]

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row."""
        self._note(row)
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        while line:
            line = line[self._file.write(line) :]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Clock:
    """Tokens per second since the tick before; the first tick knows none."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._before = tokens, None

    def tick(self) -> float | None:
        """Called once a step."""
        now = time.perf_counter()
        speed = None if self._before is None else round(self._tokens / (now - self._before), 1)
        self._before = now
        return speed


def finite_or_none(value: Any) -> float | None:
    """A scalar as JSON can hold it."""
    number = float(np.asarray(value))
    return number if math.isfinite(number) else None
