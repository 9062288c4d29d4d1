"""The sweep's progress on a terminal: a bar with ETA and current losses, or plain lines where there is no terminal."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from train.sweep_points import Point, Progress

# Without a terminal (a log file, CI) a line so often is enough.
_LINE_EVERY_S = 20.0


class SweepBar(Progress):
    """Shows a sweep; a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}  {task.fields[now]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("sweep", total=None, eta="", now="")
        self._total = self._done = self._done_here = 0
        self._training_s = 0.0
        self._last_step_at: float | None = None
        self._last_line_at = time.perf_counter()

    def __enter__(self) -> "SweepBar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """See :class:`Progress`."""
        self._console.print(line, soft_wrap=True, highlight=False)

    def begin(self, total_work: int, done_work: int) -> None:
        """See :class:`Progress`."""
        self._total, self._done = total_work, done_work
        self._bar.update(self._task, total=total_work, completed=done_work)
        if done_work:
            self._console.print(f"going on: {done_work / total_work:.0%} of the work is in the ledger")

    def compiling(self, width: int, seconds: float | None) -> None:
        """See :class:`Progress`."""
        if seconds is None:
            self._bar.update(self._task, description=f"compiling width {width}")
            self._last_step_at = None
        else:
            self._console.print(f"width {width} compiled in {seconds:.0f} s")
            self._last_step_at = time.perf_counter()

    def step(self, pack: Sequence[Point], step: int, losses: np.ndarray, work: int) -> None:
        """See :class:`Progress`."""
        now = time.perf_counter()
        self._training_s += now - (self._last_step_at or now)
        self._last_step_at = now
        self._done += work
        self._done_here += work
        point = pack[0]
        varied = "".join(f" {name} {value:g}" for name, value in point.varied)
        text = (
            f"{point.preset} lr 2^{np.log2(point.learning_rate):g}{varied} step {step} loss {_losses(losses)}"
        )
        self._bar.update(
            self._task, completed=self._done, description=f"width {point.width}", eta=self._eta(), now=text
        )
        if not self._console.is_terminal and now - self._last_line_at > _LINE_EVERY_S:
            self._last_line_at = now
            self._console.print(
                f"{self._done / self._total:4.0%}  {self._eta()}  width {point.width} {text}", soft_wrap=True
            )

    def finished(self, rows: Sequence[Mapping[str, Any]], skipped_work: int) -> None:
        """See :class:`Progress`."""
        self._done += skipped_work
        self._done_here += skipped_work
        self._bar.update(self._task, completed=self._done)

    def _eta(self) -> str:
        if not self._done_here or not self._training_s:
            return "ETA …"
        left = (self._total - self._done) / self._done_here * self._training_s
        return f"ETA {int(left // 60)}:{int(left % 60):02d}"


def _losses(losses: np.ndarray) -> str:
    finite = losses[np.isfinite(losses)]
    if not len(finite):
        return "diverged"
    if len(losses) == 1:
        return f"{finite[0]:.3f}"
    return f"{finite.min():.3f} to {finite.max():.3f}"
