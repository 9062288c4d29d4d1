"""What docs/results shows is what its committed rows say, byte for byte."""

import pathlib
import re
import shutil

import pytest

from train.report import analyse, read_rows
from train.results import markdown, replace_table, write_results

RESULTS = pathlib.Path(__file__).parents[1] / "docs/results"


def test_committed_reports_and_tables_follow_from_the_committed_rows(tmp_path):
    again = tmp_path / "results"
    shutil.copytree(RESULTS, again)
    made = [path for path in again.rglob("*") if path.suffix in (".json", ".png")]
    made = [path for path in made if path.name in ("report.json", "transfer.png", "coord.json", "coord.png")]
    assert made
    for path in made:
        path.unlink()
    # Tables too: nothing of them may survive from the copy.
    readme = (RESULTS / "README.md").read_text()
    text = readme
    marks = re.findall("^<!-- begin (.+) -->$", readme, re.MULTILINE)
    assert {path.parent.name for path in again.glob("*/rows.jsonl")} <= set(marks)
    assert any(" from " in mark for mark in marks)
    assert any(" beside " in mark for mark in marks)
    for mark in marks:
        text = replace_table(text, mark, "to be made")
    assert text.count("to be made") == len(marks)
    (again / "README.md").write_text(text)
    write_results(again)
    assert (again / "README.md").read_bytes() == (RESULTS / "README.md").read_bytes()
    for path in made:
        committed = RESULTS / path.relative_to(again)
        if path.suffix == ".json":
            assert path.read_bytes() == committed.read_bytes(), path.name
        else:
            # A picture's bytes depend on the installed libraries for fonts and PNG.
            assert path.stat().st_size > 0


def test_a_table_follows_its_rows():
    rows = read_rows(RESULTS / "adamw-heads/rows.jsonl")
    best = min((row for row in rows if row["width"] == 256), key=lambda row: row["val_loss"])
    committed = (RESULTS / "README.md").read_text()
    assert markdown(analyse(rows)) in committed
    assert markdown(analyse([row for row in rows if row is not best])) not in committed
    assert markdown(analyse([row for row in rows if row["width"] >= 256])) in committed


@pytest.mark.parametrize(
    "text", ["", "<!-- end a -->\n<!-- begin a -->\n", "<!-- begin a -->\n<!-- end a -->\n" * 2]
)
def test_a_readme_without_its_marks_is_refused(text):
    with pytest.raises(ValueError, match=r"README\.md must have the lines"):
        replace_table(text, "a", "table")
