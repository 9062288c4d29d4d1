"""The report of a sweep: a pure function of its rows. How it judges is said in `report_analysis`."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from train.faults import disk_full_said
from train.ledger import make_writable, write_atomically
from train.report_analysis import (
    NOT_ASYMPTOTIC,
    RESOLUTION,
    analyse_preset,
    curves,
    power_of_two,
    trusted_from,
)
from train.report_figure import amount, plot, signed, unsigned
from train.report_rows import SAME, Rows, check_rows, read_rows
from train.vary import LEARNING_RATE, VARIED, WORDS, abscissa, varied_names, with_all_values

__all__ = ["analyse", "plot", "read_rows", "table", "verdict", "write_report"]

# Runs of two presets that are one model by construction; what is left is the rounding of packed programs.
_SAME_LOSS_NATS = 1e-3


def analyse(rows: Rows) -> dict[str, Any]:
    """The content of `report.json`: optimum, interval, drift and regret per preset, and the verdict.

    What was swept (`abscissa`, mostly the learning rate) is log2, losses are nats, widths are keys as strings;
    numbers have six decimals. What cannot be said is null, with its reason beside it. `report_analysis` defines each.

    Raises:
        ValueError: as `read_rows`, of which only the file is not needed here.
    """
    rows = check_rows(with_all_values(rows))
    first = rows[0]
    by_preset = curves(rows)
    report: dict[str, Any] = {
        **{key: first[key] for key in SAME},
        "abscissa": abscissa(rows),
        "varied": varied_names(rows),
        "code_versions": sorted({str(row["code_version"]) for row in rows}),
        "presets": {name: analyse_preset(widths, first["base_width"]) for name, widths in by_preset.items()},
        "runs": len(rows),
        "runs_diverged": sum(row["val_loss"] is None for row in rows),
        "seeds": sorted({row["seed"] for row in rows}),
        "widths": sorted({row["width"] for row in rows}),
    }
    report["notes"] = _notes(rows, report)
    report = _rounded(report)
    report["verdict"] = verdict(report)
    return report


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        # Adding 0.0 turns -0.0 into 0.0.
        return round(value, 6) + 0.0
    if isinstance(value, dict):
        return {str(key): _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return value


def _notes(rows: Rows, report: Mapping[str, Any]) -> list[str]:
    notes = []
    if len(report["code_versions"]) > 1:
        notes.append(
            f"the rows come from {len(report['code_versions'])} code versions: "
            f"{', '.join(report['code_versions'])}"
        )
    notes += [
        f"every run has {name} {rows[0][name]:g}"
        for name in VARIED
        if name in rows[0] and name not in report["varied"]
    ]
    base = report["base_width"]
    losses: dict[str, dict[tuple[float, int], float]] = {"mup": {}, "sp": {}}
    for row in rows:
        if row["preset"] in losses and row["width"] == base and row["val_loss"] is not None:
            losses[row["preset"]][row[LEARNING_RATE], row["seed"]] = row["val_loss"]
    if report["varied"]:
        return notes
    shared = losses["mup"].keys() & losses["sp"].keys()
    if shared:
        gap = max(abs(losses["mup"][point] - losses["sp"][point]) for point in shared)
        if gap <= _SAME_LOSS_NATS:
            notes.append(
                f"mup and sp are the same model at the base width {base}, and so are their losses there"
            )
        else:
            notes.append(
                f"mup and sp should be the same model at the base width {base}, but their losses there "
                f"differ by up to {gap:.4f} nats over {len(shared)} runs: chaotic runs at large learning "
                "rates, or a fault"
            )
    return notes


def _bracket(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"[{signed(interval[0])}, {signed(interval[1])}]"


def _listed(values: Sequence[object]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def verdict(report: Mapping[str, Any]) -> str:
    """One plain sentence: what the sweep shows of each preset, over which range, and no more."""
    # Of the fits, which may have fewer than were run anywhere.
    fitted = {n for preset in report["presets"].values() for n in preset["fit_seeds"].values() if n}
    most = max(fitted, default=len(report["seeds"]))
    fewest = min(fitted, default=most)
    widths = report["widths"]
    some_interval = any(p["drift_interval"] for p in report["presets"].values())
    told = "1 seed" if most == 1 else f"{f'{fewest} to ' if fewest < most else ''}{most} seeds"
    head = (
        f"Over width{'s' if len(widths) > 1 else ''} {_listed(widths)} ({report['optimizer']}, "
        f"regime {report['regime']}, {amount(report['tokens'])} tokens a run, "
        f"{told}{'' if some_interval else ', no interval'}), "
    )
    what = WORDS[report["abscissa"]]
    parts = [_judged(name, preset, max(widths), what) for name, preset in report["presets"].items()]
    limits = "nothing is shown for other widths, tokens or data"
    if min(widths) <= NOT_ASYMPTOTIC:
        limits += f", and widths up to {NOT_ASYMPTOTIC} are narrower than the theory speaks of"
    return f"{head}{'; '.join(parts)}; {limits}."


def _judged(name: str, preset: Mapping[str, Any], widest: int, swept: str) -> str:
    drift = preset["drift_octaves_per_doubling"]
    if drift is None:
        without = [w for w, reason in preset["reason"].items() if reason]
        where = (
            f"no optimum at width{'s' if len(without) > 1 else ''} {_listed(without)}" if without else None
        )
        what = f"{name} has no drift to state ({where or preset['drift_reason']})"
    else:
        interval = _bracket(preset["drift_interval"])
        moves = "transfers" if preset["transfers"] else "does not transfer"
        what = f"the optimum of {name} {moves}, moving {signed(drift)} octave per doubling of width"
        what += f" {interval}" if interval else ""
        what += strays(preset)
    run = preset["regret_run"]
    if preset["regret_diverged"]:
        return f"{what}, and the base width's {swept} diverges at width {run['width']}"
    if preset["regret_nats"] is not None:
        error = preset["regret_standard_error"]
        spread = f" ± {error:.3f}" if error is not None else ""
        cost = f"{unsigned(preset['regret_nats'], 3)}{spread} nats at width {run['width']}"
        stays = trusted_from(preset)
        told = f" (from width {stays} on it stays within half an octave)" if stays else ""
        return f"{what}, and the base width's {swept} costs {cost}{told}"
    return (
        what
        if drift is None or preset["drift_reason"] == "one width only"
        else f"{what} (regret at width {widest} unknown)"
    )


def strays(preset: Mapping[str, Any]) -> str:
    """The step that keeps an optimum from transferring, where its drift is too small to say so; else "".

    `preset` is one of a report that has a drift: an optimum at every width.
    """
    places = {int(width): place for width, place in preset["optimum_log2_x"].items()}
    base = preset["base_width"]
    away = {width: place - places[base] for width, place in places.items()}
    farthest = max(away, key=lambda width: abs(away[width]))
    drifted = preset["drift_octaves_per_doubling"] * math.log2(max(places) / min(places))
    if preset["transfers"] is not False or abs(drifted) > RESOLUTION or abs(away[farthest]) <= RESOLUTION:
        return ""
    return f" but by {signed(away[farthest])} from width {base} to {farthest}"


def table(report: Mapping[str, Any]) -> Group:
    """The report for a terminal: optima per width, then drift and regret per preset, notes, verdict."""
    what = WORDS[report["abscissa"]]
    short = "LR" if report["abscissa"] == LEARNING_RATE else what
    optima = Table(
        title=f"Optimal {what}, {report['optimizer']}, regime {report['regime']}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    optima.add_column("preset")
    for heading in ("width", f"{short}*", f"log2 {short}*", "95 % interval", "loss there", "best run"):
        optima.add_column(heading, justify="right")
    moves = Table(title="Transfer over width", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("preset", "octaves / doubling", "95 % interval", "regret (nats)", "transfers"):
        moves.add_column(heading, justify="left" if heading == "preset" else "right")
    remarks: list[str] = []
    for name, preset in report["presets"].items():
        for width, place in preset["optimum_log2_x"].items():
            best, diverged = preset["best_run"][width], preset["diverged_log2_x"][width]
            remark = preset["reason"][width] or (
                f"diverged at {', '.join(map(power_of_two, diverged))}" if diverged else ""
            )
            optima.add_row(
                name,
                width,
                "—" if place is None else f"{2**place:.2e}",
                "—" if place is None else f"{place:.2f}",
                _bracket(preset["interval"][width]) or "—",
                "—" if place is None else f"{preset['minimum_nats'][width]:.4f}",
                "—" if best is None else f"{best['loss_nats']:.4f} at {power_of_two(best['log2_x'])}",
            )
            if remark:
                remarks.append(f"{name} at width {width}: {remark}")
        optima.add_section()
        drift, regret, error = (
            preset[key] for key in ("drift_octaves_per_doubling", "regret_nats", "regret_standard_error")
        )
        moves.add_row(
            name,
            "—" if drift is None else signed(drift),
            _bracket(preset["drift_interval"]) or "—",
            "diverged"
            if preset["regret_diverged"]
            else "—"
            if regret is None
            else unsigned(regret, 4) + (f" ± {error:.4f}" if error is not None else ""),
            {True: "yes", False: "no", None: "—"}[preset["transfers"]],
        )
        reasons = dict.fromkeys(filter(None, (preset["drift_reason"], preset["regret_reason"])))
        remarks += [f"{name}: {reason}" for reason in reasons]
    notes = [Text(f"{remark}.") for remark in remarks]
    notes += [Text(f"Note: {note}.") for note in report["notes"]]
    return Group(optima, moves, *notes, Text(report["verdict"]))


def write_report(directory: pathlib.Path) -> dict[str, Any]:
    """Read `rows.jsonl` in `directory`, write `report.json` and `transfer.png` beside it, return the report.

    The same rows give the same bytes, whatever their order.

    Raises:
        ValueError: as `read_rows`, or nothing can be written to `directory`.
        RunFailedError: the disk is full.
    """
    rows = read_rows(directory / "rows.jsonl")
    make_writable(directory, "DIRECTORY")
    report = analyse(rows)
    text = json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with disk_full_said(directory, lambda: "the rows are as they were"):
        write_atomically(directory / "report.json", text + "\n")
        plot(rows, report, directory / "transfer.png")
    return report
