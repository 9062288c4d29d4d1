"""The README is true: its commands and examples run, the commands at reduced size."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
EXAMPLES = [text for language, text in BLOCKS if language == "python"]
SHELL = [
    shlex.split(line, comments=True)
    for language, text in BLOCKS
    if language == "sh"
    for line in text.splitlines()
]
COMMANDS = [words[1:] for words in SHELL if words and words[0] == "gdn"]

# Later options win, so these follow what the README says. A smaller coordinate check is refused: it is slow.
SMALL = "--steps 2 --model.layers 1 --data.sequence-length 32 --data.batch-size 2 --data.validation-batches 1"
SMALLER = {
    "sweep": f"--widths 32 64 --learning-rates 2^-8 2^-7 2^-6 {SMALL}",
    "train": f"--width 64 {SMALL}",
    "show-rules": "",
    "report": "",
}


def run(arguments, folder):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def gdn(words, folder):
    done = run(["-m", "train", *words], folder)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_commands_run(tmp_path):
    """In the order of the page: `report` reads what `sweep` wrote."""
    assert {words[0] for words in COMMANDS} == {*SMALLER, "coord-check"}
    for words in COMMANDS:
        if words[0] in SMALLER:
            gdn([*words, *SMALLER[words[0]].split()], tmp_path)
    assert (tmp_path / "runs/sweep/transfer.png").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_coordinate_check_passes_as_written(tmp_path):
    (words,) = [words for words in COMMANDS if words[0] == "coord-check"]
    gdn(words, tmp_path)
    assert (tmp_path / "runs/coord/coord.png").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_shows_transfer(tmp_path):
    planned = subprocess.run(
        ["make", "-n", "-s", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (words,) = [
        shlex.split(line) for line in planned.stdout.splitlines() if line.startswith(".venv/bin/gdn ")
    ]
    printed = gdn([*words[1:], "--out", str(tmp_path)], tmp_path)
    assert "transfer.png" in printed
    presets = json.loads((tmp_path / "report.json").read_text())["presets"]
    optima = {name: preset["optimum_log2_lr"].values() for name, preset in presets.items()}
    moved = {name: max(values) - min(values) for name, values in optima.items()}
    assert moved["sp"] >= 1, moved
    assert moved["mup"] <= min(0.75, moved["sp"] / 2), moved


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(example, tmp_path):
    done = run(["-W", "error", "-c", example], tmp_path)
    assert done.returncode == 0, done.stderr
    for promised in re.findall(r"^print.*  # (.*)$", example, re.MULTILINE):
        assert promised in done.stdout


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", "\n".join(text for _, text in BLOCKS))) | set(
        re.findall(r"`make ([a-z][\w-]*)", README)
    )
    assert named
    assert named <= targets
