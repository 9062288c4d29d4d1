"""Learning rates as a user writes them: numbers, powers of two, ranges by half octaves."""

import math
import re
from collections.abc import Sequence
from typing import Annotated

import tyro

from train.config import check_learning_rate

OCTAVE_STEP = 0.5
# Of logarithms, in steps.
_ROUNDING = 1e-9


def parse_rates(texts: Sequence[str], flag: str = "--learning-rates") -> tuple[float, ...]:
    """Numbers, powers of two and half-octave ranges as ascending learning rates without repetition."""
    rates: set[float] = set()
    for text in texts:
        low, dots, high = text.partition("..")
        if not dots:
            rates.add(_rate(low, flag))
            continue
        start, end = _rate(low, flag), _rate(high, flag)
        if start > end:
            raise ValueError(f"{flag} range must ascend; got {text!r}. Use {high}..{low}.")
        count = math.floor(math.log2(end / start) / OCTAVE_STEP + _ROUNDING)
        first = round(math.log2(start) / OCTAVE_STEP)
        if abs(math.log2(start) / OCTAVE_STEP - first) < _ROUNDING:
            # By their exponents: 2^-8.5 times the root of two is not 2^-8, and a sweep would run both.
            rates |= {2.0 ** (OCTAVE_STEP * (first + i)) for i in range(count + 1)}
        else:
            rates |= {start * 2.0 ** (OCTAVE_STEP * i) for i in range(count + 1)}
    return tuple(sorted(rates))


def _rate(text: str, flag: str) -> float:
    try:
        value = _number(text)
    except ValueError:
        raise ValueError(f"{flag} must be numbers, 2^-7 or 2^-9..2^-5; got {text!r}.") from None
    check_learning_rate(value, flag)
    return value


def _number(text: str) -> float:
    match = re.fullmatch(r"2\^([-+]?\d+(?:\.\d+)?)", text)
    return power_of_two(float(match[1])) if match else float(text)


def _single(texts: list[str]) -> float:
    try:
        return _number(texts[0])
    except ValueError:
        raise ValueError(f"must be one number, such as 0.01 or 2^-7; got {texts[0]!r}") from None


# One on the command line, or none. tyro would name both types in an error if None were outside.
Rate = Annotated[
    float | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="RATE",
        instance_from_str=_single,
        is_instance=lambda value: value is None or isinstance(value, float),
        str_from_instance=lambda value: [str(value)],
    ),
]


def power_of_two(exponent: float) -> float:
    """Infinite where a float64 ends; `check_learning_rate` refuses that."""
    try:
        return 2.0**exponent
    except OverflowError:
        return math.inf
