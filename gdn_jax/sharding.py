"""Where arrays lie on a mesh: the one table from logical axes to mesh axes, and what follows from it.

Parameters are stored as the table says, and gathered over ``fsdp`` where a layer uses them; activations are
held to it where XLA could choose otherwise; the gated delta rule, which is opaque to XLA, and the convolution
along a split sequence run in a `jax.shard_map`.

The mesh is the one in context (`jax.set_mesh`, or `jax.sharding.use_abstract_mesh` inside jit). Its axes are
known by name, and of type Auto; on a mesh with other names call the mixer inside a `jax.shard_map` of your own.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from gdn_jax.mup import axes as ax

# Mesh axes, the slowest first: what talks most lies on neighbouring devices.
SWEEP, DATA, FSDP, SEQUENCE, TENSOR = MESH_AXES = ("sweep", "data", "fsdp", "sequence", "tensor")

# Axes of activations; those of parameters, in `mup.axes`, are theirs as well.
BATCH = "batch"
TIME = "time"

# Logical axis -> mesh axes. A mesh axis serves one axis of an array, the first that asks for it: so ``embed`` of
# an activation, whose batch has taken ``fsdp``, is whole.
TABLE: Mapping[str, tuple[str, ...]] = {
    BATCH: (DATA, FSDP),
    TIME: (SEQUENCE,),
    ax.EMBED: (FSDP,),
    ax.KEY_HEADS: (TENSOR,),
    ax.VALUE_HEADS: (TENSOR,),
    ax.MLP: (TENSOR,),
    ax.VOCAB: (TENSOR,),
    ax.KEY_DIM: (),
    ax.VALUE_DIM: (),
    ax.CONV: (),
    ax.LAYERS: (),
}
# Whole where its devices do not divide it: 257 ids of bytes are nobody's multiple. All other axes must divide.
MAY_STAY_WHOLE = frozenset({ax.VOCAB})


def partition_spec(axes: Sequence[str | None], sizes: Sequence[int], devices: Mapping[str, int]) -> P:
    """Where an array lies.

    Args:
        axes: logical axis of each dimension; ``None``: one that is never split.
        sizes: of the dimensions.
        devices: mesh axis to its number of devices; those of one device, and those left out, split nothing.

    Raises:
        ValueError: an axis that is not in the table, or whose devices do not divide it.
    """
    taken: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, sizes, strict=True):
        if axis is not None and axis not in TABLE:
            raise ValueError(f"logical axes must be among {', '.join(TABLE)}; got {axis!r}.")
        wanted = () if axis is None else TABLE[axis]
        mesh_axes = tuple(name for name in wanted if devices.get(name, 1) > 1 and name not in taken)
        count = math.prod(devices[name] for name in mesh_axes)
        if size % count:
            if axis not in MAY_STAY_WHOLE:
                raise ValueError(
                    f"{axis} ({size}) must be a multiple of the {count} devices of mesh axes {mesh_axes}; "
                    "use another size, or fewer devices along them."
                )
            mesh_axes = ()
        taken.update(mesh_axes)
        entries.append(mesh_axes or None)
    return P(*entries)


def free_axes() -> dict[str, int]:
    """Axes of the mesh in context that have more than one device and that no `shard_map` around has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: mesh.shape[name] for name in _automatic_axes() if name in MESH_AXES and mesh.shape[name] > 1
    }


def _automatic_axes() -> set[str]:
    """All that are left to XLA: inside a `shard_map` of ours none may be, since kernels cannot be partitioned."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = [name for name, kind in kinds.items() if kind == AxisType.Explicit and mesh.shape[name] > 1]
    if explicit:
        raise ValueError(
            f"mesh axes must be of type Auto, or manual inside jax.shard_map; got Explicit {', '.join(explicit)}, as "
            f"jax.make_mesh makes them. Give it axis_types=(jax.sharding.AxisType.Auto,) * {len(kinds)}."
        )
    return {name for name, kind in kinds.items() if kind == AxisType.Auto}


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, told where its axes lie; x itself where no mesh is in context."""
    devices = free_axes()
    if not devices:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, devices))


def parameter(param: nnx.Param, dtype: DTypeLike | None = None) -> jax.Array:
    """A parameter's value as a layer uses it: whole along ``fsdp``, its gradient split again.

    Where XLA is left the choice, it may gather activations in place of parameters, or all layers at once.

    Args:
        param: with or without a declaration; without, its value is left as it is.
        dtype: cast first, so that the devices exchange no more than the layer reads.
    """
    value = param[...] if dtype is None else param[...].astype(dtype)
    spec, devices = param.get_metadata().get("spec"), free_axes()
    if spec is None or FSDP not in devices:
        return value
    # Inside a scan over layers the value has lost its leading axis, its declaration has not.
    axes = spec.axes[len(spec.axes) - value.ndim :]
    stored = partition_spec(axes, value.shape, devices)
    used = partition_spec(axes, value.shape, {name: n for name, n in devices.items() if name != FSDP})
    return value if stored == used else _gathered(value, stored, used)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(value: jax.Array, stored: P, used: P) -> jax.Array:
    # Both, or XLA may move the exchange to the other side of the cast.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(value, stored), used)


def _gathered_forward(value: jax.Array, stored: P, used: P) -> tuple[jax.Array, None]:
    return _gathered(value, stored, used), None


def _gathered_backward(stored: P, used: P, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # A sum over the devices of a batch that is wanted in parts: a reduce-scatter.
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def lookup(table: nnx.Param, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows of an embedding ``[vocab, D]`` for tokens ``[B, T]``, in a dtype.

    Each device looks tokens up in its part of the vocabulary. Left to XLA, the gradient moves activations
    between the devices of a batch in place of the gradient's parts.
    """
    value, devices = parameter(table, dtype), free_axes()
    if not devices:
        return _rows(value, tokens)
    whole_rows = {name: n for name, n in devices.items() if name != FSDP}
    rows = partition_spec((ax.VOCAB, None), value.shape, whole_rows)
    places = partition_spec((BATCH, TIME), tokens.shape, devices)

    def local(value: jax.Array, tokens: jax.Array) -> jax.Array:
        if rows[0] is None:
            return _rows(value, tokens)
        tokens = tokens - jax.lax.axis_index(TENSOR) * len(value)
        mine = (tokens >= 0) & (tokens < len(value))
        found = jnp.where(
            mine[..., None], _rows(value, jnp.where(mine, tokens, 0)), jnp.zeros((), value.dtype)
        )
        return jax.lax.psum(found, TENSOR)

    split = jax.shard_map(
        local, in_specs=(rows, places), out_specs=P(*places, None), axis_names=_automatic_axes()
    )
    return split(value, tokens)


def _rows(table: jax.Array, tokens: jax.Array) -> jax.Array:
    # The gradient adds up a row for every time that its token occurs, "the" some hundred times a batch: in float32,
    # since in bfloat16 a sum of equal terms stops at 256 of them, and since a GPU adds bfloat16 in a loop.
    return table.astype(jnp.float32)[tokens].astype(table.dtype)


def over_time(
    function: Callable[..., jax.Array], kernel: jax.Array, x: jax.Array, segment_ids: jax.Array | None
) -> jax.Array:
    """`function(kernel, x, segment_ids, sequence_axis)`, each device on its part of the sequence and its heads.

    Args:
        function: the short convolution, which takes what it needs of the part before.
        kernel: ``[taps, heads, dim]``.
        x: ``[B, T, heads, dim]``; the result is like it.
        segment_ids: ``[B, T]``.
    """
    devices = free_axes()
    if SEQUENCE not in devices:
        return function(kernel, x, segment_ids, None)
    tokens = partition_spec((BATCH, TIME, ax.VALUE_HEADS, None), x.shape, devices)
    split = jax.shard_map(
        lambda kernel, x, ids: function(kernel, x, ids, SEQUENCE),
        in_specs=(P(None, tokens[2]), tokens, P(*tokens[:2])),
        out_specs=tokens,
        axis_names=_automatic_axes(),
    )
    return split(kernel, x, segment_ids)


def over_batch_and_heads(
    op: Callable[..., tuple[jax.Array, jax.Array | None]],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    a: jax.Array,
    b: jax.Array,
    A_log: jax.Array,
    dt_bias: jax.Array,
    **options: Any,
) -> tuple[jax.Array, jax.Array | None]:
    """`gated_delta_rule_from_gates`, each device of the mesh in context on its own sequences, heads and time.

    Args:
        op: the rule; what is not split goes to it as it is.
        q: queries ``[B, T, H, K]``; the rest as the op takes them.
        k: keys.
        v: values.
        a: raw decay.
        b: raw write strength.
        A_log: ``[G]``.
        dt_bias: ``[G]``.
        options: of the op; `initial_state` and `segment_ids` are split as well.

    Raises:
        ValueError: batch, heads or time do not divide by the devices of their axes.
    """
    devices = free_axes()
    if not devices.keys() & {DATA, FSDP, SEQUENCE, TENSOR}:
        return op(q, k, v, a, b, A_log, dt_bias, **options)
    axes = (BATCH, TIME, ax.KEY_HEADS)
    tokens = partition_spec(axes, q.shape[:3], devices)
    batch, _, heads = tokens
    state, segment_ids = options.pop("initial_state"), options.pop("segment_ids")
    final = options["return_final_state"]
    states, vector = P(batch, heads), P(heads)
    if SEQUENCE in devices:
        options["sequence_axis"] = SEQUENCE

    def local(q: Any, k: Any, v: Any, a: Any, b: Any, A_log: Any, dt_bias: Any, state: Any, ids: Any) -> Any:
        return op(q, k, v, a, b, A_log, dt_bias, initial_state=state, segment_ids=ids, **options)

    split = jax.shard_map(
        local,
        in_specs=(tokens, tokens, tokens, tokens, tokens, vector, vector, states, P(*tokens[:2])),
        out_specs=(tokens, states if final else None),
        axis_names=_automatic_axes(),
    )
    return split(q, k, v, a, b, A_log, dt_bias, state, segment_ids)
