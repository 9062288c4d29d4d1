"""The exchanges between devices that a mesh plans, and those that a compiled program holds.

The plan is the table of ``gdn_jax.sharding`` read once more: gradients are summed over the devices that share a
batch, parameters are gathered over ``fsdp``, halves of a matrix product are summed over ``tensor``, halos and
states pass along ``sequence``, and nothing else moves.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gdn_jax.mup import axes as ax
from gdn_jax.mup.spec import ParamSpec
from gdn_jax.sharding import DATA, FSDP, SEQUENCE, TENSOR, partition_spec
from kernels_pallas.gated_delta_rule import hlo_text

# Elements of what is summed over devices of unlike roles: losses, norms and the like.
_SCALARS = 64


class Exchange(NamedTuple):
    """A collective of a compiled program, by the mesh axes it runs along."""

    kind: str
    axes: tuple[str, ...]
    # Along these axes.
    devices: int
    collective: hlo_text.Collective


def exchanges(compiled_text: str, sizes: Mapping[str, int]) -> list[Exchange]:
    """The collectives of a program compiled for a mesh, those among single devices left out.

    Args:
        compiled_text: ``compiled.as_text()``.
        sizes: mesh axis to devices, in the order of the mesh.
    """
    found = []
    for collective in hlo_text.collectives(compiled_text):
        if axes := axes_of_groups(collective.groups, sizes):
            devices = math.prod(sizes[name] for name in axes)
            found.append(Exchange(collective.kind, axes, devices, collective))
    return found


def say(exchange: Exchange) -> str:
    """A line for a reader."""
    arrays = ", ".join(f"{count:,} x {dtype}" for dtype, count in exchange.collective.arrays[:4])
    origin = exchange.collective.origin or "the compiler"
    return f"{exchange.kind} along {'+'.join(exchange.axes)} of {arrays}, from {origin}"


def totals(found: Sequence[Exchange]) -> list[dict[str, Any]]:
    """Calls and bytes of the result on one device, by kind and mesh axes; the most bytes first. JSON-able."""
    rows: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {}
    for kind, axes, _, collective in found:
        row = rows.setdefault((kind, axes), {"kind": kind, "axes": list(axes), "calls": 0, "bytes": 0})
        row["calls"] += collective.calls
        row["bytes"] += collective.bytes * collective.calls
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def axes_of_groups(groups: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which devices of one group differ.

    Args:
        groups: replica groups or pairs of a collective, in any of XLA's notations.
        sizes: mesh axis to devices, in the order of the mesh.

    Raises:
        ValueError: a notation that is not known.
    """
    shape, differ = tuple(sizes.values()), set()
    for group in _device_groups(groups, math.prod(shape)):
        places = np.stack(np.unravel_index(np.asarray(group), shape))
        differ |= {name for name, row in zip(sizes, places, strict=True) if len(set(row.tolist())) > 1}
    return tuple(name for name in sizes if name in differ)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _device_groups(groups: str, devices: int) -> Sequence[Sequence[int]]:
    if groups == "{}":
        return [range(devices)]
    if groups.startswith("{{"):
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", groups)]
    if match := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", groups):
        ids = np.arange(devices).reshape(_numbers(match[2]))
        ids = ids.transpose(_numbers(match[3])) if match[3] else ids
        return ids.reshape(_numbers(match[1])).tolist()
    if match := re.fullmatch(r"mesh\[([^\]]*)\] *\{([^}]*)\}", groups):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        named = re.findall(r"'(\w+)'", match[2])
        # A part of an axis, as 'x':(1)2, is no axis of ours.
        if ":" not in match[2] and math.prod(axes.values()) == devices:
            order = [*(name for name in axes if name not in named), *named]
            ids = np.arange(devices).reshape(list(axes.values()))
            ids = ids.transpose([list(axes).index(name) for name in order])
            return ids.reshape(-1, math.prod(axes[name] for name in named)).tolist()
    raise ValueError(f"replica groups must be in one of XLA's notations; got {groups!r}.")


def unplanned(found: Sequence[Exchange], specs: Any, sizes: Mapping[str, int]) -> list[Exchange]:
    """Those that the mesh does not plan.

    Args:
        found: of a train step.
        specs: tree of ``ParamSpec``.
        sizes: mesh axis to devices.
    """
    leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, ParamSpec))
    gathered = {_used_elements(spec, sizes) for spec in leaves}
    # Their gradients are sums over heads, so over tensor as well: of one layer, or of all at once.
    whole = {
        _used_elements(spec, sizes) * count
        for spec in leaves
        if _used_elements(spec, sizes) == _used_elements(spec, {})
        for count in (1, _layers(spec))
    }
    return [exchange for exchange in found if not _is_planned(exchange, gathered, whole)]


def _layers(spec: ParamSpec) -> int:
    return spec.sizes[spec.axes.index(ax.LAYERS)] if ax.LAYERS in spec.axes else 1


def _used_elements(spec: ParamSpec, sizes: Mapping[str, int]) -> int:
    """Elements of a parameter as a device uses it: of one layer, gathered over ``fsdp``, split over ``tensor``."""
    devices = sizes.get(TENSOR, 1)
    is_split = any(partition_spec(spec.axes, spec.sizes, {TENSOR: devices}))
    return math.prod(spec.sizes) // _layers(spec) // (devices if is_split else 1)


def _is_planned(exchange: Exchange, gathered: set[int], whole: set[int]) -> bool:
    axes, arrays = set(exchange.axes), exchange.collective.arrays
    match exchange.kind:
        case "all-reduce":
            # Gradients over the batch's axes, partial products over tensor; over both, sums of few numbers.
            small = all(count <= _SCALARS or count in whole for _, count in arrays)
            return axes <= {DATA, FSDP, SEQUENCE} or axes == {TENSOR} or small
        case "reduce-scatter":
            return FSDP in axes and axes <= {DATA, FSDP, SEQUENCE}
        case "all-gather" if axes == {FSDP}:
            return all(count in gathered for _, count in arrays)
        case "all-gather":
            # Along a sequence: which document each part ends with.
            return axes == {SEQUENCE} and all(dtype.startswith("s") for dtype, _ in arrays)
        case "collective-permute" if axes == {FSDP}:
            # The TPU compiler scatters several gradients as one array at times, then shifts the parts into place:
            # its own doing, so of no operation of ours.
            part = max(gathered) // exchange.devices
            return not exchange.collective.origin and all(count <= part for _, count in arrays)
        case "collective-permute":
            return axes == {SEQUENCE}
    return False
