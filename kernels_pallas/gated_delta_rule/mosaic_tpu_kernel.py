"""Kernel bodies for TPUs (Pallas Mosaic TPU): a program does one chunk of several heads, the state in VMEM.

README.md derives the algorithm; comments cite its equation numbers. Program (b, g, n) of the forward pass does
chunk n of the value heads of group g of sequence b; n runs in order, and the state stays in scratch between
chunks. The backward pass runs n from the last chunk to the first, with the cotangent of the state in scratch.

What these chips are bound by shapes the code. Not arithmetic, but latency and the cross-lane unit: so the heads of
a program go through every stage side by side (their matmuls are independent), a sum or a broadcast across lanes is
replaced by a power of two, a transpose or a matmul wherever that is cheaper, and write strengths are folded
into columns (README, "On a TPU"): a row broadcasts for nothing, a column costs as much as two matmuls.

Heads of 64 fill half of the 128 lanes, and what depends on C alone would cost as much as for heads of 128. So two of
them make a pack, in chunks half as long: [X₁ | X₂] side by side on the lanes, as they lie in memory, whether X is a
head's q, k, v, state or C × C matrix. A product of packs takes its right-hand side as diag(X₁, X₂). A pack of
one head is that head.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.gated_delta_rule import tiling

# 2 to this times log₂ e is 0 in float32: a smaller log decay is none, and the bound bounds sums over a chunk.
FORGET = -120.0
_LOG2_E = 1.4426950408889634
# Rows of the diagonal tiles that are inverted by substitution: the packing of bfloat16 in a register.
TILE = 16
# Below the smallest β that matters, above what float32 flushes to zero.
_LEAST_BETA = 1e-37


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fixed when a kernel is traced.

    Attributes:
        chunk: C, tokens of a chunk: a power of two, at least `TILE`.
        heads: value heads of a program.
        pack: P, how many of them lie side by side on the lanes.
        share: how many of them share a key head.
        key_dim: K.
        value_dim: V.
        length: T.
        scale: of the output.
        qk_norm_eps: if set, q and k are L2-normalised inside.
        compute: dtype of what goes into the MXU; float32 takes six passes.
        inverse: the same where the triangular inverse is merged and applied.
        padded: whether a last row of the gates says which tokens count.
        one_store: whether a bundle of the chip stores only one register: smaller regions, to spill less.
    """

    chunk: int
    heads: int
    pack: int
    share: int
    key_dim: int
    value_dim: int
    length: int
    scale: float
    qk_norm_eps: float | None
    compute: Any
    inverse: Any
    padded: bool
    one_store: bool

    @property
    def chunks(self) -> int:
        """N."""
        return -(-self.length // self.chunk)

    @property
    def key_heads(self) -> int:
        """Key heads of a program."""
        return self.heads // self.share

    @property
    def packs(self) -> int:
        """Packs of value heads of a program."""
        return self.heads // self.pack

    @property
    def units(self) -> list[tuple[int, ...]]:
        """The key heads side by side in each pack of q and k; packs of value heads may share one."""
        return list(dict.fromkeys(self._keys_of(p) for p in range(self.packs)))

    def unit(self, p: int) -> int:
        """Which of `units` pack p of value heads goes with."""
        return self.units.index(self._keys_of(p))

    def _keys_of(self, p: int) -> tuple[int, ...]:
        return tuple(h // self.share for h in range(p * self.pack, (p + 1) * self.pack))

    @property
    def exact_decay(self) -> bool:
        """Whether sums of log decays are kept in two parts: README, "Sums of log decays"."""
        return self.compute == jnp.float32


def _dot(a: jax.Array, b: jax.Array, compute: Any, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """The product with float32 sums of operands rounded to `compute`: what a CPU does here, the MXU does."""
    exact = jax.lax.Precision.HIGHEST if compute == jnp.float32 else None
    return jax.lax.dot_general(
        a.astype(compute),
        b.astype(compute),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )


def _times_ones(x: jax.Array, ones: jax.Array) -> jax.Array:
    """x @ ones for a matrix of zeros and ones: x in three bfloat16 parts, which hold all its bits."""
    parts, rest = [], x
    for _ in range(3):
        parts.append(rest.astype(jnp.bfloat16))
        rest = rest - parts[-1].astype(jnp.float32)
    product = _dot(jnp.concatenate(parts), ones, jnp.bfloat16)
    rows = x.shape[0]
    return product[:rows] + product[rows : 2 * rows] + product[2 * rows :]


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _causal(chunk: int, pack: int) -> jax.Array:
    """i ≥ j in each of `pack` blocks on the lanes, (C, P · C)."""
    return _iota((chunk, pack * chunk), 0) >= _iota((chunk, pack * chunk), 1) % chunk


def _block(shape: tuple[int, ...], pack: int) -> jax.Array:
    """Which of `pack` blocks of lanes an element is in."""
    return _iota(shape, 1) // (shape[1] // pack)


def _spread(pieces: Sequence[jax.Array], width: int) -> jax.Array:
    """(rows, 1) each → (rows, P · width), each piece in all lanes of its block."""
    shape = (pieces[0].shape[0], len(pieces) * width)
    wide = jnp.broadcast_to(pieces[0], shape)
    for s, piece in enumerate(pieces[1:], 1):
        wide = jnp.where(_block(shape, len(pieces)) >= s, piece, wide)
    return wide


def _block_sums(x: jax.Array, pack: int) -> list[jax.Array]:
    """Sums over each block of lanes, (rows, 1) each."""
    if pack == 1:
        return [jnp.sum(x, axis=1, keepdims=True)]
    block = _block(x.shape, pack)
    return [jnp.sum(jnp.where(block == s, x, 0.0), axis=1, keepdims=True) for s in range(pack)]


def _diagonal(x: jax.Array, pack: int) -> jax.Array:
    """[X₁ | X₂] → diag(X₁, X₂)."""
    if pack == 1:
        return x
    block = _block(x.shape, pack)
    return jnp.concatenate([jnp.where(block == s, x, jnp.zeros_like(x)) for s in range(pack)])


def _from_diagonal(x: jax.Array, pack: int) -> jax.Array:
    """The inverse of `_diagonal`, whatever lies off the diagonal."""
    rows = x.shape[0] // pack
    wide = x[:rows]
    for s in range(1, pack):
        piece = x[s * rows : (s + 1) * rows]
        wide = jnp.where(_block(piece.shape, pack) >= s, piece, wide)
    return wide


def _side_by_side(heads: int, most: int) -> list[range]:
    """The heads of a program in groups that go through a stage together."""
    return [range(start, min(start + most, heads)) for start in range(0, heads, most)]


@dataclasses.dataclass(frozen=True)
class _Gates:
    """Gates of all heads of a program, one pack a row (packs, P · C).

    Attributes:
        chunk: C.
        pack: P.
        sums: γ log₂ e, as it is or as (coarse, fine).
        sum_columns: the same, as `_as_columns` gives them.
        decay_in: e^γ.
        decay_out: e^{γ_C − γ}.
        beta: β.
    """

    chunk: int
    pack: int
    sums: Sequence[jax.Array]
    sum_columns: Sequence[jax.Array]
    decay_in: jax.Array
    decay_out: jax.Array
    beta: jax.Array

    def decay_across(self, width: int) -> jax.Array:
        """e^{γ_C} in all `width` lanes of every head, (packs, P · width)."""
        return _spread(_last(self.decay_in, self.chunk, self.pack), width)

    def column(self, x: jax.Array, p: int, width: int) -> jax.Array:
        """Pack p of `_as_columns`, each head's value in all `width` lanes of its block: (C, P · width)."""
        rows, lanes = x.shape[1], min(self.pack * width, 128)
        packs = self.beta.shape[0]
        x = jnp.where(_iota(x.shape, 1) % packs == p, x, jnp.zeros_like(x))
        block = _iota((rows, lanes), 0) // packs % self.pack
        selector = (block == _block((rows, lanes), self.pack)).astype(jnp.bfloat16)
        # A register's lanes are made once; what is wider repeats them.
        return _repeat(_dot(x, selector, jnp.bfloat16), self.pack * width)

    def decay_in_column(self, p: int, width: int) -> jax.Array:
        """e^γ of pack p in every lane of (C, P · width)."""
        narrow = min(width, 128 // self.pack)
        columns = functools.reduce(jnp.add, [self.column(x, p, narrow) for x in self.sum_columns])
        return _repeat(jnp.exp2(columns), self.pack * width)

    def decay_between(self, p: int, above: jax.Array, log_weights: jax.Array | None = None) -> jax.Array:
        """E_ij of eq. (3) for pack p, or E_ij · 2^{log_weights_j}; `above` is −∞ where i < j, else 0.

        Masked before the power: above the diagonal it would overflow. An addition is cheaper than a selection.
        """
        last = self.sums[-1][p : p + 1, :]
        if log_weights is not None:
            last = last - log_weights
        difference = (self.column(self.sum_columns[-1], p, self.chunk) - last) + above
        if len(self.sums) == 2:
            coarse = self.column(self.sum_columns[0], p, self.chunk)
            difference = difference + (coarse - self.sums[0][p : p + 1, :])
        return jnp.exp2(difference)


def _repeat(x: jax.Array, width: int) -> jax.Array:
    """Lanes repeated up to `width` of them."""
    return x if x.shape[1] == width else jnp.concatenate([x] * (width // x.shape[1]), axis=1)


def _as_columns(x: jax.Array, chunk: int, pack: int, ref: Any) -> jax.Array:
    """(packs, P · C) → (C, 3 · P · packs): a pack's tokens down, in three bfloat16 parts that hold all bits.

    By way of `ref`: XLA for CPUs takes a transpose into the products that follow, and cannot run those.
    """
    parts = []
    for _ in range(3):
        part = x.astype(jnp.bfloat16).astype(jnp.float32)
        parts += [part[:, s * chunk : (s + 1) * chunk] for s in range(pack)]
        x = x - part
    ref[...] = jnp.transpose(jnp.concatenate(parts)).astype(jnp.bfloat16)
    return ref[...]


def _last(x: jax.Array, chunk: int, pack: int) -> list[jax.Array]:
    """The last token's value of each head of a row, (packs, 1) each."""
    return [x[:, (s + 1) * chunk - 1 : (s + 1) * chunk] for s in range(pack)]


def _read_gates(plan: Plan, gates_ref: Any, columns_ref: Any) -> _Gates:
    packs, chunk, pack = plan.packs, plan.chunk, plan.pack
    # Powers of two, which is what the hardware computes.
    log_decay = jnp.maximum(gates_ref[0, 0, 0, :packs, :], FORGET) * _LOG2_E
    until = _until(plan)
    sums = [log_decay]
    if plan.exact_decay:
        coarse = jnp.round(log_decay * 256) / 256
        sums = [coarse, log_decay - coarse]
    sums = [_times_ones(x, until) for x in sums]
    rest = [_spread(_last(x, chunk, pack), chunk) - x for x in sums]
    return _Gates(
        chunk=chunk,
        pack=pack,
        sums=sums,
        sum_columns=[_as_columns(x, chunk, pack, columns_ref.at[i]) for i, x in enumerate(sums)],
        decay_in=jnp.exp2(functools.reduce(jnp.add, sums)),
        decay_out=jnp.exp2(functools.reduce(jnp.add, rest)),
        beta=gates_ref[0, 0, 0, packs : 2 * packs, :],
    )


def _until(plan: Plan, *, onward: bool = False) -> jax.Array:
    """Ones that sum, by a product from the right, the tokens of a head up to each one, or from each one on."""
    shape = (plan.pack * plan.chunk,) * 2
    first, second = _iota(shape, 0), _iota(shape, 1)
    ones = first >= second if onward else first <= second
    if plan.pack > 1:
        ones = ones & (first // plan.chunk == second // plan.chunk)
    return ones.astype(jnp.bfloat16)


def _counts(plan: Plan, gates_ref: Any, index: Any) -> jax.Array | None:
    """Which tokens of a chunk count, (C, 1); None where all do."""
    mask = None
    if plan.length % plan.chunk:
        mask = index * plan.chunk + _iota((plan.chunk, 1), 0) < plan.length
    if plan.padded:
        column = jnp.transpose(gates_ref[0, 0, 0, 2 * plan.packs :, :])[: plan.chunk] > 0
        mask = column if mask is None else mask & column
    return mask


def _side(ref: Any, heads: Sequence[int], dim: int, mask: jax.Array | None) -> jax.Array:
    """Heads of a (1, C, heads · dim) block side by side; zeros where a token does not count: it may be NaN."""
    if list(heads) == list(range(heads[0], heads[0] + len(heads))):
        x = ref[0, :, heads[0] * dim : (heads[-1] + 1) * dim]
    else:
        x = jnp.concatenate([ref[0, :, h * dim : (h + 1) * dim] for h in heads], axis=1)
    return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


def _normaliser(plan: Plan, x: jax.Array, heads: int) -> jax.Array:
    """1 / |x| of each of `heads` heads side by side, in all its lanes."""
    x = x.astype(jnp.float32)
    assert plan.qk_norm_eps is not None
    return _spread([jax.lax.rsqrt(y + plan.qk_norm_eps) for y in _block_sums(x * x, heads)], plan.key_dim)


def _store_units(plan: Plan, q_ref: Any, k_ref: Any, units_ref: Any, mask: jax.Array | None) -> None:
    """k over q of every unit, normalised, as the MXU takes them: (units, 2C, P · K)."""
    for u, heads in enumerate(plan.units):
        for half, ref in enumerate((k_ref, q_ref)):
            x = _side(ref, heads, plan.key_dim, mask)
            if plan.qk_norm_eps is not None:
                x = x.astype(jnp.float32) * _normaliser(plan, x, plan.pack)
            units_ref[u, half * plan.chunk : (half + 1) * plan.chunk] = x.astype(plan.compute)


def _solve_tiles(tiles_ref: Any) -> None:
    """Inverts the TILE × TILE diagonal tiles of I + L, of all heads at once, by substitution in float32.

    `tiles_ref` is (TILE, packs, P · C): row i of the tiles, side by side on the lanes. Row i of an inverse is
    e_i − Σ_j L_ij (row j); L_ij gets to all lanes of its tile by a gather within them.
    """
    shape = tiles_ref.shape[1:]
    lane = _iota(shape, 1)
    start = lane - lane % TILE
    rows: list[jax.Array] = []
    for i in range(TILE):
        row = jnp.where(lane - start == i, 1.0, 0.0)
        lower = tiles_ref[i]
        for j in range(i):
            factor = jnp.take_along_axis(lower, start + j, axis=1, mode="promise_in_bounds")
            row = row - factor * rows[j]
        rows.append(row)
    for i in range(TILE):
        tiles_ref[i] = rows[i]


def _to_tiles(lower: jax.Array) -> jax.Array:
    """The diagonal tiles of (C, P · C) matrices side by side: (TILE, P · C)."""
    chunk, lanes = lower.shape
    tile = _iota((TILE, lanes), 1) % chunk // TILE
    compact = lower[:TILE]
    for p in range(1, chunk // TILE):
        compact = jnp.where(tile == p, lower[p * TILE : (p + 1) * TILE], compact)
    return compact


def _from_tiles(compact: jax.Array, chunk: int) -> jax.Array:
    """The inverse of `_to_tiles`, zeros off the tiles."""
    tile = _iota(compact.shape, 1) % chunk // TILE
    return jnp.concatenate(
        [jnp.where(tile == p, compact, jnp.zeros_like(compact)) for p in range(chunk // TILE)]
    )


def _merge(inverse: jax.Array, lower: jax.Array, block: int, compute: Any) -> Callable[[], jax.Array]:
    """One round of eq. (9): from the inverses of diagonal blocks those of blocks twice as large.

    Only the rows of every second block change, and of what the products give them only the block on the left:
    what else `lower` holds, on and above the diagonal too, is never used. In two steps, so that heads can take
    turns: the call issues the first product, what it returns the second.
    """
    chunk, lanes = inverse.shape
    pack = lanes // chunk
    starts = range(block, chunk, 2 * block)
    second = jnp.concatenate([inverse[s : s + block] for s in starts])
    product = _dot(second, _diagonal(lower, pack), compute)

    def finish() -> jax.Array:
        corner = _dot(product, _diagonal(inverse, pack), compute).astype(compute)
        pieces = []
        for i, s in enumerate(starts):
            left = _iota((block, lanes), 1) % chunk // block == s // block - 1
            changed = jnp.where(left, -corner[i * block : (i + 1) * block], inverse[s : s + block])
            pieces += [inverse[s - block : s], changed]
        return jnp.concatenate(pieces)

    return finish


def _invert(plan: Plan, tiles_ref: Any, inverse_ref: Any) -> None:
    """L of every pack in `inverse_ref` (packs, C, P · C), its diagonal tiles in `tiles_ref`; U takes its place."""
    _solve_tiles(tiles_ref)
    for packs in _side_by_side(plan.packs, tiling.TPU_HEADS_MERGE):
        inverses = {p: _from_tiles(tiles_ref[:, p, :].astype(plan.inverse), plan.chunk) for p in packs}
        block = TILE
        while block < plan.chunk:
            rounds = {p: _merge(inverses[p], inverse_ref[p], block, plan.inverse) for p in packs}
            inverses = {p: finish() for p, finish in rounds.items()}
            block *= 2
        for p, inverse in inverses.items():
            inverse_ref[p] = inverse


def _in_regions(plan: Plan, step: Any, parts: Sequence[Callable[[], None]]) -> None:
    """Runs the parts in order, each in a region of its own: they meet in memory only.

    The compiler schedules a region as a whole and hoists what it can; in one that is too long it spills every fifth
    store. A condition that is always true, which the compiler does not see, makes a region; neighbours under the same
    condition would become one.
    """
    for which, part in enumerate(parts):
        pl.when(step < plan.chunks + which)(part)


def forward_kernel(plan: Plan, has_state: bool, save_states: bool, *refs: Any) -> None:
    """Chunk n of the forward pass, eq. (6) to (8)."""
    q_ref, k_ref, v_ref, gates_ref, *rest = refs
    first_ref = rest.pop(0) if has_state else None
    o_ref, final_ref, *rest = rest
    states_ref = rest.pop(0) if save_states else None
    state_ref, above_ref, columns_ref, units_ref, tiles_ref, inverse_ref, scores_ref = rest
    index = pl.program_id(2)
    chunk, pack = plan.chunk, plan.pack
    wide_value = pack * plan.value_dim
    dot = functools.partial(_dot, compute=plan.compute)
    diagonal = functools.partial(_diagonal, pack=pack)

    @pl.when(index == 0)
    def _():
        state_ref[...] = jnp.zeros_like(state_ref) if first_ref is None else first_ref[0]
        above_ref[...] = jnp.where(_causal(chunk, pack), 0.0, -jnp.inf)

    gates = _read_gates(plan, gates_ref, columns_ref)
    mask = _counts(plan, gates_ref, index)
    _store_units(plan, q_ref, k_ref, units_ref, mask)
    log_beta = jnp.log2(jnp.maximum(gates.beta, _LEAST_BETA))
    out = gates.decay_out * gates.beta
    decay_across = gates.decay_across(plan.value_dim)

    def score() -> None:
        for p in range(plan.packs):
            units = units_ref[plan.unit(p)]
            products = dot(units, diagonal(units[:chunk]), contract=(1, 1))
            weights = gates.decay_between(p, above_ref[...], log_beta[p : p + 1, :])
            lower = weights * products[:chunk]
            scores_ref[p] = (weights * products[chunk:]).astype(plan.compute)
            inverse_ref[p] = lower.astype(plan.inverse)
            tiles_ref[:, p, :] = _to_tiles(lower)

    def walk(groups: Sequence[range]) -> None:
        for packs in groups:
            states = {p: state_ref[p] for p in packs}
            if states_ref is not None:
                for p in packs:
                    states_ref[0, 0, p] = states[p].astype(states_ref.dtype)
            recalled = {
                p: dot(units_ref[plan.unit(p)], diagonal(states[p].astype(plan.compute))) for p in packs
            }
            decay_in = {p: gates.decay_in_column(p, plan.value_dim) for p in packs}
            written, both = {}, {}
            for p in packs:
                v = _values(plan, v_ref, p, mask).astype(jnp.float32)
                missing = v - decay_in[p] * recalled[p][:chunk]
                written[p] = _dot(inverse_ref[p], diagonal(missing.astype(plan.inverse)), plan.inverse)
            for p in packs:
                keys = _from_diagonal(
                    jnp.transpose(jnp.concatenate([units_ref[plan.unit(p), :chunk]] * pack)), pack
                )
                k_out = keys.astype(jnp.float32) * out[p : p + 1, :]
                both[p] = dot(
                    jnp.concatenate([scores_ref[p], k_out.astype(plan.compute)]),
                    diagonal(written[p].astype(plan.compute)),
                )
            for p in packs:
                o = plan.scale * (decay_in[p] * recalled[p][chunk:] + both[p][:chunk])
                o_ref[0, :, p * wide_value : (p + 1) * wide_value] = o.astype(o_ref.dtype)
                state_ref[p] = decay_across[p : p + 1] * states[p] + both[p][chunk:]

    if plan.one_store:
        groups = _side_by_side(plan.packs, tiling.TPU_HEADS_FORWARD_ONE_STORE)
        _in_regions(plan, index, [score])
        _invert(plan, tiles_ref, inverse_ref)
        _in_regions(plan, index, [functools.partial(walk, [packs]) for packs in groups])
    else:
        groups = _side_by_side(plan.packs, tiling.TPU_HEADS_FORWARD)
        score()
        _invert(plan, tiles_ref, inverse_ref)
        _in_regions(plan, index, [functools.partial(walk, groups)])

    @pl.when(index == plan.chunks - 1)
    def _():
        final_ref[0] = state_ref[...]


def _values(plan: Plan, ref: Any, p: int, mask: jax.Array | None) -> jax.Array:
    """Pack p of a block of values, (C, P · V)."""
    return _side(ref, range(p * plan.pack, (p + 1) * plan.pack), plan.value_dim, mask)


def _row_sums(terms: Sequence[jax.Array], pack: int) -> jax.Array:
    """Sums over the lanes of each head of (C, ·), of all terms, as a row (1, P · C).

    A transpose and adds are cheaper than sums across lanes.
    """
    if pack == 1:
        terms = [x[:, :128] + x[:, 128:] if x.shape[1] > 128 else x for x in terms]
    if len({x.shape for x in terms}) == 1:
        terms = [functools.reduce(jnp.add, terms)]
    rows = []
    for x in terms:
        across = jnp.transpose(x)
        width = across.shape[0] // pack
        sums = [jnp.sum(across[s * width : (s + 1) * width], axis=0, keepdims=True) for s in range(pack)]
        rows.append(jnp.concatenate(sums, axis=1))
    return functools.reduce(jnp.add, rows)


def backward_kernel(plan: Plan, has_state: bool, *refs: Any) -> None:
    """Chunk N − 1 − n of the backward pass, eq. (19) to (23)."""
    q_ref, k_ref, v_ref, gates_ref, states_ref, do_ref, dfinal_ref, *rest = refs
    dq_ref, dk_ref, dv_ref, dgates_ref, *rest = rest
    dfirst_ref = rest.pop(0) if has_state else None
    dstate_ref, above_ref, below_ref, columns_ref, units_ref, tiles_ref, inverse_ref, *rest = rest
    decay_ref, gram_ref, scores_ref, written_ref, dmissing_ref, dscores_ref, rows_ref, dots_ref = rest
    step = pl.program_id(2)
    chunk, pack, key_dim, value_dim = plan.chunk, plan.pack, plan.key_dim, plan.value_dim
    wide_value = pack * value_dim
    compute = plan.compute
    dot = functools.partial(_dot, compute=compute)
    diagonal = functools.partial(_diagonal, pack=pack)

    def dot_rows(a: jax.Array, b: jax.Array, dtype: Any = compute) -> jax.Array:
        """aᵀ b of every head."""
        return _from_diagonal(_dot(a, b, dtype, (0, 0)), pack)

    @pl.when(step == 0)
    def _():
        dstate_ref[...] = dfinal_ref[0]
        above_ref[...] = jnp.where(_causal(chunk, pack), 0.0, -jnp.inf)
        strict = _iota((chunk, pack * chunk), 0) > _iota((chunk, pack * chunk), 1) % chunk
        below_ref[...] = jnp.where(strict, -1.0, 0.0)

    gates = _read_gates(plan, gates_ref, columns_ref)
    mask = _counts(plan, gates_ref, plan.chunks - 1 - step)
    _store_units(plan, q_ref, k_ref, units_ref, mask)
    out = gates.decay_out * gates.beta
    out_columns = _as_columns(out, chunk, pack, columns_ref.at[len(gates.sums)])
    decay_across = gates.decay_across(value_dim)

    def units(p: int) -> jax.Array:
        return units_ref[plan.unit(p)]

    def key(p: int) -> jax.Array:
        return units_ref[plan.unit(p), :chunk]

    def query(p: int) -> jax.Array:
        return units_ref[plan.unit(p), chunk:]

    def entering(p: int) -> jax.Array:
        return diagonal(states_ref[0, 0, p].astype(compute))

    def leaving(p: int) -> jax.Array:
        return diagonal(dstate_ref[p].astype(compute))

    def do(p: int) -> jax.Array:
        return _values(plan, do_ref, p, mask).astype(compute)

    def cotangents(p: int) -> jax.Array:
        return jnp.concatenate([dmissing_ref[p], do(p)])

    # What the forward pass had: E, E-free products, and U.
    for p in range(plan.packs):
        products = dot(units(p), diagonal(key(p)), contract=(1, 1))
        gram_ref[p], scores_ref[p] = products[:chunk], plan.scale * products[chunk:]
        decay_ref[p] = gates.decay_between(p, above_ref[...])
        lower = decay_ref[p] * gates.beta[p : p + 1, :] * gram_ref[p]
        inverse_ref[p] = lower.astype(plan.inverse)
        tiles_ref[:, p, :] = _to_tiles(lower)
    _invert(plan, tiles_ref, inverse_ref)

    def differentiate() -> None:
        for packs in _side_by_side(plan.packs, tiling.TPU_HEADS_BACKWARD):
            recalled = {p: dot(key(p), entering(p)) for p in packs}
            for p in packs:
                v = _values(plan, v_ref, p, mask).astype(jnp.float32)
                missing = v - gates.decay_in_column(p, value_dim) * recalled[p]
                written = _dot(inverse_ref[p], diagonal(missing.astype(plan.inverse)), plan.inverse)
                written_ref[p] = written.astype(compute)
        for packs in _side_by_side(plan.packs, tiling.TPU_HEADS_BACKWARD):
            dwritten = {}
            for p in packs:
                weighed = decay_ref[p] * gates.beta[p : p + 1, :] * scores_ref[p]
                # Eq. (19).
                inside = dot_rows(weighed, do(p))
                dwritten[p] = inside + gates.column(out_columns, p, value_dim) * dot(key(p), leaving(p))
            for p in packs:
                # Eq. (20).
                dmissing = dot_rows(inverse_ref[p], dwritten[p], plan.inverse)
                dmissing_ref[p] = dmissing.astype(compute)
                dv_ref[0, :, p * wide_value : (p + 1) * wide_value] = dmissing.astype(dv_ref.dtype)

        for p in range(plan.packs):
            beta = gates.beta[p : p + 1, :]
            products = dot(cotangents(p), diagonal(written_ref[p]), contract=(1, 1))
            # Eq. (21): dL and dP times E, before β.
            dlower = products[:chunk] * (below_ref[...] * decay_ref[p])
            dscores = products[chunk:] * decay_ref[p]
            shares = dlower * gram_ref[p] + dscores * scores_ref[p]
            rows_ref[2, p : p + 1, :] = jnp.sum(shares, axis=0, keepdims=True)
            gram_ref[p] = shares * beta
            dscores_ref[p, :chunk] = (dlower * beta).astype(compute)
            dscores_ref[p, chunk:] = (dscores * (plan.scale * beta)).astype(compute)

        dkeys: dict[int, Any] = {}
        dqueries: dict[int, Any] = {}
        for p in range(plan.packs):
            # Eq. (22), term by term.
            products = dot(cotangents(p), entering(p), contract=(1, 1))
            decay_in = gates.decay_in_column(p, key_dim)
            dk = -decay_in * products[:chunk]
            dq = (plan.scale * decay_in) * products[chunk:]
            through = dq * query(p).astype(jnp.float32) + dk * key(p).astype(jnp.float32)
            rows_ref[0, p : p + 1, :] = _row_sums([gram_ref[p], through], pack)
            products = dot(dscores_ref[p], diagonal(key(p)))
            dk, dq = dk + products[:chunk], dq + products[chunk:]
            products = dot(written_ref[p], leaving(p), contract=(1, 1))
            rows_ref[1, p : p + 1, :] = _row_sums([products * key(p).astype(jnp.float32)], pack)
            dk = dk + gates.column(out_columns, p, key_dim) * products + dot_rows(dscores_ref[p], units(p))
            unit = plan.unit(p)
            dkeys[unit], dqueries[unit] = dkeys.get(unit, 0) + dk, dqueries.get(unit, 0) + dq
            if p + 1 == plan.packs or plan.unit(p + 1) != unit:
                _store_gradient(plan, k_ref, dk_ref, unit, dkeys.pop(unit), key(p), mask)
                _store_gradient(plan, q_ref, dq_ref, unit, dqueries.pop(unit), query(p), mask)

    def update(packs: range) -> None:
        for p in packs:
            dstate = dstate_ref[p]
            product = dstate * states_ref[0, 0, p].astype(jnp.float32)
            dots_ref[p : p + 1, :] = jnp.sum(product, axis=0, keepdims=True)
            decay_in = gates.decay_in_column(p, value_dim)
            into = jnp.concatenate(
                [
                    (-decay_in * dmissing_ref[p].astype(jnp.float32)).astype(compute),
                    ((plan.scale * decay_in) * do(p).astype(jnp.float32)).astype(compute),
                ]
            )
            # Eq. (11).
            dstate_ref[p] = decay_across[p : p + 1] * dstate + dot_rows(units(p), into)

    state_elements = key_dim * wide_value
    updates = _side_by_side(plan.packs, max(1, tiling.TPU_REGION_STATE_ELEMENTS // state_elements))
    _in_regions(plan, step, [differentiate, *(functools.partial(update, packs) for packs in updates)])

    # Eq. (23).
    inside, outside, shares = rows_ref[0], rows_ref[1], rows_ref[2]
    out_share = out * outside
    dsums = inside - gates.beta * shares - out_share
    ends = [
        written + across * product
        for written, across, product in zip(
            _block_sums(out_share, pack),
            _last(gates.decay_in, chunk, pack),
            _block_sums(dots_ref[...], pack),
            strict=True,
        )
    ]
    at_end = _spread(ends, chunk)
    dgates_ref[0, 0, 0, : plan.packs, :] = _times_ones(dsums, _until(plan, onward=True)) + at_end
    dgates_ref[0, 0, 0, plan.packs :, :] = shares + gates.decay_out * outside

    if dfirst_ref is not None:

        @pl.when(step == plan.chunks - 1)
        def _():
            dfirst_ref[0] = dstate_ref[...]


def _store_gradient(
    plan: Plan,
    ref: Any,
    gradient_ref: Any,
    u: int,
    gradient: jax.Array,
    unit: jax.Array,
    mask: jax.Array | None,
) -> None:
    """Gradient of q or k of the key heads of unit u, through their norms."""
    heads, dim = plan.units[u], plan.key_dim
    if len(set(heads)) == 1 and plan.pack > 1:
        # All of a pack is one key head's.
        gradient = functools.reduce(jnp.add, (gradient[:, s * dim : (s + 1) * dim] for s in range(plan.pack)))
        heads, unit = heads[:1], unit[:, :dim]
    if plan.qk_norm_eps is not None:
        unit = unit.astype(jnp.float32)
        along = _spread(_block_sums(unit * gradient, len(heads)), dim)
        gradient = _normaliser(plan, _side(ref, heads, dim, mask), len(heads)) * (gradient - unit * along)
    gradient_ref[0, :, heads[0] * dim : (heads[-1] + 1) * dim] = gradient.astype(gradient_ref.dtype)
