"""Times the implementations beside one another: `python -m kernels_pallas.gated_delta_rule.bench`.

Forward, and forward with all five gradients, in turns: one call of each contestant per round, so that a noisy
machine is noisy for all; the figures are medians over rounds. Where an interpreter with torch and
transformers is found (`--torch-python`, else this one), their chunked form runs in the same rounds. On a Hopper GPU
each kernel is measured by itself, too, beside the least time that its bytes and operations take.
"""

import argparse
import contextlib
import functools
import gzip
import importlib.util
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.gated_delta_rule.api import gated_delta_rule
from kernels_pallas.gated_delta_rule.costs import UNCOUNTED, Cost, launch_costs, op_costs
from kernels_pallas.gated_delta_rule.implementations import IMPLEMENTATIONS
from kernels_pallas.gated_delta_rule.shapes import SHAPES, Shape

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
_MODES = ("forward", "both")
_TRANSFORMERS = "transformers (torch)"
# On an accelerator one call takes less than its launch from Python: so many in a row.
_IN_A_ROW = 20


def _operands(shape: Shape, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 6)
    key_shape = (shape.batch, shape.length, shape.key_heads, shape.key_dim)
    value_shape = (shape.batch, shape.length, shape.value_heads, shape.value_dim)
    q = jax.random.normal(keys[0], key_shape, dtype)
    k = jax.random.normal(keys[1], key_shape)
    k = (k / jnp.linalg.norm(k, axis=-1, keepdims=True)).astype(dtype)
    v = jax.random.normal(keys[2], value_shape, dtype)
    log_decay = -jax.random.uniform(keys[3], value_shape[:-1])
    beta = jax.random.uniform(keys[4], value_shape[:-1])
    return q, k, v, log_decay, beta, jax.random.normal(keys[5], value_shape, dtype)


def _calls(
    implementation: str, shape: Shape, dtype: jnp.dtype
) -> dict[str, Callable[[], tuple[jax.Array, ...]]]:
    """Compiled when first called, by mode."""
    *operands, do = _operands(shape, dtype)

    def op(*x: jax.Array) -> jax.Array:
        return gated_delta_rule(*x, implementation=implementation)[0]

    def both(do: jax.Array, *x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        o, vjp = jax.vjp(op, *x)
        return o, vjp(do)

    return {
        "forward": functools.partial(jax.jit(op), *operands),
        "both": functools.partial(jax.jit(both), do, *operands),
    }


def _run(call: Callable[[], tuple[jax.Array, ...]], count: int) -> None:
    """So many calls, of which the results of one live at a time."""
    result = None
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)


def _ours(calls: dict[str, Callable[[], tuple[jax.Array, ...]]], in_a_row: int) -> Callable[[str], float]:
    def seconds(mode: str) -> float:
        start = time.perf_counter()
        _run(calls[mode], in_a_row)
        return (time.perf_counter() - start) / in_a_row

    return seconds


def launch_seconds(trace: pathlib.Path, names: list[str]) -> dict[str, float]:
    """Mean time of each kernel in a profile of JAX's, by the beginning of its name; those that ran."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    found = {
        name: [1e-6 * e["dur"] for e in events if e.get("ph") == "X" and e["name"].startswith(name)]
        for name in names
    }
    return {name: statistics.mean(times) for name, times in found.items() if times}


def _profiled(call: Callable[[], tuple[jax.Array, ...]], names: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            _run(call, _IN_A_ROW)
        return launch_seconds(next(pathlib.Path(folder).rglob("*.trace.json.gz")), names)


def _against(cost: Cost, seconds: float, device_kind: str) -> str:
    """µs, the least of them, and the rates."""
    least = cost.seconds(device_kind)
    columns = (
        f"{1e6 * seconds:.0f}",
        "" if least is None else f"{1e6 * least:.0f}",
        f"{1e-9 * cost.moved / seconds:.0f}",
        f"{1e-12 * cost.operations / seconds:.0f}",
    )
    return "".join(f"{column:>10}" for column in columns)


def _print_kernels(
    shape: Shape, modes: dict[str, float], calls: dict[str, Callable[..., Any]], device_kind: str
) -> None:
    forward, backward = op_costs(shape)
    costs = launch_costs(shape)
    launches = _profiled(calls["both"], [*costs, *UNCOUNTED])
    print(f"\n{'mosaic_gpu':24}{'µs':>10}{'least':>10}{'GB/s':>10}{'TFLOP/s':>10}")
    for mode, label, cost in (
        ("forward", "forward", forward),
        ("both", "forward + backward", forward + backward),
    ):
        print(f"{label:24}{_against(cost, 1e-3 * modes[mode], device_kind)}")
    for name, seconds in launches.items():
        print(
            f"{name:24}"
            + (_against(costs[name], seconds, device_kind) if name in costs else f"{1e6 * seconds:10.0f}")
        )
    rest = 1e-3 * modes["both"] - sum(launches.values())
    print(f"{'all else':24}{1e6 * rest:10.0f}")


@contextlib.contextmanager
def _theirs(python: str, shape: Shape, threads: int) -> Iterator[Callable[[str], float]]:
    worker = pathlib.Path(__file__).with_name("bench_torch.py")
    process = subprocess.Popen(
        [python, str(worker), *map(str, shape), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def answer() -> str:
        line = answers.readline()
        if not line:
            raise SystemExit(
                f"--torch-python must have torch and transformers; {python} stopped without an answer, its "
                "error is above. Name another interpreter, or leave the argument away."
            )
        return line

    def seconds(mode: str) -> float:
        requests.write(mode + "\n")
        requests.flush()
        return float(answer())

    try:
        answer()
        yield seconds
    finally:
        requests.close()
        process.wait()


def _find_torch(python: str | None) -> str | None:
    if python is not None:
        return python
    found = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    return sys.executable if found else None


def measure(contestants: dict[str, Callable[[str], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each contestant and mode, after one call of each to compile and warm up."""
    times = {name: {mode: [] for mode in _MODES} for name in contestants}
    for turn in range(-1, rounds):
        for mode in _MODES:
            for name, seconds in contestants.items():
                elapsed = seconds(mode)
                if turn >= 0:
                    times[name][mode].append(1e3 * elapsed)
    return {
        name: {mode: statistics.median(taken) for mode, taken in modes.items()}
        for name, modes in times.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and print one table per shape."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels_pallas.gated_delta_rule.bench", description=__doc__
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["cpu"], help="default: cpu")
    parser.add_argument(
        "--implementations", nargs="+", choices=sorted(IMPLEMENTATIONS), default=["chunked", "reference"]
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each contestant")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each contestant; 0: all")
    parser.add_argument("--torch-python", metavar="PATH", help="interpreter that has torch and transformers")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1; got {options.rounds}. Use 9.")
    if options.threads < 0:
        parser.error(f"--threads must be 0 or more; got {options.threads}. Use 2.")
    if options.torch_python is not None and shutil.which(options.torch_python) is None:
        parser.error(
            f"--torch-python must be an interpreter; got {options.torch_python}, which cannot be run."
        )
    if options.threads and hasattr(os, "sched_setaffinity"):
        # XLA takes as many threads as it may use cores; asked before JAX starts its first device.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch_python = _find_torch(options.torch_python)
    device = jax.devices()[0]
    print(
        f"{device.device_kind} ({device.platform}), {options.dtype}, medians of {options.rounds} rounds, ms"
    )
    if torch_python is None:
        print("torch and transformers are not installed here: name an interpreter by --torch-python")

    for name in options.shapes:
        shape = SHAPES[name]
        dtype = jnp.dtype(_DTYPES[options.dtype])
        calls = {i: _calls(i, shape, dtype) for i in options.implementations}
        in_a_row = 1 if device.platform == "cpu" else _IN_A_ROW
        contestants = {i: _ours(of_one, in_a_row) for i, of_one in calls.items()}
        with contextlib.ExitStack() as stack:
            if torch_python is not None and device.platform == "cpu" and options.dtype == "float32":
                theirs = _theirs(torch_python, shape, options.threads)
                contestants[_TRANSFORMERS] = stack.enter_context(theirs)
            try:
                results = measure(contestants, options.rounds)
            except NotImplementedError as error:
                parser.error(str(error))
        sizes = "  ".join(f"{axis}={size}" for axis, size in zip("BTHGKV", shape, strict=True))
        print(f"\n{name}: {sizes}\n{'':24}{'forward':>10}{'forward + backward':>22}")
        first = next(iter(results.values()))
        for contestant, modes in results.items():
            forward, both = (f"{modes[mode]:.2f} ({modes[mode] / first[mode]:.2f}x)" for mode in _MODES)
            print(f"{contestant:24}{forward:>18}{both:>22}")
        if "mosaic_gpu" in calls:
            _print_kernels(shape, results["mosaic_gpu"], calls["mosaic_gpu"], device.device_kind)


if __name__ == "__main__":
    main()
