"""Judges the rows of a coordinate check: slopes over width, their errors, and verdicts. A pure function.

A slope is the least-squares line through log2(size) of every seed against log2(width). Its standard error is
the larger of two: from the residuals of all points, and from those of the seed means per width. The second is
there because all seeds of a width share its departure from a straight line; as independent points they would
understate the error by the root of their number. (With 3 seeds there are 10 distinct resamples: too few for a
bootstrap, and blind to that departure.)
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from train.coord_bounds import (
    CONTROLS,
    KINDS,
    MAX_STANDARD_ERROR,
    MIN_HEADS_FOR_LOG_DECAY,
    MIN_SEEDS,
    MIN_SPAN,
    MIN_WIDTH,
    MIN_WIDTHS,
    QUANTITIES,
    STEPS,
    bound_for,
    update_sort,
)

Rows = Sequence[Mapping[str, Any]]

_KEYS = ("preset", "optimizer", "regime", "width", "seed", "step", "kind", "quantity", "size")
_GROUP = ("preset", "optimizer", "regime", "kind", "quantity", "step")


def slope_of(widths: Sequence[int], sizes: Sequence[float]) -> tuple[float, float | None]:
    """Slope of log2(size) over log2(width) and its standard error (None for fewer than 3 widths)."""
    x, y = np.log2(np.array(widths, float)), np.log2(np.array(sizes, float))
    slope, error = _line(x, y)
    places = np.unique(x)
    _, error_of_means = _line(places, np.array([y[x == place].mean() for place in places]))
    if error is None or error_of_means is None:
        return slope, None
    return slope, max(error, error_of_means)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float | None]:
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    residual = y - y.mean() - slope * centred
    if np.unique(x).size < 3:
        return slope, None
    return slope, float(np.sqrt(residual @ residual / (x.size - 2) / (centred @ centred)))


def _grouped(rows: Rows) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    if not rows:
        raise ValueError("the coordinate check has no rows; run at least one width and seed")
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    seen = set()
    for number, row in enumerate(rows, 1):
        missing = [key for key in _KEYS if key not in row]
        if missing:
            raise ValueError(f"row {number} lacks {', '.join(missing)}")
        if row["kind"] in ("absolute", "change") and row["quantity"] not in QUANTITIES:
            raise ValueError(
                f"row {number}: quantity must be one of {', '.join(QUANTITIES)}; got {row['quantity']!r}"
            )
        # Refuses unknown kinds, optimizers and regimes.
        bound_for(row["kind"], row["quantity"], row["optimizer"], row["regime"], row["step"])
        key = tuple(row[name] for name in _GROUP)
        point = (*key, row["width"], row["seed"])
        if point in seen:
            raise ValueError(f"row {number} repeats {point}; give each measurement once")
        seen.add(point)
        groups.setdefault(key, []).append(row)
    return groups


def _entry(key: tuple[Any, ...], rows: Rows) -> dict[str, Any]:
    entry: dict[str, Any] = dict(zip(_GROUP, key, strict=True))
    bound = bound_for(entry["kind"], entry["quantity"], entry["optimizer"], entry["regime"], entry["step"])
    judged = bound.judged
    if entry["quantity"] == "log_decay":
        judged &= min(row.get("value_heads", 0) for row in rows) >= MIN_HEADS_FOR_LOG_DECAY
    widths = sorted({row["width"] for row in rows})
    entry |= {
        "bound": bound.limit,
        "expected": bound.expected,
        "source": bound.source,
        "widths": widths,
        "seeds": len({row["seed"] for row in rows}),
        "slope": None,
        "standard_error": None,
        "remark": None,
    }
    sizes = [row["size"] for row in rows]
    unusable = [size is None or not math.isfinite(size) for size in sizes]
    zero = [not bad and size <= 0 for bad, size in zip(unusable, sizes, strict=True)]
    if any(unusable):
        at = sorted({row["width"] for row, bad in zip(rows, unusable, strict=True) if bad})
        return entry | {
            "verdict": "fail" if judged else "reported",
            "remark": f"not finite at width {_list(at)}",
        }
    if any(zero):
        at = sorted({row["width"] for row, none in zip(rows, zero, strict=True) if none})
        remark = f"exactly zero at width {_list(at)}"
        return entry | {"verdict": "fail" if judged else "reported", "remark": remark}
    if len(widths) < 2:
        return entry | {"verdict": "inconclusive" if judged else "reported", "remark": "one width only"}
    slope, error = slope_of([row["width"] for row in rows], sizes)
    entry |= {"slope": slope, "standard_error": error}
    if not judged:
        return entry | {"verdict": "reported"}
    if error is None or error > MAX_STANDARD_ERROR:
        shown = "unknown" if error is None else f"{error:.3f}"
        return entry | {"verdict": "inconclusive", "remark": f"standard error {shown} > {MAX_STANDARD_ERROR}"}
    assert bound.limit is not None
    return entry | {"verdict": "pass" if abs(slope - bound.expected) <= bound.limit else "fail"}


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def analyse_coord(rows: Rows) -> dict[str, Any]:
    """Slopes and verdicts of a coordinate check.

    Args:
        rows: dicts of preset, optimizer, regime (`heads`, `head_dim`), width, seed, step, kind, quantity and
            size (> 0); `value_heads` where log_decay is to be judged (where head counts grow, from 16 on).

    Returns:
        `entries` (one per preset, optimizer, regime, kind, quantity and step, with slope, standard error,
        bound, source and verdict: pass, fail, inconclusive, reported), `controls` (one per slope that must be
        wrong), `checks` (one per optimizer and regime), `problems` (of the measurement itself), `passed` and
        a sentence of `verdict`. It passes when every judged slope of `mup` does, every control fails, and
        there are no problems.

    Raises:
        ValueError: no rows, missing keys, unknown kind, quantity, optimizer or regime, repeated points.
    """
    entries = [_entry(key, group) for key, group in sorted(_grouped(rows).items())]
    settings = sorted({(entry["optimizer"], entry["regime"]) for entry in entries})
    checks, controls, problems = [], [], []
    for optimizer, regime in settings:
        here = [e for e in entries if (e["optimizer"], e["regime"]) == (optimizer, regime)]
        own = [e for e in here if e["preset"] == "mup"]
        shown = _controls(here, optimizer, regime)
        wanted = {"mup"} | {control["preset"] for control in shown}
        problems += [
            f"{optimizer}, {regime}, {preset}: {problem}"
            for preset in sorted(wanted)
            for problem in _design([e for e in here if e["preset"] == preset], preset == "mup")
        ]
        failed = [_name(e) for e in own if e["verdict"] == "fail"]
        unsure = [_name(e) for e in own if e["verdict"] == "inconclusive"]
        checks.append(
            {
                "optimizer": optimizer,
                "regime": regime,
                "mup": "fail" if failed else "inconclusive" if unsure or not own else "pass",
                "mup_failed": failed,
                "mup_inconclusive": unsure,
                "mup_judged": sum(e["verdict"] != "reported" for e in own),
                "controls_fail": all(control["fails"] for control in shown),
            }
        )
        controls += shown
    analysis: dict[str, Any] = _rounded(
        {"entries": entries, "controls": controls, "checks": checks, "problems": problems}
    )
    analysis["passed"] = not problems and all(c["mup"] == "pass" and c["controls_fail"] for c in checks)
    analysis["verdict"] = _sentence(analysis)
    return analysis


def _name(entry: Mapping[str, Any]) -> str:
    slope = entry["remark"] if entry["slope"] is None else f"{entry['slope']:+.2f}"
    return f"{entry['quantity']} ({entry['kind']}, step {entry['step']}: {slope})"


def _controls(entries: Sequence[Mapping[str, Any]], optimizer: str, regime: str) -> list[dict[str, Any]]:
    """Every slope that must be wrong, at the control's step; one that was not measured does not fail."""
    out = []
    for control in CONTROLS:
        if control.optimizer != optimizer or control.regime not in (None, regime):
            continue
        candidates = [e for e in entries if e["preset"] == control.preset and e["kind"] == control.kind]
        last = max((e["step"] for e in candidates), default=0) if control.step is None else control.step
        for quantity in control.quantities:
            found = [
                e
                for e in candidates
                if e["step"] == last
                and quantity in (e["quantity"], update_sort(e["quantity"]) if e["kind"] == "update" else None)
            ]
            common = {
                "preset": control.preset,
                "optimizer": optimizer,
                "regime": regime,
                "kind": control.kind,
                "threshold": control.threshold,
                "source": control.source,
            }
            if not found:
                nothing = {"quantity": quantity, "step": last, "slope": None, "standard_error": None}
                out.append(common | nothing | {"fails": False, "remark": "not measured"})
            for entry in found:
                own = {key: entry[key] for key in ("quantity", "step", "slope", "standard_error")}
                fails, remark = _fails(entry, control.threshold)
                out.append(common | own | {"fails": fails, "remark": remark})
    return out


def _fails(entry: Mapping[str, Any], threshold: float) -> tuple[bool, str | None]:
    slope, error = entry["slope"], entry["standard_error"]
    if slope is None:
        return False, entry["remark"]
    if error is None:
        return False, "inconclusive: standard error unknown"
    beyond = slope - threshold if threshold > 0 else threshold - slope
    # A large error does not matter to a slope that lies beyond the threshold by twice as much.
    if error > MAX_STANDARD_ERROR and beyond < 2 * error:
        return False, f"inconclusive: standard error {error:.3f}"
    return beyond >= 0, None if beyond >= 0 else "does not fail"


def _design(entries: Sequence[Mapping[str, Any]], complete: bool) -> list[str]:
    """What the measurement lacks to prove anything; `complete` demands every quantity, as of `mup`."""
    if not entries:
        return ["not measured"]
    out = []
    # The poorest group counts: a quantity measured at two widths only is one that was not checked.
    widths = min((e["widths"] for e in entries), key=len)
    if len(widths) < MIN_WIDTHS or widths[-1] < MIN_SPAN * widths[0] or widths[0] < MIN_WIDTH:
        demand = f"at least {MIN_WIDTHS} widths from {MIN_WIDTH} up, spanning {MIN_SPAN} times"
        out.append(f"widths {_list(widths)}; it takes {demand}")
    seeds = min(e["seeds"] for e in entries)
    if seeds < MIN_SEEDS:
        out.append(f"{seeds} seed{'s' if seeds > 1 else ''}; it takes at least {MIN_SEEDS}")
    if absent := sorted(set(STEPS) - {e["step"] for e in entries}):
        out.append(f"step {_list(absent)} not measured")
    if complete:
        for kind in KINDS[:2]:
            there = {e["quantity"] for e in entries if e["kind"] == kind}
            if lacking := [quantity for quantity in QUANTITIES if quantity not in there]:
                out.append(f"{kind} size of {_list(lacking)} not measured")
        if not any(e["kind"] == "update" for e in entries):
            out.append("no parameter updates measured")
    return out


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        # Adding 0.0 turns -0.0 into 0.0.
        return round(value, 6) + 0.0
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return value


def _sentence(analysis: Mapping[str, Any]) -> str:
    parts = []
    for check in analysis["checks"]:
        where = f"{check['optimizer']}, regime {check['regime']}"
        if check["mup"] == "pass":
            said = f"mup keeps all {check['mup_judged']} judged slopes within bounds"
        else:
            names = check["mup_failed"] or check["mup_inconclusive"] or ["not measured"]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            said = f"mup {'fails' if check['mup_failed'] else 'is undecided'} at {_list(names[:3])}{more}"
        kept = [
            f"{c['preset']} {c['quantity']}"
            for c in analysis["controls"]
            if not c["fails"] and (c["optimizer"], c["regime"]) == (check["optimizer"], check["regime"])
        ]
        more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
        said += (
            f"; controls that should fail do not: {_list(kept[:3])}{more}"
            if kept
            else "; its controls fail, as they must"
        )
        parts.append(f"{where}: {said}")
    problems = (
        f" The measurement is too small: {'; '.join(analysis['problems'])}." if analysis["problems"] else ""
    )
    return (
        f"Coordinate check {'passed' if analysis['passed'] else 'not passed'}. {'. '.join(parts)}.{problems}"
    )
