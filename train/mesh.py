"""The one place that knows devices: how many lie along each mesh axis, and what of a run lies on which.

Which logical axis lies on which mesh axis is the table of ``gdn_jax.sharding``; parameters, optimizer state,
activations and kernels all follow it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gdn_jax.config import GDNConfig
from gdn_jax.mup.spec import ParamSpec
from gdn_jax.sharding import BATCH, DATA, FSDP, MESH_AXES, SEQUENCE, SWEEP, TENSOR, TIME, partition_spec


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """How many devices lie along each axis of the mesh; the product is the number of devices there are."""

    data: int | None = None
    """Parts of a batch; each has all parameters. By default as many as the other axes leave."""
    fsdp: int = 1
    """Parts of a batch, and of parameters and optimizer state: gathered layer by layer where they are used."""
    tensor: int = 1
    """Parts of each layer: of the heads and of the MLP's inner width."""
    sequence: int = 1
    """Parts of every sequence."""

    def __post_init__(self) -> None:
        for name, count in dataclasses.asdict(self).items():
            if count is not None and count < 1:
                raise ValueError(f"--mesh.{name} must be positive; got {count}.")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each axis. ``sweep`` holds points of a sweep; the others are those of `MeshOptions`."""

    sweep: int = 1
    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """Axis to devices, in the order of the mesh."""
        return {name: getattr(self, name) for name in MESH_AXES}

    @property
    def devices(self) -> int:
        """All of them."""
        return math.prod(self.sizes.values())

    def __str__(self) -> str:
        split = [f"{name} {size}" for name, size in self.sizes.items() if size > 1]
        return ", ".join(split) or "one device"


def choose_mesh(
    options: MeshOptions,
    devices: int,
    config: GDNConfig,
    batch_size: int,
    sequence_length: int,
    accumulate: int = 1,
) -> MeshShape:
    """The mesh of one run over `devices` devices, checked against what it is to split.

    Args:
        options: of the run; with ``data`` left open it takes what the other axes leave.
        devices: how many there are, in all processes.
        config: of the model.
        batch_size: sequences of a step.
        sequence_length: tokens of each.
        accumulate: parts of a batch, each of which is split over the devices.

    Raises:
        ValueError: the axes do not multiply to the devices, or do not divide the model or the batch; the message
            names factorizations that do.
    """
    fixed = options.fsdp * options.sequence * options.tensor
    data = max(1, devices // fixed) if options.data is None else options.data
    wanted = MeshShape(data=data, fsdp=options.fsdp, sequence=options.sequence, tensor=options.tensor)
    what = (devices, config, batch_size, sequence_length, accumulate)
    problem = _problem(wanted, *what)
    if problem is None:
        return wanted
    valid = [shape for shape in _factorizations(devices) if _problem(shape, *what) is None]
    # Those first that leave most of what was asked for as it was.
    asked = [
        name for name in ("tensor", "sequence", "fsdp", "data") if getattr(options, name) not in (None, 1)
    ]
    valid.sort(
        key=lambda shape: (-sum(getattr(shape, name) == getattr(wanted, name) for name in asked), -shape.data)
    )
    if not valid:
        raise ValueError(f"{problem}. No factorization of {devices} devices fits this model and batch.")
    more = f"; and {len(valid) - _NAMED} more" if len(valid) > _NAMED else ""
    raise ValueError(f"{problem}. Valid: {'; '.join(map(str, valid[:_NAMED]))}{more}.")


# Factorizations that a message names.
_NAMED = 6


def _problem(
    shape: MeshShape,
    devices: int,
    config: GDNConfig,
    batch_size: int,
    sequence_length: int,
    accumulate: int,
) -> str | None:
    if shape.devices != devices:
        sizes = " x ".join(f"{name} {shape.sizes[name]}" for name in (DATA, FSDP, SEQUENCE, TENSOR))
        return f"--mesh axes must multiply to the {devices} devices there are; got {sizes} = {shape.devices}"
    parts = shape.data * shape.fsdp
    if batch_size % (parts * accumulate):
        times = "" if accumulate == 1 else f" times --accumulate {accumulate},"
        return (
            f"--data.batch-size must be a multiple of the {parts} devices along data and fsdp,{times} "
            f"as {-(-batch_size // (parts * accumulate)) * parts * accumulate} is; got {batch_size}"
        )
    for flag, name, what, size in (
        ("sequence", SEQUENCE, "--data.sequence-length", sequence_length),
        ("fsdp", FSDP, "the width", config.width),
        ("tensor", TENSOR, "the number of key heads", config.num_key_heads),
        ("tensor", TENSOR, "the MLP's width", config.mlp_width),
    ):
        if size % shape.sizes[name]:
            return f"--mesh.{flag} must divide {what} ({size}); got {shape.sizes[name]}"
    halo = config.conv_size - 1
    if shape.sequence > 1 and sequence_length // shape.sequence < halo:
        return (
            f"--mesh.sequence must leave each device conv_size - 1 = {halo} tokens of {sequence_length}; "
            f"got {shape.sequence}"
        )
    return None


def _factorizations(devices: int) -> list[MeshShape]:
    def divisors(n: int) -> list[int]:
        return [i for i in range(1, n + 1) if n % i == 0]

    return [
        MeshShape(data=devices // (fsdp * sequence * tensor), fsdp=fsdp, sequence=sequence, tensor=tensor)
        for tensor in divisors(devices)
        for sequence in divisors(devices // tensor)
        for fsdp in divisors(devices // tensor // sequence)
    ]


def build_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh; on TPUs laid out so that neighbours along an axis are neighbours in the torus.

    Args:
        shape: its devices must be as many as `devices`.
        devices: of a part of the machine, or of a topology; ``None``: all there are.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = tuple(shape.sizes.values())
    if len(devices) != shape.devices:
        raise ValueError(f"a mesh of {shape} needs {shape.devices} devices; got {len(devices)}.")
    if devices[0].platform == "tpu" and len(devices) > 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(sizes)
    # Auto axes: Explicit ones do not go with vmap's spmd_axis_name yet.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def points_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis of points split over ``sweep``."""
    return NamedSharding(mesh, PartitionSpec(SWEEP))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sequences split over ``data`` and ``fsdp``, time over ``sequence``."""
    # Of sizes that all devices divide: `choose_mesh` has refused others.
    sizes = (mesh.shape[DATA] * mesh.shape[FSDP], mesh.shape[SEQUENCE])
    return NamedSharding(mesh, partition_spec((BATCH, TIME), sizes, mesh.shape))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """A value of each sequence of a batch, where the sequence is."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def state_sharding(mesh: Mesh, specs: Any, state: Any) -> Any:
    """Where each array of a run's state lies.

    Args:
        mesh: of the run.
        specs: tree of ``ParamSpec`` with the structure of ``state.params``.
        state: a ``TrainState``, abstract or not.
    """
    whole = replicated(mesh)

    def stored(spec: ParamSpec) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(spec.axes, spec.sizes, mesh.shape))

    def is_masked(x: Any) -> bool:
        # In the chain of one group of parameters it stands for those of the others.
        return isinstance(x, optax.MaskedNode)

    params = jax.tree.map(stored, specs, is_leaf=lambda x: isinstance(x, ParamSpec))
    structure = jax.tree.structure(params)

    def is_like_params(x: Any) -> bool:
        return jax.tree.structure(x, is_leaf=is_masked) == structure

    def place(x: Any) -> Any:
        if not is_like_params(x):
            return whole
        return jax.tree.map(lambda y, sharding: y if is_masked(y) else sharding, x, params, is_leaf=is_masked)

    opt_state = jax.tree.map(place, state.opt_state, is_leaf=is_like_params)
    return jax.tree.map(lambda _: whole, state)._replace(params=params, opt_state=opt_state)


def abstract(state: Any, shardings: Any) -> Any:
    """Shapes, dtypes and places of a state: what a checkpoint is restored like."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings
    )


def of_points(shardings: Any) -> Any:
    """The same for arrays with a leading axis of points, which lies on ``sweep``."""
    return jax.tree.map(lambda x: NamedSharding(x.mesh, PartitionSpec(SWEEP, *x.spec)), shardings)


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

    Each part of the sweep axis runs its own points as if it were alone, so no collective can appear between points.
    """
    points, whole = PartitionSpec(SWEEP), PartitionSpec()
    # A point that several devices share leaves their axes to XLA.
    manual = {SWEEP} if mesh.size > mesh.shape[SWEEP] else set(mesh.axis_names)

    def lift(fn: Callable, in_axes: tuple[int | None, ...]) -> Callable:
        specs = tuple(points if axis == 0 else whole for axis in in_axes)
        return jax.shard_map(
            _map_local(fn, in_axes),
            mesh=mesh,
            in_specs=specs,
            out_specs=points,
            axis_names=manual,
            check_vma=False,
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


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a batch that lie on this process's devices, ascending: all that it has to read."""
    parts, rows = _row_parts(mesh), batch_size // (mesh.shape[DATA] * mesh.shape[FSDP])
    return np.concatenate([np.arange(part * rows, (part + 1) * rows) for part in parts])


def _row_parts(mesh: Mesh) -> list[int]:
    """Which of the parts that a batch's rows fall into lie on this process's devices."""
    mine = {device.id for device in mesh.local_devices}
    local = np.argwhere(np.vectorize(lambda device: device.id in mine)(mesh.devices))
    data, fsdp = (local[:, MESH_AXES.index(name)] for name in (DATA, FSDP))
    return sorted(set((data * mesh.shape[FSDP] + fsdp).tolist()))


def put_batch[T](mesh: Mesh, batch: T) -> T:
    """A host batch on the devices of the mesh.

    Args:
        mesh: of the run.
        batch: arrays ``[rows, T]``, of the rows that `process_rows` names.
    """
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    parts, count = _row_parts(mesh), mesh.shape[DATA] * mesh.shape[FSDP]

    def put(local: np.ndarray) -> jax.Array:
        rows = len(local) // len(parts)

        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "every device holds a part"
            start = parts.index((index[0].start or 0) // rows) * rows
            return local[start : start + rows, index[1]]

        return jax.make_array_from_callback((count * rows, *local.shape[1:]), sharding, piece)

    return jax.tree.map(put, batch)
