"""What the public ops refuse, and the words they refuse it with. No arithmetic on traced values."""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def _is_concrete(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def _require_shape(name: str, x: Array, axes: str, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(
            f"{name} must have the shape ({axes}) = {shape}; got {x.shape}. "
            f"Make {name} agree with q, k and v."
        )


def _require_float(**arrays: Array | None) -> None:
    """And no array whose type says how it is split: the ops leave that to XLA, or to a `shard_map` around."""
    for name, x in arrays.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point; got {x.dtype}. Cast it, e.g. to float32.")
        split = () if x is None else jax.typeof(x).sharding.spec
        if any(axes is not None for axes in split):
            raise ValueError(
                f"{name} must not be split over mesh axes of type Explicit; got {split}. Make the mesh with "
                "axis_types=(jax.sharding.AxisType.Auto,) * (number of its axes), or call this inside jax.shard_map."
            )


def _require_rank(name: str, x: Array, axes: str) -> None:
    if x.ndim != len(axes.split()):
        raise ValueError(f"{name} must have the axes ({axes}); got the shape {x.shape}. Add or merge axes.")


def _check_heads(q: Array, k: Array, v: Array) -> None:
    _require_shape("k", k, "the shape of q", q.shape)
    if v.shape[:-2] != q.shape[:-2]:
        raise ValueError(
            f"v must begin with the same {'B, T' if v.ndim == 4 else 'B'} as q; got {v.shape} and {q.shape}. "
            "Heads come before the last axis: (B, T, G, V)."
        )
    for name, x in (("q and k", q), ("v", v)):
        if 0 in x.shape:
            raise ValueError(f"{name} must have no axis of length 0; got {x.shape}. Pass at least one token.")
    if v.shape[-2] % q.shape[-2]:
        raise ValueError(
            f"v's heads must be a multiple of q's and k's; got {v.shape[-2]} and {q.shape[-2]}. "
            "Repeat or drop value heads."
        )


def _check_range(name: str, x: Array, low: float, high: float, used: Any) -> None:
    if not _is_concrete(x) or (used is not None and not _is_concrete(used)):
        return
    values = np.asarray(x, np.float64)
    if used is not None:
        keep = np.asarray(used) != 0
        values = np.where(keep.reshape(keep.shape + (1,) * (values.ndim - keep.ndim)), values, 0.0)
    # NaN passes: what is not a number is for the caller's loss to show, not for a range to hide.
    wrong = values[(values < low) | (values > high)]
    if wrong.size:
        raise ValueError(
            f"{name} must be in [{low:g}, {high:g}]; got {wrong[0]:g}. "
            "gated_delta_rule_from_gates computes both gates from raw ones."
        )


def _check_gates(log_decay: Array, beta: Array, used: Any) -> None:
    _check_range("log_decay", log_decay, -math.inf, 0.0, used)
    _check_range("beta", beta, 0.0, 2.0, used)


def check_sequence(
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    write: Array,
    decay_name: str,
    write_name: str,
    initial_state: Array | None,
    segment_ids: Array | None,
) -> None:
    """Refuse what `gated_delta_rule` and `gated_delta_rule_from_gates` cannot take, by ValueError."""
    _require_float(q=q, k=k, v=v, **{decay_name: decay, write_name: write}, initial_state=initial_state)
    _require_rank("q", q, "B T H K")
    _require_rank("k", k, "B T H K")
    _require_rank("v", v, "B T G V")
    _check_heads(q, k, v)
    batch, length, value_heads, value_dim = v.shape
    for name, x in ((decay_name, decay), (write_name, write)):
        _require_shape(name, x, "B T G", (batch, length, value_heads))
    if initial_state is not None:
        shape = (batch, value_heads, q.shape[-1], value_dim)
        _require_shape("initial_state", initial_state, "B G K V", shape)
    if segment_ids is not None:
        _require_shape("segment_ids", segment_ids, "B T", (batch, length))
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(
                f"segment_ids must be integers; got {segment_ids.dtype}. "
                "Number the documents from 1 and the padding 0, as int32."
            )
        if _is_concrete(segment_ids) and (np.asarray(segment_ids) < 0).any():
            raise ValueError(
                f"segment_ids must be ≥ 0; got {np.asarray(segment_ids).min()}. "
                "Number the documents from 1 and the padding 0."
            )
    if decay_name == "log_decay":
        _check_gates(decay, write, segment_ids)


def check_step(
    q: Array, k: Array, v: Array, log_decay: Array, beta: Array, state: Array, active: Array | None
) -> None:
    """Refuse what `gated_delta_step` cannot take, by ValueError."""
    _require_float(q=q, k=k, v=v, log_decay=log_decay, beta=beta, state=state)
    _require_rank("q", q, "B H K")
    _require_rank("k", k, "B H K")
    _require_rank("v", v, "B G V")
    _check_heads(q, k, v)
    batch, value_heads, value_dim = v.shape
    _require_shape("log_decay", log_decay, "B G", (batch, value_heads))
    _require_shape("beta", beta, "B G", (batch, value_heads))
    _require_shape("state", state, "B G K V", (batch, value_heads, q.shape[-1], value_dim))
    if active is not None:
        _require_shape("active", active, "B", (batch,))
        if active.dtype != jnp.bool_:
            raise ValueError(f"active must be boolean; got {active.dtype}. Compare with 0 first.")
    _check_gates(log_decay, beta, active)


def check_head_vectors(v: Array, **vectors: Array) -> None:
    """Refuse A_log and dt_bias that are not one float per value head."""
    _require_float(**vectors)
    for name, x in vectors.items():
        _require_shape(name, x, "G", (v.shape[-2],))


def check_scalars(scale: Any, qk_norm_eps: Any, beta_max: Any = 1.0) -> None:
    """Refuse a scale that is no scalar, an eps that is not positive, a β beyond 2."""
    if scale is not None and jnp.ndim(scale) != 0:
        raise ValueError(
            f"scale must be one number or None; got the shape {jnp.shape(scale)}. Scale o instead."
        )
    if qk_norm_eps is not None and not (math.isfinite(qk_norm_eps) and qk_norm_eps > 0):
        raise ValueError(f"qk_norm_eps must be positive or None; got {qk_norm_eps}. Use 1e-6.")
    if not 0 < beta_max <= 2:
        raise ValueError(f"beta_max must be in (0, 2]; got {beta_max}. Use 1, or 2 for negative eigenvalues.")
