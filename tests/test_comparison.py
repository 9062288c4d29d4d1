"""Sweeps side by side: shifts that were planted are found, with intervals that hold them."""

import json
import math

import numpy as np
import pytest

from train.comparison import comparison
from train.results import replace_table, write_results


def sweep(folder, optimum, *, seeds=5, widths=(128,), noise=0.002, least=4.0, preset="mup"):
    """A finished sweep; equal seeds have equal noise, whatever the sweep."""
    folder.mkdir()
    (folder / "sweep.json").write_text("{}")
    lines = []
    for width in widths:
        rng = np.random.default_rng(width)
        for exponent in np.arange(-9, -4, 0.5):
            for seed, noisy in enumerate(rng.normal(0, noise, 8)[:seeds]):
                row = {
                    "preset": preset, "optimizer": "adamw", "regime": "heads", "width": width, "seed": seed,
                    "learning_rate": 2.0**exponent, "steps": 3, "tokens": 384, "diverged_at_step": None,
                    "val_loss": least + 0.05 * (exponent - optimum) ** 2 + noisy, "config_fingerprint": "f",
                    "code_version": "v", "base_width": 128,
                }  # fmt: skip
                lines.append(json.dumps(row) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def numbers(text):
    return [
        float(x) for x in text.replace("−", "-").replace("[", "").replace("]", "").replace(",", "").split()
    ]


def test_a_shift_is_found_with_its_interval(tmp_path):
    table = comparison(
        [sweep(tmp_path / "depth-4", -6.4), sweep(tmp_path / "depth-8", -6.7, least=3.9, widths=(128, 256))]
    )
    first, same, other = cells(table)
    assert first[:3] == ["depth-4", "`mup`", "128"]
    assert first[4] == "—"
    shift, low, high = numbers(same[4])
    # The noise is the same, and so are the resamples: what is left of it is the different window.
    assert low <= shift <= high
    assert shift == pytest.approx(-0.3, abs=0.03)
    assert high - low < 0.1
    loss, error = same[5].split(" ± ")
    assert float(loss) == pytest.approx(3.9, abs=0.003)
    assert 0 < float(error) < 0.003
    # No such width in the first.
    assert other[2] == "256"
    assert other[4] == "—"


def test_the_interval_of_a_shift_is_over_the_seeds_that_both_have(tmp_path):
    few, many = sweep(tmp_path / "few", -6.4, noise=0.01), sweep(tmp_path / "many", -6.4, noise=0.01, seeds=8)
    # The noise of equal seeds is equal, so over these five nothing moves; over all eight the optimum is another.
    shift = numbers(cells(comparison([few, many]))[1][4])
    assert shift[0] != 0
    assert shift[1:] == pytest.approx([0, 0], abs=1e-9)


def test_a_preset_of_one_sweep_alone_is_left_out(tmp_path):
    one, two = sweep(tmp_path / "one", -6.4), sweep(tmp_path / "two", -6.5)
    other = sweep(tmp_path / "other", -8.0, preset="sp")
    with (one / "rows.jsonl").open("a") as rows:
        rows.write((other / "rows.jsonl").read_text())
    assert {row[1] for row in cells(comparison([one, two]))} == {"`mup`"}


def test_a_first_sweep_without_a_shared_preset_is_the_first_still(tmp_path):
    folders = [
        sweep(tmp_path / name, optimum, preset=preset)
        for name, preset, optimum in (("a", "sp", -7.0), ("b", "mup", -6.4), ("c", "mup", -5.4))
    ]
    assert [row[4] for row in cells(comparison(folders))] == ["—", "—"]


def test_without_five_seeds_there_is_no_interval_and_without_a_minimum_no_number(tmp_path):
    table = comparison([sweep(tmp_path / "a", -6.4, seeds=1), sweep(tmp_path / "b", -3.0, seeds=1)])
    first, edge = cells(table)
    assert math.isclose(numbers(first[3].removeprefix("2^"))[0], -6.4, abs_tol=0.05)
    assert numbers(first[5]) == pytest.approx([4.0], abs=0.01)
    assert edge[3].startswith("none: the best learning rate, 2^-4.5, is the highest that was run")
    assert edge[4:] == ["—", "—"]


def test_a_readme_names_what_stands_beside_what(tmp_path):
    one, two = sweep(tmp_path / "one", -6.4), sweep(tmp_path / "two", -6.5)
    marks = [f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in ("one", "two", "one beside two")]
    (tmp_path / "README.md").write_text("".join(marks))
    write_results(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert comparison([one, two]) in text
    assert replace_table(text, "one beside two", comparison([one, two])) == text
