"""Where a run's log goes besides metrics.jsonl: TensorBoard, Weights & Biases. Their packages are an extra, `log`."""

import importlib
import json
import pathlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from train.ledger import write_atomically

type TrackerName = Literal["tensorboard", "wandb"]

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
# Names the run of Weights & Biases that a folder belongs to, so that it goes on there.
WANDB_FILE = "wandb.json"


class Tracker:
    """Takes the rows that metrics.jsonl takes."""

    def write(self, row: Mapping[str, Any]) -> None:
        """A row: ``step``, and numbers by name; None: not finite."""
        raise NotImplementedError

    def close(self) -> None:
        """All rows are where they belong when this returns."""
        raise NotImplementedError


def check_installed(names: Sequence[str]) -> None:
    """ValueError where the package of a tracker is not installed."""
    for name in names:
        _package(name)


def open_trackers(
    names: Sequence[str], out: pathlib.Path, first_step: int, config: Mapping[str, Any]
) -> list[Tracker]:
    """Opens trackers of a run; on the first process only.

    Args:
        names: of `TrackerName`.
        out: folder of the run.
        first_step: the step that it goes on from.
        config: of the run, JSON-able.
    """
    return [_MAKERS[name](out, first_step, config) for name in names]


def _package(name: str) -> Any:
    try:
        return importlib.import_module(_PACKAGES[name])
    except ImportError as error:
        raise ValueError(
            f"--log-to {name} needs the package {_PACKAGES[name]} ({error}); pip install -e '.[log]' brings it."
        ) from None


class _TensorBoard(Tracker):
    def __init__(self, out: pathlib.Path, first_step: int, config: Mapping[str, Any]) -> None:
        # What a killed run wrote beyond its checkpoint is hidden.
        self._writer = _package("tensorboard").SummaryWriter(
            logdir=str(out / "tensorboard"), purge_step=first_step + 1
        )
        self._writer.add_text("config", json.dumps(config, indent=1, sort_keys=True), first_step)

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class _Wandb(Tracker):
    def __init__(self, out: pathlib.Path, first_step: int, config: Mapping[str, Any]) -> None:
        wandb, path = _package("wandb"), out / WANDB_FILE
        if not path.exists():
            write_atomically(path, json.dumps({"id": secrets.token_hex(4)}) + "\n")
        identifier = json.loads(path.read_text())["id"]
        # Its own step never goes back, as a run after a kill does: rows are drawn over ours.
        self._run = wandb.init(
            dir=str(out), project="gdn", name=out.name, id=identifier, resume="allow", config=dict(config)
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log({"step": row["step"], **_numbers(row)})

    def close(self) -> None:
        self._run.finish()


_MAKERS = {"tensorboard": _TensorBoard, "wandb": _Wandb}


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "step" and value is not None}
