"""Checkpoints through Orbax: parameters, optimizer state, step, seed, data position and configuration."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from train.step import TrainState

_STATE, _DATA, _CONFIG = "state", "data", "config"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie; made if it does not exist.
        keep: how many of the newest to keep.
    """

    def __init__(self, folder: pathlib.Path, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    @property
    def latest_step(self) -> int | None:
        """Steps taken by the newest committed checkpoint; ``None``: there is none."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, data_state: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        """Saves in the background; the arrays are copied off the device before this returns."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    _STATE: ocp.args.StandardSave(state._asdict()),
                    _DATA: ocp.args.JsonSave(dict(data_state)),
                    _CONFIG: ocp.args.JsonSave(dict(config)),
                }
            ),
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and data position after ``step`` steps.

        Args:
            step: of a checkpoint that exists.
            like: abstract state with shardings, ``jax.eval_shape`` of the program's init.
        """
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{
                    _STATE: ocp.args.StandardRestore(like._asdict()),
                    _DATA: ocp.args.JsonRestore(),
                }
            ),
        )
        return TrainState(**restored[_STATE]), restored[_DATA]

    def config(self, step: int) -> dict[str, Any]:
        """The configuration saved with a checkpoint."""
        return self._manager.restore(step, args=ocp.args.Composite(**{_CONFIG: ocp.args.JsonRestore()}))[
            _CONFIG
        ]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def abstract_like(state: Any, sharding: jax.sharding.Sharding) -> Any:
    """Shapes and dtypes of ``state`` with one sharding for all."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
