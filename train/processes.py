"""Several processes that run one program: who speaks, and what all of them must agree on.

They talk through the key-value store of ``jax.distributed``, never through the devices, so a thread may do it while
the main thread trains. In a single process everything here is free.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax._src import distributed

from train.faults import RunFailedError, first_line
from train.ledger import differences

# How long a process waits for another that is still hashing, compiling or reading the corpus, and how often it asks
# meanwhile whether that one has failed.
_TIMEOUT_S, _ASK_MS = 3600.0, 1000
_FAILED = "gdn/failed"
# The same on every process, as all make the same calls in the same order.
_calls = itertools.count()


def first() -> bool:
    """Whether this process prints, writes the log and owns the folder."""
    return jax.process_index() == 0


def store() -> Any:
    """The key-value store that the processes share; only where there are several."""
    # jax has no public name for it; its own multihost_utils and Orbax take it from here.
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("there are several processes, but jax.distributed.initialize was not called.")
    return client


def on_first[T](fn: Callable[[], T]) -> T:
    """What ``fn`` gives on the first process, on every process; so is its ``ValueError``.

    Call it on all of them, from the main thread. What ``fn`` gives must be JSON-able.

    Raises:
        RunFailedError: another process failed meanwhile; so does all that waits here.
    """
    if jax.process_count() == 1:
        return fn()
    key = f"gdn/on_first/{next(_calls)}"
    if first():
        try:
            answer = {"value": fn()}
        except ValueError as error:
            store().key_value_set(key, json.dumps({"error": str(error)}))
            raise
        store().key_value_set(key, json.dumps(answer))
    answer = json.loads(_wait_for(key))
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["value"]


def require_equal(config: Mapping[str, Any]) -> None:
    """Refuses, on every process, what is not the same on all of them; call it on each, from the main thread.

    Raises:
        ValueError: another process has another command, corpus or code; the message names the differences.
    """
    of_first, *others = gather(config)
    for process, other in enumerate(others, 1):
        if changed := differences(of_first, other):
            raise ValueError(
                f"process {process} has another configuration than process 0 ({changed}); give all processes the same "
                "command and the same corpus."
            )


def gather[T](value: T) -> list[T]:
    """The JSON-able values of all processes, by process; from the main thread of each."""
    if jax.process_count() == 1:
        return [value]
    key = f"gdn/gather/{next(_calls)}"
    store().key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    return [json.loads(_wait_for(f"{key}/{process}")) for process in range(jax.process_count())]


def _wait_for(key: str) -> str:
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            return store().blocking_key_value_get(key, _ASK_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error) or time.monotonic() > deadline:
                raise
        require_no_failure()


def tell_failure(error: BaseException) -> bool:
    """Ends the waiting of the other processes; whether there are any. Of several that fail the first is heard."""
    if distributed.global_state.client is None:
        return False
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        store().key_value_set(_FAILED, json.dumps([distributed.global_state.process_id, first_line(error)]))
    return True


def require_no_failure() -> None:
    """Raises RunFailedError where another process has told a failure."""
    try:
        process, reason = json.loads(store().key_value_try_get(_FAILED))
    except jax.errors.JaxRuntimeError:
        return
    if process != jax.process_index():
        raise RunFailedError(f"process {process} failed: {reason}")
