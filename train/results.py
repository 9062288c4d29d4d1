"""The results of a folder of sweeps, made again from their rows: `python -m train.results docs/results`.

Every folder with `rows.jsonl` (of `gdn sweep`) or `coord_rows.jsonl` (of `gdn coord-check`) gets its report and its
picture; the tables of the sweeps go into the README.md beside the folders, between the lines `<!-- begin NAME -->`
and `<!-- end NAME -->`. Between `<!-- begin NAME from WIDTH to WIDTH -->` and its end comes the table of these widths
and of those between; between `<!-- begin NAME beside NAME -->`, of two names or more, and its end these sweeps are
compared. What people write around them stays.
"""

import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from train.comparison import bracket, comparison
from train.coord_report import write_coord_report
from train.coord_run import ROWS_FILE as COORD_ROWS_FILE
from train.ledger import ROWS_FILE, write_atomically
from train.report import analyse, read_rows, write_report
from train.report_analysis import power_of_two
from train.report_figure import signed, unsigned

_FROM_TO = re.compile(r"^<!-- begin ((\S+) from (\d+) to (\d+)) -->$", re.MULTILINE)
_BESIDE = re.compile(r"^<!-- begin (\S+(?: beside \S+)+) -->$", re.MULTILINE)


def markdown(report: Mapping[str, Any]) -> str:
    """A sweep's report as Markdown: optima per preset and width, drift, regret; then what limits them."""
    widths = [str(width) for width in report["widths"]]
    lines = [
        f"| preset | {' | '.join(widths)} | octaves / doubling | regret (nats) | transfers |",
        "| --- " * (len(widths) + 4) + "|",
    ]
    remarks: list[str] = []
    for name, preset in report["presets"].items():
        cells = [_optimum(preset, width) for width in widths]
        transfers = {True: "yes", False: "no", None: "—"}[preset["transfers"]]
        drift = _with_interval(preset["drift_octaves_per_doubling"], preset["drift_interval"])
        lines.append(f"| `{name}` | {' | '.join(cells)} | {drift} | {_regret(preset)} | {transfers} |")
        remarks += [
            f"`{name}`, width {width}: {reason}" for width, reason in preset["reason"].items() if reason
        ]
        remarks += [
            f"`{name}`, width {width}: diverged at {', '.join(map(power_of_two, diverged))}"
            for width, diverged in preset["diverged_log2_x"].items()
            if diverged
        ]
        said = dict.fromkeys(filter(None, (preset["drift_reason"], preset["regret_reason"])))
        remarks += [f"`{name}`: {reason}" for reason in said]
    remarks += report["notes"]
    if remarks:
        lines += ["", *(f"- {remark}." for remark in remarks)]
    return "\n".join([*lines, "", report["verdict"]])


def _optimum(preset: Mapping[str, Any], width: str) -> str:
    if width not in preset["optimum_log2_x"]:
        return "not run"
    place, interval = preset["optimum_log2_x"][width], preset["interval"][width]
    if place is not None:
        return f"2^{place:.2f}{bracket(interval)}"
    best = preset["best_run"][width]
    return "diverged" if best is None else f"none (best run {power_of_two(best['log2_x'])})"


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "—"
    return signed(value) + bracket(interval)


def _regret(preset: Mapping[str, Any]) -> str:
    if preset["regret_diverged"]:
        return "diverged"
    if preset["regret_nats"] is None:
        return "—"
    error = preset["regret_standard_error"]
    return unsigned(preset["regret_nats"], 4) + (f" ± {error:.4f}" if error is not None else "")


def replace_table(text: str, name: str, table: str) -> str:
    """`text` with `table` between the marks of `name`; ValueError where they are not there once each."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if text.count(begin) != 1 or text.count(end) != 1 or not pattern.search(text):
        raise ValueError(f"README.md must have the lines {begin!r} and {end!r}, once and in this order.")
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", text)


def write_results(root: pathlib.Path) -> list[pathlib.Path]:
    """Writes the reports and pictures of all folders below `root`, and their tables into its README.md.

    Returns:
        The folders, sorted.

    Raises:
        ValueError: rows that make no report, or a README.md without a sweep's marks.
    """
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    folders = sorted(
        {path.parent for name in (ROWS_FILE, COORD_ROWS_FILE) for path in root.glob(f"*/{name}")}
    )
    for folder in folders:
        if (folder / ROWS_FILE).exists():
            text = replace_table(text, folder.name, markdown(write_report(folder)))
        if (folder / COORD_ROWS_FILE).exists():
            lines = (folder / COORD_ROWS_FILE).read_text(encoding="utf-8").splitlines()
            write_coord_report([json.loads(line) for line in lines], folder)
    for mark, name, narrowest, widest in _FROM_TO.findall(text):
        rows = read_rows(root / name / ROWS_FILE)
        rows = [row for row in rows if int(narrowest) <= row["width"] <= int(widest)]
        text = replace_table(text, mark, markdown(analyse(rows)))
    for names in _BESIDE.findall(text):
        text = replace_table(text, names, comparison([root / name for name in names.split(" beside ")]))
    write_atomically(readme, text)
    return folders


def main() -> None:
    """The command line."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m train.results FOLDER")
    try:
        for folder in write_results(pathlib.Path(sys.argv[1])):
            print(folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"train.results: {error}") from None


if __name__ == "__main__":
    main()
