"""Hyperparameters that a sweep may vary besides the learning rate, and how their rows become one figure.

All of them are arguments of the compiled step: a width still compiles once. A value at its default (factors: 1, the
decay: the configured one) names the same run as no value, so a ledger never holds a run twice.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

LEARNING_RATE = "learning_rate"
WEIGHT_DECAY = "weight_decay"
# Factors on the rule table's values; `gdn_jax.mup.adjusted` defines them.
FACTORS = ("embedding_lr", "gate_lr", "init_scale", "o_norm_lr", "readout_lr")
VARIED: tuple[str, ...] = (WEIGHT_DECAY, *FACTORS)

# As sentences call them.
WORDS = {
    LEARNING_RATE: "learning rate",
    WEIGHT_DECAY: "weight decay",
    "embedding_lr": "embedding LR factor",
    "gate_lr": "gate LR factor",
    "init_scale": "init scale",
    "o_norm_lr": "o_norm LR factor",
    "readout_lr": "readout LR factor",
}

type Varied = tuple[tuple[str, float], ...]


def same(value: float) -> float:
    """What tells values apart: 2^-8.5 · 2^0.5 is 2^-8, though its last digit differs."""
    return float(f"{value:.12g}")


def parse_vary(
    texts: Sequence[str], parse_values: Callable[[Sequence[str], str], tuple[float, ...]]
) -> dict[str, tuple[float, ...]]:
    """`NAME=VALUES` of the command line by name; `parse_values` reads the values, for the flag it is given."""
    result: dict[str, tuple[float, ...]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if name not in VARIED or not equals:
            raise ValueError(f"--vary must be NAME=VALUES with a name of {', '.join(VARIED)}; got {text!r}.")
        if name in result:
            raise ValueError(f"--vary must name {name} once.")
        result[name] = parse_values(values.split(","), f"--vary {name}")
    return result


def default_values(names: Iterable[str], weight_decay: float) -> dict[str, float]:
    """What a point has that does not say otherwise; `weight_decay` is the configured one."""
    return {name: weight_decay if name == WEIGHT_DECAY else 1.0 for name in names}


def combinations(values: Mapping[str, Sequence[float]], weight_decay: float) -> list[Varied]:
    """Each value with each of the others, as what differs from the defaults."""
    return [
        not_default(dict(zip(values, chosen, strict=True)), weight_decay)
        for chosen in itertools.product(*values.values())
    ]


def not_default(values: Mapping[str, Any], weight_decay: float | None) -> Varied:
    """The varied values of a row or a point that differ from the defaults, in the order of `VARIED`."""
    return tuple(
        (name, values[name])
        for name in VARIED
        if name in values and values[name] != (weight_decay if name == WEIGHT_DECAY else 1.0)
    )


def with_all_values(
    rows: Sequence[Mapping[str, Any]], weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Rows that all name what any of them names, at its default where they do not.

    Raises:
        ValueError: only some rows name a weight decay, and the configured one is not known.
    """
    named = [name for name in VARIED if any(name in row for row in rows)]
    defaults: dict[str, float] = {name: 1.0 for name in named if name != WEIGHT_DECAY}
    if WEIGHT_DECAY in named and not all(WEIGHT_DECAY in row for row in rows):
        if weight_decay is None:
            raise ValueError(
                "some rows name a weight decay and some do not; keep sweep.json beside rows.jsonl"
            )
        defaults[WEIGHT_DECAY] = weight_decay
    return [defaults | dict(row) for row in rows]


def abscissa(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a figure of these rows is drawn against.

    The learning rate where any other setting was run with several; else what has the most values, all of them above 0.
    """
    varied = varied_names(rows)
    places: dict[tuple[Any, ...], set[float]] = {}
    for row in rows:
        setting = (row["preset"], row["width"], *(row[name] for name in varied))
        places.setdefault(setting, set()).add(row[LEARNING_RATE])
    # No decay has no place on a logarithmic axis.
    possible = [name for name in varied if all(row[name] > 0 for row in rows)]
    if not possible or any(len(rates) > 1 for rates in places.values()):
        return LEARNING_RATE
    return max(possible, key=lambda name: len({row[name] for row in rows}))


def varied_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What takes more than one value over the rows, beside the learning rate."""
    return [name for name in VARIED if len({row.get(name) for row in rows}) > 1]


def series(row: Mapping[str, Any], rows_abscissa: str, varied: Sequence[str]) -> str:
    """The curve's name that a row belongs to: its preset, and every varied value that is not the abscissa."""
    told = [f"{name} {row[name]:g}" for name in varied if name != rows_abscissa]
    if rows_abscissa != LEARNING_RATE:
        told.append(f"{LEARNING_RATE} {row[LEARNING_RATE]:.3g}")
    return ", ".join([row["preset"], *told])
