"""A disk that fills up at a random point, and numbers that stop being finite at a random step."""

import contextlib
import json
import random
import re
import shutil
import subprocess
import unittest.mock

import jax
import numpy as np
import tiny
from campaign_runs import complete, digest, losses, start, tell, train_words

from train import train_run
from train.checkpoint import Checkpoints
from train.config import KeepOptions, ModelOptions
from train.train_run import TrainOptions, run_training


class NoMountError(Exception):
    """A tmpfs cannot be mounted here."""


@contextlib.contextmanager
def small_disk(folder, size):
    """A tmpfs of ``size`` bytes at ``folder``; NoMountError where that is not allowed."""
    folder.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoMountError(f"a tmpfs cannot be mounted here: {error}") from None
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(folder, count, seed, steps=60, say=tell, whole=None):
    """Runs on a disk that has too little space ``count`` times, then with space; the end must be the same.

    ``whole``: the folder of a run with space, where there is one already.

    Returns at which newest checkpoint the disk was full.
    """
    rng = random.Random(f"{seed} disk")
    if whole is None:
        whole = folder / "space"
        complete(train_words(folder, whole, steps=steps))
    used = sum(path.stat().st_blocks * 512 for path in whole.rglob("*"))
    kept, size = [], 64 * 2**20
    with small_disk(folder / "disk", size) as disk:
        while len(kept) < count:
            out = disk / "out"
            shutil.rmtree(out, ignore_errors=True)
            # From nothing at all to what the run takes at its end; while it saves it takes half as much again.
            free = rng.randrange(int(used * 1.3))
            ballast = disk / "ballast"
            with ballast.open("wb") as file:
                file.write(b"\0" * (size - free))
            words = train_words(folder, out, steps=steps)
            process = start(words)
            output, errors = process.communicate()
            if process.returncode == 0:
                ballast.unlink()
                continue
            assert process.returncode == 1, f"exit code {process.returncode}\n{output}\n{errors}"
            message = [line for line in errors.splitlines() if line.startswith("gdn: ")]
            assert len(message) == 1, errors[-2000:]
            assert "Traceback" not in errors, errors[:2000]
            assert f"no space left in {out}" in message[0]
            said = re.search(r"the checkpoint of step (\d+) is kept", message[0])
            ballast.unlink()
            newest = None
            if (out / "checkpoints").exists():
                checkpoints = Checkpoints(out / "checkpoints")
                newest = checkpoints.newest
                checkpoints.close()
            assert newest == (int(said[1]) if said else None), message[0]
            resumed = complete(words)
            if newest:
                assert f"going on from step {newest}" in resumed.stdout
            assert digest(out) == digest(whole)
            assert losses(out) == losses(whole)
            kept.append(newest)
            say(f"disk full {len(kept)} of {count}: {free} bytes free, kept {newest}, then bit-identical")
    return {"full": len(kept), "kept": kept}


def poisoned_loader(step):
    """`train_loader` whose batch of ``step`` has one NaN; position and all other batches are as they were."""
    original = train_run.train_loader

    class Poisoned:
        def __init__(self, iterator, start):
            self._iterator, self._next = iterator, start

        def __iter__(self):
            return self

        def __next__(self):
            batch = next(self._iterator)
            self._next += 1
            if self._next == step:
                mask = np.array(batch.loss_mask)
                mask[step % len(mask), -1] = np.nan
                batch = batch._replace(loss_mask=mask)
            return batch

        def get_state(self):
            return self._iterator.get_state()

        def set_state(self, state):
            self._iterator.set_state(state)
            self._next = state["next_index"]

    def loader(*arguments, start_step=0, **options):
        return Poisoned(original(*arguments, start_step=start_step, **options), start_step)

    return unittest.mock.patch.object(train_run, "train_loader", loader)


def poisoned_layer(step, layer):
    """Compiled functions of which the step number ``step`` finds a NaN in the parameters of ``layer``."""
    original = train_run.ahead_of_time

    def compiled_functions(*arguments, **options):
        compiled = original(*arguments, **options)

        def poisoned(state, batch, hparams):
            if int(state.step) == step - 1:
                kernel = state.params["layers"]["mlp"]["down"]["kernel"]
                bad = kernel.at[layer, 0, 0].set(jax.numpy.nan)
                params = jax.tree.map(lambda x: bad if x is kernel else x, state.params)
                state = state._replace(params=params)
            return compiled.step(state, batch, hparams)

        return compiled._replace(step=poisoned)

    return unittest.mock.patch.object(train_run, "ahead_of_time", compiled_functions)


MODEL = ModelOptions(layers=3, key_dim=8, value_dim=8, base_width=8)


def not_finite(folder, count, seed, steps=40, say=tell):
    """Puts a NaN into ``count`` random steps: into a batch with each policy, or into the parameters of a layer."""
    rng = random.Random(f"{seed} nan")

    def train(out, policy="abort"):
        said = []
        options = TrainOptions(
            out=folder / out, width=8, learning_rate=0.02, steps=steps, checkpoint_every=10, validate_every=15
        )
        summary = run_training(
            options,
            MODEL,
            tiny.OPTIMIZER,
            tiny.data_config(folder),
            said.append,
            KeepOptions(nan_policy=policy),
        )
        return summary, said

    def reports(out):
        return [json.loads(line) for line in (folder / out / "not-finite.jsonl").read_text().splitlines()]

    clean, _ = train("clean")
    for number in range(count):
        step, out = rng.randint(2, steps - 1), f"nan-{number}"
        what = ("batch, abort", "batch, skip", "layer")[number % 3]
        if what == "layer":
            layer = rng.randrange(MODEL.layers)
            with poisoned_layer(step, layer):
                # Skipping would not help: the policy must not make it go on for ever.
                summary, said = train(out, rng.choice(("abort", "skip")))
            (report,) = reports(out)
            assert (report["where"], report["layer"]) == ("parameters", layer)
            assert "mlp.down.kernel" in report["name"]
            assert any(f"parameter {report['name']} of layer {layer} is not finite" in line for line in said)
        else:
            policy = what.removeprefix("batch, ")
            with poisoned_loader(step):
                summary, said = train(out, policy)
            (report,) = reports(out)
            assert (report["where"], report["name"]) == ("batch", "loss_mask")
            assert report["batch"]["rows_not_finite"] == [step % 8]
        assert report["step"] == step
        assert report["batch"]["places"] == [8 * (step - 1), 8 * step - 1]
        assert any(line.startswith(f"step {step} is not finite") for line in said)
        if what == "batch, skip":
            assert summary["steps"] == steps
            assert summary["diverged_at_step"] is None
            assert np.isfinite(summary["val_loss"])
            with poisoned_loader(step):
                again, _ = train(f"{out}-again", policy)
            assert again == summary
            assert digest(folder / out) == digest(folder / f"{out}-again") != digest(folder / "clean")
        else:
            assert summary["diverged_at_step"] == step
            assert summary["val_loss"] is None
            # Nothing that was not finite was kept: without the fault the run ends as if it had not been.
            resumed, said = train(out)
            assert resumed == clean
            if what == "batch, abort" and step > 1:
                assert f"going on from step {step - 1} of {steps}" in said
            assert digest(folder / out) == digest(folder / "clean")
        say(f"NaN {number + 1} of {count}: {what} of step {step}, as it must be")
    return {"injected": count}
