"""The command line as a user meets it: one clear line and exit code 2 for wrong input, before any compilation."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys

import jax
import pytest
import tiny
from report_cases import basin, ledger

from train.__main__ import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny.write_corpus(folder)
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 50)
    (folder / "file").write_text("")
    ledger = folder / "ledger"
    ledger.mkdir()
    (ledger / "sweep.json").write_text(json.dumps({"steps": 3}))
    (ledger / "rows.jsonl").write_text("{}\n")
    for name, content in (("run", json.dumps({"steps": 3})), ("damaged", "{")):
        (folder / name).mkdir()
        (folder / name / "run.json").write_text(content)
    return folder


WRONG = [
    ("sweep --out {0}/o --widths -64", "--widths must be positive; got -64."),
    ("sweep --out {0}/o --widths 64 64", "--widths must not repeat"),
    ("sweep --out {0}/o --widths 80 64", "Use a multiple of 32"),
    ("sweep --out {0}/o --learning-rates 0", "--learning-rates must be positive and finite; got 0."),
    (
        "sweep --out {0}/o --learning-rates x",
        "--learning-rates must be numbers, 2^-7 or 2^-9..2^-5; got 'x'.",
    ),
    ("sweep --out {0}/o --learning-rates 2^99999", "--learning-rates must be positive and finite; got inf."),
    (
        "sweep --out {0}/o --shifts sp=-100000",
        "--shifts must be PRESET=OCTAVES, such as sp=-1; got 'sp=-100000'.",
    ),
    ("sweep --out {0}/o --shifts sp=-900", "learning rates of sp at width 128 must be a float32"),
    (
        "sweep --out {0}/o --shifts sp=900 --widths 64 1024",
        "sp at width 1024 must be positive and finite; got inf.",
    ),
    ("sweep --out {0}/o --shifts sp=-1 sp=-2", "--shifts must name a preset once; got sp twice."),
    (
        "sweep --out {0}/o --grids sp@64=1 sp@64=2",
        "--grids must name a preset and width once; got sp@64 twice.",
    ),
    ("sweep --out {0}/o --model.mlp-ratio inf", "--model.mlp-ratio must be positive and finite; got inf."),
    (
        "sweep --out {0}/o --optimizer.epsilon inf",
        "--optimizer.epsilon must be positive and finite; got inf.",
    ),
    ("sweep --out {0}/o --presets mupp", "invalid choice 'mupp' for argument '--presets'"),
    ("sweep --out {0}/o --presets sp_embedding --model.tie-embedding", "use tie_embedding=False"),
    ("sweep --out {0}/o --steps 0", "--steps must be positive; got 0."),
    ("sweep --out {0}/o --seeds -1", "--seeds must be in [0, 2^31); got -1."),
    ("sweep --out {0}/o --optimizer adam", "invalid choice 'adam'"),
    (
        "sweep --out {0}/o --optimizer.warmup-fraction 2",
        "--optimizer.warmup-fraction must be between 0 and 1; got 2",
    ),
    ("sweep --out {0}/o --model.value-dim 24", "must be a multiple of --model.value-dim (24)"),
    ("sweep --out {0}/o --model.value-heads 3 --model.key-heads 2", "Use 4 value heads"),
    ("sweep --out {0}/o --data.corpus {0}/missing.txt", "missing.txt', which does not exist"),
    ("sweep --out {0}/o --data.corpus {0}/empty.txt", "empty.txt"),
    ("sweep --out {0}/o --data.corpus {0}/binary.txt", "binary.txt"),
    ("sweep --out {0}/o --data.sequence-length 0", "sequence_length must be at least 2; got 0."),
    ("sweep --out {0}/file/o", "--out must be a folder that can be written"),
    ("sweep --out {0}/ledger", "was begun with another configuration"),
    ("sweep", "--out PATH"),
    ("sweep --out {0}/o --wdiths 64", "Perhaps you meant: --widths"),
    ("train --out {0}/o --width 0", "--width must be positive; got 0."),
    ("train --out {0}/o --learning-rate 2^x", "must be one number, such as 0.01 or 2^-7; got '2^x'"),
    ("train --out {0}/o --learning-rate 2^-9..2^-7", "must be one number, such as 0.01 or 2^-7"),
    ("train --out {0}/o --learning-rate 2^-7 --width 0", "--width must be positive; got 0."),
    ("train --out {0}/o --learning-rate -1", "--learning-rate must be positive and finite; got -1."),
    ("train --out {0}/o --learning-rate 0", "--learning-rate must be positive and finite; got 0."),
    ("train --out {0}/o --learning-rate 1e39", "must be a float32, from 1.2e-38 to 3.4e+38; got 1e+39."),
    ("train --out {0}/o --width 100", "Use a multiple of 32"),
    ("train --out {0}/file/o", "--out must be a folder that can be written"),
    ("train --out {0}/o --data.corpus {0}/binary.txt", "binary.txt"),
    ("train --out {0}/o --data.sequence-length 0", "sequence_length must be at least 2; got 0."),
    ("train --out {0}/o --preset standard", "invalid choice 'standard'"),
    ("train --out {0}/o --keep 0", "--keep must be positive; got 0."),
    ("train --out {0}/o --keep-best -1", "--keep-best must be 0 or more; got -1."),
    ("train --out {0}/o --nan-policy ignore", "invalid choice 'ignore' for argument '--nan-policy'"),
    (
        "train --out {0}/o --accumulate 3",
        "--data.batch-size must be a multiple of the 1 devices along data and fsdp, times --accumulate 3, as ",
    ),
    ("train --out {0}/o --accumulate 0", "--accumulate must be positive; got 0."),
    ("train --out {0}/o --profile-steps 7", "--profile-steps must be FIRST..LAST, such as 10..12; got '7'."),
    ("train --out {0}/o --profile-steps 7..3", "--profile-steps must be FIRST..LAST"),
    ("train --out {0}/o --model.remat all", "invalid choice 'all' for argument '--model.remat'"),
    ("train --out {0}/o --checkpoint-every 0", "--checkpoint-every must be positive; got 0."),
    ("train --out {0}/o --stop-at 300", "--stop-at must be from 1 to --steps (200); got 300."),
    ("train --out {0}/run", "or --allow-changes to go on with these"),
    ("train --out {0}/damaged", "choose another --out"),
    ("train --out {0}/damaged --allow-changes", "choose another --out"),
    ("train --out {0}/file", "--out must be a folder that can be written"),
    ("train --out {0}/o --mesh.fsdp 0", "--mesh.fsdp must be positive; got 0."),
    ("train --out {0}/o --mesh.fsdp two", "invalid literal for int() with base 10: 'two'"),
    (
        "train --out {0}/o --mesh.tensor 3",
        "--mesh axes must multiply to the 1 devices there are; got data 1 x fsdp 1 x sequence 1 x tensor 3 = 3. "
        "Valid: one device.",
    ),
    ("train --out {0}/o --mesh.data 2 --mesh.sequence 2", "= 4. Valid: one device."),
    ("train --out {0}/o --mesh.pipeline 2", "--mesh.pipeline"),
    ("train --out {0}/o --log-to csv", "invalid choice 'csv' for argument '--log-to'"),
    ("train --out {0}/o --log-to wandb wandb", "--log-to must name each once; got wandb wandb."),
    ("train --out {0}/o --data.corpus {0}/missing.parquet", "missing.parquet', which does not exist"),
    ("compile", "--topology STR"),
    ("compile --topology v5e:16x16", "needs --size or --width, and not both"),
    ("compile --topology v5e:16x16 --size 7b --width 64", "needs --size or --width, and not both"),
    ("compile --topology v9:16x16 --size 7b", "topology must be one of v4, v5e, v5p, v6e, tpu7x"),
    ("compile --topology v5e:16x16 --size 8b", "invalid choice '8b'"),
    ("compile --topology v5e:16x16 --size 7b --batch-size 0", "--batch-size must be positive; got 0."),
    ("compile --topology v5e:16x16 --size 7b --batch-size 100", "as 256 is; got 100. Valid: "),
    ("compile --topology v5e:16x16 --size 7b --mesh.tensor 3", "multiply to the 256 devices"),
    (
        "compile --topology v5e:16x16 --size 7b --sequence-length 1",
        "--sequence-length must be at least 2; got 1.",
    ),
    ("compile --topology v5e:16x16 --width 100", "Use a multiple of 32"),
    ("train --out {0}/o --steps 3000000000", "--steps must be below 2^31; got 3000000000."),
    ("train --out {0}/o --steps 5 --profile-steps 4..6", "--profile-steps must end by the last step (5)"),
    ("sweep --out {0}/o --steps 3000000000", "--steps must be below 2^31; got 3000000000."),
    ("coord-check --out {0}/o --widths 64 128", "Use 64 128 256 512."),
    ("coord-check --out {0}/o --seeds 0", "--seeds must be at least 3"),
    ("coord-check --out {0}/o --learning-rate 0", "--learning-rate must be positive and finite; got 0."),
    (
        "coord-check --out {0}/o --model.tie-embedding",
        "leave --model.compute-dtype and --model.tie-embedding away",
    ),
    ("coord-check --out {0}/o --optimizer.weight-decay 0.1", "trains without schedule, clip or weight decay"),
    ("coord-check --out {0}/o --data.corpus {0}/missing.txt", "missing.txt', which does not exist"),
    (
        "coord-check --out {0}/file/o --data.corpus {0}/corpus.txt --data.sequence-length 16",
        "--out must be a folder",
    ),
    (
        "coord-check --out {0}/o --data.corpus {0}/corpus.txt --data.sequence-length 16 --widths 64 96 128 512",
        "--widths: 96 has 3 value heads, no multiple of the 2 of the base width 64; use multiples of 64.",
    ),
    (
        "coord-check --out {0}/o --data.corpus {0}/corpus.txt --data.sequence-length 16 --model.base-width 128",
        "--widths: 64 has 2 value heads, no multiple of the 4 of the base width 128; use multiples of 128.",
    ),
    ("report {0}/nowhere", "does not exist"),
    ("show-rules --width 100", "Use a multiple of 32"),
    ("", "Expected one of"),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_input(folder, line, message, monkeypatch):
    def compiled(*_args, **_options):
        raise AssertionError("wrong input must be refused before anything is traced")

    monkeypatch.setattr(jax, "jit", compiled)
    words = line.format(folder).split()
    if "--data.corpus" not in words and words and words[0] in ("sweep", "train"):
        words += ["--data.corpus", str(folder / "corpus.txt")]
    if words and words[0] in ("sweep", "train"):
        words += ["--data.cache-dir", str(folder / "cache")]
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    text = printed.getvalue()
    assert message in text
    assert text.startswith("gdn: ")
    assert text.count("\n") == 1


@pytest.mark.parametrize("command", ["", "train", "sweep", "report", "coord-check", "show-rules", "compile"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "gdn" in capsys.readouterr().out


def test_help_that_nobody_reads_to_its_end_is_no_traceback():
    words = [sys.executable, "-m", "train", "sweep", "--help"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, capsys):
    folder = ledger(tmp_path / "sweep", basin("mup", 0.0))
    (folder / "transfer.png").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["report", str(folder)])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gdn: {folder}/transfer.png: Is a directory; ")


@pytest.mark.parametrize("platform", ["cuda", "none-such"])
def test_a_platform_that_jax_lacks_is_said_in_a_line(tmp_path, platform):
    tiny.write_corpus(tmp_path)
    words = [sys.executable, "-m", "train", "train", "--width", "32", "--out", str(tmp_path / "o")]
    environment = os.environ | {"JAX_PLATFORMS": platform}
    ended = subprocess.run(
        [*words, "--data.corpus", str(tmp_path / "corpus.txt")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(
        f"gdn: jax finds no device (JAX_PLATFORMS is '{platform}'"
    )
    assert "Traceback" not in ended.stderr
