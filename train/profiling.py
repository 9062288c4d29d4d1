"""`--profile-steps`: a trace of a few steps, for TensorBoard's profiler or Perfetto."""

import pathlib
import re
from collections.abc import Iterable, Iterator

import jax


def parse_steps(text: str | None) -> tuple[int, int] | None:
    """First and last step of ``FIRST..LAST``; ValueError where it is something else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--profile-steps must be FIRST..LAST, such as 10..12; got {text!r}.")
    return int(match[1]), int(match[2])


class Profile:
    """Traces the steps that the user named; nothing where there are none.

    Args:
        steps: ``FIRST..LAST``, or None.
        folder: where the trace goes.
    """

    def __init__(self, steps: str | None, folder: pathlib.Path) -> None:
        self._steps = parse_steps(steps)
        self._folder = folder
        self._running = False

    def batches[T](self, source: Iterable[T], first_step: int) -> Iterator[T]:
        """``source``, whose first item is for the step after ``first_step``; the trace begins with its item."""
        for step, batch in enumerate(source, first_step + 1):
            if self._steps is not None and step == self._steps[0]:
                jax.profiler.start_trace(str(self._folder))
                self._running = True
            yield batch

    def seen(self, step: int) -> bool:
        """Call it when a step is done; whether the trace was written now."""
        if not self._running or self._steps is None or step < self._steps[1]:
            return False
        self.close()
        return True

    def close(self) -> None:
        """Ends a trace that still runs."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
