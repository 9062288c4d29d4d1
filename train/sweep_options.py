"""What a sweep may vary, and the grids of learning rates that its texts stand for."""

import dataclasses
import fnmatch
import math
import pathlib
import re

from train.config import PresetName, check_learning_rate, check_preset_name
from train.rates import OCTAVE_STEP, parse_rates, power_of_two
from train.vary import parse_vary


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """What is swept, and where the results go."""

    out: pathlib.Path
    """Folder of the ledger and the report; a sweep that was stopped goes on from it."""
    widths: tuple[int, ...] = (64, 128, 256)
    """Model widths, one compilation each."""
    learning_rates: tuple[str, ...] = ("2^-11..2^-4",)
    """Peak learning rates at the base width: numbers, powers (2^-7), or ranges by half octaves (2^-11..2^-4)."""
    presets: tuple[PresetName, ...] = ("mup", "sp")
    """Parametrizations to compare."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initialisation. All points see the same data in the same order."""
    steps: int = 200
    """Training steps a point."""
    shifts: tuple[str, ...] = ()
    """PRESET=OCTAVES: move that preset's grid by so much per doubling of the width above the base (sp=-1)."""
    grids: tuple[str, ...] = ()
    """PRESET@WIDTH=RATES: another grid for a preset (* for all) at one width, ranges and commas allowed; the
    first that fits counts."""
    vary: tuple[str, ...] = ()
    """NAME=VALUES of weight_decay, or of the factors embedding_lr, gate_lr, init_scale, o_norm_lr,
    readout_lr; each with each is run."""
    points_per_device: int | None = None
    """Points that one device trains side by side; by default 1 on a CPU, as many as fit on a GPU, else 8."""

    def __post_init__(self) -> None:
        for name in ("widths", "learning_rates", "presets", "seeds"):
            values = getattr(self, name)
            flag = f"--{name.replace('_', '-')}"
            if not values:
                raise ValueError(f"{flag} must name at least one; got none.")
            if len(set(values)) < len(values):
                raise ValueError(f"{flag} must not repeat a value; got {' '.join(map(str, values))}.")
        for width in self.widths:
            if width < 1:
                raise ValueError(f"--widths must be positive; got {width}.")
        for seed in self.seeds:
            if not 0 <= seed < 2**31:
                raise ValueError(f"--seeds must be in [0, 2^31); got {seed}.")
        if self.steps < 1:
            raise ValueError(f"--steps must be positive; got {self.steps}.")
        if self.steps >= 2**31:
            raise ValueError(f"--steps must be below 2^31; got {self.steps}.")
        if self.points_per_device is not None and self.points_per_device < 1:
            raise ValueError(f"--points-per-device must be positive; got {self.points_per_device}.")
        for preset in self.presets:
            check_preset_name(preset)
        parse_rates(self.learning_rates)
        self._shifts()
        self._grids()
        self.varied()

    def grid(self, preset: str, width: int, base_width: int) -> tuple[float, ...]:
        """Learning rates of a preset at a width, ascending."""
        for pattern, grid_width, rates in self._grids():
            if grid_width == width and fnmatch.fnmatch(preset, pattern):
                return rates
        octaves = self._shifts().get(preset, 0.0) * math.log2(width / base_width)
        # Whole half octaves, so that grids of different widths stay comparable.
        factor = power_of_two(round(octaves / OCTAVE_STEP) * OCTAVE_STEP)
        rates = tuple(rate * factor for rate in parse_rates(self.learning_rates))
        for rate in rates:
            check_learning_rate(rate, f"--shifts: the learning rates of {preset} at width {width}")
        return rates

    def varied(self) -> dict[str, tuple[float, ...]]:
        """The values of `vary` by name."""
        return parse_vary(self.vary, parse_rates)

    def _shifts(self) -> dict[str, float]:
        result = {}
        for text in self.shifts:
            match = re.fullmatch(r"(\w+)=([-+]?(?:\d{1,3}(?:\.\d+)?|\.\d+))", text)
            if not match:
                raise ValueError(f"--shifts must be PRESET=OCTAVES, such as sp=-1; got {text!r}.")
            self._require_swept(match[1], "--shifts")
            if match[1] in result:
                raise ValueError(f"--shifts must name a preset once; got {match[1]} twice.")
            result[match[1]] = float(match[2])
        return result

    def _grids(self) -> list[tuple[str, int, tuple[float, ...]]]:
        result = []
        for text in self.grids:
            match = re.fullmatch(r"(\w+|\*)@(\d+)=(\S+)", text)
            if not match:
                raise ValueError(
                    f"--grids must be PRESET@WIDTH=RATES, such as sp@256=2^-11..2^-7; got {text!r}."
                )
            if match[1] != "*":
                self._require_swept(match[1], "--grids")
            if int(match[2]) not in self.widths:
                raise ValueError(f"--grids must name a width of --widths; got {text!r}.")
            if (match[1], int(match[2])) in [known[:2] for known in result]:
                raise ValueError(
                    f"--grids must name a preset and width once; got {match[1]}@{match[2]} twice."
                )
            result.append((match[1], int(match[2]), parse_rates(match[3].split(","), "--grids")))
        return result

    def _require_swept(self, preset: str, flag: str) -> None:
        if preset not in self.presets:
            raise ValueError(
                f"{flag} must name a preset of --presets ({', '.join(self.presets)}); got {preset!r}."
            )
