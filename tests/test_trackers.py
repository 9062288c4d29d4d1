"""`--log-to`: a run's rows in TensorBoard and Weights & Biases, and a clear line where they are not installed."""

import json
import sys
import types

import pytest
import tiny

from train.trackers import WANDB_FILE
from train.train_run import TrainOptions, run_training


class _Seen(list):
    """Stands for tensorboardX and for wandb: notes what it is called with."""

    def module(self, monkeypatch, name):
        module = types.ModuleType(name)
        module.SummaryWriter = lambda **options: self._note("open", options)
        module.init = lambda **options: self._note("open", options)
        monkeypatch.setitem(sys.modules, name, module)
        return self

    def _note(self, *what):
        self.append(what)
        return self

    def add_scalar(self, name, value, step):
        self._note("scalar", step, name, value)

    def add_text(self, name, text, step):
        self._note("text", json.loads(text))

    def define_metric(self, *names, **options):
        self._note("metric", options)

    def log(self, row):
        self._note("log", row)

    def close(self):
        self._note("closed")

    finish = close


def _train(folder, **changes):
    options = TrainOptions(
        out=folder / "run", width=8, learning_rate=0.02, steps=4, validate_every=2, **changes
    )
    run_training(options, tiny.MODEL, tiny.OPTIMIZER, tiny.data_config(folder))


def test_rows_go_to_both(tmp_path, monkeypatch):
    board = _Seen().module(monkeypatch, "tensorboardX")
    bias = _Seen().module(monkeypatch, "wandb")
    log_to = ("tensorboard", "wandb")
    _train(tmp_path, log_to=log_to, stop_at=3)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row[1] for row in bias if row[0] == "log"] == [
        {key: value for key, value in row.items() if value is not None} for row in rows
    ]
    assert ("scalar", 2, "loss", rows[1]["loss"]) in board
    assert next(x for x in board if x[0] == "text")[1]["run"]["width"] == 8
    assert any(row[:3] == ("scalar", 2, "val_loss") for row in board)
    assert board[-1] == bias[-1] == ("closed",)
    identifier = json.loads((tmp_path / "run" / WANDB_FILE).read_text())["id"]
    # Goes on in the same place; what lies beyond the checkpoint is purged.
    board.clear()
    bias.clear()
    _train(tmp_path, log_to=log_to)
    assert board[0][1]["purge_step"] == 4
    assert (bias[0][1]["id"], bias[0][1]["resume"]) == (identifier, "allow")
    assert [row[1]["step"] for row in bias if row[0] == "log"] == [4]


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_what_is_not_installed_is_said(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"--log-to {name} needs the package {package} .*; pip install -e '.\[log\]' brings it"
    with pytest.raises(ValueError, match=message):
        TrainOptions(out=tmp_path, log_to=(name,))
    monkeypatch.undo()


def test_each_once(tmp_path, monkeypatch):
    _Seen().module(monkeypatch, "wandb")
    with pytest.raises(ValueError, match="--log-to must name each once; got wandb wandb"):
        TrainOptions(out=tmp_path, log_to=("wandb", "wandb"))
