"""The points of a sweep, the packs in which they are trained, and what is told of them while they are."""

import dataclasses
import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.sweep_options import SweepOptions
from train.vary import Varied, combinations, same


@dataclasses.dataclass(frozen=True)
class Point:
    """One training run of a sweep."""

    preset: str
    width: int
    learning_rate: float
    seed: int
    varied: Varied = ()

    @property
    def key(self) -> tuple[Any, ...]:
        """As ``ledger.point_key`` of its row."""
        return (self.preset, self.width, same(self.learning_rate), self.seed, self.varied)


def plan_points(options: SweepOptions, base_width: int, weight_decay: float = 0.0) -> dict[int, list[Point]]:
    """The points of each width, in the order of their packs; ``weight_decay`` is the configured one."""
    settings = combinations(options.varied(), weight_decay)
    return {
        width: [
            Point(preset, width, rate, seed, setting)
            for preset in options.presets
            for setting in settings
            for rate in options.grid(preset, width, base_width)
            for seed in options.seeds
        ]
        for width in sorted(options.widths)
    }


def packs(points: Sequence[Point], size: int) -> list[list[Point]]:
    """Consecutive packs of ``size``; the last is filled up with its own last point. None of no points."""
    cut = [list(chunk) for chunk in itertools.batched(points, size)]
    for chunk in cut[-1:]:
        chunk += [chunk[-1]] * (size - len(chunk))
    return cut


class Progress:
    """What the sweep tells its caller; the command line shows it as a bar. Does nothing by itself."""

    def say(self, line: str) -> None:
        """What takes its time, and which width and points run where, before anything is compiled."""

    def begin(self, total_work: int, done_work: int) -> None:
        """Work is counted in units that are proportional to the time it takes."""

    def compiling(self, width: int, seconds: float | None) -> None:
        """A width's program is being compiled; with seconds: it is done."""

    def step(self, pack: Sequence[Point], step: int, losses: np.ndarray, work: int) -> None:
        """A pack has taken a step that was worth ``work``."""

    def finished(self, rows: Sequence[Mapping[str, Any]], skipped_work: int) -> None:
        """A pack is in the ledger; ``skipped_work`` was left out since all had diverged."""


class OneAtATime(Progress):
    """Another progress, called by one thread at a time."""

    def __init__(self, inner: Progress) -> None:
        self._inner, self._lock = inner, threading.Lock()

    def say(self, line: str) -> None:
        """See :class:`Progress`."""
        with self._lock:
            self._inner.say(line)

    def begin(self, total_work: int, done_work: int) -> None:
        """See :class:`Progress`."""
        with self._lock:
            self._inner.begin(total_work, done_work)

    def compiling(self, width: int, seconds: float | None) -> None:
        """See :class:`Progress`."""
        with self._lock:
            self._inner.compiling(width, seconds)

    def step(self, pack: Sequence[Point], step: int, losses: np.ndarray, work: int) -> None:
        """See :class:`Progress`."""
        with self._lock:
            self._inner.step(pack, step, losses, work)

    def finished(self, rows: Sequence[Mapping[str, Any]], skipped_work: int) -> None:
        """See :class:`Progress`."""
        with self._lock:
            self._inner.finished(rows, skipped_work)
