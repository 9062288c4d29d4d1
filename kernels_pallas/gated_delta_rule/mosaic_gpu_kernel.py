"""Kernel bodies for Hopper GPUs (Pallas Mosaic GPU): four launches, two of which walk the chunks of a head in order.

README.md derives the algorithm; comments cite its equation numbers. `inverse_body` (one chunk a program) makes T of
every chunk. `forward_body` walks the chunks with the state in registers. `backward_walk_body` walks them from the last
to the first with the cotangent of the state in registers and makes dv. `gradients_body` (some chunks a program) makes
the rest from the states and their cotangents. Where a sequence is cut into parts, `summary_body` finds what they do to
a state, `backward_walk_body` what they do to a cotangent, and `ends_body` puts that together.

States are kept transposed, (V, K): a warpgroup's matmul takes its left operand from registers and its right one
from shared memory, so the walk never waits for its own state to get there. 64 columns of V fill the 64 rows of a
tensor core instruction, and every 64 columns are a program of their own.

A program is a few warpgroups, one of which only moves memory; they meet at barriers. Every warpgroup waits for all
others before it ends: one that ends early, while another still issues matmuls, can fail the launch (jax 0.11.2).

Gates come as γ, sums of log₂ α from a chunk's start, and √β, both (B, G, T) float32; where q and k have norms, with
√β over the length of k and the scale over the length of q, both (B, G, T). A new document is a token whose log₂ α is
so small that 2 to it is 0. Exponents are differences of γ within a chunk that are at most 0, masked before the power.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Tokens of a chunk, and columns of V of a program: the rows of a warpgroup's matmul.
CHUNK = 64
# Shared memory that a program may ask for.
SMEM_BYTES = 227 * 1024
# Of it, the compiler's own: sums across warps, barriers.
_SMEM_RESERVED = 3072

# A tensor core's sums. Pallas' typing stubs leave it out, and call the transforms of `tiled` abstract.
_SUMS = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
_TILE = plgpu.Layout.WGMMA
# One value for each row, or for each column, of a tile.
_ROWS = _TILE.reduce(1)
_COLUMNS = _TILE.reduce(0)
_SQUARE = (CHUNK, CHUNK)
_FLOAT = jnp.float32
_LOG2_E = math.log2(math.e)
# 2 to it is 0 in float32, and sums of 64 of it are still exact to 1e-3: what forgets, forgets all.
_FORGET_LOG2 = -160.0
# β = 0 would lose what dβ is divided by. The root of this, times a cosine of keys, is still a normal float16
# number, and less than this writes nothing that bfloat16 could hold.
_LEAST_BETA = 2.0**-24
# Registers of a thread: one warpgroup that moves memory, two that compute. A program of three has 3 · 168 to share, the
# 65,536 of an SM in steps of 8: one that asks for more waits for ever.
_MOVER_REGISTERS = 40
_COMPUTE_REGISTERS = 232
assert _MOVER_REGISTERS + 2 * _COMPUTE_REGISTERS <= 3 * 168


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fixed when a kernel is traced.

    Attributes:
        length: T, a multiple of `CHUNK`.
        share: value heads of a key head.
        key_dim: K.
        value_dim: V.
        scale: of the output.
        normed: whether q and k are to be divided by their lengths, eq. (27).
        compute: dtype of q, k, v: what the tensor cores take.
        interpreted: whether the kernels run on a CPU.
        parts: into which the walks cut a sequence, of as many chunks each: programs of their own.
        pieces: into which a part is cut where what it does to a state is looked for.
    """

    length: int
    share: int
    key_dim: int
    value_dim: int
    scale: float
    normed: bool
    compute: Any
    interpreted: bool
    parts: int = 1
    pieces: int = 1

    @property
    def chunks(self) -> int:
        """N."""
        return self.length // CHUNK

    @property
    def part_chunks(self) -> int:
        """Of these, how many a part has."""
        return self.chunks // self.parts

    @property
    def piece_chunks(self) -> int:
        """And how many a piece has."""
        return self.part_chunks // self.pieces

    @property
    def summary_pairs(self) -> int:
        """Programs of `summary_body` for a piece: V + K columns, 2 · 64 each."""
        return -(-(self.value_dim + self.key_dim) // (2 * CHUNK))

    @property
    def slabs(self) -> int:
        """How many times 64 columns V has."""
        return self.value_dim // CHUNK

    @property
    def wide(self) -> bool:
        """Whether a state and its copy in the compute dtype do not fit the registers of a warpgroup."""
        return self.key_dim > 128

    @property
    def state_stride(self) -> int:
        """Chunks for each state that is saved."""
        return state_stride(self.chunks, self.key_dim, self.value_dim)

    @property
    def key_block(self) -> int:
        """Keys' columns whose gradients a program can hold in registers."""
        return min(self.key_dim, 128)


def state_stride(chunks: int, key_dim: int, value_dim: int) -> int:
    """Chunks for each state that is saved, of which they are a multiple.

    The gradients make the others, where there is room for it. With 2, 4, 8, 16 the forward pass takes 130, 117, 109,
    106 µs (166 with 1) and the gradients 279, 270, 277, 275 (B 4, T 4,096, H 16, K = V = 128); with 2, 4, 8 at
    T = 16,384 133, 119, 111 and 286, 297, 300; with 2 and 8 at K = V = 64 66, 63 and 137, 145.
    """
    return math.gcd(chunks, 8) if key_dim <= 128 and value_dim <= 128 else 1


def tiled(shape: tuple[int, ...], dtype: Any, *, columns: int | None = None) -> Any:
    """Shared memory in the order that the copy engine and the tensor cores want.

    With `columns` so many are next to each other in memory, and can be taken for themselves.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle((columns or shape[-1]) * size * 8)
    order = (
        plgpu.TilingTransform((8, swizzle // size)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=order)


def plain(*shape: int) -> Any:
    """Shared memory of float32 in the order of the indices."""
    return plgpu.SMEM(shape, _FLOAT)


def _dot(plan: "Plan", a: Any, b: Any, onto: jax.Array | None = None) -> jax.Array:
    """a @ b, plus `onto`: a from registers or shared memory, b from shared memory, float32 sums.

    The barrier makes what follows depend on the wait: without it the compiler may read the sums too early.
    """
    if plan.interpreted:
        # The interpreter's tensor cores know no left operand in registers, nor sums that begin with something.
        left, right = (x if isinstance(x, jax.Array) else plgpu.load(x) for x in (a, b))
        # Reads of tensor cores, unlike those of threads, need no fence before the copy engine writes again.
        plgpu.commit_smem()
        product = jnp.dot(left, right, preferred_element_type=_FLOAT)
        return product if onto is None else onto + product
    if onto is None:

        def multiply(sums: Any) -> jax.Array:
            plgpu.wgmma(sums, a, b)
            return sums[...]

        result = pl.run_scoped(multiply, _SUMS((a.shape[0], b.shape[1]), _FLOAT))
    else:
        result = pl.run_state(lambda sums: plgpu.wgmma(sums, a, b))(_SUMS.init(onto))
    return lax.optimization_barrier(result)


def _dots(
    plan: "Plan", *products: tuple[Any, ...], meanwhile: Callable[[], Any] = lambda: None
) -> tuple[Any, ...]:
    """Independent products (a, b) or (a, b, onto) at once, as `_dot` does one, and what `meanwhile` returns.

    The tensor cores work while the threads do `meanwhile`. It must return nothing where there is an `onto`.
    """
    if plan.interpreted:
        return *(_dot(plan, *product) for product in products), meanwhile()
    shapes = [(a.shape[0], b.shape[1]) for a, b, *_ in products]
    if all(len(product) == 2 for product in products):

        def multiply(*sums: Any) -> tuple[Any, ...]:
            for onto, (a, b) in zip(sums, products, strict=True):
                plgpu.wgmma(onto, a, b)
            extra = meanwhile()
            return *(onto[...] for onto in sums), extra

        *results, extra = pl.run_scoped(multiply, *(_SUMS(shape, _FLOAT) for shape in shapes))
    else:

        def accumulate(sums: Any) -> None:
            for onto, (a, b, *_) in zip(sums, products, strict=True):
                plgpu.wgmma(onto, a, b)
            meanwhile()

        first = [
            product[2] if len(product) == 3 else _zeros(shape[1])
            for product, shape in zip(products, shapes, strict=True)
        ]
        results, extra = pl.run_state(accumulate)([_SUMS.init(x) for x in first]), None
    return *lax.optimization_barrier(tuple(results)), extra


def _sums(plan: "Plan", *sums: tuple[Any, Any]) -> list[jax.Array]:
    """Independent sums (onto, [(a, b), ...]) at once: each is `onto`, or zero where it is None, plus all a @ b."""
    work = [(onto, list(products)) for onto, products in sums]
    shapes = [(products[0][0].shape[0], products[0][1].shape[1]) for _, products in work]
    if plan.interpreted:
        results = []
        for onto, products in work:
            for a, b in products:
                onto = _dot(plan, a, b, onto)
            results.append(onto)
        return results

    def multiply(refs: Any) -> None:
        for ref, (_, products) in zip(refs, work, strict=True):
            for a, b in products:
                plgpu.wgmma(ref, a, b)

    if all(onto is None for onto, _ in work):

        def fresh(*refs: Any) -> list[jax.Array]:
            multiply(refs)
            return [ref[...] for ref in refs]

        results = pl.run_scoped(fresh, *(_SUMS(shape, _FLOAT) for shape in shapes))
    else:
        first = [
            _zeros(shape[1]) if onto is None else onto for (onto, _), shape in zip(work, shapes, strict=True)
        ]
        results = pl.run_state(multiply)([_SUMS.init(x) for x in first])
    return list(lax.optimization_barrier(tuple(results)))


def _nothing_yet() -> Any:
    """For sums: the first product begins one, which zeros in registers would not be free for."""
    return None


def _load(ref: Any, layout: Any = _TILE) -> jax.Array:
    return plgpu.load(ref, layout=layout)


def _load_state(ref: Any) -> jax.Array:
    """A state (columns of V, K) from device memory.

    Inside `shard_map` what is loaded varies over mesh axes by its type, and what is computed in a kernel does not:
    a loop must not begin with the one and go on with the other. The compiler removes the product.
    """
    return plgpu.load(ref, layout=_TILE, optimized=False) * 1.0


def _load_count(ref: Any) -> jax.Array:
    """A number from device memory, as `_load_state` loads a state."""
    return ref[...] * 1


def _gate_refs(plan: Plan, refs: list[Any]) -> tuple[Any, Any, Any, Any]:
    """γ, √β, √β over the length of k, and the scale over that of q, taken from the front; the last two if there are."""
    gamma, root = refs.pop(0), refs.pop(0)
    return (gamma, root, refs.pop(0), refs.pop(0)) if plan.normed else (gamma, root, None, None)


def _down(row_values: jax.Array, columns: int = CHUNK) -> jax.Array:
    """One value for each row, repeated along it."""
    return lax.broadcast_in_dim(row_values, (CHUNK, columns), [0])


def _across(column_values: jax.Array) -> jax.Array:
    """One value for each column, repeated down it."""
    return lax.broadcast_in_dim(column_values, _SQUARE, [1])


def _indices(gamma: Any) -> tuple[jax.Array, jax.Array]:
    """(row, column) of every entry of a tile.

    Made anew from `gamma` (or log₂ α), a chunk's in shared memory: what does not change from chunk to chunk, such as a
    mask, would be kept in registers that are not there.
    """
    # γ is at most 0, which the compiler does not know.
    zero = jnp.where(gamma[0] > 1.0, 1, 0)
    row, column = (plgpu.broadcasted_iota(jnp.int32, _SQUARE, axis, layout=_TILE) for axis in (0, 1))
    return row + zero, column + zero


def _decay_between(rows: Any, columns: Any) -> jax.Array:
    """E_ij = 2^(γ_i − γ_j) where i ≥ j, else 0, from a chunk's γ in shared memory, twice."""
    row, column = _indices(rows)
    difference = _down(_load(rows, _ROWS)) - _across(_load(columns, _COLUMNS))
    return jnp.exp2(jnp.where(row >= column, difference, -jnp.inf))


def _zeros(columns: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((CHUNK, columns), _FLOAT), _TILE)


def _put(ref: Any, x: jax.Array) -> None:
    """Writes to device memory what does not fill whole sectors of 32 bytes there, row by row."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:  # jax 0.11
        ref[...] = x


def _end_together(ended: Any) -> None:
    plgpu.barrier_arrive(ended)
    plgpu.barrier_wait(ended)


def _pipeline(
    count: int, stages: int, free: Any, issue: Callable[[Any, Any], None], skipped: Any = 0
) -> None:
    """The mover's loop: asks for item n of `count` as soon as the slot of item n − stages is free.

    It begins at item `skipped`, in slot 0.
    """
    for n in range(min(stages, count)):
        pl.when(skipped + n < count)(functools.partial(issue, skipped + n, n))

    @pl.loop(stages, count - skipped)
    def _refill(n: Any) -> None:
        slot = lax.rem(n, stages)
        plgpu.barrier_wait(free.at[slot])
        issue(skipped + n, slot)

    _wait_for_last(count, stages, free, skipped)


def _wait_for_last(count: int, slots: int, barrier: Any, skipped: Any = 0) -> None:
    """Waits until the last items of `count`, all but `skipped`, have left their slots."""
    for slot in range(min(slots, count)):
        pl.when(skipped + slot < count)(functools.partial(plgpu.barrier_wait, barrier.at[slot]))


# T of every chunk ---------------------------------------------------------------------------------------------------

# Rows of a warp in a tile, and so of the diagonal blocks of T that are made first.
_WARP_ROWS = 16
# Value heads whose gates a program gets at once, being next to each other: the copy engine moves no fewer bytes.
GATE_HEADS = 8
# What a program has for each token, in shared memory and read by rows.
_INVERSE_ROWS = ("gamma", "root", "key_root", "one_over_k")


def _strips(x: jax.Array) -> list[jax.Array]:
    """The columns of x, `_WARP_ROWS` at a time."""
    return [
        lax.slice(x, (0, start), (CHUNK, start + _WARP_ROWS)) for start in range(0, x.shape[1], _WARP_ROWS)
    ]


def inverse_scratch(plan: Plan) -> dict[str, Any]:
    """Shared memory of `inverse_body`. With K = 128 there is room for five programs, and not for 1 KiB more of each."""
    strip = (CHUNK, _WARP_ROWS)
    return {
        "k": tiled((CHUNK, plan.key_dim), plan.compute),
        "log_decay": tiled((CHUNK, GATE_HEADS), _FLOAT),
        "beta": tiled((CHUNK, GATE_HEADS), _FLOAT),
        "rows": plain(len(_INVERSE_ROWS), CHUNK),
        "columns": plain(2, CHUNK),
        "a": tiled(_SQUARE, jnp.float16, columns=_WARP_ROWS),
        "diagonal": tiled(strip, jnp.float16),
        "inverse": tiled(strip, jnp.float16),
        "result": tiled(_SQUARE, plan.compute, columns=_WARP_ROWS),
        "gates_came": plgpu.Barrier(num_arrivals=2 + plan.normed),
        "came": plgpu.Barrier(),
    }


def inverse_body(plan: Plan, k_ref: Any, log_decay_ref: Any, beta_ref: Any, *refs: Any, **s: Any) -> None:
    """T of eq. (24) of one chunk by doubling, eq. (9): (B, G, T, C) in the compute dtype.

    And from log α and β, (B, T, G), the gates as the others want them, (B, G, T): γ, √β and, with norms, √β over the
    length of k. XLA would take two launches to lay these out, and there is a pause after the first one of a program.

    The 16 rows of a warp have one of the four diagonal blocks of 16 × 16. As long as nothing else is needed, these are
    a strip of 64 × 16, and a product of two of them is four products, each of whose left operands is zero but for one
    warp: a quarter of the registers, and of the instructions, of tiles of 64 × 64.

    In float16: with unit keys and β ≤ 2 no entry of it, nor of the inverse of any diagonal block, nor of the products
    on the way is larger than 2, and float16 keeps three bits more than bfloat16.
    """
    outputs = list(refs)
    lengths_ref = outputs.pop(0) if plan.normed else None
    inverse_ref = outputs.pop(0)
    b, n, g = lax.axis_index("b"), lax.axis_index("n"), lax.axis_index("g")
    h = lax.div(g, plan.share)
    # From the last chunks of the parts to the first ones, which the walks want first: they are still in the L2 cache.
    chunk = lax.rem(n, plan.parts) * plan.part_chunks + plan.part_chunks - 1 - lax.div(n, plan.parts)
    tokens = pl.ds(chunk * CHUNK, CHUNK)
    among = lax.rem(g, GATE_HEADS)
    heads = pl.ds(lax.div(g, GATE_HEADS) * GATE_HEADS, GATE_HEADS)
    for ref, name in ((log_decay_ref, "log_decay"), (beta_ref, "beta")):
        plgpu.copy_gmem_to_smem(ref.at[b, tokens, heads], s[name], s["gates_came"])

    def kept(name: str) -> Any:
        return s["rows"].at[_INVERSE_ROWS.index(name)]

    if lengths_ref is not None:
        plgpu.copy_gmem_to_smem(lengths_ref.at[b, h, tokens], kept("one_over_k"), s["gates_came"])
    plgpu.copy_gmem_to_smem(k_ref.at[b, tokens, h], s["k"], s["came"])

    def of_head(name: str) -> jax.Array:
        head = plgpu.broadcasted_iota(jnp.int32, (CHUNK, GATE_HEADS), 1, layout=_TILE)
        return jnp.sum(jnp.where(head == among, _load(s[name]), 0.0), axis=1)

    row_index, column_index = (
        plgpu.broadcasted_iota(jnp.int32, _SQUARE, axis, layout=_TILE) for axis in (0, 1)
    )
    plgpu.barrier_wait(s["gates_came"])
    log2, starts = (s["columns"].at[i] for i in range(2))
    log2[...] = jnp.maximum(of_head("log_decay") * _LOG2_E, _FORGET_LOG2)
    root = jnp.sqrt(jnp.maximum(of_head("beta"), _LEAST_BETA))
    plgpu.commit_smem()
    gamma = jnp.sum(jnp.where(row_index >= column_index, _across(_load(log2, _COLUMNS)), 0.0), axis=1)
    kept("gamma")[...] = gamma
    kept("root")[...] = root
    if plan.normed:
        root = root * _load(kept("one_over_k"), _ROWS)
        kept("key_root")[...] = root
    exponent = jnp.log2(root)
    starts[...] = gamma - exponent
    ends = gamma + exponent
    plgpu.commit_smem()
    for name, ref in zip(("gamma", "root", "key_root"), outputs, strict=False):
        plgpu.copy_smem_to_gmem(kept(name), ref.at[b, g, tokens])

    plgpu.barrier_wait(s["came"])

    def prepare() -> jax.Array:
        # √β_i E_ij √β_j is one power. Only what lies below the diagonal is used. New indices: a fifth program fits.
        row_index, column_index = _indices(kept("gamma"))
        exponents = _down(ends) - _across(_load(starts, _COLUMNS))
        return jnp.exp2(jnp.where(row_index > column_index, exponents, -jnp.inf))

    # Eq. (24).
    a, decay = _dots(plan, (s["k"], s["k"].T), meanwhile=prepare)
    a = a * decay
    row_index, column_index = (
        plgpu.broadcasted_iota(jnp.int32, (CHUNK, _WARP_ROWS), axis, layout=_TILE) for axis in (0, 1)
    )
    warp, row_index = lax.shift_right_logical(row_index, 4), lax.bitwise_and(row_index, _WARP_ROWS - 1)
    # Two float16 numbers are multiplied at once, and selected one by one.
    ones = [jnp.where(warp == i, 1.0, 0.0).astype(jnp.float16) for i in range(4)]

    def only(which: int, x: jax.Array) -> jax.Array:
        return x * ones[which]

    def rows(ref: Any, which: int) -> Any:
        return ref.at[pl.ds(which * _WARP_ROWS, _WARP_ROWS)]

    def blocks(x: jax.Array) -> jax.Array:
        """The tile of which x is the strip."""
        return lax.concatenate([only(i, x) for i in range(4)], 1)

    diagonal = functools.reduce(
        lambda x, i: jnp.where(warp == i, _strips(a)[i], x), range(1, 4), _strips(a)[0]
    )
    s["a"][...] = a.astype(jnp.float16)
    s["diagonal"][...] = diagonal.astype(jnp.float16)
    apart = lax.bitwise_xor(row_index, column_index)
    # Blocks of two: 1 on the diagonal, −A below it.
    inverse = jnp.where(apart == 0, 1.0, jnp.where(apart == 1, diagonal * -1.0, 0.0))
    for block in (2, 4, 8):
        low = inverse.astype(jnp.float16)
        s["inverse"][...] = low
        plgpu.commit_smem()
        (product,) = _sums(plan, (None, [(blocks(low), s["diagonal"])]))
        # Of it only the corners count: in different blocks of `block` and in the same of twice as many.
        corners = jnp.where((apart >= block) & (apart < 2 * block), product * -1.0, 0.0).astype(jnp.float16)
        (inverse,) = _sums(plan, (inverse, [(blocks(corners), s["inverse"])]))
    low = inverse.astype(jnp.float16)
    s["inverse"][...] = low
    plgpu.commit_smem()

    def corner(row: int, columns: int, width: int) -> Any:
        return rows(s["a"], row).at[:, pl.ds(columns * _WARP_ROWS, width)]

    # Blocks of 32 have a corner of 16 × 16 in the second and in the fourth warp,
    (product,) = _sums(plan, (None, [(only(i, low), corner(i, i - 1, _WARP_ROWS)) for i in (1, 3)]))
    product = (product * -1.0).astype(jnp.float16)
    (small,) = _sums(plan, (None, [(only(i, product), rows(s["inverse"], i - 1)) for i in (1, 3)]))
    small_low = small.astype(jnp.float16)
    # Nobody wants what was there any more.
    s["diagonal"][...] = small_low
    plgpu.commit_smem()
    # and the whole one of 32 × 32, in the last two warps.
    left = jnp.where(warp == 2, low, only(3, small_low)), only(3, low)
    (product,) = _sums(
        plan, (None, [(x, corner(i, 0, 2 * _WARP_ROWS)) for i, x in zip((2, 3), left, strict=True)])
    )
    first, second = _strips((product * -1.0).astype(jnp.float16))
    large = _sums(
        plan,
        (None, [(first, rows(s["inverse"], 0)), (second, rows(s["diagonal"], 1))]),
        (None, [(second, rows(s["inverse"], 1))]),
    )
    strips = (
        jnp.where(warp == 0, inverse, jnp.where(warp == 1, small, large[0])),
        jnp.where(warp == 1, inverse, large[1]),
        jnp.where(warp == 2, inverse, jnp.where(warp == 3, small, 0.0)),
        jnp.where(warp == 3, inverse, 0.0),
    )
    for i, strip in enumerate(strips):
        s["result"].at[:, pl.ds(i * _WARP_ROWS, _WARP_ROWS)][...] = strip.astype(plan.compute)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(s["result"], inverse_ref.at[b, g, tokens])
    plgpu.wait_smem_to_gmem(0)


# Forward ------------------------------------------------------------------------------------------------------------


def _smem_bytes(scratch: dict[str, Any]) -> int:
    """What the compiler takes for it: every buffer starts at a multiple of 1024 bytes."""
    sizes = [
        math.prod(buffer.shape) * jnp.dtype(buffer.dtype).itemsize
        for buffer in scratch.values()
        if not isinstance(buffer, plgpu.Barrier)
    ]
    return sum(-(-size // 1024) * 1024 for size in sizes)


def _fits(scratch: dict[str, Any]) -> bool:
    return _smem_bytes(scratch) <= SMEM_BYTES - _SMEM_RESERVED


def _most_stages(most: int, scratch: Callable[[int], dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    """The most stages, up to `most`, that fit the shared memory, and their `scratch`."""
    for stages in range(most, 1, -1):
        if _fits(scratch(stages)):
            return stages, scratch(stages)
    return 1, scratch(1)


def _missing(
    plan: Plan,
    state: Any,
    k: Any,
    v: Any,
    gates: tuple[Any, Any, Any],
    meanwhile: Callable[[], None] = lambda: None,
    has_values: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """√β (V − e^γ K S) of eq. (24), transposed, in the compute dtype; γ; and the root that V' has.

    Args:
        plan: of the launch.
        state: S in the compute dtype, (columns of V, K), in registers or shared memory.
        k: keys of the chunk, in shared memory as all that follows.
        v: its values, (C, columns of V).
        gates: γ, √β and, with norms, that over the length of k.
        meanwhile: what is to be done besides while the tensor cores work.
        has_values: a number that v is multiplied by; None is 1.
    """
    gamma_ref, root_ref, key_root_ref = gates

    def prepare() -> tuple[jax.Array, ...]:
        meanwhile()
        gamma, root = _load(gamma_ref, _COLUMNS), _load(root_ref, _COLUMNS)
        offered = _load(v.T).astype(_FLOAT) * _across(root if has_values is None else root * has_values)
        if key_root_ref is not None:
            root = _load(key_root_ref, _COLUMNS)
        return offered, root * jnp.exp2(gamma), gamma, root

    recalled, (offered, taking, gamma, root) = _dots(plan, (state, k.T), meanwhile=prepare)
    return (offered - recalled * _across(taking)).astype(plan.compute), gamma, root


def summary_scratch(plan: Plan) -> tuple[int, dict[str, Any]]:
    """(stages, shared memory) of `summary_body`."""

    def scratch(stages: int) -> dict[str, Any]:
        buffers = {
            "k": tiled((stages, CHUNK, plan.key_dim), plan.compute),
            "v": tiled((stages, 2, CHUNK, CHUNK), plan.compute),
            "inverse": tiled((stages, CHUNK, CHUNK), plan.compute),
            "gamma": plain(stages, CHUNK),
            "root": plain(stages, CHUNK),
            "came": plgpu.Barrier(num_arrivals=6 + plan.normed, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "ended": plgpu.Barrier(num_arrivals=3),
        }
        if plan.wide:
            buffers["state"] = tiled((2, CHUNK, plan.key_dim), plan.compute)
        if plan.normed:
            buffers["key_root"] = plain(stages, CHUNK)
        return buffers

    return _most_stages(4, scratch)


def summary_body(plan: Plan, stages: int, *refs: Any, **s: Any) -> None:
    """What a piece does to the state that enters it, eq. (16).

    The state that leaves it if zero enters, (B, G, P · pieces, V, K) float32, and the transposed M of eq. (17), as two
    bfloat16 whose sum it is, (B, G, P · pieces, 2, K, K): that is the states of K more values, all zero, that begin as
    the identity. A program has 2 · 64 of these V + K columns, and reads no queries.

    It begins at the chunk that the input says; where that is the end of the piece, nobody will ask, and it writes
    nothing.
    """
    k_ref, v_ref, inverse_ref, begins_ref, *rest = refs
    gamma_ref, root_ref, key_root_ref, _ = _gate_refs(plan, rest)
    local_ref, maps_ref = rest
    b, piece, g, pair = (lax.axis_index(name) for name in ("b", "p", "g", "v"))
    h = lax.div(g, plan.share)
    warpgroup = lax.axis_index("warpgroup")
    count, first_chunk = plan.piece_chunks, piece * plan.piece_chunks
    begins = _load_count(begins_ref.at[b, g, piece, pair])

    @pl.when(warpgroup == 2)
    def _move() -> None:
        plgpu.set_max_registers(_MOVER_REGISTERS, action="decrease")

        def issue(n: Any, slot: Any) -> None:
            tokens, came = pl.ds((first_chunk + n) * CHUNK, CHUNK), s["came"].at[slot]
            sources = [
                (k_ref.at[b, tokens, h], s["k"].at[slot]),
                (inverse_ref.at[b, g, tokens], s["inverse"].at[slot]),
                (gamma_ref.at[b, g, tokens], s["gamma"].at[slot]),
                (root_ref.at[b, g, tokens], s["root"].at[slot]),
            ]
            if plan.normed:
                sources.append((key_root_ref.at[b, g, tokens], s["key_root"].at[slot]))
            for i in range(2):
                # Beyond the last columns of v they are not used.
                slab = lax.min(2 * pair + i, plan.slabs - 1)
                sources.append((v_ref.at[b, tokens, g, pl.ds(slab * CHUNK, CHUNK)], s["v"].at[slot, i]))
            for source, target in sources:
                plgpu.copy_gmem_to_smem(source, target, came)

        _pipeline(count, stages, s["free"], issue, begins)

    @pl.when(warpgroup < 2)
    def _walk() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        slab = 2 * pair + warpgroup
        map_row = slab * CHUNK - plan.value_dim
        row, column = (
            plgpu.broadcasted_iota(jnp.int32, (CHUNK, plan.key_dim), axis, layout=_TILE) for axis in (0, 1)
        )
        # An M that does not begin at the first chunk is not asked for; the states' zeros are right everywhere.
        first = jnp.where(row + map_row == column, 1.0, 0.0)
        has_values = jnp.where(slab < plan.slabs, 1.0, 0.0)

        def step(n: Any, state: jax.Array) -> jax.Array:
            slot = lax.rem(n - begins, stages)
            plgpu.barrier_wait(s["came"].at[slot])
            low = state.astype(plan.compute)
            if plan.wide:
                s["state"].at[warpgroup][...] = low
                plgpu.commit_smem()
                low = s["state"].at[warpgroup]

            missing, gamma, root = _missing(
                plan,
                low,
                s["k"].at[slot],
                s["v"].at[slot, warpgroup],
                (s["gamma"].at[slot], s["root"].at[slot], s["key_root"].at[slot] if plan.normed else None),
                has_values=has_values,
            )

            def fade() -> tuple[jax.Array, ...]:
                last = s["gamma"][slot, CHUNK - 1]
                return jnp.exp2(last - gamma) * root, state * jnp.exp2(last)

            written, (fading, kept) = _dots(plan, (missing, s["inverse"].at[slot].T), meanwhile=fade)
            state = _dot(plan, (written * _across(fading)).astype(plan.compute), s["k"].at[slot], kept)
            plgpu.barrier_arrive(s["free"].at[slot])
            return state

        state = lax.fori_loop(begins, count, step, first)

        @pl.when((begins < count) & (slab < plan.slabs))
        def _() -> None:
            local_ref.at[b, g, piece, pl.ds(slab * CHUNK, CHUNK)][...] = state

        @pl.when((begins < count) & (map_row >= 0) & (map_row < plan.key_dim))
        def _() -> None:
            for half, x in enumerate(_halves(state)):
                _put(maps_ref.at[b, g, piece, half, pl.ds(map_row, CHUNK)], x)

    _end_together(s["ended"])


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two bfloat16 whose sum has 16 bits of x.

    The first is x cut off. Rounded, number by number, it would go through the slow unit that converts them: 0.3 to
    0.4 µs of a step's 2.6 in `ends_body`.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-0x10000)
    high = lax.bitcast_convert_type(bits, _FLOAT)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def ends_scratch(plan: Plan) -> tuple[int, dict[str, Any]]:
    """(stages, shared memory) of `ends_body`."""

    def scratch(stages: int) -> dict[str, Any]:
        return {
            "high": tiled((stages, CHUNK, plan.key_block), jnp.bfloat16),
            "low": tiled((stages, CHUNK, plan.key_block), jnp.bfloat16),
            "state_high": tiled((2, CHUNK, plan.key_dim), jnp.bfloat16),
            "state_low": tiled((2, CHUNK, plan.key_dim), jnp.bfloat16),
            "came": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "free": plgpu.Barrier(num_barriers=stages),
            "ended": plgpu.Barrier(num_arrivals=2),
        }

    return _most_stages(4, scratch)


def ends_body(plan: Plan, stages: int, backward: bool, has_state: bool, *refs: Any, **s: Any) -> None:
    """The states that enter the parts, or the cotangents of those that leave them, (B, G, P, V, K), by eq. (17).

    Of each piece it gets M, transposed, as two of bfloat16, and the state that leaves it if zero enters; or, backward,
    the cotangent of what enters it if that of what leaves it is zero. And of each part with what to begin: 0, and its
    pieces, one after the other, change what enters it; or n, and it is what the n-th piece makes of zero that the
    pieces after it change: of what enters the part nothing is left.

    States, in shared memory, are two of bfloat16, too: 16 bits. Of the four products only that of the small halves is
    left out.
    """
    maps_ref, local_ref, starts_ref, *rest = refs
    given_ref = rest.pop(0) if has_state else None
    (ends_ref,) = rest
    b, g, slab = (lax.axis_index(name) for name in ("b", "g", "v"))
    warpgroup = lax.axis_index("warpgroup")
    columns = pl.ds(slab * CHUNK, CHUNK)
    last, width = plan.parts - 1, plan.key_block
    # Blocks of 64 rows and `width` columns of M, in the order in which they are multiplied by: all that some columns of
    # the product need follow each other.
    rows, blocks = range(plan.key_dim // CHUNK), range(plan.key_dim // width)
    if backward:
        needs = [[(row, block) for block in blocks] for row in rows]
    else:
        needs = [[(row, block) for row in rows] for block in blocks]
    order = [place for places in needs for place in places]

    def part_of(step: Any) -> Any:
        return last - step if backward else step

    def piece_of(part: Any, i: Any) -> Any:
        return part * plan.pieces + (plan.pieces - 1 - i if backward else i)

    def start_of(part: Any) -> Any:
        return _load_count(starts_ref.at[b, g, part * plan.pieces, 1 if backward else plan.summary_pairs])

    no_item = start_of(0) * 0

    @pl.when(warpgroup == 1)
    def _move() -> None:
        def part_step(step: Any, item: Any) -> Any:
            part = part_of(step)

            def piece_step(i: Any, item: Any) -> Any:
                for n, (row, block) in enumerate(order):
                    slot = lax.rem(item + n, stages)

                    free = functools.partial(plgpu.barrier_wait, s["free"].at[slot])
                    pl.when(item + n >= stages)(free)
                    for half, name in enumerate(("high", "low")):
                        place = (pl.ds(row * CHUNK, CHUNK), pl.ds(block * width, width))
                        source = maps_ref.at[b, g, piece_of(part, i), half, *place]
                        plgpu.copy_gmem_to_smem(source, s[name].at[slot], s["came"].at[slot])
                return item + len(order)

            return lax.fori_loop(start_of(part), plan.pieces, piece_step, item)

        items = lax.fori_loop(0, last, part_step, no_item)
        for slot in range(stages):
            pl.when(slot < items)(functools.partial(plgpu.barrier_wait, s["free"].at[slot]))

    @pl.when(warpgroup == 0)
    def _chain() -> None:
        def local(part: Any, i: Any, start: int, size: int) -> jax.Array:
            """What a piece makes of zero: some of K's columns."""
            return _load_state(local_ref.at[b, g, piece_of(part, i), columns, pl.ds(start, size)])

        def keep(copy: Any, start: int, x: jax.Array) -> None:
            for name, half in zip(("state_high", "state_low"), _halves(x), strict=True):
                s[name].at[copy].at[:, pl.ds(start, x.shape[1])][...] = half

        def kept(copy: Any, start: int, size: int) -> jax.Array:
            halves = (s[name].at[copy].at[:, pl.ds(start, size)] for name in ("state_high", "state_low"))
            high, low = (_load(half).astype(_FLOAT) for half in halves)
            return high + low

        def part_step(step: Any, carry: Any) -> Any:
            item, copy = carry
            part = part_of(step)
            start = start_of(part)
            enters = jnp.where(start == 0, 1.0, 0.0)
            for block in blocks:
                at = block * width
                state = kept(copy, at, width)
                ends_ref.at[b, g, part, columns, pl.ds(at, width)][...] = state
                first = local(part, lax.max(start - 1, 0), at, width)
                keep(copy, at, state * enters + first * (1.0 - enters))
            plgpu.commit_smem()

            def piece_step(i: Any, carry: Any) -> Any:
                item, copy = carry
                for places in needs:
                    at = places[0][0] * CHUNK if backward else places[0][1] * width
                    made: Any = local(part, i, at, CHUNK if backward else width)
                    # As many at once as there are places for.
                    for begin in range(0, len(places), stages):
                        some, products = places[begin : begin + stages], []
                        for n, (row, block) in enumerate(some):
                            slot = lax.rem(item + n, stages)
                            plgpu.barrier_wait(s["came"].at[slot])
                            high, low = s["high"].at[slot], s["low"].at[slot]
                            size = width if backward else CHUNK
                            start = block * width if backward else row * CHUNK
                            state_high, state_low = (
                                s[name].at[copy].at[:, pl.ds(start, size)]
                                for name in ("state_high", "state_low")
                            )
                            if backward:
                                high, low = high.T, low.T
                            products += [(state_high, high), (state_low, high), (state_high, low)]
                        (sums,) = _sums(plan, (None, products))
                        made = made + sums
                        for n in range(len(some)):
                            plgpu.barrier_arrive(s["free"].at[lax.rem(item + n, stages)])
                        item = item + len(some)
                    keep(1 - copy, at, made)
                plgpu.commit_smem()
                return item, 1 - copy

            return lax.fori_loop(start, plan.pieces, piece_step, (item, copy))

        for block in blocks:
            at = block * width
            keep(
                0,
                at,
                _zeros(width)
                if given_ref is None
                else _load_state(given_ref.at[b, g, columns, pl.ds(at, width)]),
            )
        plgpu.commit_smem()
        _, copy = lax.fori_loop(0, last, part_step, (no_item, no_item))
        for block in blocks:
            at = block * width
            ends_ref.at[b, g, part_of(last), columns, pl.ds(at, width)][...] = kept(copy, at, width)

    _end_together(s["ended"])


class Depths(NamedTuple):
    """How many chunks have a place in shared memory at once.

    Attributes:
        stages: of what comes.
        queries: of q.
        copies: of what the warpgroups hand over.
        outputs: of o.
    """

    stages: int
    queries: int
    copies: int
    outputs: int


def forward_scratch(plan: Plan) -> tuple[Depths, dict[str, Any]]:
    """Depths and shared memory of `forward_body`."""
    # Two states in shared memory let the walk go on while the last one is read. Where they are wide, q has but one
    # place: its chunk is asked for when the reader is done with the one before.
    copies = 2
    narrow = 1 if plan.wide else 2

    def scratch(stages: int) -> dict[str, Any]:
        query_stages = 1 if plan.wide else stages
        buffers = {
            "q": tiled((query_stages, CHUNK, plan.key_dim), plan.compute),
            "k": tiled((stages, CHUNK, plan.key_dim), plan.compute),
            "v": tiled((stages, CHUNK, CHUNK), plan.compute),
            "inverse": tiled((stages, CHUNK, CHUNK), plan.compute),
            "state_gamma": plain(stages, CHUNK),
            "state_root": plain(stages, CHUNK),
            "gamma_rows": plain(stages, CHUNK),
            "gamma_columns": plain(stages, CHUNK),
            "state": tiled((copies, CHUNK, plan.key_dim), plan.compute),
            "written": tiled((copies, CHUNK, CHUNK), plan.compute),
            "o": tiled((narrow, CHUNK, CHUNK), plan.compute),
            "came": plgpu.Barrier(num_arrivals=7 + 2 * plan.normed, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "query_came": plgpu.Barrier(num_barriers=query_stages),
            "query_free": plgpu.Barrier(num_barriers=query_stages),
            "handed": plgpu.Barrier(num_barriers=copies),
            "taken": plgpu.Barrier(num_barriers=copies),
            "ended": plgpu.Barrier(num_arrivals=3),
        }
        if plan.normed:
            buffers |= {"state_key_root": plain(stages, CHUNK), "scale_rows": plain(stages, CHUNK)}
        return buffers

    stages, buffers = _most_stages(4, scratch)
    depths = Depths(stages, buffers["q"].shape[0], copies, narrow)
    return depths, buffers


def forward_body(
    plan: Plan,
    depths: Depths,
    has_state: bool,
    save_states: bool,
    *refs: Any,
    **s: Any,
) -> None:
    """o, the state that leaves each part (B, G, P, V, K) and, if saved, those that enter the chunks, every
    `state_stride`-th one (B, G, N / stride, V, K).

    `has_state`: what enters each part is given, else it is zero.
    """
    stages, queries, copies, outputs = depths
    q_ref, k_ref, v_ref, inverse_ref, *rest = refs
    gamma_ref, root_ref, key_root_ref, scale_ref = _gate_refs(plan, rest)
    first_ref = rest.pop(0) if has_state else None
    o_ref, final_ref, *rest = rest
    states_ref: Any = rest.pop(0) if save_states else None
    b, part, g, slab = (lax.axis_index(name) for name in ("b", "p", "g", "v"))
    h, columns = lax.div(g, plan.share), pl.ds(slab * CHUNK, CHUNK)
    warpgroup = lax.axis_index("warpgroup")
    count, first_chunk = plan.part_chunks, part * plan.part_chunks

    @pl.when(warpgroup == 2)
    def _move() -> None:
        plgpu.set_max_registers(_MOVER_REGISTERS, action="decrease")

        def issue(n: Any, slot: Any) -> None:
            tokens, came = pl.ds((first_chunk + n) * CHUNK, CHUNK), s["came"].at[slot]
            sources = [
                (k_ref.at[b, tokens, h], "k"),
                (v_ref.at[b, tokens, g, columns], "v"),
                (inverse_ref.at[b, g, tokens], "inverse"),
                (gamma_ref.at[b, g, tokens], "state_gamma"),
                (root_ref.at[b, g, tokens], "state_root"),
                (gamma_ref.at[b, g, tokens], "gamma_rows"),
                (gamma_ref.at[b, g, tokens], "gamma_columns"),
            ]
            if plan.normed:
                sources += [
                    (key_root_ref.at[b, g, tokens], "state_key_root"),
                    (scale_ref.at[b, g, tokens], "scale_rows"),
                ]
            for source, name in sources:
                plgpu.copy_gmem_to_smem(source, s[name].at[slot], came)
            place = lax.rem(n, queries)

            @pl.when(n >= queries)
            def _() -> None:
                plgpu.barrier_wait(s["query_free"].at[place])

            plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, h], s["q"].at[place], s["query_came"].at[place])

        _pipeline(count, stages, s["free"], issue)
        _wait_for_last(count, queries, s["query_free"])

    @pl.when(warpgroup == 0)
    def _walk() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        first = _zeros(plan.key_dim) if first_ref is None else _load_state(first_ref.at[b, g, part, columns])

        def step(n: Any, state: jax.Array) -> jax.Array:
            slot, copy = lax.rem(n, stages), lax.rem(n, copies)
            plgpu.barrier_wait(s["came"].at[slot])
            low = state.astype(plan.compute)
            stride = plan.state_stride
            is_saved = lax.rem(first_chunk + n, stride) == 0

            def keep() -> None:
                @pl.when(n >= copies)
                def _() -> None:
                    plgpu.barrier_wait(s["taken"].at[copy])

                if save_states:
                    # If what this place holds was saved, `copies` chunks ago, and so many since then.
                    left = functools.partial(
                        plgpu.wait_smem_to_gmem, (copies - 1) // stride, wait_read_only=True
                    )
                    before = lax.rem(first_chunk + n + copies * (stride - 1), stride)
                    pl.when(before == 0)(left) if stride > 1 else left()
                s["state"].at[copy][...] = low

            if plan.wide:
                keep()
                plgpu.commit_smem()
                low = s["state"].at[copy]

            missing, gamma, root = _missing(
                plan,
                low,
                s["k"].at[slot],
                s["v"].at[slot],
                (
                    s["state_gamma"].at[slot],
                    s["state_root"].at[slot],
                    s["state_key_root"].at[slot] if plan.normed else None,
                ),
                (lambda: None) if plan.wide else keep,
            )

            def fade() -> tuple[jax.Array, ...]:
                last = s["state_gamma"][slot, CHUNK - 1]
                return jnp.exp2(last - gamma), state * jnp.exp2(last)

            # Eq. (6).
            written, (fading, kept) = _dots(plan, (missing, s["inverse"].at[slot].T), meanwhile=fade)
            written = written * _across(root)

            def hand_over() -> None:
                s["written"].at[copy].T[...] = written.astype(plan.compute)
                plgpu.commit_smem()
                plgpu.barrier_arrive(s["handed"].at[copy])

                def save() -> None:
                    place = lax.div(first_chunk + n, stride)
                    plgpu.copy_smem_to_gmem(s["state"].at[copy], states_ref.at[b, g, place, columns])

                if states_ref is not None:
                    pl.when(is_saved)(save) if stride > 1 else save()

            # Eq. (8).
            faded = (written * _across(fading)).astype(plan.compute)
            state, _ = _dots(plan, (faded, s["k"].at[slot], kept), meanwhile=hand_over)
            plgpu.barrier_arrive(s["free"].at[slot])
            return state

        final = lax.fori_loop(0, count, step, first)
        _wait_for_last(count, copies, s["taken"])
        final_ref.at[b, g, part, columns][...] = final
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 1)
    def _read() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")

        def step(n: Any, carry: None) -> None:
            slot, copy = lax.rem(n, stages), lax.rem(n, copies)
            place, output = lax.rem(n, queries), lax.rem(n, outputs)
            plgpu.barrier_wait(s["came"].at[slot])
            plgpu.barrier_wait(s["query_came"].at[place])

            def prepare() -> tuple[jax.Array, jax.Array]:
                rows = s["gamma_rows"].at[slot]
                decay = _decay_between(rows, s["gamma_columns"].at[slot])
                from_start = jnp.exp2(_load(rows, _ROWS))
                if plan.normed:
                    scale = _load(s["scale_rows"].at[slot], _ROWS)
                    return decay * _down(scale), from_start * scale
                return decay * plan.scale, from_start * plan.scale

            scores, (decay, from_start) = _dots(
                plan, (s["q"].at[place], s["k"].at[slot].T), meanwhile=prepare
            )
            scores = (scores * decay).astype(plan.compute)
            plgpu.barrier_wait(s["handed"].at[copy])
            # Eq. (7).
            o = _dot(plan, s["q"].at[place], s["state"].at[copy].T) * _down(from_start)
            plgpu.barrier_arrive(s["query_free"].at[place])
            plgpu.barrier_arrive(s["free"].at[slot])
            o = _dot(plan, scores, s["written"].at[copy], o)
            plgpu.barrier_arrive(s["taken"].at[copy])
            plgpu.wait_smem_to_gmem(outputs - 1, wait_read_only=True)
            s["o"].at[output][...] = o.astype(plan.compute)
            plgpu.commit_smem()
            tokens = pl.ds((first_chunk + n) * CHUNK, CHUNK)
            plgpu.copy_smem_to_gmem(s["o"].at[output], o_ref.at[b, tokens, g, columns])
            return carry

        lax.fori_loop(0, count, step, None)
        plgpu.wait_smem_to_gmem(0)

    _end_together(s["ended"])


# Backward: the walk ---------------------------------------------------------------------------------------------------


def walk_scratch(plan: Plan) -> tuple[int, int, dict[str, Any]]:
    """(stages, copies of what the warpgroups hand over, shared memory) of `backward_walk_body`."""
    copies = 2 if plan.key_dim <= 128 else 1

    def scratch(stages: int) -> dict[str, Any]:
        buffers = {
            "q": tiled((stages, CHUNK, plan.key_dim), plan.compute),
            "k": tiled((stages, CHUNK, plan.key_dim), plan.compute),
            "do": tiled((stages, CHUNK, CHUNK), plan.compute),
            "inverse": tiled((stages, CHUNK, CHUNK), plan.compute),
            "walk_gamma": plain(stages, CHUNK),
            "walk_root": plain(stages, CHUNK),
            "gamma_rows": plain(stages, CHUNK),
            "gamma_columns": plain(stages, CHUNK),
            "dstate": tiled((copies, CHUNK, plan.key_dim), plan.compute),
            "dv": tiled((copies, CHUNK, CHUNK), plan.compute),
            "scores": tiled((copies, CHUNK, CHUNK), plan.compute),
            "came": plgpu.Barrier(num_arrivals=8 + 3 * plan.normed, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "handed": plgpu.Barrier(num_barriers=copies),
            "taken": plgpu.Barrier(num_barriers=copies),
            "ended": plgpu.Barrier(num_arrivals=3),
        }
        if plan.normed:
            buffers |= {name: plain(stages, CHUNK) for name in ("walk_key_root", "walk_scale", "scale_rows")}
        return buffers

    stages, buffers = _most_stages(4, scratch)
    return stages, copies, buffers


def backward_walk_body(
    plan: Plan, stages: int, copies: int, local: bool, has_last: bool, *refs: Any, **s: Any
) -> None:
    """dv, the cotangents of the states that leave the chunks (B, G, N, V, K), and of those that enter the parts.

    If it is `local`, only the cotangents of what enters the pieces, if those of what leaves them are zero. It then
    skips as many of a piece's last chunks as the first input says; where these are all, nobody will ask, and it writes
    nothing.

    `has_last`: the cotangent of what leaves each part is given, else it is zero.
    """
    rest = list(refs)
    skipped_ref = rest.pop(0) if local else None
    q_ref, k_ref, do_ref, inverse_ref, *rest = rest
    gamma_ref, root_ref, key_root_ref, scale_ref = _gate_refs(plan, rest)
    last_ref = rest.pop(0) if has_last else None
    dv_ref: Any = None if local else rest.pop(0)
    dstates_ref: Any = None if local else rest.pop(0)
    (dfirst_ref,) = rest
    b, part, g, slab = (lax.axis_index(name) for name in ("b", "p", "g", "v"))
    h, columns = lax.div(g, plan.share), pl.ds(slab * CHUNK, CHUNK)
    warpgroup = lax.axis_index("warpgroup")
    count = plan.piece_chunks if local else plan.part_chunks
    skipped = 0 if skipped_ref is None else _load_count(skipped_ref.at[b, g, part, 0])
    last_chunk = (part + 1) * count - 1

    @pl.when(warpgroup == 2)
    def _move() -> None:
        plgpu.set_max_registers(_MOVER_REGISTERS, action="decrease")

        def issue(n: Any, slot: Any) -> None:
            tokens, came = pl.ds((last_chunk - n) * CHUNK, CHUNK), s["came"].at[slot]
            sources = [
                (q_ref.at[b, tokens, h], "q"),
                (k_ref.at[b, tokens, h], "k"),
                (do_ref.at[b, tokens, g, columns], "do"),
                (inverse_ref.at[b, g, tokens], "inverse"),
                (gamma_ref.at[b, g, tokens], "walk_gamma"),
                (gamma_ref.at[b, g, tokens], "gamma_rows"),
                (gamma_ref.at[b, g, tokens], "gamma_columns"),
                (root_ref.at[b, g, tokens], "walk_root"),
            ]
            if plan.normed:
                sources += [
                    (key_root_ref.at[b, g, tokens], "walk_key_root"),
                    (scale_ref.at[b, g, tokens], "walk_scale"),
                    (scale_ref.at[b, g, tokens], "scale_rows"),
                ]
            for source, name in sources:
                plgpu.copy_gmem_to_smem(source, s[name].at[slot], came)

        _pipeline(count, stages, s["free"], issue, skipped)

    @pl.when(warpgroup == 0)
    def _walk() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")

        def step(n: Any, dstate: jax.Array) -> jax.Array:
            slot, copy = lax.rem(n - skipped, stages), lax.rem(n - skipped, copies)
            plgpu.barrier_wait(s["came"].at[slot])
            low = dstate.astype(plan.compute)

            def keep() -> None:
                if local and not plan.wide:
                    return
                # With one copy, only dV of the chunk before may still be on its way; with two all of that chunk.
                plgpu.wait_smem_to_gmem(copies, wait_read_only=True)
                s["dstate"].at[copy][...] = low

            def send_dstate() -> None:
                if dstates_ref is not None:
                    plgpu.copy_smem_to_gmem(
                        s["dstate"].at[copy], dstates_ref.at[b, g, last_chunk - n, columns]
                    )

            if plan.wide:
                keep()
                plgpu.commit_smem()
                low = s["dstate"].at[copy]
                # At once: it has but one place, which the next chunk wants.
                send_dstate()

            last = s["walk_gamma"][slot, CHUNK - 1]

            def factors() -> tuple[jax.Array, jax.Array, jax.Array]:
                gamma = _load(s["walk_gamma"].at[slot], _COLUMNS)
                root = _load(s["walk_key_root" if plan.normed else "walk_root"].at[slot], _COLUMNS)
                return jnp.exp2(gamma), jnp.exp2(last - gamma), root

            def prepare() -> tuple[jax.Array, Any]:
                if not plan.wide:
                    keep()
                from_start, *others = factors()
                scale = _load(s["walk_scale"].at[slot], _COLUMNS) if plan.normed else plan.scale
                read = _load(s["do"].at[slot].T).astype(_FLOAT) * _across(from_start * scale)
                # A wide state leaves no registers for numbers of the tokens: they are made again.
                return read.astype(plan.compute), () if plan.wide else (from_start, *others)

            plgpu.barrier_wait(s["handed"].at[copy])
            kept, here, (read, ready) = _dots(
                plan,
                (low, s["k"].at[slot].T),
                (s["do"].at[slot].T, s["scores"].at[copy]),
                meanwhile=prepare,
            )
            from_start, to_end, root = ready or factors()
            dwritten = (kept * _across(to_end) + here) * _across(root)
            plgpu.barrier_arrive(s["taken"].at[copy])
            # Eq. (12), and the first half of eq. (11).
            dmissing, dstate, _ = _dots(
                plan,
                (dwritten.astype(plan.compute), s["inverse"].at[slot]),
                (read, s["q"].at[slot], dstate * jnp.exp2(last)),
            )
            if plan.wide:
                from_start, _, root = factors()
            drecalled = (dmissing * _across(root * from_start * -1.0)).astype(plan.compute)
            if plan.normed:
                root = _load(s["walk_root"].at[slot], _COLUMNS)
            dv = dmissing * _across(root)

            def store() -> None:
                if dv_ref is None:
                    return
                if plan.wide:
                    # All but the cotangent of this chunk.
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                s["dv"].at[copy].T[...] = dv.astype(plan.compute)
                plgpu.commit_smem()
                if not plan.wide:
                    send_dstate()
                tokens = pl.ds((last_chunk - n) * CHUNK, CHUNK)
                plgpu.copy_smem_to_gmem(s["dv"].at[copy], dv_ref.at[b, tokens, g, columns])

            # The other half.
            dstate, _ = _dots(plan, (drecalled, s["k"].at[slot], dstate), meanwhile=store)
            plgpu.barrier_arrive(s["free"].at[slot])
            return dstate

        last = _zeros(plan.key_dim) if last_ref is None else _load_state(last_ref.at[b, g, part, columns])
        dfirst = lax.fori_loop(skipped, count, step, last)

        def put() -> None:
            dfirst_ref.at[b, g, part, columns][...] = dfirst

        pl.when(skipped < count)(put) if local else put()
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 1)
    def _score() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")

        def step(n: Any, carry: None) -> None:
            slot, copy = lax.rem(n - skipped, stages), lax.rem(n - skipped, copies)
            plgpu.barrier_wait(s["came"].at[slot])

            def prepare() -> jax.Array:
                decay = _decay_between(s["gamma_rows"].at[slot], s["gamma_columns"].at[slot])
                return decay * (_down(_load(s["scale_rows"].at[slot], _ROWS)) if plan.normed else plan.scale)

            scores, decay = _dots(plan, (s["q"].at[slot], s["k"].at[slot].T), meanwhile=prepare)
            scores = scores * decay

            @pl.when(n - skipped >= copies)
            def _() -> None:
                plgpu.barrier_wait(s["taken"].at[copy])

            s["scores"].at[copy][...] = scores.astype(plan.compute)
            plgpu.commit_smem()
            plgpu.barrier_arrive(s["handed"].at[copy])
            plgpu.barrier_arrive(s["free"].at[slot])
            return carry

        lax.fori_loop(skipped, count, step, None)
        _wait_for_last(count, copies, s["taken"], skipped)

    _end_together(s["ended"])


# Backward: the gradients of every chunk -------------------------------------------------------------------------------


def _row_products(x: jax.Array, ref: Any) -> jax.Array:
    """Sum over columns of x times what is in `ref`, for each row; 64 columns at a time, so that few registers do."""
    parts = []
    for start in range(0, x.shape[1], CHUNK):
        part = lax.slice(x, (0, start), (CHUNK, start + CHUNK))
        parts.append(part * _load(ref.at[:, pl.ds(start, CHUNK)]).astype(_FLOAT))
    return jnp.sum(functools.reduce(lax.add, parts), axis=1)


# Gates of a chunk in the shared memory of `gradients_body`, a row each, by what reads them.
_QUERY_ROWS = ("query_gamma", "query_root", "query_key_root", "query_scale")
_KEY_ROWS = ("key_gamma", "root", "key_root")
_GATE_ROWS = (*_QUERY_ROWS, *_KEY_ROWS)
# And what its warpgroups find for each token: read by rows or by the copy engine, and read by columns.
_ROW_SUMS = ("query_sums", "dbeta", "dlog")
_COLUMN_SUMS = ("state_sums", "end_sums", "leave_sums")


def gradients_scratch(plan: Plan) -> tuple[int, int, dict[str, Any]]:
    """(places of k, stages of 64 columns of V, shared memory) of `gradients_body`."""
    width, blocks = plan.key_block, plan.key_dim // plan.key_block

    def state_places(stages: int) -> int:
        # States that the kernel makes itself take the places of those that they are made of.
        return stages if plan.state_stride == 1 else max(2, plan.slabs)

    def scratch(key_places: int, stages: int) -> dict[str, Any]:
        square, staged = (1, CHUNK, CHUNK), (stages, CHUNK, CHUNK)
        buffers = {
            "q": tiled((blocks, CHUNK, width), plan.compute),
            "k": tiled((key_places * blocks, CHUNK, width), plan.compute),
            "inverse": tiled(square, plan.compute),
            "gate_rows": plain(key_places * len(_GATE_ROWS), CHUNK),
            "gate_columns": plain(key_places, CHUNK),
            "v": tiled(staged, plan.compute),
            "do": tiled(staged, plan.compute),
            "dv": tiled(staged, plan.compute),
            "state": tiled((state_places(stages) * blocks, CHUNK, width), plan.compute),
            "dstate": tiled((stages, CHUNK, width), plan.compute),
            "missing": tiled(square, plan.compute),
            "written": tiled(square, plan.compute),
            "dscores": tiled(square, plan.compute),
            "dgram": tiled(square, plan.compute),
            "dq": tiled((1, CHUNK, width), plan.compute),
            "row_sums": plain(len(_ROW_SUMS), CHUNK),
            "column_sums": plain(len(_COLUMN_SUMS), CHUNK),
            "k_came": plgpu.Barrier(num_arrivals=blocks + 5 + 3 * plan.normed, num_barriers=key_places),
            "k_free": plgpu.Barrier(num_arrivals=2, num_barriers=key_places),
            "q_came": plgpu.Barrier(num_arrivals=blocks),
            "q_free": plgpu.Barrier(num_arrivals=2),
            "inverse_came": plgpu.Barrier(),
            "inverse_free": plgpu.Barrier(),
            "sums_handed": plgpu.Barrier(),
            "sums_taken": plgpu.Barrier(),
            "handed": plgpu.Barrier(),
            "taken": plgpu.Barrier(),
            "pairs_handed": plgpu.Barrier(),
            "pairs_taken": plgpu.Barrier(),
            "ended": plgpu.Barrier(num_arrivals=3),
        }
        if key_places == 1:
            buffers["dk"] = tiled((1, CHUNK, width), plan.compute)
        # Each of them is asked for again as soon as its readers are done with it.
        for name, readers, copies in (
            ("v", 1, 1),
            ("do", 1, 1),
            ("dv", 2, 1),
            ("state", 2, blocks),
            ("dstate", 2, 1),
        ):
            places = state_places(stages) if name == "state" else stages
            buffers[f"{name}_came"] = plgpu.Barrier(num_arrivals=copies, num_barriers=places)
            buffers[f"{name}_free"] = plgpu.Barrier(num_arrivals=readers, num_barriers=places)
        return buffers

    for key_places, stages in ((2, 3), (2, 2), (2, 1), (1, 1)):
        if _fits(scratch(key_places, stages)):
            break
    return key_places, stages, scratch(key_places, stages)


def gradients_body(plan: Plan, key_places: int, stages: int, chunks: int, *refs: Any, **s: Any) -> None:
    """dq and dk of each value head (B, T, G, K), d log α and dβ (blocks of K, B, G, T), of `chunks` chunks.

    A block of K has its part of d log α, and all of dβ. Where q and k have norms, dq and dk are those of q and k as
    they came if a block is all of K; else what eq. (27) subtracts is missing.

    One warpgroup makes dq, dβ and what pairs of tokens do to each other, one dk and d log α. Where only some states
    were saved, the first one makes the others, each in the place of the one before, by eq. (8). Of q, which both want
    last, and of T there is one place, of k two, if they fit: dk then leaves by that of k.
    """
    q_ref, k_ref, v_ref, do_ref, dv_ref, inverse_ref, states_ref, dstates_ref, *rest = refs
    gamma_ref, root_ref, key_root_ref, scale_ref = _gate_refs(plan, rest)
    dq_ref, dk_ref, dlog_ref, dbeta_ref = rest
    b, run, g, block = (lax.axis_index(name) for name in ("b", "n", "g", "k"))
    h = lax.div(g, plan.share)
    warpgroup = lax.axis_index("warpgroup")
    width, blocks, slabs = plan.key_block, plan.key_dim // plan.key_block, plan.slabs
    # The program's own block of keys' columns comes first.
    key_columns = [pl.ds(lax.rem(block + i, blocks) * width, width) for i in range(blocks)]

    def place_of(c: Any) -> Any:
        # Heads begin at different chunks. Where all do the same ones at the same time, each at the same place of its
        # own 8 MiB of memory, such powers of two can get into each other's way (340 µs for 286 at T = 16,384).
        return run * chunks + lax.rem(c + 3 * g * plan.state_stride, chunks)

    def tokens(c: Any) -> Any:
        return pl.ds(place_of(c) * CHUNK, CHUNK)

    def gate(name: str, c: Any) -> Any:
        return s["gate_rows"].at[lax.rem(c, key_places) * len(_GATE_ROWS) + _GATE_ROWS.index(name)]

    def gate_columns(c: Any) -> Any:
        return s["gate_columns"].at[lax.rem(c, key_places)]

    def last_of(name: str, c: Any) -> Any:
        row = lax.rem(c, key_places) * len(_GATE_ROWS) + _GATE_ROWS.index(name)
        return s["gate_rows"][row, CHUNK - 1]

    def sums_of(name: str) -> Any:
        if name in _ROW_SUMS:
            return s["row_sums"].at[_ROW_SUMS.index(name)]
        return s["column_sums"].at[_COLUMN_SUMS.index(name)]

    def places(c: Any, gamma: str) -> Callable[..., Any]:
        """How a chunk finds the places of its buffers.

        The indices begin at zero, but made from what came, anew in every chunk: of constant ones the compiler keeps two
        hundred registers of addresses and descriptors from chunk to chunk, and spills others.
        """
        # γ is at most 0, which the compiler does not know.
        row = lax.rem(c, key_places) * len(_GATE_ROWS) + _GATE_ROWS.index(gamma)
        zero = jnp.where(s["gate_rows"][row, 0] > 1.0, 1, 0)

        def at(name: str, index: Any = 0) -> Any:
            return s[name].at[zero + index]

        return at

    def key_place(c: Any) -> Any:
        return lax.rem(c, key_places) * blocks

    stride = plan.state_stride
    state_places = s["state"].shape[0] // blocks

    def state_item(c: Any, slab: Any) -> Any:
        """Number of a saved state of 64 columns of V, among those of the program."""
        return lax.div(c, stride) * slabs + slab

    def state_place(c: Any, slab: Any) -> Any:
        return lax.rem(state_item(c, slab), state_places)

    def free_state(c: Any, slab: Any) -> None:
        """The place is free when the last chunk that reads it has."""
        free = functools.partial(plgpu.barrier_arrive, s["state_free"].at[state_place(c, slab)])
        pl.when(lax.rem(c, stride) == stride - 1)(free) if stride > 1 else free()

    def for_slabs(step: Callable[[Any, Any], Any], sums: tuple[int, ...]) -> tuple[Any, ...]:
        """What `step` makes of sums, of so many columns each (0: one for each row), with each 64 columns of V.

        One after the other where they are many: written out, the compiler would keep all their addresses at once
        (K = 128, V = 256: it spills 280 bytes a thread for 104; but with K = V = 256, 72 for 128).
        """
        if slabs <= 2 or blocks > 1:
            carry = tuple(_nothing_yet() for _ in sums)
            for slab in range(slabs):
                carry = step(slab, carry)
            return carry
        first = tuple(_zeros(n) if n else jnp.sum(_zeros(CHUNK), axis=1) for n in sums)
        return lax.fori_loop(0, slabs, step, first)

    def when(condition: Any, do: Callable[[], Any]) -> None:
        """`pl.when`, for conditions that may be known."""
        if isinstance(condition, bool):
            if condition:
                do()
        else:
            pl.when(condition)(do)

    def without_length(dx: jax.Array, x: Any, along: jax.Array, lengths: jax.Array) -> jax.Array:
        """Eq. (27): dx less its part along x, from x · dx and one over the length of x, row by row."""
        share = _down(along * lengths * lengths)
        parts = [
            lax.slice(dx, (0, start), (CHUNK, start + CHUNK))
            - _load(x.at[:, pl.ds(start, CHUNK)]).astype(_FLOAT) * share
            for start in range(0, width, CHUNK)
        ]
        return lax.concatenate(parts, 1)

    @pl.when(warpgroup == 2)
    def _move() -> None:
        plgpu.set_max_registers(_MOVER_REGISTERS, action="decrease")

        def columns(ref: Any) -> Callable[[Any, Any], list[Any]]:
            return lambda c, slab: [ref.at[b, tokens(c), g, pl.ds(slab * CHUNK, CHUNK)]]

        def states(ref: Any, which: list[Any], place: Any, slab: Any) -> list[Any]:
            return [ref.at[b, g, place, pl.ds(slab * CHUNK, CHUNK), columns] for columns in which]

        sources = {
            "v": columns(v_ref),
            "state": lambda c, slab: states(states_ref, key_columns, lax.div(place_of(c), stride), slab),
            "dv": columns(dv_ref),
            "do": columns(do_ref),
            "dstate": lambda c, slab: states(dstates_ref, key_columns[:1], place_of(c), slab),
        }

        def issue(name: str, c: Any, slab: Any) -> None:
            item, places = (
                (state_item(c, slab), state_places) if name == "state" else (c * slabs + slab, stages)
            )
            slot = lax.rem(item, places)

            @pl.when(item >= places)
            def _() -> None:
                plgpu.barrier_wait(s[f"{name}_free"].at[slot])

            copies = sources[name](c, slab)
            for i, source in enumerate(copies):
                target = s[name].at[slot * len(copies) + i]
                plgpu.copy_gmem_to_smem(source, target, s[f"{name}_came"].at[slot])

        def issue_keys(c: Any) -> None:
            place = lax.rem(c, key_places)

            @pl.when(c >= key_places)
            def _() -> None:
                plgpu.barrier_wait(s["k_free"].at[place])

            came = s["k_came"].at[place]
            for i, columns in enumerate(key_columns):
                plgpu.copy_gmem_to_smem(k_ref.at[b, tokens(c), h, columns], s["k"].at[key_place(c) + i], came)
            plgpu.copy_gmem_to_smem(gamma_ref.at[b, g, tokens(c)], gate_columns(c), came)
            for ref, names in (
                (gamma_ref, ("query_gamma", "key_gamma")),
                (root_ref, ("query_root", "root")),
                (key_root_ref, ("query_key_root", "key_root")),
                (scale_ref, ("query_scale",)),
            ):
                if ref is not None:
                    for name in names:
                        plgpu.copy_gmem_to_smem(ref.at[b, g, tokens(c)], gate(name, c), came)

        def issue_queries(c: Any) -> None:
            pl.when(c > 0)(functools.partial(plgpu.barrier_wait, s["q_free"]))
            for i, columns in enumerate(key_columns):
                plgpu.copy_gmem_to_smem(q_ref.at[b, tokens(c), h, columns], s["q"].at[i], s["q_came"])

        def issue_inverse(c: Any) -> None:
            pl.when(c > 0)(functools.partial(plgpu.barrier_wait, s["inverse_free"]))
            source = inverse_ref.at[b, g, tokens(c)]
            plgpu.copy_gmem_to_smem(source, s["inverse"].at[0], s["inverse_came"])

        @pl.loop(0, chunks)
        def _chunk(c: Any) -> None:
            # In the order in which they become free.
            issue_keys(c)

            def issue_slab(slab: Any, carry: Any) -> Any:
                for name in sources:
                    if name == "state":
                        when(slab == min(slabs, stages) - 1, functools.partial(issue_inverse, c))
                    load = functools.partial(issue, name, c, slab)
                    pl.when(lax.rem(c, stride) == 0)(load) if name == "state" and stride > 1 else load()
                return carry

            for_slabs(issue_slab, ())
            issue_queries(c)

        _wait_for_last(chunks, key_places, s["k_free"])
        plgpu.barrier_wait(s["q_free"])
        plgpu.barrier_wait(s["inverse_free"])
        for name in sources:
            items, places = (
                (chunks // stride * slabs, state_places) if name == "state" else (chunks * slabs, stages)
            )
            for item in range(max(items - places, 0), items):
                plgpu.barrier_wait(s[f"{name}_free"].at[item % places])

    @pl.when(warpgroup == 0)
    def _queries() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")

        def next_state(c: Any, slab: int) -> None:
            """Eq. (8), once the other warpgroup, which has handed over V', has read the state before."""
            at, place = places(c, "query_gamma"), state_place(c, slab)
            last = last_of("query_gamma", c)
            fading = jnp.exp2(last - _load(gate_columns(c), _COLUMNS))
            faded = (_load(at("written").T).astype(_FLOAT) * _across(fading)).astype(plan.compute)
            # Half of K at a time, since there are few registers.
            for columns in (pl.ds(start, CHUNK) for start in range(0, width, CHUNK)):
                state, k = (x.at[:, columns] for x in (at("state", place), at("k", key_place(c))))
                (made,) = _sums(plan, (_load(state).astype(_FLOAT) * jnp.exp2(last), [(faded, k)]))
                state[...] = made.astype(plan.compute)
            plgpu.commit_smem()
            plgpu.barrier_arrive(s["state_came"].at[place])

        def chunk(c: Any, carry: None) -> None:
            plgpu.barrier_wait(s["k_came"].at[lax.rem(c, key_places)])

            def step(slab: Any, sums: Any) -> tuple[Any, ...]:
                dq, dscores, dpairs, through = sums
                slot = lax.rem(c * slabs + slab, stages)
                at = places(c, "query_gamma")
                for name in ("do", "dstate"):
                    plgpu.barrier_wait(s[f"{name}_came"].at[slot])
                place = state_place(c, slab)
                plgpu.barrier_wait(s["state_came"].at[place])
                do, dv, dstate = (at(name, slot) for name in ("do", "dv", "dstate"))
                state = at("state", place * blocks)
                # Of the second only the diagonal counts: ⟨dS', S⟩, column by column of V.
                dq, flow = _sums(plan, (dq, [(do, state)]), (None, [(state, dstate.T)]))
                free_state(c, slab)
                plgpu.barrier_arrive(s["dstate_free"].at[slot])
                row, column = _indices(gate("query_gamma", c))
                flow = jnp.sum(jnp.where(row == column, flow, 0.0), axis=1)
                through = flow if through is None else through + flow
                plgpu.barrier_wait(s["dv_came"].at[slot])
                plgpu.barrier_wait(s["handed"])
                # When few sums are in registers: before any are of the pairs, or after all of them have left.
                if stride > 1 and slab < slabs - 1:
                    pl.when(lax.rem(c, stride) < stride - 1)(functools.partial(next_state, c, slab))
                written = at("written").T
                dscores, dpairs = _sums(plan, (dscores, [(do, written)]), (dpairs, [(dv, written)]))
                for name in ("do", "dv"):
                    plgpu.barrier_arrive(s[f"{name}_free"].at[slot])
                if stride == 1 or slab < slabs - 1:
                    plgpu.barrier_arrive(s["taken"])
                return dq, dscores, dpairs, through

            dq, dscores, dpairs, through = for_slabs(step, (width, CHUNK, CHUNK, 0))
            at = places(c, "query_gamma")
            # dq and dβ of the chunk before have left.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            row, column = _indices(gate("query_gamma", c))
            gamma, root = _load(gate("query_gamma", c), _ROWS), _load(gate("query_root", c), _ROWS)
            scale: Any = _load(gate("query_scale", c), _ROWS) if plan.normed else plan.scale
            key_root = _load(gate("query_key_root", c), _ROWS) if plan.normed else root
            # Eq. (25).
            diagonal = jnp.sum(jnp.where(row == column, dpairs, 0.0), axis=1)
            sums_of("dbeta")[...] = diagonal / (root * root * root * key_root)
            decay = _decay_between(gate("query_gamma", c), gate_columns(c))
            # Eq. (13) and (14); dv has β in it.
            low = (dscores * (decay * (_down(scale) if plan.normed else scale))).astype(plan.compute)
            lengths = _down(key_root / root * -1.0) if plan.normed else -1.0
            dgram = jnp.where(row > column, dpairs * (decay * lengths), 0.0).astype(plan.compute)

            @pl.when(c > 0)
            def _() -> None:
                plgpu.barrier_wait(s["pairs_taken"])

            at("dscores")[...] = low
            at("dgram")[...] = dgram
            plgpu.commit_smem()
            plgpu.barrier_arrive(s["pairs_handed"])
            if stride > 1:
                pl.when(lax.rem(c, stride) < stride - 1)(functools.partial(next_state, c, slabs - 1))
                plgpu.barrier_arrive(s["taken"])
            dq = dq * _down(jnp.exp2(gamma) * scale, width)
            dq = _dot(plan, at("dscores"), at("k", key_place(c)), dq)
            plgpu.barrier_wait(s["q_came"])
            along = _row_products(dq, at("q"))

            @pl.when(c > 0)
            def _() -> None:
                plgpu.barrier_wait(s["sums_taken"])

            sums_of("query_sums")[...] = along
            sums_of("state_sums")[...] = through * jnp.exp2(last_of("query_gamma", c))
            plgpu.barrier_arrive(s["sums_handed"])
            if plan.normed and blocks == 1:
                dq = without_length(dq, at("q"), along, scale * (1.0 / plan.scale))
            at("dq")[...] = dq.astype(plan.compute)
            plgpu.commit_smem()
            plgpu.barrier_arrive(s["q_free"])
            plgpu.barrier_arrive(s["k_free"].at[lax.rem(c, key_places)])
            plgpu.copy_smem_to_gmem(
                s["dq"].at[0], dq_ref.at[b, tokens(c), g, key_columns[0]], commit_group=False
            )
            plgpu.copy_smem_to_gmem(sums_of("dbeta"), dbeta_ref.at[block, b, g, tokens(c)])
            return carry

        lax.fori_loop(0, chunks, chunk, None)
        plgpu.barrier_wait(s["pairs_taken"])
        plgpu.barrier_wait(s["sums_taken"])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 1)
    def _keys() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")

        def left(c: Any) -> None:
            """dk and d log α of a chunk have left, and with dk the place of k is free."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if key_places > 1:
                plgpu.barrier_arrive(s["k_free"].at[lax.rem(c, key_places)])

        def chunk(c: Any, carry: None) -> None:
            # What dk gets through the states that enter and leave the chunk, before their decays.
            ends = _nothing_yet()
            plgpu.barrier_wait(s["k_came"].at[lax.rem(c, key_places)])
            at = places(c, "key_gamma")

            def by_key(dk: jax.Array) -> jax.Array:
                return _row_products(dk, at("k", key_place(c)))

            def key_roots() -> jax.Array:
                return _load(gate("key_root" if plan.normed else "root", c), _ROWS)

            def lengths() -> jax.Array:
                """One over those of the keys."""
                return key_roots() / _load(gate("root", c), _ROWS)

            def decayed_in(dk_in: jax.Array) -> tuple[jax.Array, jax.Array]:
                factor = jnp.exp2(_load(gate("key_gamma", c), _ROWS)) * -1.0
                dk_in = dk_in * _down(factor * lengths() if plan.normed else factor, width)
                return dk_in, by_key(dk_in)

            def step(slab: Any, sums: Any) -> tuple[Any, ...]:
                nonlocal ends
                dk_in, dk_out = sums
                slot = lax.rem(c * slabs + slab, stages)
                at = places(c, "key_gamma")
                place = state_place(c, slab)
                plgpu.barrier_wait(s["state_came"].at[place])
                plgpu.barrier_wait(s["v_came"].at[slot])
                recalls = [
                    (at("k", key_place(c) + i), at("state", place * blocks + i).T) for i in range(blocks)
                ]
                (recalled,) = _sums(plan, (None, recalls))
                when(slab == 0, lambda: pl.when(c > 0)(functools.partial(left, c - 1)))
                gamma, root = _load(gate("key_gamma", c), _ROWS), _load(gate("root", c), _ROWS)
                offered = _load(at("v", slot)).astype(_FLOAT) * _down(root)
                missing = offered - recalled * _down(key_roots() * jnp.exp2(gamma))
                at("missing")[...] = missing.astype(plan.compute)
                # Fences come before the barrier wherever the copy engine writes what threads have read.
                plgpu.commit_smem()
                plgpu.barrier_arrive(s["v_free"].at[slot])
                plgpu.barrier_wait(s["dv_came"].at[slot])
                when(slab == 0, functools.partial(plgpu.barrier_wait, s["inverse_came"]))
                # Eq. (6) once more.
                written, dk_in = _sums(
                    plan,
                    (None, [(at("inverse"), at("missing"))]),
                    (dk_in, [(at("dv", slot), at("state", place * blocks))]),
                )
                free_state(c, slab)
                plgpu.barrier_arrive(s["dv_free"].at[slot])
                when(slab == slabs - 1, functools.partial(plgpu.barrier_arrive, s["inverse_free"]))

                @pl.when(c * slabs + slab > 0)
                def _() -> None:
                    plgpu.barrier_wait(s["taken"])

                at("written")[...] = (written * _down(key_roots())).astype(plan.compute)
                plgpu.commit_smem()
                plgpu.barrier_arrive(s["handed"])
                if slabs == 1:
                    # Before `dk_out` wants its registers.
                    dk_in, ends = decayed_in(dk_in)
                plgpu.barrier_wait(s["dstate_came"].at[slot])
                (dk_out,) = _sums(plan, (dk_out, [(at("written"), at("dstate", slot))]))
                plgpu.barrier_arrive(s["dstate_free"].at[slot])
                return dk_in, dk_out

            dk_in, dk_out = for_slabs(step, (width, width))
            at = places(c, "key_gamma")
            if slabs > 1:
                dk_in, ends = decayed_in(dk_in)
            gamma, last = _load(gate("key_gamma", c), _ROWS), last_of("key_gamma", c)
            dk_out = dk_out * _down(jnp.exp2(last - gamma), width)
            leaves = by_key(dk_out)
            dk = dk_in + dk_out
            plgpu.barrier_wait(s["pairs_handed"])
            # Eq. (14): what a token reads of others through its key, and what others read of it.
            more = _dot(plan, at("dgram"), at("k", key_place(c)))
            ends = ends + by_key(more)
            dk = dk + more
            plgpu.barrier_wait(s["q_came"])
            read = [(at("dgram").T, at("k", key_place(c))), (at("dscores").T, at("q"))]
            (more,) = _sums(plan, (None, read))
            starts = by_key(more)
            dk = dk + more
            plgpu.barrier_arrive(s["pairs_taken"])
            plgpu.barrier_arrive(s["q_free"])
            if plan.normed and blocks == 1:
                dk = without_length(dk, at("k", key_place(c)), ends + starts + leaves, lengths())
            # The other warpgroup hands these over when it is done with k, whose place dk takes.
            plgpu.barrier_wait(s["sums_handed"])
            name, place = ("k", key_place(c)) if key_places > 1 else ("dk", 0)
            at(name, place)[...] = dk.astype(plan.compute)
            # Eq. (26): what ends here or later, what leaves the chunk from an earlier token, and what passes.
            sums_of("end_sums")[...] = ends - starts + _load(sums_of("query_sums"), _ROWS)
            sums_of("leave_sums")[...] = leaves
            plgpu.commit_smem()
            row, column = _indices(gate("key_gamma", c))
            of_ends, of_leaves, of_states = (
                _across(_load(sums_of(name), _COLUMNS)) for name in ("end_sums", "leave_sums", "state_sums")
            )
            sums_of("dlog")[...] = jnp.sum(jnp.where(column >= row, of_ends, of_leaves) + of_states, axis=1)
            plgpu.barrier_arrive(s["sums_taken"])
            plgpu.commit_smem()
            if key_places == 1:
                plgpu.barrier_arrive(s["k_free"].at[0])
            plgpu.copy_smem_to_gmem(
                s[name].at[place], dk_ref.at[b, tokens(c), g, key_columns[0]], commit_group=False
            )
            plgpu.copy_smem_to_gmem(sums_of("dlog"), dlog_ref.at[block, b, g, tokens(c)])
            return carry

        lax.fori_loop(0, chunks, chunk, None)
        left(chunks - 1)
        plgpu.barrier_wait(s["taken"])
        plgpu.wait_smem_to_gmem(0)

    _end_together(s["ended"])
