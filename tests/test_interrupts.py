"""Signals in one process: noticed at a tick, at once where there is nothing to save, and during a compilation."""

import os
import signal
import threading
import time

import pytest

from train.__main__ import main
from train.interrupts import Stopped, StopRequests, left_behind


def _signal_later(number, seconds):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.start()
    return timer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_noted_until_a_tick(number):
    before = signal.getsignal(number)
    with StopRequests() as stop:
        assert not stop.tick()
        os.kill(os.getpid(), number)
        assert stop.tick()
        # A scheduler may say it more than once; who presses Ctrl-C again will not wait.
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        else:
            signal.raise_signal(number)
        assert stop.stopped.number == number
        assert str(stop.stopped) == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_running_out_of_memory_is_one_line(monkeypatch, capsys):
    for error in (
        MemoryError("Unable to allocate 5 TiB"),
        RuntimeError("INTERNAL: Out of memory allocating"),
        MemoryError(),
    ):

        def run(command, error=error):
            raise error

        monkeypatch.setattr("train.__main__._run", run)
        with pytest.raises(SystemExit) as stop:
            main(["show-rules"])
        assert stop.value.code == 1
        said = capsys.readouterr().err
        assert said.startswith(f"gdn: out of memory ({str(error) or 'MemoryError'})")
        assert said.count("\n") == 1


def test_at_once_where_there_is_nothing_to_save():
    with StopRequests() as stop:
        with pytest.raises(Stopped), stop.at_once():
            # The handler runs after the call, still within.
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped), stop.at_once():
            pytest.fail("a signal that came before is not forgotten")


def test_noticed_while_something_compiles():
    done = threading.Event()
    with StopRequests() as stop:
        timer, began = _signal_later(signal.SIGTERM, 0.2), time.monotonic()
        with pytest.raises(Stopped):
            stop.compile(lambda: done.wait(60))
        assert time.monotonic() - began < 20
        assert left_behind()
        done.set()
        timer.join()
    for _ in range(1000):
        if not left_behind():
            break
        time.sleep(0.01)
    assert not left_behind()


def test_what_compiling_gives_and_raises():
    def fail():
        raise TimeoutError("its own")

    with StopRequests() as stop:
        assert stop.compile(lambda: 3) == 3
        with pytest.raises(TimeoutError, match="its own"):
            stop.compile(fail)


def test_outside_the_main_thread_nothing_is_installed():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with StopRequests() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.tick()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
