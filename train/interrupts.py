"""SIGTERM, SIGUSR1 and Ctrl-C: noticed wherever a run is, agreed by all its processes, answered by saving and leaving.

A handler runs only between bytecodes of the main thread: while XLA compiles there are none. So compiling happens in
a thread that is left behind when the run stops.
"""

import concurrent.futures
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax

from train import processes

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
COMPILE_THREAD = "gdn-compile"
# How often a process that waits for its compiler asks whether another was told to stop.
_ASK_EVERY_S = 0.2
# A process that is told to stop at tick n says so before it dispatches n + 1. Others read the results of n + 1
# before they come to the end of tick n + 2, so they know by then; all stop at n + 3.
_TICKS_AHEAD = 3
_BARRIER_MS = 3600 * 1000


class Stopped(BaseException):
    """The run was told to stop and has; no ``Exception``, so that nothing takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequests:
    """While it is entered, `SIGNALS` are noted; outside the main thread it notes nothing. A second Ctrl-C interrupts.

    A tick is a unit of work, a step or a batch of validation, whose result no process has before all have begun
    it; at ticks the processes agree where to stop.

    Args:
        in_step: whether all processes run one program. If not, as in a sweep, each stops at its own next tick; `tick`
            and `compile` may then be called from any thread.
    """

    def __init__(self, *, in_step: bool = True) -> None:
        self._in_step = in_step
        self._number: int | None = None
        self._at_once = False
        self._ticks = self._compilations = 0
        self._proposed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._number = self._number is not None, self._number or number
        if self._at_once:
            raise Stopped(self._number)
        if number == signal.SIGINT:
            if again:
                raise KeyboardInterrupt
            # Not by print: the signal may have come within one.
            os.write(2, b"\ngdn: stopping; Ctrl-C again leaves without saving\n")

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """In here a signal raises `Stopped` at once: there is nothing to save, and nobody else waits."""
        self._at_once = True
        try:
            if self._number is not None:
                raise Stopped(self._number)
            yield
        finally:
            self._at_once = False

    @property
    def stopped(self) -> Stopped:
        """What to raise once a tick said to stop."""
        if self._number is None and jax.process_count() > 1 and (agreed := _agreed()):
            return Stopped(agreed[1])
        return Stopped(self._number or SIGNALS[0])

    def tick(self) -> bool:
        """Whether to stop here; on all processes at the same tick, where they run in step."""
        if jax.process_count() == 1:
            return self._number is not None
        if not self._in_step:
            if self._number is not None and not self._proposed:
                self._propose(0)
            return self._number is not None or _agreed() is not None
        self._ticks += 1
        if self._number is not None and not self._proposed:
            self._propose(self._ticks + _TICKS_AHEAD)
        agreed = _agreed()
        return agreed is not None and self._ticks >= agreed[0]

    def _propose(self, tick: int) -> None:
        self._proposed = True
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            # Refused where another process was first.
            processes.store().key_value_set(_KEY, f"{tick} {self._number}")

    def compile[T](self, fn: Callable[[], T]) -> T:
        """What ``fn`` gives, run in a thread.

        Raises:
            Stopped: a signal came, here or on another process; ``fn`` goes on in its thread, see `left_behind`.
        """
        result: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                result.set_result(fn())
            except BaseException as error:
                result.set_exception(error)

        # A daemon, unlike those of an executor: the interpreter does not wait for it at its end.
        threading.Thread(target=run, name=COMPILE_THREAD, daemon=True).start()
        several = jax.process_count() > 1
        while self._number is None and not (several and _agreed()):
            with contextlib.suppress(concurrent.futures.TimeoutError):
                result.exception(_ASK_EVERY_S)
                break
        if not self._in_step:
            if self.tick():
                raise self.stopped
        elif several:
            self._compilations += 1
            if self._number is not None and not self._proposed:
                self._propose(0)
            processes.store().wait_at_barrier(f"{_KEY}/compiled/{self._compilations}", _BARRIER_MS)
            if agreed := _agreed():
                raise Stopped(agreed[1])
        elif self._number is not None:
            raise Stopped(self._number)
        return result.result()


_KEY = "gdn/stop"


def _agreed() -> tuple[int, int] | None:
    """The tick to stop at and the signal, where a process has been told to."""
    try:
        tick, number = processes.store().key_value_try_get(_KEY).split()
    except jax.errors.JaxRuntimeError:
        return None
    return int(tick), int(number)


def leave(code: int) -> None:
    """Ends a process that was stopped; returns where the interpreter may come to its usual end.

    Where a compilation still runs, that end would crash into the compiler's thread. Where there are several processes,
    it would wait for those that compile; so all leave, the first as the last: it keeps what they talk through.
    """
    several = jax.distributed.is_initialized()
    if several:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if processes.first():
                deadline = time.monotonic() + _LEAVE_S
                for other in range(1, jax.process_count()):
                    left_ms = max(1, round(1000 * (deadline - time.monotonic())))
                    processes.store().blocking_key_value_get(f"{_LEFT}/{other}", left_ms)
            else:
                processes.store().key_value_set(f"{_LEFT}/{jax.process_index()}", "1")
    if several or left_behind():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


_LEFT = "gdn/left"
# Within the grace period of any scheduler, also after a save.
_LEAVE_S = 10.0


def left_behind() -> bool:
    """Whether a compilation still runs."""
    return any(thread.name.startswith(COMPILE_THREAD) for thread in threading.enumerate())
