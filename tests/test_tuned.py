"""`gdn train --tuned-by`: what it takes from a sweep, what it prints, and what it refuses before any compilation."""

import contextlib
import dataclasses
import io
import json
import math
import pathlib

import jax
import pytest
import tiny

from train import train_run
from train.__main__ import main
from train.data import prepare
from train.ledger import check_identity, fingerprint
from train.report import analyse, read_rows
from train.step import Program
from train.sweep import identity
from train.tuned import CHANGES, differences, read_tuning, require_accepted

STEPS = 3
GRID = [2.0 ** (-9 + 0.5 * i) for i in range(13)]


def sweep(folder, name, optima, *, preset="mup", seeds=(0,), grid=GRID, varied=None):
    """A finished sweep with planted optima (width to log2); its data are those of `tiny.data_config`."""
    out = folder / name
    out.mkdir(exist_ok=True)
    data_config = tiny.data_config(folder)
    config = identity(tiny.MODEL, tiny.OPTIMIZER, data_config, prepare(data_config), STEPS)
    (out / "sweep.json").write_text(json.dumps(config))
    with (out / "rows.jsonl").open("a") as file:
        for width, optimum in optima.items():
            for rate in grid:
                for seed in seeds:
                    row = {
                        "preset": preset,
                        "optimizer": "adamw",
                        "regime": "heads",
                        "width": width,
                        "learning_rate": rate,
                        "seed": seed,
                        "steps": STEPS,
                        "tokens": STEPS * 8 * 16,
                        "val_loss": 4 + 0.05 * (math.log2(rate) - optimum) ** 2,
                        "diverged_at_step": None,
                        "config_fingerprint": fingerprint(config),
                        "code_version": "v",
                        "base_width": 8,
                    }
                    file.write(json.dumps(row | (varied or {})) + "\n")
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    sweep(folder, "good", {8: -6.2, 16: -6.3, 32: -6.1})
    sweep(folder, "good", {8: -6.2, 16: -7.2, 32: -8.2}, preset="sp", grid=[rate / 4 for rate in GRID])
    sweep(folder, "drifting", {8: -6.0, 16: -7.0})
    sweep(folder, "strays", {8: -6.0, 16: -6.7, 32: -6.1})
    sweep(folder, "stays", {8: -5.5, 128: -6.4, 256: -6.5, 512: -6.4})
    sweep(folder, "stays_shortly", {8: -5.5, 256: -6.5, 512: -6.4})
    sweep(folder, "edge", {8: -6.0, 16: -3.0})
    sweep(folder, "coarse", {8: -6.0, 16: -6.0}, grid=GRID[::2])
    sweep(folder, "narrow", {8: -6.0})
    sweep(folder, "narrow_sp", {8: -6.0}, preset="sp")
    sweep(
        folder, "factors", {8: -6.0, 16: -6.0}, varied={"o_norm_lr": 0.25, "gate_lr": 2.0, "init_scale": 1.0}
    )
    sweep(folder, "other_decay", {8: -6.0, 16: -6.0}, varied={"weight_decay": 0.5})
    return folder


def run(folder, words):
    """Exit code, what was printed, and the errors of `gdn train` with the tiny corpus."""
    words = ["train", "--out", str(folder / "out"), *words.format(folder).split()]
    if "--data.corpus" not in words:
        words += ["--data.corpus", str(folder / "corpus.txt")]
    words += ["--data.cache-dir", str(folder / "cache")]
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        with pytest.raises(SystemExit) as stop:
            main(words)
    return stop.value.code, said.getvalue(), errors.getvalue()


def test_the_run_is_the_sweeps_at_another_width(folder):
    code, said, errors = run(folder, "--tuned-by {0}/good --width 64 --out {0}/taken")
    assert (code, errors) == (0, "")
    lines = said.splitlines()
    # The plan comes first.
    assert lines[0] == f"plan: width 64, tuned by {folder}/good at width 8"
    assert lines[1].startswith("  learning rate 0.0136 = 2^-6.2 at the base, no interval; preset mup, adamw")
    assert "width 8, 1 key heads of 8, 1 value heads of 8; what grows: heads" in lines[2]
    assert "1 layers, float32; T 16, batch 8, 3 steps = 384 tokens; vocabulary bytes; decay 0.1" in lines[3]
    assert "the optimum of mup transfers" in lines[4]
    assert lines[5] == "  width 64 lies beyond the swept ones, 8 to 32"
    begun = json.loads((folder / "taken/run.json").read_text())
    assert begun["run"] == {
        "width": 64,
        "learning_rate": pytest.approx(2**-6.2),
        "preset": "mup",
        "seed": 0,
        "accumulate": 1,
    }
    del begun["run"]
    assert begun == json.loads((folder / "good/sweep.json").read_text())


def test_factors_that_all_runs_of_the_sweep_have_are_taken_over(folder, monkeypatch):
    """They were dropped in silence: the run trained with other rates than those the optimum was found with."""
    asked = []
    real = Program.hparams

    def hparams(self, learning_rate, preset, weight_decay=None, **factors):
        asked.append(factors)
        return real(self, learning_rate, preset, weight_decay, **factors)

    monkeypatch.setattr(Program, "hparams", hparams)
    code, said, errors = run(folder, "--tuned-by {0}/factors --width 16 --out {0}/with_factors")
    assert (code, errors) == (0, "")
    assert "  factors on the rules, as in the sweep: gate_lr 2, o_norm_lr 0.25\n" in said
    assert {"gate_lr": 2.0, "o_norm_lr": 0.25} in asked
    begun = json.loads((folder / "with_factors/run.json").read_text())
    assert begun["run"]["factors"] == {"gate_lr": 2.0, "o_norm_lr": 0.25}


@pytest.fixture
def no_compilation(monkeypatch):
    def compiled(*_args, **_options):
        raise AssertionError("a refusal must come before anything is traced")

    monkeypatch.setattr(jax, "jit", compiled)


REFUSED = [
    ("--tuned-by {0}/drifting", "the optimum of mup does not transfer (moving −1.00 octave per doubling"),
    (
        "--tuned-by {0}/strays",
        "moving −0.05 octave per doubling of width but by −0.70 from width 8 to 16); sweep the width itself.",
    ),
    ("--tuned-by {0}/stays", "sweep the width itself, or from width 128 on, where it stays within half an octave."),
    ("--tuned-by {0}/stays_shortly", "per doubling of width); sweep the width itself."),
    ("--tuned-by {0}/edge", "the optimum of mup at width 16 lies on an edge: the best learning rate, 2^-3, is"),
    ("--tuned-by {0}/coarse", "the optimum of mup at width 8 is not resolved: within an octave"),
    ("--tuned-by {0}/narrow_sp", "has one width, which does not show that the optimum of sp transfers"),
    ("--tuned-by {0}/other_decay", "has the weight decay 0.5 by --vary, which a run here does not take over; sweep"),
    ("--tuned-by {0}/good --preset sp", "the optimum of sp does not transfer"),
    ("--tuned-by {0}/good --preset paper_code", "--preset must be one that"),
    ("--tuned-by {0}/good --learning-rate 0.1", "use one of the two"),
    ("--tuned-by {0}/nowhere", "--tuned-by must be a folder that `gdn sweep --out` wrote"),
    ("--accept-change depth", "name that sweep"),
    ("--tuned-by {0}/good --accept-change length", "invalid choice 'length'"),
    ("--tuned-by {0}/good --model.layers 2", "depth: layers 1 -> 2"),
    ("--tuned-by {0}/good --data.sequence-length 32", "sequence_length: sequence_length 16 -> 32; tokens: 384 -> 768"),
    ("--tuned-by {0}/good --data.batch-size 16", "batch: batch_size 8 -> 16; tokens: 384 -> 768"),
    ("--tuned-by {0}/good --steps 6", "tokens: 384 -> 768"),
    ("--tuned-by {0}/good --optimizer.warmup-fraction 0.2", "schedule: warmup_fraction 0.1 -> 0.2"),
    ("--tuned-by {0}/good --data.tokenizer bpe --data.vocab-size 300", "vocabulary: bytes -> bpe 300"),
    ("--tuned-by {0}/good --model.compute-dtype bfloat16", "dtype: compute_dtype float32 -> bfloat16"),
    ("--tuned-by {0}/good --optimizer.weight-decay 0", "decay: weight_decay 0.1 -> 0.0"),
    ("--tuned-by {0}/good --optimizer.beta2 0.99", "optimizer: beta2 0.95 -> 0.99"),
    ("--tuned-by {0}/good --data.corpus {0}/other.txt", "corpus: "),
    ("--tuned-by {0}/good --model.layers 2 --steps 6 --accept-change depth", "--accept-change depth tokens."),
    ("--tuned-by {0}/good --model.key-dim 16", "base sizes and optimizer must be those of the sweep (key_dim 8 -> 16)"),
    ("--tuned-by {0}/good --optimizer sgd", "(optimizer adamw -> sgd)"),
]  # fmt: skip


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[words for words, _ in REFUSED])
def test_refusals(folder, words, message):
    (folder / "other.txt").write_text((folder / "corpus.txt").read_text() + "\n\nabba cede fog")
    code, said, errors = run(folder, words + " --width 16")
    assert (code, said) == (2, "")
    assert message in errors
    assert errors.startswith("gdn: ")
    assert errors.count("\n") == 1


@pytest.fixture
def no_training(monkeypatch):
    """Everything up to the first array: what the run was begun with, and its summary."""
    begun = []

    def trained(run):
        begun.append((run.options, run.setup.program))
        return {"val_loss": None, "diverged_at_step": None, "steps": 0}

    monkeypatch.setattr(train_run._Run, "train", trained)
    return begun


def test_the_configuration_of_another_sweep_is_refused(folder):
    mixed = sweep(folder, "mixed", {8: -6.0, 16: -6.0})
    config = json.loads((mixed / "sweep.json").read_text())
    (mixed / "sweep.json").write_text(json.dumps(config | {"steps": 5}))
    with pytest.raises(ValueError, match="is not the configuration of the rows beside it"):
        read_tuning(mixed, None, 16)


def test_a_named_change_is_accepted_and_told(folder, no_training):
    code, said, errors = run(
        folder,
        "--tuned-by {0}/good --width 8 --model.layers 2 --steps 1 --accept-change tokens depth --out {0}/accepted",
    )
    assert (code, errors) == (0, "")
    assert "  accepted change of depth: layers 1 -> 2\n  accepted change of tokens: 384 -> 128\n" in said
    options, program = no_training[0]
    assert (options.steps, program.config.num_layers) == (1, 2)


def test_one_width_tunes_mup_and_the_plan_says_what_is_not_shown(folder, no_training):
    tuning = read_tuning(folder / "narrow", None, 32)
    assert (tuning.preset, tuning.width, tuning.log2_lr) == ("mup", 8, pytest.approx(-6.0))
    code, said, _ = run(folder, "--tuned-by {0}/narrow --width 16 --out {0}/one")
    assert (code, len(no_training)) == (0, 1)
    assert "that the optimum transfers is what mup promises, not shown" in said


def test_the_committed_sweep_tunes_mup_and_not_sp():
    committed = pathlib.Path(__file__).parents[1] / "docs/results/adamw-rates"
    tuning = read_tuning(committed, None, 1024)
    assert (tuning.preset, tuning.width, tuning.widths) == ("mup", 128, [128, 256, 512, 1024])
    assert tuning.interval is not None
    assert tuning.interval[0] < tuning.log2_lr < tuning.interval[1]
    with pytest.raises(ValueError, match="shows that the optimum of sp does not transfer"):
        read_tuning(committed, "sp", 1024)


@pytest.mark.parametrize(("optimizer", "version"), [("adamw", 2), ("sgd", 4)])
def test_a_sweep_of_growing_head_dims_with_another_rule_table_is_not_mixed_with_this_one(
    optimizer, version, folder, tmp_path
):
    data_config, options = tiny.data_config(folder), dataclasses.replace(tiny.OPTIMIZER, name=optimizer)
    now = {
        regime: identity(dataclasses.replace(tiny.MODEL, regime=regime), options, data_config, None, STEPS)
        for regime in ("heads", "head_dim")
    }
    # Where head counts grow the rules did not change, and older ledgers go on.
    assert "rules" not in now["heads"]
    before = {key: value for key, value in now["head_dim"].items() if key != "rules"}
    (tmp_path / "sweep.json").write_text(json.dumps(before))
    with pytest.raises(ValueError, match=f"rules None -> {version}"):
        check_identity(tmp_path, "sweep.json", now["head_dim"])
    for config in (before, now["head_dim"]):
        config["data"]["fingerprint"] = "f"
    changed = differences(before, now["head_dim"])
    assert changed == {
        "rules": f"version 1 -> {version} of the rule table where head dims grow, which only a new sweep has"
    }
    with pytest.raises(ValueError, match="--accept-change rules"):
        require_accepted(changed, (), folder)
    assert differences(now["head_dim"], now["head_dim"]) == {}


def test_every_field_of_a_sweep_is_compared_or_left_out_on_purpose(folder):
    """A new option must be put somewhere; else it could differ unseen."""
    config = json.loads((folder / "good/sweep.json").read_text())
    # The order of rows, the size of the validation set, and what the fingerprint covers.
    unseen = {"remat", "seed", "validation_batches", "validation_fraction"}
    for part in ("model", "optimizer", "data"):
        for field, value in config[part].items():
            if field in unseen or field == "vocab_size":
                continue
            other = "other" if isinstance(value, str) or value is None else value + 1
            now = config | {part: config[part] | {field: other}}
            if (part == "model" and field not in ("layers", "compute_dtype")) or field == "name":
                with pytest.raises(ValueError, match="base sizes and optimizer"):
                    differences(config, now)
            else:
                changed = differences(config, now)
                assert changed, field
                assert changed.keys() <= set(CHANGES)


def test_a_report_says_as_well_from_which_width_on_the_optimum_stays(folder):
    """Where that of the base does not; two doublings of the width must show it."""
    told = "nats at width 512 (from width 128 on it stays within half an octave)"
    assert told in analyse(read_rows(folder / "stays/rows.jsonl"))["verdict"]
    shortly = analyse(read_rows(folder / "stays_shortly/rows.jsonl"))
    assert shortly["presets"]["mup"]["proxy_from_width"] == 256
    assert "stays" not in shortly["verdict"]
