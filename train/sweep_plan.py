"""Which width and which points of a sweep run where: a pure function of the plan and the devices.

Points know nothing of each other, so no program spans two processes: each process gets a run of consecutive points,
worth about as much as those of the others. Inside a process, widths run at the same time, each on devices of its
own, where there are devices enough; otherwise one after another on all of them.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gdn_jax.model import unrolled
from train.flops import peak_flops, train_flops_per_token
from train.step import Program

# Widths at the same time overlap their compilations and their hosts' work, which is worth more than what is lost
# because devices come in whole numbers; up to this factor of the steps' own time.
_WORTH_OVERLAP = 1.25
# Units of `Program` cost, a second and CPU core: 36 ms a step of 1,024 tokens at width 64 on two cores.
_UNITS_PER_CORE_S = 2.4e10
# Of its peak a small model gets about so much from an accelerator; a guess, for a time that is called one.
_USUAL_MFU = 0.05
# Of a device's memory so much may be planned for points.
_OF_MEMORY = 0.92


class Lane(NamedTuple):
    """Devices of one process, by their index there, and the widths that they train one after another."""

    process: int
    devices: tuple[int, ...]
    widths: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SweepPlan[Point]:
    """Lanes that run at the same time, and the points of each process and width."""

    lanes: list[Lane]
    points: dict[tuple[int, int], list[Point]]
    per_device: Mapping[int, int]

    def pack_size(self, lane: Lane, width: int, left: int | None = None) -> int:
        """Points of a width that a lane trains side by side: no more than packs of one size need.

        Args:
            lane: one of the plan's.
            width: one of the lane's.
            left: how many of its points are not yet in the ledger, 1 or more; all by default. Where they are the last
                of the planned packs, those keep their size, so that a sweep that was stopped goes on as it would have.
        """
        count = len(self.points[lane.process, width])
        planned = self._even(lane, width, count)
        # Places in the last pack that no point needs.
        if left is None or -left % planned == -count % planned:
            return planned
        return self._even(lane, width, left)

    def _even(self, lane: Lane, width: int, count: int) -> int:
        devices = len(lane.devices)
        rounds = math.ceil(count / (devices * self.per_device[width]))
        return devices * math.ceil(count / (rounds * devices))


def points_that_fit(programs: Mapping[int, Program], tokens: int, device: Any) -> dict[int, int]:
    """Points of each width that a device trains side by side where the user leaves it open.

    Args:
        programs: by width.
        tokens: of one step.
        device: one of those that the sweep runs on.
    """
    if device.platform == "cpu":
        return dict.fromkeys(programs, 1)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if device.platform != "gpu" or limit is None or jax.process_count() > 1:
        # On a TPU the memory of a point was not measured. Processes plan on their own, and must plan the same.
        return dict.fromkeys(programs, 8)
    # Few points of a small model leave a GPU waiting for the host.
    return {
        width: max(1, int(_OF_MEMORY * limit / _device_bytes(program, tokens)))
        for width, program in programs.items()
    }


def plan_sweep[Point](
    points: Mapping[int, Sequence[Point]],
    costs: Mapping[int, int],
    *,
    processes: int,
    devices: int,
    per_device: Mapping[int, int],
) -> SweepPlan[Point]:
    """Places the points of a sweep.

    Args:
        points: of each width, in the order of the plan.
        costs: of one point of each width, in any unit.
        processes: how many there are.
        devices: of each process.
        per_device: points of each width that one device trains side by side.
    """
    shares = _shares(points, costs, processes, per_device)
    lanes = []
    for process in range(processes):
        mine = {width: len(shares[process, width]) for width in points if shares.get((process, width))}
        lanes += _lanes(process, mine, costs, devices, per_device)
    return SweepPlan(lanes, shares, per_device)


def _shares[Point](
    points: Mapping[int, Sequence[Point]],
    costs: Mapping[int, int],
    processes: int,
    per_device: Mapping[int, int],
) -> dict[tuple[int, int], list[Point]]:
    """(process, width) -> points; cut where a process has its part of the cost."""
    total = sum(costs[width] * len(of_width) for width, of_width in points.items())
    shares: dict[tuple[int, int], list[Point]] = {}
    before = 0.0
    for width, of_width in points.items():
        # What a device trains side by side stays together.
        for chunk in itertools.batched(of_width, per_device[width]):
            cost = costs[width] * len(chunk)
            process = min(processes - 1, int((before + cost / 2) / total * processes))
            shares.setdefault((process, width), []).extend(chunk)
            before += cost
    return shares


def _lanes(
    process: int,
    counts: Mapping[int, int],
    costs: Mapping[int, int],
    devices: int,
    per_device: Mapping[int, int],
) -> list[Lane]:
    if not counts:
        return []
    everywhere = Lane(process, tuple(range(devices)), tuple(counts))
    if len(counts) == 1 or devices < len(counts):
        return [everywhere]

    def time(width: int, share: int) -> int:
        side_by_side = per_device[width]
        return math.ceil(counts[width] / (share * side_by_side)) * costs[width] * side_by_side

    allotted = dict.fromkeys(counts, 1)
    for _ in range(devices - len(counts)):
        slowest = max(counts, key=lambda width: time(width, allotted[width]))
        allotted[slowest] += 1
    together = max(time(width, share) for width, share in allotted.items())
    in_turn = sum(time(width, devices) for width in counts)
    if together > _WORTH_OVERLAP * in_turn:
        return [everywhere]
    ends = list(itertools.accumulate(allotted.values()))
    return [
        Lane(process, tuple(range(end - share, end)), (width,))
        for (width, share), end in zip(allotted.items(), ends, strict=True)
    ]


def describe(
    plan: SweepPlan, programs: Mapping[int, Program], costs: Mapping[int, int], tokens: int, device: Any
) -> list[str]:
    """The plan as lines for a reader: which width and points where, memory and time.

    Args:
        plan: of the sweep.
        programs: of each width.
        costs: of one token of one point of each width, as `plan_sweep` was given them.
        tokens: of one step.
        device: one of those that the sweep runs on.
    """
    lines = []
    for lane in plan.lanes:
        first, last = lane.devices[0], lane.devices[-1]
        where = f"device {first}" if first == last else f"devices {first} to {last}"
        if lane.process or any(other.process for other in plan.lanes):
            where = f"process {lane.process}, {where}"
        for width in lane.widths:
            program, count = programs[width], len(plan.points[lane.process, width])
            size = plan.pack_size(lane, width)
            rounds, side_by_side = math.ceil(count / size), size // len(lane.devices)
            seconds = rounds * program.steps * _step_seconds(program, costs[width], tokens, device)
            memory = _device_bytes(program, tokens) * side_by_side
            lines.append(
                f"width {width}: {count} points on {where}, in {rounds} {'pack' if rounds == 1 else 'packs'}; about "
                f"{memory / 2**30:.2g} GiB a device, {_duration(seconds * side_by_side)}"
            )
    return lines


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _step_seconds(program: Program, cost: int, tokens: int, device: Any) -> float:
    peak = peak_flops(device)
    if peak is None:
        return cost * tokens / _UNITS_PER_CORE_S
    return train_flops_per_token(program.config) * tokens / (peak * _USUAL_MFU)


def _device_bytes(program: Program, tokens: int) -> int:
    """Of one point: state, gradients and updates, and what its forward pass keeps.

    XLA's own count for packs of 6 to 15 points on an H100: within 8 % of this where the layers are a loop (widths
    256 to 1024); 3 to 14 % below it where they are not (128 to 1024).
    """
    config = program.config
    state = jax.eval_shape(program.init, np.int32(0), program.hparams(1.0, config.preset))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    gradients = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
    keys, values = config.num_key_heads * config.key_dim, config.num_value_heads * config.value_dim
    block = 8 * config.width + 4 * keys + 6 * values + 3 * config.mlp_width
    width = 4 if config.compute_dtype == "float32" else 2
    if unrolled(config.num_layers):
        kept = int(tokens * (0.95 * width * config.num_layers * block + 2 * 4 * config.vocab_size))
        return held + gradients + kept
    # Of what a block computes nearly everything is kept twice, as it is and in float32 or as its gradient.
    kept = int(tokens * (1.8 * width * config.num_layers * block + 3 * 4 * config.vocab_size))
    return 2 * held + 3 * gradients + kept
