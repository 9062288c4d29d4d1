"""The Hopper kernels' adapter: what they can do, and their launches."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels_pallas.gated_delta_rule import mosaic_gpu_kernel as kernels
from kernels_pallas.gated_delta_rule import mosaic_gpu_layout as layout
from kernels_pallas.gated_delta_rule import tiling
from kernels_pallas.gated_delta_rule.batching import folding_vmap
from kernels_pallas.gated_delta_rule.mosaic_gpu_kernel import CHUNK, Plan

_DTYPES = (jnp.bfloat16, jnp.float16)
# Lengths of keys and values; others are filled with zeros up to the next one.
_DIMS = (64, 128, 256)
MAX_DIM = _DIMS[-1]
# In the names of the devices that have the tensor cores and the copy engine of compute capability 9.
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def refusal(q: Array, k: Array, v: Array, inverse_precision: Any) -> str | None:
    """Why the kernels cannot take these operands, or None. Shapes, dtypes and the precision asked for decide."""
    if inverse_precision is not None:
        return f"the kernels invert in float16; got inverse_precision={inverse_precision!r}"
    dtypes = {x.dtype for x in (q, k, v)}
    if len(dtypes) > 1 or dtypes.pop() not in _DTYPES:
        return f"q, k and v must all be bfloat16 or all float16; got {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[-1] > MAX_DIM:
        return f"K must be at most {MAX_DIM}; got {q.shape[-1]}"
    return None


def runs_here() -> bool:
    """Whether what is compiled for, the devices of the mesh in context or JAX's default ones, are Hopper GPUs."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return any(name in device.device_kind for name in _HOPPER)
    return jax.default_backend() == "gpu" and jax.local_devices()[0].compute_capability.startswith("9.")


def interpreted() -> bool:
    """Whether `plgpu.force_gpu_interpret_mode` is on: the kernels then run on a CPU."""
    from jax._src import config

    # One setting for GPUs and TPUs; the parameters tell them apart.
    return isinstance(config.pallas_tpu_interpret_mode_context_manager.value, plgpu.InterpretGPUParams)


def _native(dim: int) -> int:
    return next(native for native in _DIMS if dim <= native)


def make_plan(q: Array, v: Array, *, scale: float, normed: bool) -> Plan:
    """How the work is cut; the operands must have passed `refusal`."""
    return Plan(
        length=-(-q.shape[1] // CHUNK) * CHUNK,
        share=v.shape[2] // q.shape[2],
        key_dim=_native(q.shape[-1]),
        value_dim=_native(v.shape[-1]),
        scale=scale,
        normed=normed,
        compute=jnp.dtype(q.dtype),
        interpreted=interpreted(),
    )


def _launch(
    name: str,
    body: Callable[..., None],
    grid: dict[str, int],
    inputs: Sequence[Array],
    outputs: Sequence[tuple[tuple[int, ...], Any]],
    scratch: dict[str, Any],
    *,
    warpgroups: int,
) -> list[Array]:
    """Runs a kernel on programs of `grid`.

    Args:
        name: as `costs` has it.
        body: of the kernel; it gets references to the inputs, the outputs and, by name, the scratch.
        grid: sizes of its axes, by name; programs start in this order, the last axis being the fastest.
        inputs: arrays.
        outputs: shape and dtype.
        scratch: shared memory and barriers.
        warpgroups: of a program.
    """
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs],
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="warpgroup",
        # As a profiler shows it.
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )
    # Inside `shard_map` the results vary over the mesh axes that the inputs vary over; the kernel does not say so.
    varying = tuple(jax.typeof(inputs[0]).manual_axis_type.varying)
    return [jax.lax.pcast(x, varying, to="varying") if varying else x for x in kernel(*inputs)]


def _cut(plan: Plan, batch: int, value_heads: int, *, gradients: bool = True) -> Plan:
    """The plan with parts and their pieces, for so many sequences, whether or not `gradients` follow."""
    parts = tiling.gpu_parts(plan.chunks, batch * value_heads * plan.slabs)
    pieces = tiling.gpu_pieces(plan.chunks // parts, finer=plan.wide and not gradients)
    return dataclasses.replace(plan, parts=parts, pieces=pieces if parts > 1 else 1)


class Saved(NamedTuple):
    """What the backward pass needs beside the operands.

    Attributes:
        gamma: γ, (B, G, T) float32.
        states: that enter the chunks, every `state_stride`-th one, (B, G, N / stride, V, K) in the dtype of q.
        inverse: T of each chunk, (B, G, T, C) in the dtype of q.
        roots: √β and, where q and k have norms, √β over the length of k, (B, G, T) float32.
        maps: transposed M of each piece, (B, G, P · pieces, 2, K, K) bfloat16, that add up; None where sequences are
            not cut.
        seen: `layout.Visible.backward`, which says which of them have been made; None with them.
    """

    gamma: Array
    states: Array
    inverse: Array
    roots: list[Array]
    maps: Array | None = None
    seen: Array | None = None


def forward(
    plan: Plan,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T G V"],
    log_decay: Float[Array, "B T G"],
    beta: Float[Array, "B T G"],
    initial_state: Float[Array, "B G K V"] | None,
    lengths: layout.Lengths | None,
    *,
    save_states: bool,
) -> tuple[Float[Array, "B T G V"], Float[Array, "B G K V"], Saved | None]:
    """o in the dtype of v, the final state in float32, and what is saved."""
    # Under `vmap` there may be programs enough without parts, but what is saved has its shape from here.
    most = _cut(plan, q.shape[0], v.shape[2])
    most_pieces = most.parts * most.pieces if most.parts > 1 else 0
    operands = (q, k, v, log_decay, beta, initial_state, lengths)
    arrays, tree = jax.tree.flatten(operands)

    def call(*arrays: Array) -> list[Array]:
        return _forward(plan, most_pieces, *jax.tree.unflatten(tree, arrays), save_states=save_states)

    roots = 1 + plan.normed
    results = 2 + (3 + roots + 2 * (most_pieces > 0)) * save_states
    o, final, *saved = folding_vmap(call, [0] * results)(*arrays)
    if not save_states:
        return o, final, None
    gamma, states, inverse, *rest = saved
    return o, final, Saved(gamma, states, inverse, rest[:roots], *rest[roots:])


def _forward(
    plan: Plan,
    most_pieces: int,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    beta: Array,
    initial_state: Array | None,
    lengths: layout.Lengths | None,
    *,
    save_states: bool,
) -> list[Array]:
    batch, value_heads = v.shape[0], v.shape[2]
    plan = _cut(plan, batch, value_heads, gradients=save_states)
    whole_q, whole_k = (layout.whole(plan, x, plan.key_dim) for x in (q, k))
    whole_v = layout.whole(plan, v, plan.value_dim)
    one_over_k = [] if lengths is None else [layout.whole_lengths(plan, lengths.k)]
    gate_shape = ((batch, value_heads, plan.length), jnp.float32)
    inverse, gamma, *roots = _launch(
        "gdn_inverse",
        functools.partial(kernels.inverse_body, plan),
        {"n": plan.chunks, "b": batch, "g": value_heads},
        [whole_k, *(layout.whole_gates(plan, x) for x in (log_decay, beta)), *one_over_k],
        [((batch, value_heads, plan.length, CHUNK), plan.compute), *[gate_shape] * (2 + plan.normed)],
        kernels.inverse_scratch(plan),
        warpgroups=1,
    )
    gates = [gamma, *roots, *layout.scales(plan, lengths)]
    first = None if initial_state is None else layout.turned(plan, initial_state)
    for_parts = []
    if plan.parts > 1:
        stages, scratch = kernels.summary_scratch(plan)
        seen = layout.visible(plan, gamma, has_state=first is not None, save_states=save_states)
        pieces = plan.parts * plan.pieces
        local, maps = _launch(
            "gdn_summary",
            functools.partial(kernels.summary_body, plan, stages),
            {"b": batch, "p": pieces, "g": value_heads, "v": plan.summary_pairs},
            [whole_k, whole_v, inverse, seen.forward, *gates],
            [
                ((batch, value_heads, pieces, plan.value_dim, plan.key_dim), jnp.float32),
                ((batch, value_heads, pieces, 2, plan.key_dim, plan.key_dim), jnp.bfloat16),
            ],
            scratch,
            warpgroups=3,
        )
        first = _ends(plan, maps, local, seen.forward, first, backward=False)
        for_parts = [maps, seen.backward]
    elif first is not None:
        first = first[:, :, None]
    state_shape = (batch, value_heads, plan.parts, plan.value_dim, plan.key_dim)
    outputs = [((batch, plan.length, value_heads, plan.value_dim), plan.compute), (state_shape, jnp.float32)]
    if save_states:
        states = plan.chunks // plan.state_stride
        outputs.append(((batch, value_heads, states, plan.value_dim, plan.key_dim), plan.compute))
    depths, scratch = kernels.forward_scratch(plan)
    o, final, *states = _launch(
        "gdn_forward",
        functools.partial(kernels.forward_body, plan, depths, first is not None, save_states),
        {"b": batch, "p": plan.parts, "g": value_heads, "v": plan.slabs},
        [whole_q, whole_k, whole_v, inverse, *gates, *([] if first is None else [first])],
        outputs,
        scratch,
        warpgroups=3,
    )
    o = o[:, : q.shape[1], :, : v.shape[3]]
    final = final[:, :, -1].swapaxes(2, 3)[:, :, : q.shape[3], : v.shape[3]]
    saved = [gamma, states[0], inverse, *roots] if save_states else []
    if save_states and most_pieces:
        shapes = ((2, plan.key_dim, plan.key_dim), jnp.bfloat16), ((2,), jnp.int32)
        for_parts = for_parts or [
            jnp.zeros((batch, value_heads, 0, *shape), dtype) for shape, dtype in shapes
        ]
        # Not read.
        filling = most_pieces - for_parts[0].shape[2]
        saved += [jnp.pad(x, [(0, filling) if i == 2 else (0, 0) for i in range(x.ndim)]) for x in for_parts]
    return [o, final, *saved]


def _ends(
    plan: Plan, maps: Array, local: Array, seen: Array, given: Array | None, *, backward: bool
) -> Array:
    """The states that enter the parts, or the cotangents of those that leave them, (B, G, P, V, K).

    Args:
        plan: of the launch.
        maps: transposed M of each piece, as `Saved` has them.
        local: what each piece makes of zero, (B, G, P · pieces, V, K).
        seen: as `layout.Visible` has it for this direction; its last column is with what a part's chain begins.
        given: what enters the first part, (B, G, V, K), None being zero; or the cotangent of what leaves the last one.
        backward: which.
    """
    batch, value_heads = maps.shape[:2]
    stages, scratch = kernels.ends_scratch(plan)
    (ends,) = _launch(
        "gdn_lasts" if backward else "gdn_firsts",
        functools.partial(kernels.ends_body, plan, stages, backward, given is not None),
        {"b": batch, "g": value_heads, "v": plan.slabs},
        [maps, local, seen, *([] if given is None else [given])],
        [((batch, value_heads, plan.parts, plan.value_dim, plan.key_dim), jnp.float32)],
        scratch,
        warpgroups=2,
    )
    return ends


def backward(
    plan: Plan,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T G V"],
    initial_state: Float[Array, "B G K V"] | None,
    lengths: layout.Lengths | None,
    saved: Saved,
    do: Float[Array, "B T G V"],
    dfinal_state: Float[Array, "B G K V"] | None,
) -> tuple[Array, Array, Array, Array, Array, Array | None]:
    """Cotangents of q, k, v, log_decay, beta and the initial state, if there is one; `dfinal_state` None is zero."""
    operands = (q, k, v, lengths, saved, do, dfinal_state)
    arrays, tree = jax.tree.flatten(operands)

    def call(*arrays: Array) -> list[Array]:
        return _backward(plan, *jax.tree.unflatten(tree, arrays))

    dq, dk, dv, dlog_decay, dbeta, dinitial_state = folding_vmap(call, [0] * 6)(*arrays)
    return dq, dk, dv, dlog_decay, dbeta, None if initial_state is None else dinitial_state


def _backward(
    plan: Plan,
    q: Array,
    k: Array,
    v: Array,
    lengths: layout.Lengths | None,
    saved: Saved,
    do: Array,
    dfinal_state: Array | None,
) -> list[Array]:
    batch, key_heads, value_heads = q.shape[0], q.shape[2], v.shape[2]
    plan = _cut(plan, batch, value_heads)
    gates = [saved.gamma, *saved.roots, *layout.scales(plan, lengths)]
    whole_q, whole_k = (layout.whole(plan, x, plan.key_dim) for x in (q, k))
    whole_v, whole_do = (layout.whole(plan, x.astype(v.dtype), plan.value_dim) for x in (v, do))
    stages, copies, scratch = kernels.walk_scratch(plan)

    def walk(
        name: str, parts: int, outputs: list[Any], *, seen: Array | None = None, lasts: Array | None = None
    ) -> list[Array]:
        local = seen is not None
        operands = [whole_q, whole_k, whole_do, saved.inverse, *gates]
        return _launch(
            name,
            functools.partial(kernels.backward_walk_body, plan, stages, copies, local, lasts is not None),
            {"b": batch, "p": parts, "g": value_heads, "v": plan.slabs},
            [*([] if seen is None else [seen]), *operands, *([] if lasts is None else [lasts])],
            [*outputs, ((batch, value_heads, parts, plan.value_dim, plan.key_dim), jnp.float32)],
            scratch,
            warpgroups=3,
        )

    lasts = last = None if dfinal_state is None else layout.turned(plan, dfinal_state)
    if plan.parts > 1:
        assert saved.maps is not None
        assert saved.seen is not None
        (entered,) = walk("gdn_local_walk", plan.parts * plan.pieces, [], seen=saved.seen)
        lasts = _ends(plan, saved.maps, entered, saved.seen, last, backward=True)
    elif last is not None:
        lasts = last[:, :, None]
    dv, dstates, dfirst = walk(
        "gdn_walk",
        plan.parts,
        [
            ((batch, plan.length, value_heads, plan.value_dim), plan.compute),
            ((batch, value_heads, plan.chunks, plan.value_dim, plan.key_dim), plan.compute),
        ],
        lasts=lasts,
    )
    blocks = plan.key_dim // plan.key_block
    key_places, stages, scratch = kernels.gradients_scratch(plan)
    run = tiling.gpu_run(plan.chunks, plan.state_stride, batch * value_heads * blocks)
    key_shape = (batch, plan.length, value_heads, plan.key_dim)
    gate_shape = (blocks, batch, value_heads, plan.length)
    dq, dk, dlog_decay, dbeta = _launch(
        "gdn_gradients",
        functools.partial(kernels.gradients_body, plan, key_places, stages, run),
        {"n": plan.chunks // run, "b": batch, "g": value_heads, "k": blocks},
        [whole_q, whole_k, whole_v, whole_do, dv, saved.inverse, saved.states, dstates, *gates],
        [
            (key_shape, plan.compute),
            (key_shape, plan.compute),
            (gate_shape, jnp.float32),
            (gate_shape, jnp.float32),
        ],
        scratch,
        warpgroups=3,
    )
    length = q.shape[1]

    def to_key_heads(dx: Array, x: Array, one_over: Array | None) -> Array:
        """Value heads of a key head add up; float32, so that their number does not matter."""
        dx = dx[:, :length, :, : q.shape[3]]
        if blocks == 1:
            # The kernel has done all of eq. (27).
            one_over = None
        if plan.share == 1 and one_over is None:
            return dx
        summed = jnp.sum(dx.reshape(*dx.shape[:2], key_heads, plan.share, -1).astype(jnp.float32), axis=3)
        if one_over is not None:
            long = x.astype(jnp.float32)
            along = jnp.sum(long * summed, axis=-1) * jnp.square(one_over.transpose(0, 2, 1))
            summed = summed - long * along[..., None]
        return summed.astype(dx.dtype)

    def to_tokens(y: Array) -> Array:
        return y.transpose(0, 2, 1)[:, :length]

    one_over_q, one_over_k = (None, None) if lengths is None else lengths
    return [
        to_key_heads(dq, q, one_over_q),
        to_key_heads(dk, k, one_over_k),
        dv[:, :length, :, : v.shape[3]],
        # Blocks of K have a part of the one each, and all of the other.
        to_tokens(jnp.sum(dlog_decay, axis=0)),
        to_tokens(dbeta[0]),
        dfirst[:, :, 0].swapaxes(2, 3)[:, :, : q.shape[3], : v.shape[3]],
    ]
