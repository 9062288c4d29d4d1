"""`gdn train`: stopped and resumed bit for bit, refusals, and eight devices as one."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import campaign_faults
import jax
import numpy as np
import pytest
import tiny

from train import loop, train_run
from train.checkpoint import Checkpoints
from train.config import KeepOptions
from train.interrupts import Stopped
from train.metrics_log import MetricsLog
from train.train_run import TrainOptions, run_training

ROOT = pathlib.Path(__file__).parents[1]


def _train(folder, out, keep=KeepOptions(), say=lambda text: None, **changes):
    settings = {"width": 16, "learning_rate": 0.02, "steps": 60, "checkpoint_every": 10, "validate_every": 20}
    options = TrainOptions(out=folder / out, **(settings | changes))
    return run_training(options, tiny.MODEL, tiny.OPTIMIZER, tiny.data_config(folder), say, keep)


def _final_state(folder):
    import orbax.checkpoint as ocp

    checkpoints = Checkpoints(folder / "checkpoints")
    step = checkpoints.newest
    path = folder / "checkpoints" / str(step) / "state"
    checkpoints.close()
    with ocp.StandardCheckpointer() as checkpointer:
        return step, checkpointer.restore(path.resolve())


def _losses(folder, key="loss"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def _assert_same_state(left, right):
    (step, one), (other_step, other) = _final_state(left), _final_state(right)
    assert step == other_step
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    return folder, _train(folder, "whole")


@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
def test_stopped_and_resumed_ends_bit_identical(uninterrupted):
    folder, summary = uninterrupted
    stopped = _train(folder, "parts", stop_at=25)
    assert stopped["steps"] == 25
    assert stopped["val_loss"] is None
    resumed = _train(folder, "parts")
    assert resumed == summary
    _assert_same_state(folder / "whole", folder / "parts")
    assert _losses(folder / "parts") == _losses(folder / "whole")
    assert sorted(_losses(folder / "whole")) == list(range(1, 61))


def test_summary_and_log(uninterrupted):
    folder, summary = uninterrupted
    assert summary["steps"] == 60
    assert summary["tokens"] == 60 * 8 * 16
    assert summary["diverged_at_step"] is None
    losses = _losses(folder / "whole")
    assert losses[60] < losses[1] - 1
    assert _losses(folder / "whole", "tokens") == {step: step * 8 * 16 for step in range(1, 61)}
    assert json.loads((folder / "whole/summary.json").read_text()) == summary
    again = _train(folder, "whole")
    assert again["val_loss"] == summary["val_loss"]


def test_what_a_crash_logged_beyond_the_checkpoint_is_dropped(uninterrupted):
    folder, summary = uninterrupted
    _train(folder, "crash", stop_at=25)
    with (folder / "crash/metrics.jsonl").open("a") as log:
        log.write('{"step": 26, "loss": 99.0}\n{"step": 27, "lo')
    assert _train(folder, "crash") == summary
    assert _losses(folder / "crash") == _losses(folder / "whole")


class _SignalledWhenRead(list):
    """Validation batches whose second reading is interrupted: the run is in the middle of an evaluation."""

    readings = 0

    def __iter__(self):
        for index, batch in enumerate(super().__iter__()):
            self.readings += index == 0
            if self.readings == 2 and index == 1:
                signal.raise_signal(signal.SIGUSR1)
            yield batch


@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
def test_a_signal_during_an_evaluation_loses_nothing(uninterrupted, monkeypatch):
    """Not at a step that is saved anyway; the evaluation is made up for when the run goes on."""
    folder, summary = uninterrupted
    original, said = train_run.validation_batches, []
    with monkeypatch.context() as patched:
        patched.setattr(train_run, "validation_batches", lambda *args: _SignalledWhenRead(original(*args)))
        with pytest.raises(Stopped, match="SIGUSR1"):
            _train(folder, "signalled", checkpoint_every=1000, say=said.append)
    assert said[-1] == "stopped by SIGUSR1; the checkpoint of step 40 is kept"
    assert sorted(_losses(folder / "signalled", "val_loss")) == [20]
    said = []
    # How often a run is saved may change.
    assert _train(folder, "signalled", say=said.append) == summary
    assert said[0] == "going on from step 40 of 60"
    assert _losses(folder / "signalled") == _losses(folder / "whole")
    assert _losses(folder / "signalled", "val_loss") == _losses(folder / "whole", "val_loss")
    _assert_same_state(folder / "whole", folder / "signalled")


@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
def test_a_run_that_ends_at_a_batch_has_saved_what_the_step_found(uninterrupted):
    """Under the number of the step before, with that batch as the next."""
    folder, _ = uninterrupted
    with campaign_faults.poisoned_loader(28):
        ended = _train(folder, "poisoned")
    assert (ended["steps"], ended["diverged_at_step"], ended["val_loss"]) == (27, 28, None)
    step, state = _final_state(folder / "poisoned")
    assert (step, state["step"], state["diverged_at"]) == (27, 27, -1)
    position = json.loads((folder / "poisoned/checkpoints/27/data/metadata").read_text())
    assert position["next_index"] == 27
    losses = _losses(folder / "whole")
    assert _losses(folder / "poisoned") == {step: losses[step] for step in range(1, 28)} | {28: None}


def test_the_best_checkpoint_is_kept_and_known_to_the_run_that_goes_on(tmp_path, monkeypatch):
    """Validation losses that rise: the first that is validated is the best, and never among the newest."""
    monkeypatch.setattr(loop, "mean_validation_loss", lambda compiled, state, *_: np.float64(state.step))

    def train(stop_at):
        keep = KeepOptions(keep=1, keep_best=1)
        _train(tmp_path, "best", keep, checkpoint_every=2, validate_every=2, stop_at=stop_at)
        return sorted(path.name for path in (tmp_path / "best/checkpoints").iterdir())

    assert train(3) == ["2", "3"]
    assert train(6) == ["2", "6"]
    assert _losses(tmp_path / "best", "val_loss") == {2: 2.0, 4: 4.0, 6: 6.0}


def test_another_configuration_is_refused_unless_told(uninterrupted):
    folder, _ = uninterrupted
    _train(folder, "changed", stop_at=5)
    with pytest.raises(
        ValueError, match=r"run.learning_rate 0.02 -> 0.03\); .*, or --allow-changes to go on with these"
    ):
        _train(folder, "changed", learning_rate=0.03)
    said = []
    _train(folder, "changed", KeepOptions(allow_changes=True), said.append, learning_rate=0.03, stop_at=8)
    assert said[0] == "going on from step 5 of 60"
    # From then on that is its configuration.
    with pytest.raises(ValueError, match=r"run.learning_rate 0.03 -> 0.02"):
        _train(folder, "changed", stop_at=8)


def test_a_change_that_cannot_be_made_leaves_the_folder_as_it_was(uninterrupted):
    folder, _ = uninterrupted
    _train(folder, "kept", stop_at=5)
    with pytest.raises(ValueError, match=r"checkpoint 5 .* is of another model"):
        _train(folder, "kept", KeepOptions(allow_changes=True), width=24)
    said = []
    _train(folder, "kept", say=said.append, stop_at=6)
    assert said[0] == "going on from step 5 of 60"


def test_a_finished_run_is_that_of_its_own_configuration(uninterrupted):
    """Other options are not answered with its loss, and the folder still says what it was."""
    folder, _ = uninterrupted
    known = _train(folder, "finished", steps=6)
    config = folder / "finished/run.json"
    before, changed = config.read_bytes(), KeepOptions(allow_changes=True)
    for changes in ({"learning_rate": 0.5}, {"width": 24}, {"steps": 3}):
        with pytest.raises(ValueError, match=r"is at step 6, and --steps is \d: none is left to train"):
            _train(folder, "finished", changed, **({"steps": 6} | changes))
        assert config.read_bytes() == before
    config.unlink()
    with pytest.raises(ValueError, match=r"has a checkpoint of another configuration than this one; choose"):
        _train(folder, "finished", steps=6, learning_rate=0.5)
    assert not config.exists()
    assert _train(folder, "finished", steps=6) == known
    assert config.read_bytes() == before
    for damaged in ("[]", '{"steps": 6}', "null"):
        (folder / "finished/summary.json").write_text(damaged)
        assert _train(folder, "finished", steps=6)["val_loss"] == known["val_loss"]


@pytest.mark.parametrize("damage", [b'{"step": 2, "val_l', b"[1, 2]", b"{}", b"\x98"])
def test_a_damaged_line_of_the_log_costs_no_other(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    sound = [json.dumps({"step": step, "val_loss": 1.0}).encode() for step in (1, 3, 4)]
    path.write_bytes(b"\n".join([sound[0], damage, *sound[1:]]) + b"\n")
    log = MetricsLog(path, keep_until=3)
    log.close()
    assert path.read_bytes().splitlines() == sound[:2]
    assert log.val_losses == {1: 1.0, 3: 1.0}


def test_processes_that_were_started_otherwise_are_refused(uninterrupted, monkeypatch):
    folder, _ = uninterrupted

    def gather(value):
        return [value, value | {"run": value["run"] | {"learning_rate": 0.5}}]

    monkeypatch.setattr("train.processes.gather", gather)
    with pytest.raises(
        ValueError, match=r"process 1 has another configuration .*\(run.learning_rate 0.02 -> 0.5\)"
    ):
        _train(folder, "unequal", stop_at=1)


def test_another_corpus_is_refused(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    data = tiny.data_config(tmp_path)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(corpus.read_text().replace("abba", "abbc", 1))
    options = TrainOptions(
        out=folder / "whole", width=16, learning_rate=0.02, steps=60, checkpoint_every=10, validate_every=20
    )
    with pytest.raises(ValueError, match=r"begun with another configuration \(data.fingerprint"):
        run_training(options, tiny.MODEL, tiny.OPTIMIZER, data)


def test_steps_are_traced(uninterrupted):
    folder, _ = uninterrupted
    _train(folder, "traced", stop_at=6, profile_steps="3..4")
    assert list((folder / "traced/profile").rglob("*.xplane.pb"))


def test_divergence_is_reported(tmp_path):
    summary = _train(tmp_path, "diverged", learning_rate=1e38, width=8)
    assert summary["diverged_at_step"] in (2, 3)
    assert summary["val_loss"] is None
    assert summary["steps"] < 60
    last = _train(tmp_path, "last", learning_rate=1e38, width=8, steps=1)
    assert (last["val_loss"], last["diverged_at_step"]) == (None, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "--width must be positive; got 0"),
        ({"steps": -1}, "--steps must be positive"),
        ({"learning_rate": 0.0}, "--learning-rate must be positive and finite; got 0"),
        ({"learning_rate": float("nan")}, "--learning-rate must be positive and finite; got nan"),
        ({"stop_at": 100}, "--stop-at must be from 1 to --steps"),
        ({"seed": -1}, "--seed must be in"),
        ({"accumulate": 0}, "--accumulate must be positive; got 0"),
        ({"profile_steps": "5"}, r"--profile-steps must be FIRST\.\.LAST, such as 10\.\.12; got '5'"),
        ({"profile_steps": "5..3"}, "--profile-steps must be FIRST"),
    ],
)
def test_wrong_options(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(out=tmp_path, **({"steps": 60} | changes))


_EIGHT = """
import sys, json, dataclasses, pathlib
import jax
sys.path.insert(0, sys.argv[2])
import tiny
from train.train_run import TrainOptions, run_training
folder = pathlib.Path(sys.argv[1])
options = TrainOptions(out=folder / f"on{len(jax.devices())}", width=16, learning_rate=0.02, steps=10)
summary = run_training(options, tiny.MODEL, tiny.OPTIMIZER, tiny.data_config(folder))
print(json.dumps(summary | {"mesh": len(jax.devices())}))
"""


def test_eight_devices_agree_with_one(tmp_path):
    losses = {}
    for devices in (1, 8):
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            # Compiling takes most of the time.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        }
        done = subprocess.run(
            [sys.executable, "-c", _EIGHT, str(tmp_path), str(ROOT / "tests")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout.splitlines()[-1])
        assert summary["mesh"] == summary["devices"] == devices
        losses[devices] = _losses(tmp_path / f"on{devices}") | {"val": summary["val_loss"]}
    for step, loss in losses[1].items():
        assert losses[8][step] == pytest.approx(loss, abs=1e-5), step


def test_batch_that_devices_cannot_share_is_refused(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=3",
    }
    done = subprocess.run(
        [sys.executable, "-c", _EIGHT, str(tmp_path), str(ROOT / "tests")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        "ValueError: --data.batch-size must be a multiple of the 3 devices along data and fsdp, as 9 is; got 8."
        in done.stderr
    )
