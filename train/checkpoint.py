"""Checkpoints through Orbax, each with a manifest: a damaged one is noticed and never restored.

A checkpoint is a folder named by its step. It is written under another name, hashed, and renamed in one step, so a
folder of that name is whole unless something damaged it later, which its manifest (`train.manifest`) tells: Orbax
by itself restores flipped bytes silently.
"""

import concurrent.futures
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from train import manifest, processes
from train.faults import first_line
from train.ledger import fingerprint
from train.step import TrainState

_STATE, _DATA, _CONFIG = "state", "data", "config"
_PARTIAL, _DAMAGED = ".partial", ".damaged"


class Checkpoints:
    """The checkpoints of one run; saves in the background, one at a time.

    Args:
        folder: where they lie; made if it does not exist. What a killed process left half-written is removed.
        keep: how many of the newest to keep; with two, there is one to fall back to.
        keep_best: how many of those with the lowest score to keep besides.
        warn: takes a line for the user.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        keep: int = 2,
        keep_best: int = 0,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._folder = folder.resolve()
        self._keep, self._keep_best, self._warn = keep, keep_best, warn
        self.scores: dict[int, float] = {}
        """Validation loss by step, as far as known; decides what is best."""
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        processes.on_first(self._clean)
        self.newest: int | None = self._newest_sound()
        """Step of the newest checkpoint that was committed or found sound; ``None``: there is none."""

    def _clean(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.glob(f"*{_PARTIAL}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _steps(self) -> list[int]:
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal())

    def _newest_sound(self) -> int | None:
        steps = processes.on_first(self._steps)
        for step in reversed(steps):
            # Each process hashes its share of the files, whoever wrote them.
            found = manifest.problem(
                self._folder / str(step), lambda names: names[jax.process_index() :: jax.process_count()]
            )
            found = next(filter(None, processes.gather(found)), None)
            if found is None:
                return step
            self._warn(f"warning: checkpoint {step} is damaged: {found}; falling back to the one before")
            damaged = f"{step}{_DAMAGED}"
            processes.on_first(lambda step=step, to=damaged: self._put_aside(step, to))
        if steps:
            raise ValueError(
                f"no checkpoint in {self._folder} is sound; they now end in {_DAMAGED}. Give the same command "
                "again to start from step 0, or choose another --out."
            )
        return None

    def _put_aside(self, step: int, name: str) -> None:
        shutil.rmtree(self._folder / name, ignore_errors=True)
        (self._folder / str(step)).rename(self._folder / name)

    def save(
        self, step: int, state: TrainState, data_state: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        """Saves in the background; the arrays are copied off the device before this returns.

        A step that is there already is not saved again.

        Raises:
            Exception: whatever the save before ended with.
        """
        self.wait()
        if step == self.newest:
            return
        partial = self._folder / f"{step}{_PARTIAL}"
        self._checkpointer.save(
            partial,
            args=ocp.args.Composite(
                **{
                    _STATE: ocp.args.StandardSave(state._asdict()),
                    _DATA: ocp.args.JsonSave(dict(data_state)),
                    _CONFIG: ocp.args.JsonSave(
                        {"fingerprint": fingerprint(config), "arrays": _arrays(state), "config": dict(config)}
                    ),
                }
            ),
        )
        self._pending = self._worker.submit(self._commit, step, partial)

    def _commit(self, step: int, partial: pathlib.Path) -> None:
        self._checkpointer.wait_until_finished()
        manifest.write_part(partial, jax.process_index(), jax.process_count())
        if processes.first():
            manifest.await_parts(partial, jax.process_count())
            partial.rename(self._folder / str(step))
        self.newest = step
        if processes.first():
            self._prune()

    def _prune(self) -> None:
        steps = self._steps()
        scored = sorted(
            (self.scores[step], step) for step in steps if math.isfinite(self.scores.get(step, math.nan))
        )
        kept = {*steps[-self._keep :], *(step for _, step in scored[: self._keep_best])}
        for step in steps:
            if step not in kept:
                # Out of the way first: a kill in the middle of the removal leaves no half a checkpoint.
                removed = (self._folder / str(step)).rename(self._folder / f"{step}{_PARTIAL}")
                shutil.rmtree(removed, ignore_errors=True)
        # Damaged ones are kept for whoever wants to look; only the last, or a bad disk would fill itself.
        for path in sorted(self._folder.glob(f"*{_DAMAGED}"), key=lambda path: path.stat().st_mtime)[:-1]:
            shutil.rmtree(path, ignore_errors=True)

    def check(self) -> None:
        """Raises what the save in the background ended with, if it has ended."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is committed; raises what it ended with."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and data position after ``step`` steps.

        Args:
            step: of a checkpoint that was found sound.
            like: abstract state with the shardings to restore to, of any number of devices.

        Raises:
            ValueError: the checkpoint is of a model of other shapes.
        """
        # Orbax would find out array by array, and leave others to be read by nobody.
        saved, wanted = self._about(step)["arrays"], _arrays(like)
        for name in sorted(saved | wanted):
            if saved.get(name) != wanted.get(name):
                raise ValueError(
                    f"checkpoint {step} in {self._folder} is of another model: {name} is {saved.get(name)} there, "
                    f"{wanted.get(name)} here. Use the model it was made with, or another --out."
                )
        restored = self._checkpointer.restore(
            self._folder / str(step),
            args=ocp.args.Composite(
                **{
                    _STATE: ocp.args.StandardRestore(like._asdict()),
                    _DATA: ocp.args.JsonRestore(),
                }
            ),
        )
        return TrainState(**restored[_STATE]), restored[_DATA]

    def config_fingerprint(self, step: int) -> str:
        """Of the configuration that a checkpoint was saved with, as ``ledger.fingerprint`` gives it."""
        return self._about(step)["fingerprint"]

    def _about(self, step: int) -> dict[str, Any]:
        return self._checkpointer.restore(
            self._folder / str(step), args=ocp.args.Composite(**{_CONFIG: ocp.args.JsonRestore()})
        )[_CONFIG]

    def close(self) -> None:
        """Waits until everything is on disk; raises what the last save ended with."""
        try:
            self.wait()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Ends without waiting for success: what was not committed is removed."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        try:
            self._checkpointer.close()
        except Exception as error:
            # Reported by `wait` already, or the reason to be here: raising it again would hide the first.
            self._warn(f"warning: the last checkpoint was not finished ({first_line(error)})")
        if processes.first():
            self._clean()


def _arrays(state: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
