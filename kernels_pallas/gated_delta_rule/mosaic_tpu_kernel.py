"""Kernel bodies for TPUs (Pallas Mosaic TPU): a program does one chunk of several heads, the state in VMEM.

README.md derives the algorithm; comments cite its equation numbers. Program (b, g, n) of the forward pass does
chunk n of the value heads of group g of sequence b; n runs in order, and the state stays in scratch between
chunks. The backward pass runs n from the last chunk to the first, with the cotangent of the state in scratch.

What these chips are bound by shapes the code. Not arithmetic, but latency and the cross-lane unit: so the heads of
a program go through every stage side by side (their matmuls are independent), a sum or a broadcast across lanes is
replaced by a power of two, a transpose or a matmul wherever that is cheaper, and write strengths are folded
into columns (README, "On a TPU"): a row broadcasts for nothing, a column costs as much as two matmuls.
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
        share: how many of them share a key head.
        key_dim: K.
        value_dim: V.
        length: T.
        scale: of the output.
        qk_norm_eps: if set, q and k are L2-normalised inside.
        compute: dtype of what goes into the MXU; float32 takes six passes.
        inverse: the same where the triangular inverse is merged and applied.
        padded: whether a last row of the gates says which tokens count.
    """

    chunk: int
    heads: int
    share: int
    key_dim: int
    value_dim: int
    length: int
    scale: float
    qk_norm_eps: float | None
    compute: Any
    inverse: Any
    padded: bool

    @property
    def chunks(self) -> int:
        """N."""
        return -(-self.length // self.chunk)

    @property
    def key_heads(self) -> int:
        """Key heads of a program."""
        return self.heads // self.share

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


def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _causal(chunk: int) -> jax.Array:
    return _iota((chunk, chunk), 0) >= _iota((chunk, chunk), 1)


def _side_by_side(heads: int, most: int) -> list[range]:
    """The heads of a program in groups that go through a stage together."""
    return [range(start, min(start + most, heads)) for start in range(0, heads, most)]


@dataclasses.dataclass(frozen=True)
class _Gates:
    """Gates of all heads of a program, one head a row (heads, C).

    Attributes:
        sums: γ log₂ e, as it is or as (coarse, fine).
        sum_columns: the same, one head a column (C, heads).
        decay_in: e^γ.
        decay_out: e^{γ_C − γ}.
        beta: β.
    """

    sums: Sequence[jax.Array]
    sum_columns: Sequence[jax.Array]
    decay_in: jax.Array
    decay_out: jax.Array
    beta: jax.Array

    @property
    def decay_across(self) -> jax.Array:
        """e^{γ_C}, (heads, 1)."""
        return self.decay_in[:, -1:]

    def decay_in_column(self, h: int, width: int) -> jax.Array:
        """e^γ of head h in every lane of (C, width)."""
        columns = [jnp.broadcast_to(x[:, h : h + 1], (x.shape[0], width)) for x in self.sum_columns]
        return jnp.exp2(functools.reduce(jnp.add, columns))

    def decay_between(self, h: int, above: jax.Array, log_weights: jax.Array | None = None) -> jax.Array:
        """E_ij of eq. (3) for head h, or E_ij · 2^{log_weights_j}; `above` is −∞ where i < j, else 0.

        Masked before the power: above the diagonal it would overflow. An addition is cheaper than a selection.
        """
        last = self.sums[-1][h : h + 1, :]
        if log_weights is not None:
            last = last - log_weights
        difference = (self.sum_columns[-1][:, h : h + 1] - last) + above
        if len(self.sums) == 2:
            difference = difference + (self.sum_columns[0][:, h : h + 1] - self.sums[0][h : h + 1, :])
        return jnp.exp2(difference)


def _read_gates(plan: Plan, gates_ref: Any) -> _Gates:
    heads, chunk = plan.heads, plan.chunk
    # Powers of two, which is what the hardware computes.
    log_decay = jnp.maximum(gates_ref[0, 0, 0, :heads, :], FORGET) * _LOG2_E
    until = (_iota((chunk, chunk), 0) <= _iota((chunk, chunk), 1)).astype(jnp.bfloat16)
    sums = [log_decay]
    if plan.exact_decay:
        coarse = jnp.round(log_decay * 256) / 256
        sums = [coarse, log_decay - coarse]
    sums = [_times_ones(x, until) for x in sums]
    columns = jnp.transpose(jnp.concatenate(sums))
    return _Gates(
        sums=sums,
        sum_columns=[columns[:, i * heads : (i + 1) * heads] for i in range(len(sums))],
        decay_in=jnp.exp2(functools.reduce(jnp.add, sums)),
        decay_out=jnp.exp2(functools.reduce(jnp.add, [x[:, chunk - 1 :] - x for x in sums])),
        beta=gates_ref[0, 0, 0, heads : 2 * heads, :],
    )


def _counts(plan: Plan, gates_ref: Any, index: Any) -> jax.Array | None:
    """Which tokens of a chunk count, (C, 1); None where all do."""
    mask = None
    if plan.length % plan.chunk:
        mask = index * plan.chunk + _iota((plan.chunk, 1), 0) < plan.length
    if plan.padded:
        column = jnp.transpose(gates_ref[0, 0, 0, 2 * plan.heads :, :]) > 0
        mask = column if mask is None else mask & column
    return mask


def _head(ref: Any, h: int, dim: int, mask: jax.Array | None) -> jax.Array:
    """Head h of a (1, C, heads · dim) block; zeros where a token does not count: it may hold anything, NaN too."""
    x = ref[0, :, h * dim : (h + 1) * dim]
    return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


def _normaliser(plan: Plan, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    assert plan.qk_norm_eps is not None
    return jax.lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) + plan.qk_norm_eps)


def _store_units(plan: Plan, q_ref: Any, k_ref: Any, units_ref: Any, mask: jax.Array | None) -> None:
    """k over q of every key head, normalised, as the MXU takes them: (key heads, 2C, K)."""
    for h in range(plan.key_heads):
        for half, ref in enumerate((k_ref, q_ref)):
            x = _head(ref, h, plan.key_dim, mask)
            if plan.qk_norm_eps is not None:
                x = x.astype(jnp.float32) * _normaliser(plan, x)
            units_ref[h, half * plan.chunk : (half + 1) * plan.chunk] = x.astype(plan.compute)


def _solve_tiles(tiles_ref: Any) -> None:
    """Inverts the TILE × TILE diagonal tiles of I + L, of all heads at once, by substitution in float32.

    `tiles_ref` is (TILE, heads, C): row i of the tiles, side by side on the lanes. Row i of an inverse is
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
    """The diagonal tiles of a C × C matrix side by side: (TILE, C)."""
    chunk = lower.shape[0]
    tile = _iota((TILE, chunk), 1) // TILE
    compact = lower[:TILE]
    for p in range(1, chunk // TILE):
        compact = jnp.where(tile == p, lower[p * TILE : (p + 1) * TILE], compact)
    return compact


def _from_tiles(compact: jax.Array) -> jax.Array:
    """The inverse of `_to_tiles`, zeros off the tiles."""
    chunk = compact.shape[1]
    tile = _iota((TILE, chunk), 1) // TILE
    return jnp.concatenate(
        [jnp.where(tile == p, compact, jnp.zeros_like(compact)) for p in range(chunk // TILE)]
    )


def _merge(inverse: jax.Array, lower: jax.Array, block: int, compute: Any) -> Callable[[], jax.Array]:
    """One round of eq. (9): from the inverses of diagonal blocks those of blocks twice as large.

    Only the rows of every second block change, and of what the products give them only the block on the left:
    what else `lower` holds, on and above the diagonal too, is never used. In two steps, so that heads can take
    turns: the call issues the first product, what it returns the second.
    """
    chunk = inverse.shape[0]
    starts = range(block, chunk, 2 * block)
    second = jnp.concatenate([inverse[s : s + block] for s in starts])
    product = _dot(second, lower, compute)

    def finish() -> jax.Array:
        corner = _dot(product, inverse, compute).astype(compute)
        pieces = []
        for i, s in enumerate(starts):
            left = _iota((block, chunk), 1) // block == s // block - 1
            changed = jnp.where(left, -corner[i * block : (i + 1) * block], inverse[s : s + block])
            pieces += [inverse[s - block : s], changed]
        return jnp.concatenate(pieces)

    return finish


def _invert(plan: Plan, tiles_ref: Any, inverse_ref: Any) -> None:
    """L of every head in `inverse_ref` (heads, C, C), its diagonal tiles in `tiles_ref`; U takes its place."""
    _solve_tiles(tiles_ref)
    for heads in _side_by_side(plan.heads, tiling.TPU_HEADS_MERGE):
        inverses = {h: _from_tiles(tiles_ref[:, h, :].astype(plan.inverse)) for h in heads}
        block = TILE
        while block < plan.chunk:
            rounds = {h: _merge(inverses[h], inverse_ref[h], block, plan.inverse) for h in heads}
            inverses = {h: finish() for h, finish in rounds.items()}
            block *= 2
        for h, inverse in inverses.items():
            inverse_ref[h] = inverse


def forward_kernel(plan: Plan, has_state: bool, save_states: bool, *refs: Any) -> None:
    """Chunk n of the forward pass, eq. (6) to (8)."""
    q_ref, k_ref, v_ref, gates_ref, *rest = refs
    first_ref = rest.pop(0) if has_state else None
    o_ref, final_ref, *rest = rest
    states_ref = rest.pop(0) if save_states else None
    state_ref, above_ref, units_ref, tiles_ref, inverse_ref, scores_ref = rest
    index = pl.program_id(2)
    chunk, value_dim = plan.chunk, plan.value_dim
    dot = functools.partial(_dot, compute=plan.compute)

    @pl.when(index == 0)
    def _():
        state_ref[...] = jnp.zeros_like(state_ref) if first_ref is None else first_ref[0]
        above_ref[...] = jnp.where(_causal(chunk), 0.0, -jnp.inf)

    gates = _read_gates(plan, gates_ref)
    mask = _counts(plan, gates_ref, index)
    _store_units(plan, q_ref, k_ref, units_ref, mask)
    log_beta = jnp.log2(jnp.maximum(gates.beta, _LEAST_BETA))
    for h in range(plan.heads):
        units = units_ref[h // plan.share]
        products = dot(units, units[:chunk], contract=(1, 1))
        weights = gates.decay_between(h, above_ref[...], log_beta[h : h + 1, :])
        lower = weights * products[:chunk]
        scores_ref[h] = (weights * products[chunk:]).astype(plan.compute)
        inverse_ref[h] = lower.astype(plan.inverse)
        tiles_ref[:, h, :] = _to_tiles(lower)
    _invert(plan, tiles_ref, inverse_ref)

    out = gates.decay_out * gates.beta
    for heads in _side_by_side(plan.heads, tiling.TPU_HEADS_FORWARD):
        states = {h: state_ref[h] for h in heads}
        if states_ref is not None:
            for h in heads:
                states_ref[0, 0, h] = states[h].astype(states_ref.dtype)
        recalled = {h: dot(units_ref[h // plan.share], states[h]) for h in heads}
        decay_in = {h: gates.decay_in_column(h, value_dim) for h in heads}
        written, both = {}, {}
        for h in heads:
            v = _head(v_ref, h, value_dim, mask).astype(jnp.float32)
            missing = v - decay_in[h] * recalled[h][:chunk]
            written[h] = _dot(inverse_ref[h], missing, plan.inverse)
        for h in heads:
            k_out = jnp.transpose(units_ref[h // plan.share, :chunk]).astype(jnp.float32) * out[h : h + 1, :]
            both[h] = dot(jnp.concatenate([scores_ref[h], k_out.astype(plan.compute)]), written[h])
        for h in heads:
            o = plan.scale * (decay_in[h] * recalled[h][chunk:] + both[h][:chunk])
            o_ref[0, :, h * value_dim : (h + 1) * value_dim] = o.astype(o_ref.dtype)
            state_ref[h] = gates.decay_across[h : h + 1] * states[h] + both[h][chunk:]

    @pl.when(index == plan.chunks - 1)
    def _():
        final_ref[0] = state_ref[...]


def _row_sums(x: jax.Array) -> jax.Array:
    """Sums over the lanes of (C, ·) as a row (1, C): a transpose and adds are cheaper than sums across lanes."""
    if x.shape[1] > 128:
        x = x[:, :128] + x[:, 128:]
    return jnp.sum(jnp.transpose(x), axis=0, keepdims=True)


def backward_kernel(plan: Plan, has_state: bool, *refs: Any) -> None:
    """Chunk N − 1 − n of the backward pass, eq. (19) to (23)."""
    q_ref, k_ref, v_ref, gates_ref, states_ref, do_ref, dfinal_ref, *rest = refs
    dq_ref, dk_ref, dv_ref, dgates_ref, *rest = rest
    dfirst_ref = rest.pop(0) if has_state else None
    dstate_ref, above_ref, below_ref, units_ref, tiles_ref, inverse_ref, *rest = rest
    decay_ref, gram_ref, scores_ref, written_ref, dmissing_ref, dscores_ref, rows_ref, dots_ref = rest
    step = pl.program_id(2)
    all_heads, chunk, key_dim, value_dim = plan.heads, plan.chunk, plan.key_dim, plan.value_dim
    compute = plan.compute
    dot = functools.partial(_dot, compute=compute)

    @pl.when(step == 0)
    def _():
        dstate_ref[...] = dfinal_ref[0]
        above_ref[...] = jnp.where(_causal(chunk), 0.0, -jnp.inf)
        below_ref[...] = jnp.where(_iota((chunk, chunk), 0) > _iota((chunk, chunk), 1), -1.0, 0.0)

    gates = _read_gates(plan, gates_ref)
    mask = _counts(plan, gates_ref, plan.chunks - 1 - step)
    _store_units(plan, q_ref, k_ref, units_ref, mask)
    out = gates.decay_out * gates.beta
    out_columns = jnp.transpose(out)

    def units(h: int) -> jax.Array:
        return units_ref[h // plan.share]

    def key(h: int) -> jax.Array:
        return units_ref[h // plan.share, :chunk]

    def query(h: int) -> jax.Array:
        return units_ref[h // plan.share, chunk:]

    def entering(h: int) -> jax.Array:
        return states_ref[0, 0, h].astype(compute)

    def do(h: int) -> jax.Array:
        return _head(do_ref, h, value_dim, mask).astype(compute)

    # What the forward pass had: E, E-free products, and U.
    for h in range(all_heads):
        products = dot(units(h), key(h), contract=(1, 1))
        gram_ref[h], scores_ref[h] = products[:chunk], plan.scale * products[chunk:]
        decay_ref[h] = gates.decay_between(h, above_ref[...])
        lower = decay_ref[h] * gates.beta[h : h + 1, :] * gram_ref[h]
        inverse_ref[h] = lower.astype(plan.inverse)
        tiles_ref[:, h, :] = _to_tiles(lower)
    _invert(plan, tiles_ref, inverse_ref)

    for heads in _side_by_side(all_heads, tiling.TPU_HEADS_BACKWARD):
        recalled = {h: dot(key(h), entering(h)) for h in heads}
        for h in heads:
            v = _head(v_ref, h, value_dim, mask).astype(jnp.float32)
            missing = v - gates.decay_in_column(h, value_dim) * recalled[h]
            written_ref[h] = _dot(inverse_ref[h], missing, plan.inverse).astype(compute)
    for heads in _side_by_side(all_heads, tiling.TPU_HEADS_BACKWARD):
        dwritten = {}
        for h in heads:
            weighed = decay_ref[h] * gates.beta[h : h + 1, :] * scores_ref[h]
            # Eq. (19).
            inside = dot(weighed, do(h), contract=(0, 0))
            dwritten[h] = inside + out_columns[:, h : h + 1] * dot(key(h), dstate_ref[h])
        for h in heads:
            # Eq. (20).
            dmissing = _dot(inverse_ref[h], dwritten[h], plan.inverse, (0, 0))
            dmissing_ref[h] = dmissing.astype(compute)
            dv_ref[0, :, h * value_dim : (h + 1) * value_dim] = dmissing.astype(dv_ref.dtype)

    dkeys: dict[int, Any] = {}
    dqueries: dict[int, Any] = {}
    for heads in _side_by_side(all_heads, tiling.TPU_HEADS_GRADIENTS):
        cotangents = {h: jnp.concatenate([dmissing_ref[h], do(h)]) for h in heads}
        products = {h: dot(cotangents[h], written_ref[h], contract=(1, 1)) for h in heads}
        for h in heads:
            beta = gates.beta[h : h + 1, :]
            # Eq. (21): dL and dP times E, before β.
            dlower = products[h][:chunk] * (below_ref[...] * decay_ref[h])
            dscores = products[h][chunk:] * decay_ref[h]
            shares = dlower * gram_ref[h] + dscores * scores_ref[h]
            rows_ref[2, h : h + 1, :] = jnp.sum(shares, axis=0, keepdims=True)
            rows_ref[0, h : h + 1, :] = _row_sums(shares * beta)
            dscores_ref[h, :chunk] = (dlower * beta).astype(compute)
            dscores_ref[h, chunk:] = (dscores * (plan.scale * beta)).astype(compute)
        # Eq. (22), term by term.
        dk, dq = {}, {}
        products = {h: dot(cotangents[h], entering(h), contract=(1, 1)) for h in heads}
        for h in heads:
            decay_in = gates.decay_in_column(h, key_dim)
            dk[h] = -decay_in * products[h][:chunk]
            dq[h] = (plan.scale * decay_in) * products[h][chunk:]
            through = dq[h] * query(h).astype(jnp.float32) + dk[h] * key(h).astype(jnp.float32)
            rows_ref[0, h : h + 1, :] += _row_sums(through)
        products = {h: dot(dscores_ref[h], key(h)) for h in heads}
        for h in heads:
            dk[h] = dk[h] + products[h][:chunk]
            dq[h] = dq[h] + products[h][chunk:]
        products = {h: dot(written_ref[h], dstate_ref[h], contract=(1, 1)) for h in heads}
        for h in heads:
            rows_ref[1, h : h + 1, :] = _row_sums(products[h] * key(h).astype(jnp.float32))
            dk[h] = dk[h] + out_columns[:, h : h + 1] * products[h]
        products = {h: dot(dscores_ref[h], units(h), contract=(0, 0)) for h in heads}
        for h in heads:
            key_head = h // plan.share
            dkeys[key_head] = dkeys.get(key_head, 0) + dk[h] + products[h]
            dqueries[key_head] = dqueries.get(key_head, 0) + dq[h]
        for h in heads:
            dstate = dstate_ref[h]
            dots_ref[h : h + 1, :] = jnp.sum(
                dstate * states_ref[0, 0, h].astype(jnp.float32), axis=0, keepdims=True
            )
            decay_in = gates.decay_in_column(h, value_dim)
            into = jnp.concatenate(
                [
                    (-decay_in * dmissing_ref[h].astype(jnp.float32)).astype(compute),
                    ((plan.scale * decay_in) * do(h).astype(jnp.float32)).astype(compute),
                ]
            )
            # Eq. (11).
            dstate_ref[h] = gates.decay_across[h : h + 1] * dstate + dot(units(h), into, contract=(0, 0))
        for h in heads:
            if (h + 1) % plan.share == 0:
                key_head = h // plan.share
                _store_gradient(plan, k_ref, dk_ref, key_head, dkeys.pop(key_head), key(h), mask)
                _store_gradient(plan, q_ref, dq_ref, key_head, dqueries.pop(key_head), query(h), mask)

    # Eq. (23).
    inside, outside, shares = rows_ref[0], rows_ref[1], rows_ref[2]
    out_share = out * outside
    across = gates.decay_across * jnp.sum(dots_ref[...], axis=1, keepdims=True)
    dsums = inside - gates.beta * shares - out_share
    onward = _causal(chunk).astype(jnp.bfloat16)
    at_end = jnp.sum(out_share, axis=1, keepdims=True) + across
    dgates_ref[0, 0, 0, :all_heads, :] = _times_ones(dsums, onward) + at_end
    dgates_ref[0, 0, 0, all_heads:, :] = shares + gates.decay_out * outside

    if dfirst_ref is not None:

        @pl.when(step == plan.chunks - 1)
        def _():
            dfirst_ref[0] = dstate_ref[...]


def _store_gradient(
    plan: Plan,
    ref: Any,
    gradient_ref: Any,
    h: int,
    gradient: jax.Array,
    unit: jax.Array,
    mask: jax.Array | None,
) -> None:
    """Gradient of q or k of key head h, through its norm."""
    if plan.qk_norm_eps is not None:
        unit = unit.astype(jnp.float32)
        along = jnp.sum(unit * gradient, axis=1, keepdims=True)
        gradient = _normaliser(plan, _head(ref, h, plan.key_dim, mask)) * (gradient - unit * along)
    gradient_ref[0, :, h * plan.key_dim : (h + 1) * plan.key_dim] = gradient.astype(gradient_ref.dtype)
