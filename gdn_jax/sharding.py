"""Splits the gated delta rule over the devices of a mesh, where XLA cannot: a kernel is opaque to it.

The mesh is the one in context (`jax.set_mesh`, or `jax.sharding.use_abstract_mesh` inside jit). Its axes are
known by name, as in `train.mesh`; on a mesh with other names call the mixer inside a `jax.shard_map` of your own.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

# Mesh axes that sequences of a batch, and heads, lie on.
BATCH_AXES = ("data", "fsdp")
HEAD_AXES = ("tensor",)


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
    """`gated_delta_rule_from_gates`, each device of the mesh in context on its own sequences and heads.

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
        ValueError: the batch or the heads do not divide by the devices of their axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {
        name: mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }
    batch = tuple(name for name in BATCH_AXES if free.get(name, 1) > 1)
    heads = tuple(name for name in HEAD_AXES if free.get(name, 1) > 1)
    if not batch and not heads:
        return op(q, k, v, a, b, A_log, dt_bias, **options)
    for what, size, axes in (("batch", q.shape[0], batch), ("key heads", q.shape[2], heads)):
        devices = math.prod(free[name] for name in axes)
        if size % devices:
            raise ValueError(
                f"{what} ({size}) must be a multiple of the {devices} devices of mesh axes {axes}; use another size."
            )
    state, segment_ids = options.pop("initial_state"), options.pop("segment_ids")
    final = options["return_final_state"]
    tokens, states, vector = P(batch, None, heads), P(batch, heads), P(heads)

    def local(q: Any, k: Any, v: Any, a: Any, b: Any, A_log: Any, dt_bias: Any, state: Any, ids: Any) -> Any:
        return op(q, k, v, a, b, A_log, dt_bias, initial_state=state, segment_ids=ids, **options)

    split = jax.shard_map(
        local,
        in_specs=(tokens, tokens, tokens, tokens, tokens, vector, vector, states, P(batch)),
        out_specs=(tokens, states if final else None),
    )
    return split(q, k, v, a, b, A_log, dt_bias, state, segment_ids)
