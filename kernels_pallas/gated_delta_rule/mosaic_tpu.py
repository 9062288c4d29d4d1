"""The TPU kernels' adapter: what they can do, how the work is laid out, and their launches.

No array as large as q is moved around the kernels: (B, T, heads · dim) is what projections write, so the
reshape that takes the heads together cancels the one that took them apart. Only the gates are laid out anew,
with time on the lanes: (B, groups of heads, N, rows, P · C), where P heads make a pack (`mosaic_tpu_kernel.py`);
states are (K, P · V), so that those of narrow heads fill their lanes, too.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from kernels_pallas.gated_delta_rule import tiling
from kernels_pallas.gated_delta_rule.batching import folding_vmap
from kernels_pallas.gated_delta_rule.mosaic_tpu_kernel import TILE, Plan, backward_kernel, forward_kernel

_DTYPES = (jnp.bfloat16, jnp.float32)
# Lengths of keys and values; others are filled with zeros up to the next one.
_DIMS = (64, 128, 256)
# Heads of which several fill a register's lanes.
_NARROW = 64
MAX_DIM = _DIMS[-1]
# Sequences and groups of heads may run on either core of a chip; chunks hand their state on.
_GRID = ("parallel", "parallel", "arbitrary")


def refusal(q: Array, k: Array, v: Array, inverse_precision: Any) -> str | None:
    """Why the kernels cannot take these operands, or None. Shapes and dtypes alone decide: any precision will do."""
    del inverse_precision
    dtypes = {x.dtype for x in (q, k, v)}
    if len(dtypes) > 1 or dtypes.pop() not in _DTYPES:
        return f"q, k and v must all be bfloat16 or all float32; got {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[-1] > MAX_DIM:
        return f"K must be at most {MAX_DIM}; got {q.shape[-1]}"
    if _heads(q, v) is None:
        return (
            f"{v.shape[2]} value heads on {q.shape[2]} key heads do not divide into groups that fit a program"
        )
    return None


def target_platform() -> str:
    """What is compiled for: the devices of the mesh in context, or JAX's default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    kind = device.device_kind.lower()
    return "tpu" if "tpu" in kind else "cpu" if "cpu" in kind else "gpu"


def _target_kind() -> str:
    """The kind of those devices, such as "TPU v5 lite"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.devices()[0] if device is None else device).device_kind


def runs_here() -> bool:
    """Whether what is compiled for has what the kernels need."""
    return target_platform() == "tpu"


def interpreted() -> bool:
    """Whether `pltpu.force_tpu_interpret_mode` is on: the kernels then run on any platform."""
    from jax._src import config

    # One setting for TPUs and GPUs; the parameters tell them apart, and True is Pallas' plain interpreter.
    return isinstance(config.pallas_tpu_interpret_mode_context_manager.value, pltpu.InterpretParams | bool)


def _native(dim: int) -> int:
    return next(native for native in _DIMS if dim <= native)


def _heads(q: Array, v: Array) -> int | None:
    """Value heads of a program: whole key heads, and blocks that fill whole lanes or the whole array."""
    key_heads, value_heads = q.shape[2], v.shape[2]
    key_dim, value_dim = _native(q.shape[-1]), _native(min(v.shape[-1], MAX_DIM))
    share = value_heads // key_heads
    legal = [
        heads
        for heads in range(share, value_heads + 1, share)
        if value_heads % heads == 0
        and (heads == value_heads or (heads // share * key_dim % 128 == 0 and heads * value_dim % 128 == 0))
        # A gate is a row; all of a program's are one or two registers.
        and heads <= 2 * tiling.TPU_HEADS
    ]
    widest = max(key_dim, value_dim)
    most = tiling.TPU_TOKEN_BYTES // (widest * q.dtype.itemsize)
    most = min(tiling.TPU_HEADS * (tiling.TPU_PACK if widest <= _NARROW else 1), most)
    return max((h for h in legal if h <= most), default=min(legal, default=None))


def _pack(heads: int, share: int, key_dim: int, value_dim: int) -> int:
    """Heads side by side on the lanes: narrow ones, where each has a key head of its own or all of a pack one."""
    narrow = key_dim <= _NARROW and value_dim <= _NARROW
    pack = tiling.TPU_PACK
    return pack if narrow and heads % pack == 0 and (share == 1 or share % pack == 0) else 1


def make_plan(
    q: Array,
    v: Array,
    *,
    scale: float,
    qk_norm_eps: float | None,
    inverse_precision: Any,
    padded: bool,
) -> Plan:
    """How the work is cut; the operands must have passed `refusal`."""
    length, key_dim, value_dim = q.shape[1], _native(q.shape[-1]), _native(v.shape[-1])
    heads = _heads(q, v)
    assert heads is not None
    share = v.shape[2] // q.shape[2]
    pack = _pack(heads, share, key_dim, value_dim)
    compute = jnp.dtype(q.dtype)
    one_pass = inverse_precision in (None, jax.lax.Precision.DEFAULT, "default", "fastest", "bfloat16")
    return Plan(
        # A short sequence is one chunk, not longer than it must be.
        chunk=min(tiling.TPU_CHUNK // pack, max(TILE, 1 << (length - 1).bit_length())),
        heads=heads,
        pack=pack,
        share=share,
        key_dim=key_dim,
        value_dim=value_dim,
        length=length,
        scale=scale,
        qk_norm_eps=qk_norm_eps,
        compute=compute,
        inverse=compute if one_pass else jnp.dtype(jnp.float32),
        padded=padded,
        one_store=_target_kind().startswith(tiling.TPU_ONE_STORE),
    )


def _flat(x: Array, dim: int) -> Array:
    """(B, T, heads, ·) → (B, T, heads · dim), zeros where a head is shorter than `dim`."""
    x = jnp.pad(x, ((0, 0),) * 3 + ((0, dim - x.shape[3]),))
    return x.reshape(*x.shape[:2], -1)


def _pack_states(plan: Plan, state: Array) -> Array:
    """(B, G, K, V) → (B, G / P, K, P · V), filled with zeros."""
    padding = ((0, plan.key_dim - state.shape[2]), (0, plan.value_dim - state.shape[3]))
    state = jnp.pad(state, ((0, 0), (0, 0), *padding))
    state = state.reshape(state.shape[0], -1, plan.pack, *state.shape[2:])
    return state.swapaxes(2, 3).reshape(*state.shape[:2], plan.key_dim, -1)


def _unpack_states(plan: Plan, packed: Array, key_dim: int, value_dim: int) -> Array:
    state = packed.reshape(*packed.shape[:3], plan.pack, plan.value_dim).swapaxes(2, 3)
    return state.reshape(state.shape[0], -1, *state.shape[3:])[:, :, :key_dim, :value_dim]


def _pack_gates(plan: Plan, log_decay: Array, beta: Array, counts: Array | None) -> Array:
    """(B, T, G) each → (B, groups, N, rows, P · C) float32; filling does nothing: α = 1, β = 0."""
    batch, _, value_heads = beta.shape
    groups = value_heads // plan.heads

    def rows(x: Array) -> Array:
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -plan.length % plan.chunk), (0, 0)))
        x = x.reshape(batch, plan.chunks, plan.chunk, groups, -1).transpose(0, 3, 1, 4, 2)
        return x.reshape(*x.shape[:3], -1, plan.pack * plan.chunk)

    packed = [rows(log_decay), rows(beta)]
    if counts is not None:
        packed.append(rows(jnp.broadcast_to(counts[:, :, None], (*counts.shape, groups * plan.pack))))
    return jnp.concatenate(packed, axis=3)


def _unpack_gates(plan: Plan, packed: Array) -> tuple[Array, Array]:
    batch, groups = packed.shape[:2]

    def scalars(x: Array) -> Array:
        x = x.reshape(*x.shape[:3], plan.heads, plan.chunk)
        x = x.transpose(0, 2, 4, 1, 3).reshape(batch, plan.chunks * plan.chunk, groups * plan.heads)
        return x[:, : plan.length]

    return scalars(packed[..., : plan.packs, :]), scalars(packed[..., plan.packs :, :])


class _Launch:
    """What the two launches share. Every input and output has the batch as its first axis."""

    def __init__(self, plan: Plan, groups: int, *, reverse: bool) -> None:
        self.plan, self.groups = plan, groups
        last = plan.chunks - 1
        self._chunk = (lambda n: last - n) if reverse else (lambda n: n)

    def tokens(self, dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, self.plan.chunk, dim), lambda b, g, n: (b, self._chunk(n), g))

    def gates(self, rows: int) -> pl.BlockSpec:
        lanes = self.plan.pack * self.plan.chunk
        return pl.BlockSpec((1, 1, 1, rows, lanes), lambda b, g, n: (b, g, self._chunk(n), 0, 0))

    def state(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, *self.state_shape), lambda b, g, n: (b, g, 0, 0))

    def states(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, *self.state_shape), lambda b, g, n: (b, self._chunk(n), g, 0, 0))

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Of a program: (packs, K, P · V)."""
        plan = self.plan
        return plan.packs, plan.key_dim, plan.pack * plan.value_dim

    def columns(self, more: int) -> Any:
        """Scratch for sums of log decays, one or two, and `more` gates as columns in three parts each."""
        plan = self.plan
        count = (2 if plan.exact_decay else 1) + more
        return self.scratch(count, plan.chunk, 3 * plan.heads, dtype=jnp.bfloat16)

    def scratch(self, *shape: int, dtype: Any = jnp.float32) -> Any:
        return pltpu.VMEM(shape, dtype)

    def __call__(
        self,
        kernel: Callable[..., None],
        name: str,
        inputs: Sequence[tuple[Array, pl.BlockSpec]],
        outputs: Sequence[tuple[tuple[int, ...], Any, pl.BlockSpec]],
        scratch: Sequence[Any],
    ) -> list[Array]:
        """Runs a kernel; outputs are (shape without the batch, dtype, blocks). `vmap` lengthens the batch."""

        def call(*arrays: Array) -> list[Array]:
            batch = arrays[0].shape[0]
            varying = jax.typeof(arrays[0]).manual_axis_type
            results = pl.pallas_call(
                kernel,
                grid=(batch, self.groups, self.plan.chunks),
                in_specs=[blocks for _, blocks in inputs],
                out_specs=[blocks for *_, blocks in outputs],
                out_shape=[
                    jax.ShapeDtypeStruct((batch, *shape), dtype, manual_axis_type=varying)
                    for shape, dtype, _ in outputs
                ],
                scratch_shapes=scratch,
                compiler_params=pltpu.CompilerParams(
                    dimension_semantics=_GRID, vmem_limit_bytes=tiling.TPU_VMEM_BYTES
                ),
                name=name,
            )(*arrays)
            return list(results)

        return folding_vmap(call, [0] * len(outputs))(*(x for x, _ in inputs))


def forward(
    plan: Plan,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T G V"],
    log_decay: Float[Array, "B T G"],
    beta: Float[Array, "B T G"],
    counts: Bool[Array, "B T"] | None,
    initial_state: Float[Array, "B G K V"] | None,
    *,
    save_states: bool,
) -> tuple[Float[Array, "B T G V"], Float[Array, "B G K V"], Float[Array, "B N packs K2 V2"] | None]:
    """(o in the dtype of v, final state float32, the states that enter the chunks, packed, in the dtype of q)."""
    value_heads, value_dim = v.shape[2:]
    key_dim, compute = q.shape[-1], plan.compute
    heads, chunk, lanes = plan.heads, plan.chunk, plan.pack * plan.chunk
    launch = _Launch(plan, value_heads // heads, reverse=False)
    gates = _pack_gates(plan, log_decay, beta, counts)
    keys, values = launch.tokens(plan.key_heads * plan.key_dim), launch.tokens(heads * plan.value_dim)
    inputs = [
        (_flat(q, plan.key_dim), keys),
        (_flat(k, plan.key_dim), keys),
        (_flat(v, plan.value_dim), values),
        (gates, launch.gates(gates.shape[3])),
    ]
    if initial_state is not None:
        inputs.append((_pack_states(plan, initial_state), launch.state()))
    packs, *state_dims = launch.state_shape
    state_shape = (launch.groups * packs, *state_dims)
    outputs = [
        ((plan.length, value_heads * plan.value_dim), v.dtype, values),
        (state_shape, jnp.float32, launch.state()),
    ]
    if save_states:
        outputs.append(((plan.chunks, *state_shape), compute, launch.states()))
    o, final_state, *states = launch(
        functools.partial(forward_kernel, plan, initial_state is not None, save_states),
        "gated_delta_rule_forward",
        inputs,
        outputs,
        [
            launch.scratch(*launch.state_shape),
            launch.scratch(chunk, lanes),
            launch.columns(0),
            launch.scratch(len(plan.units), 2 * chunk, plan.pack * plan.key_dim, dtype=compute),
            launch.scratch(TILE, packs, lanes),
            launch.scratch(packs, chunk, lanes, dtype=plan.inverse),
            launch.scratch(packs, chunk, lanes, dtype=compute),
        ],
    )
    o = o.reshape(*v.shape[:3], plan.value_dim)[..., :value_dim]
    return o, _unpack_states(plan, final_state, key_dim, value_dim), states[0] if states else None


def backward(
    plan: Plan,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T G V"],
    log_decay: Float[Array, "B T G"],
    beta: Float[Array, "B T G"],
    counts: Bool[Array, "B T"] | None,
    states: Float[Array, "B N packs K2 V2"],
    do: Float[Array, "B T G V"],
    dfinal_state: Float[Array, "B G K V"],
    *,
    has_state: bool,
) -> tuple[Array, Array, Array, Array, Array, Array | None]:
    """Cotangents of q, k, v, log_decay, beta and, where there is one, the initial state."""
    value_heads, value_dim = v.shape[2:]
    key_dim, compute = q.shape[-1], plan.compute
    heads, chunk, lanes = plan.heads, plan.chunk, plan.pack * plan.chunk
    launch = _Launch(plan, value_heads // heads, reverse=True)
    gates = _pack_gates(plan, log_decay, beta, counts)
    keys, values = launch.tokens(plan.key_heads * plan.key_dim), launch.tokens(heads * plan.value_dim)
    inputs = [
        (_flat(q, plan.key_dim), keys),
        (_flat(k, plan.key_dim), keys),
        (_flat(v, plan.value_dim), values),
        (gates, launch.gates(gates.shape[3])),
        (states, launch.states()),
        (_flat(do.astype(v.dtype), plan.value_dim), values),
        (_pack_states(plan, dfinal_state.astype(jnp.float32)), launch.state()),
    ]
    outputs: list[tuple[tuple[int, ...], Any, pl.BlockSpec]] = [
        (x.shape[1:], x.dtype, blocks) for x, blocks in inputs[:3]
    ]
    packs, *state_dims = launch.state_shape
    outputs.append(((*gates.shape[1:3], 2 * packs, lanes), jnp.float32, launch.gates(2 * packs)))
    if has_state:
        outputs.append(((launch.groups * packs, *state_dims), jnp.float32, launch.state()))
    square = functools.partial(launch.scratch, packs, chunk, lanes)
    values_scratch = launch.scratch(packs, chunk, plan.pack * plan.value_dim, dtype=compute)
    dq, dk, dv, dgates, *dfirst = launch(
        functools.partial(backward_kernel, plan, has_state),
        "gated_delta_rule_backward",
        inputs,
        outputs,
        [
            launch.scratch(*launch.state_shape),
            launch.scratch(chunk, lanes),
            launch.scratch(chunk, lanes),
            launch.columns(1),
            launch.scratch(len(plan.units), 2 * chunk, plan.pack * plan.key_dim, dtype=compute),
            launch.scratch(TILE, packs, lanes),
            square(dtype=plan.inverse),
            square(),
            square(),
            square(),
            values_scratch,
            values_scratch,
            launch.scratch(packs, 2 * chunk, lanes, dtype=compute),
            launch.scratch(3, packs, lanes),
            launch.scratch(packs, plan.pack * plan.value_dim),
        ],
    )

    def apart(x: Array, like: Array, dim: int) -> Array:
        return x.reshape(*like.shape[:3], dim)[..., : like.shape[3]]

    dlog_decay, dbeta = _unpack_gates(plan, dgates)
    return (
        apart(dq, q, plan.key_dim),
        apart(dk, k, plan.key_dim),
        apart(dv, v, plan.value_dim),
        dlog_decay,
        dbeta,
        _unpack_states(plan, dfirst[0], key_dim, value_dim) if dfirst else None,
    )
