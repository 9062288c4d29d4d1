"""The one place that knows devices: mesh axes, and which array axis lies on which of them.

Axes so far: ``sweep`` (points of a sweep) and ``data`` (sequences of a batch).
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

SWEEP = "sweep"
DATA = "data"


def make_mesh(*, sweep: int = 1, data: int | None = None) -> Mesh:
    """A mesh over the devices there are.

    Args:
        sweep: devices along ``sweep``.
        data: devices along ``data``; ``None``: all that are left.

    Raises:
        ValueError: the product is not the number of devices.
    """
    devices = jax.devices()
    if data is None:
        data = max(1, len(devices) // sweep)
    if sweep * data != len(devices):
        raise ValueError(
            f"mesh axes sweep x data must multiply to the {len(devices)} devices there are; got {sweep} x {data}."
        )
    # Auto axes: Explicit ones do not go with vmap's spmd_axis_name yet.
    return Mesh(np.asarray(devices).reshape(sweep, data), (SWEEP, DATA), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def points_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis of points split over ``sweep``."""
    return NamedSharding(mesh, PartitionSpec(SWEEP))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis of sequences split over ``data``."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def in_context[**A, R](mesh: Mesh, fn: Callable[A, R]) -> Callable[A, R]:
    """`fn` traced with the mesh in context, which tells the mixer how to split what XLA cannot: its kernels."""

    def run(*args: A.args, **options: A.kwargs) -> R:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fn(*args, **options)

    return run


def over_points(
    mesh: Mesh, init: Callable, step: Callable, evaluate: Callable
) -> tuple[Callable, Callable, Callable]:
    """Lifts the functions of one point to a pack: mapped over the points, ``sweep`` kept manual.

    Each device runs its own points as if it were alone, so no collective can appear between points.
    """
    points, whole = PartitionSpec(SWEEP), PartitionSpec()

    def lift(fn: Callable, in_axes: tuple[int | None, ...]) -> Callable:
        specs = tuple(points if axis == 0 else whole for axis in in_axes)
        return jax.shard_map(
            _map_local(fn, in_axes), mesh=mesh, in_specs=specs, out_specs=points, check_vma=False
        )

    return lift(init, (0, 0)), lift(step, (0, None, 0)), lift(evaluate, (0, None))


def _map_local(fn: Callable, in_axes: tuple[int | None, ...]) -> Callable:
    """``vmap`` over a device's own points; a single one is run as it is, which is faster on a CPU."""

    def run(*args: Any) -> Any:
        count = jax.tree.leaves(args[0])[0].shape[0]
        if count > 1:
            return jax.vmap(fn, in_axes=in_axes)(*args)
        single = [
            jax.tree.map(lambda x: x[0], arg) if axis == 0 else arg
            for arg, axis in zip(args, in_axes, strict=True)
        ]
        return jax.tree.map(lambda x: x[None], fn(*single))

    return run


def put_batch[T](mesh: Mesh, batch: T) -> T:
    """A host batch on the devices of the mesh."""
    return jax.device_put(batch, batch_sharding(mesh))
