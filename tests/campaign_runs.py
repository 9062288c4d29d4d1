"""What the fault campaigns share: tiny runs as processes, moments to disturb them at, and what they end with."""

import hashlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
import warnings

import tiny

ROOT = pathlib.Path(__file__).parents[1]
EVERY, VALIDATE_EVERY = 20, 15
# What a scheduler leaves between SIGTERM and SIGKILL, at the least.
GRACE_S = 30


def environment():
    # One device, and every program from the cache: a run is deterministic, and starts in seconds.
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache")),
        "JAX_COMPILATION_CACHE_MAX_SIZE": "4000000000",
    }


def tell(text):
    """A line now, wherever the output goes."""
    print(text, flush=True)


def data_words(folder):
    if not (folder / "corpus.txt").exists():
        tiny.write_corpus(folder)
    return [
        "--data.corpus", str(folder / "corpus.txt"), "--data.cache-dir", str(folder / "cache"),
        "--data.sequence-length", "16", "--data.batch-size", "8", "--data.validation-batches", "2",
        "--data.validation-fraction", "0.2",
    ]  # fmt: skip


def train_words(folder, out, *, seed=0, steps=200, more=()):
    """The command of a run of width 32; 20 steps at most are lost, a validation every 15."""
    return [
        sys.executable, "-m", "train", "train", "--out", str(out), "--width", "32", "--steps", str(steps),
        "--seed", str(seed), "--learning-rate", "0.02",
        "--checkpoint-every", str(EVERY), "--validate-every", str(VALIDATE_EVERY),
        "--model.base-width", "32", "--model.layers", "1", "--model.key-dim", "8", "--model.value-dim", "16",
        *data_words(folder), *more,
    ]  # fmt: skip


def start(words):
    return subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def complete(words, code=0):
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == code, f"exit code {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}"
    return done


def rows(out):
    path = out / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def last_step(out):
    return max((row["step"] for row in rows(out)), default=0)


def losses(out):
    """Losses of training and validation by step, without what depends on the clock."""
    return {(row["step"], key): row[key] for row in rows(out) for key in ("loss", "val_loss") if key in row}


def resumed_from(text):
    match = re.search(r"going on from step (\d+)", text)
    return int(match[1]) if match else 0


def digest(out, step=None):
    """SHA-256 over every array of the newest checkpoint's state, optimizer included."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    steps = [int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdecimal()]
    path = out / "checkpoints" / str(max(steps) if step is None else step) / "state"
    with warnings.catch_warnings(), ocp.StandardCheckpointer() as checkpointer:
        warnings.filterwarnings("ignore", "Sharding info not provided")
        state = checkpointer.restore(path.resolve())
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        total.update(f"{path} {leaf.shape} {leaf.dtype}".encode() + np.asarray(leaf).tobytes())
    return total.hexdigest()


class Moment:
    """A random moment of a run that goes on: by the clock, by its log, or by what lies in its folder."""

    KINDS = ("clock", "training", "save", "evaluation")

    def __init__(self, rng: random.Random) -> None:
        self.kind = rng.choice(self.KINDS)
        # Up to what a start takes, imports and compilation included; the others lie behind it.
        self._seconds = rng.uniform(0.1, 8.0)
        self._steps = rng.randint(1, 2 * EVERY)
        self._after = rng.choice((0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.2)))

    def wait(self, process, out):
        """Waits for it; whether the process still runs."""
        began, first = time.monotonic(), last_step(out)
        while process.poll() is None:
            if self.kind == "clock":
                reached = time.monotonic() - began > self._seconds
            else:
                step = last_step(out)
                reached = step >= first + self._steps
                if self.kind == "save":
                    reached = reached and any((out / "checkpoints").glob("*.partial*"))
                elif self.kind == "evaluation":
                    reached = reached and _evaluates(out)
            if reached:
                time.sleep(self._after)
                break
            time.sleep(0.001)
        return process.poll() is None


def _evaluates(out):
    found = rows(out)
    return bool(found) and found[-1]["step"] % VALIDATE_EVERY == 0 and "val_loss" not in found[-1]


def phase(out, first):
    """What a run is doing, as far as its folder tells."""
    if last_step(out) <= first:
        return "starting"
    saves, evaluates = any((out / "checkpoints").glob("*.partial*")), _evaluates(out)
    if evaluates:
        return "evaluating and saving" if saves else "evaluating"
    return "saving" if saves else "training"


def strike(process, number, timeout=GRACE_S):
    """Sends a signal; output, errors and the seconds until the process was gone."""
    began = time.monotonic()
    process.send_signal(number)
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        raise AssertionError(f"signal {number} was not answered within {timeout} s") from None
    return output, errors, time.monotonic() - began
