"""The README is true: its commands and examples run, the commands at reduced size."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from train.report import analyse, read_rows

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


def run(arguments, folder, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def gdn(words, folder):
    done = run(["-m", "train", *words], folder)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


# Each command on its own, but for the interpreter's start, which takes as long as most of them.
_ONE_AFTER_ANOTHER = """
import json, sys
from train.__main__ import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    print(f"gdn: {words} ended with {code}", file=sys.stderr, flush=True)
    if code:
        sys.exit(code)
"""


def test_commands_run(tmp_path):
    """In the order of the page: `report` reads what `sweep` wrote."""
    assert {words[0] for words in COMMANDS} == {*SMALLER, "coord-check"}
    *before, tuned = [words for words in COMMANDS if words[0] in SMALLER]
    smaller = [[*words, *SMALLER[words[0]].split()] for words in before]
    # A few steps: compiling is most of it.
    unoptimized = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    done = run(["-c", _ONE_AFTER_ANOTHER, json.dumps(smaller)], tmp_path, **unoptimized)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count(" ended with 0") == len(before)
    assert (tmp_path / "runs/sweep/transfer.png").is_file()
    # Of so small a sweep it must not take an optimum; tests/test_tuned.py trains with one.
    assert "--tuned-by" in tuned
    done = run(["-m", "train", *tuned], tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "runs/sweep: the optimum of mup at width 32" in done.stderr


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_coordinate_check_passes_as_written(tmp_path):
    checks = [words for words in COMMANDS if words[0] == "coord-check"]
    assert checks
    for words in checks:
        gdn(words, tmp_path)
        assert (tmp_path / words[words.index("--out") + 1] / "coord.png").is_file()


# Fixed before the demo's sizes were final; four of the five must show the transfer.
DEMO_SEEDS = (0, 1, 2, 3, 4)


@pytest.mark.long
@pytest.mark.timeout(3 * 3600)
def test_the_demo_shows_transfer(tmp_path):
    planned = subprocess.run(
        ["make", "-n", "-s", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (words,) = [
        shlex.split(line) for line in planned.stdout.splitlines() if line.startswith(".venv/bin/gdn ")
    ]
    printed = gdn([*words[1:], "--out", str(tmp_path), "--seeds", *map(str, DEMO_SEEDS)], tmp_path)
    assert "transfer.png" in printed
    rows = read_rows(tmp_path / "rows.jsonl")
    moved = [_octaves_moved([row for row in rows if row["seed"] == seed]) for seed in DEMO_SEEDS]
    shown = [by["sp"] >= 1 and by["mup"] <= min(0.75, by["sp"] / 2) for by in moved]
    print(moved)
    assert sum(shown) >= 4, moved


def _octaves_moved(rows):
    """How far the optimum of each preset lies apart over the widths; infinite where one has none."""
    moved = {}
    for name, preset in analyse(rows)["presets"].items():
        optima = list(preset["optimum_log2_x"].values())
        missing = float("-inf") if name == "sp" else float("inf")
        moved[name] = missing if None in optima else max(optima) - min(optima)
    return moved


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
