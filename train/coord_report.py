"""The report of a coordinate check: table, `coord.json`, `coord.png`. `coord_analysis` says how it judges."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from train.coord_analysis import Rows, analyse_coord
from train.coord_bounds import KINDS, QUANTITIES
from train.coord_figure import plot_coord

__all__ = ["analyse_coord", "coord_table", "plot_coord", "print_coord", "write_coord_report"]

_STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "yellow", "reported": "dim"}


def coord_table(analysis: Mapping[str, Any]) -> Group:
    """Slopes for a terminal: the last step, and earlier ones where `mup` does not pass."""
    parts: list[Any] = []
    for check in analysis["checks"]:
        here = [e for e in analysis["entries"] if all(e[k] == check[k] for k in ("optimizer", "regime"))]
        presets = sorted({e["preset"] for e in here})
        last = {e["kind"]: max(f["step"] for f in here if f["kind"] == e["kind"]) for e in here}
        cells: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
        for e in here:
            cells.setdefault((e["kind"], e["quantity"], e["step"]), {})[e["preset"]] = e
        controls = {
            tuple(c[k] for k in ("preset", "kind", "quantity", "step")): c["fails"]
            for c in analysis["controls"]
            if all(c[k] == check[k] for k in ("optimizer", "regime"))
        }
        title = f"Slopes over width: {check['optimizer']}, regime {check['regime']}"
        table = Table(title=title, title_justify="left")
        for heading in ("kind", "quantity"):
            table.add_column(heading)
        for heading in ("step", "bound", *presets):
            table.add_column(heading, justify="right")
        order = {name: index for index, name in enumerate(QUANTITIES)}
        for key in sorted(cells, key=lambda k: (KINDS.index(k[0]), order.get(k[1], 99), k[1], k[2])):
            kind, quantity, step = key
            entries = cells[key]
            if step != last[kind] and (
                "mup" not in entries or entries["mup"]["verdict"] in ("pass", "reported")
            ):
                continue
            cells_shown = [_cell(entries.get(preset), controls.get((preset, *key))) for preset in presets]
            table.add_row(kind, quantity, str(step), _bound(next(iter(entries.values()))), *cells_shown)
        parts.append(table)
    return Group(*parts, Text(analysis["verdict"]))


def print_coord(analysis: Mapping[str, Any], console: Console) -> None:
    """`coord_table`, a line a quantity: a narrow terminal, or a file, breaks lines, it does not cut names."""
    presets = len({entry["preset"] for entry in analysis["entries"]})
    Console(file=console.file, width=max(console.width, 60 + 24 * presets)).print(coord_table(analysis))


def _bound(entry: Mapping[str, Any]) -> str:
    if entry["bound"] is None:
        return "—"
    return (
        f"{entry['expected']:+.2f} ± {entry['bound']:.2f}" if entry["expected"] else f"{entry['bound']:.2f}"
    )


def _cell(entry: Mapping[str, Any] | None, control_fails: bool | None) -> Text:
    """Slope, error and, where it counts, the verdict: of `mup` its own, of a control whether it fails."""
    if entry is None:
        return Text("—")
    if entry["slope"] is None:
        return Text(str(entry["remark"]))
    error = "?" if entry["standard_error"] is None else f"{entry['standard_error']:.2f}"
    said, style = "", ""
    if entry["preset"] == "mup":
        said, style = f" {entry['verdict']}", _STYLES[entry["verdict"]]
    elif control_fails is not None:
        said, style = (" must fail: yes", "green") if control_fails else (" must fail: NO", "bold red")
    return Text(f"{entry['slope']:+.2f} ± {error}{said}", style=style)


def write_coord_report(rows: Rows, directory: pathlib.Path) -> dict[str, Any]:
    """Write `coord.json` and `coord.png` into `directory` (made if absent); return the analysis.

    The same rows give the same bytes, whatever their order.
    """
    analysis = analyse_coord(rows)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(analysis, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (directory / "coord.json").write_text(text + "\n", encoding="utf-8")
    plot_coord(rows, analysis, directory / "coord.png")
    return analysis
