"""Runs as a process of its own, or as one of several: a run on a mesh, and which rows of the data it read.

``python mesh_runs.py FOLDER JSON``: ``out``, ``mesh``, what else of `TrainOptions` and `KeepOptions`, and ``poison``, a
step whose batch gets a NaN. Every process adds to ``FOLDER/rows.jsonl.PROCESS`` what it read for each step.
"""

import contextlib
import hashlib
import json
import pathlib
import sys
import unittest.mock

import campaign_faults
import conftest
import jax
import numpy as np
import tiny

from train import train_run
from train.config import KeepOptions, ModelOptions
from train.distributed import start_processes
from train.mesh import MeshOptions
from train.train_run import TrainOptions, run_training

assert conftest, "its settings hold here as well"

# Eight heads at width 64; the learning rate is one at which rounding stays rounding (see mesh_cases.py).
MODEL = ModelOptions(layers=1, key_dim=4, value_dim=8, base_width=16)
RATE = 0.001


def noting_loader(path):
    """`train_loader` that notes, in a line a step, the step and a digest of the tokens of each row."""
    original = train_run.train_loader

    def loader(*arguments, **options):
        iterator = original(*arguments, **options)

        class Noting:
            def __init__(self):
                self._step = 0

            def __iter__(self):
                return self

            def __next__(self):
                batch = next(iterator)
                self._step += 1
                digests = [hashlib.sha256(np.asarray(row).tobytes()).hexdigest()[:16] for row in batch.tokens]
                with path.open("a") as file:
                    file.write(json.dumps([self._step, digests]) + "\n")
                return batch

            def get_state(self):
                return iterator.get_state()

            def set_state(self, state):
                iterator.set_state(state)
                self._step = state["next_index"]

        return Noting()

    return unittest.mock.patch.object(train_run, "train_loader", loader)


def main(folder, words):
    # Before anything asks for a device, as the command does it.
    start_processes()
    folder, given = pathlib.Path(folder), json.loads(words)
    out, mesh, poison = given.pop("out"), MeshOptions(**given.pop("mesh")), given.pop("poison", None)
    keep = KeepOptions(nan_policy=given.pop("nan_policy", "abort"))
    settings = {"width": 64, "learning_rate": RATE, "checkpoint_every": 1000, "validate_every": 1000}
    options = TrainOptions(out=folder / out, **settings | given)
    with contextlib.ExitStack() as patched:
        patched.enter_context(noting_loader(folder / f"{out}.rows.{jax.process_index()}"))
        if poison is not None:
            patched.enter_context(campaign_faults.poisoned_loader(poison))
        config = tiny.data_config(folder, sequence_length=32)
        summary = run_training(options, MODEL, tiny.OPTIMIZER, config, keep=keep, mesh=mesh)
    print(json.dumps(summary))


if __name__ == "__main__":
    main(*sys.argv[1:])
