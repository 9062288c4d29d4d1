"""The rows of a sweep, read from its ledger and checked to belong into one report."""

import json
import math
import pathlib
from typing import Any

from train.ledger import CONFIG_FILE, POINT_KEYS
from train.vary import LEARNING_RATE, VARIED, WEIGHT_DECAY, same, with_all_values

Rows = list[dict[str, Any]]

KEYS = (
    "preset",
    "optimizer",
    "regime",
    "width",
    LEARNING_RATE,
    "seed",
    "steps",
    "tokens",
    "val_loss",
    "diverged_at_step",
    "config_fingerprint",
    "code_version",
    "base_width",
)
# Rows that differ in one of these answer different questions and must not share a figure.
SAME = ("optimizer", "regime", "steps", "tokens", "base_width", "config_fingerprint")


def read_rows(path: pathlib.Path) -> Rows:
    """The rows of a sweep's ledger `rows.jsonl`, checked to belong into one report.

    A last line that is not finished (no newline, no whole JSON) is left out: the sweep was killed there.

    Raises:
        ValueError: no such file, no rows, a damaged line, a missing key, an impossible value, or rows of
            different sweeps.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name the folder that `gdn sweep --out` wrote")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows: Rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                continue
            raise ValueError(
                f"{path}, line {number}, is not JSON: {line[:60]!r}; "
                "remove the line and sweep again to fill it in"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}, must be a JSON object; got {line[:60]!r}")
        rows.append(row)
    try:
        return check_rows(with_all_values(rows, _configured_decay(path.with_name(CONFIG_FILE))))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _configured_decay(path: pathlib.Path) -> float | None:
    """The weight decay of a sweep's runs that do not name their own, from its configuration if that is there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["optimizer"]["weight_decay"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_rows(rows: Rows) -> Rows:
    """The rows without exact repetitions; ValueError if they are impossible or do not belong together."""
    if not rows:
        raise ValueError("no finished run yet; let `gdn sweep` finish at least one")
    seen: dict[tuple[Any, ...], float | None] = {}
    kept = []
    for number, row in enumerate(rows, 1):
        missing = [key for key in KEYS if key not in row]
        if missing:
            raise ValueError(
                f"row {number} lacks {', '.join(missing)}; was it written by another version of `gdn sweep`?"
            )
        if not isinstance(row["preset"], str) or type(row["seed"]) is not int:
            raise ValueError(
                f"row {number}: preset must be a name and seed a whole number; got {row['preset']!r} and "
                f"{row['seed']!r}"
            )
        varied = [(key, False) for key in VARIED if key in row]
        for key, whole in (("width", True), (LEARNING_RATE, False), *varied):
            value = row[key]
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ValueError(f"row {number}: {key} must be a number; got {value!r}")
            # A row of a sweep that varied nothing has the configured decay, which may be none.
            if not ((value > 0 or (key == WEIGHT_DECAY and value == 0)) and math.isfinite(value)):
                raise ValueError(f"row {number}: {key} must be positive and finite; got {value!r}")
        loss, stopped = row["val_loss"], row["diverged_at_step"]
        if loss is not None and not (isinstance(loss, (int, float)) and math.isfinite(loss)):
            raise ValueError(
                f"row {number}: val_loss must be a finite number, or null when diverged; got {loss!r}"
            )
        if (loss is None) != (stopped is not None):
            raise ValueError(
                f"row {number}: val_loss must be null exactly where diverged_at_step is not; "
                f"got {loss!r} and {stopped!r}"
            )
        point = tuple(
            same(row[key]) if key == LEARNING_RATE else row[key]
            for key in (*POINT_KEYS, *(key for key in VARIED if key in row))
        )
        if point in seen and seen[point] != loss:
            raise ValueError(
                f"row {number}: preset {point[0]}, width {point[1]}, learning_rate {point[2]:g}, seed "
                f"{point[3]} is there twice, with val_loss {seen[point]} and {loss}; "
                "keep the ledgers of different sweeps apart"
            )
        if point not in seen:
            kept.append(row)
        seen[point] = loss
    for key in SAME:
        values = sorted({str(row[key]) for row in kept})
        if len(values) > 1:
            raise ValueError(
                f"rows with different {key} ({', '.join(values[:4])}) must not be put in one figure; "
                "write each sweep into a folder of its own"
            )
    return kept
