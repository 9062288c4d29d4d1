"""The Gated Delta Network mixer (arXiv:2412.06464, eq. (10) and figure 1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from gdn_jax.array_types import Tap, no_tap
from gdn_jax.config import GDNConfig
from gdn_jax.layers import (
    ParamMaker,
    Projection,
    RMSNorm,
    ShortConv,
    decay_rate_log,
    document_numbers,
    keep_layout,
    time_step_bias,
)
from gdn_jax.mup import axes as ax
from gdn_jax.mup.rules import Rules
from gdn_jax.mup.spec import Role
from gdn_jax.sharding import over_batch_and_heads
from kernels_pallas import gated_delta_rule_from_gates


class GDNCache(NamedTuple):
    """What a mixer remembers between calls; a host model can allocate it without a mixer.

    Attributes:
        conv_tail: inputs of the q, k and v convolutions at the last ``conv_size - 1`` tokens of the
            current document: ``[B, conv_size - 1, heads, dim]`` each, zeros where there were none.
        state: delta-rule state ``[B, G, K, V]`` float32.
        last_segment: ``[B]`` int32, the document that both belong to; 0: none yet.
    """

    conv_tail: tuple[jax.Array, jax.Array, jax.Array]
    state: jax.Array
    last_segment: jax.Array


class GatedDeltaNet(nnx.Module):
    """``y = W_o (RMSNorm(o) * SiLU(W_g x))``, o from the gated delta rule over short-convolved q, k, v.

    Args:
        config: sizes and options; only the mixer's own fields are used.
        rngs: ``nnx.Rngs`` (stream ``params``), or a PRNG key.
        rules: initial scales, possibly traced; ``None``: those of ``config.preset``.
    """

    def __init__(self, config: GDNConfig, *, rngs: nnx.Rngs | jax.Array, rules: Rules | None = None) -> None:
        key = rngs.params() if isinstance(rngs, nnx.Rngs) else rngs
        make = ParamMaker(config, key, rules)
        key_axes, value_axes = (ax.KEY_HEADS, ax.KEY_DIM), (ax.VALUE_HEADS, ax.VALUE_DIM)
        self.config = config
        self.q = Projection(make, (ax.EMBED,), key_axes)
        self.k = Projection(make, (ax.EMBED,), key_axes)
        self.v = Projection(make, (ax.EMBED,), value_axes)
        self.g = Projection(make, (ax.EMBED,), value_axes)
        self.a = Projection(make, (ax.EMBED,), (ax.VALUE_HEADS,), Role.GATE_A_MATRIX)
        self.b = Projection(make, (ax.EMBED,), (ax.VALUE_HEADS,), Role.GATE_MATRIX)
        self.A_log = make(
            decay_rate_log, (ax.VALUE_HEADS,), out_axes=(ax.VALUE_HEADS,), role=Role.GATE_SCALAR
        )
        self.dt_bias = make(
            time_step_bias, (ax.VALUE_HEADS,), out_axes=(ax.VALUE_HEADS,), role=Role.GATE_SCALAR
        )
        self.conv_q = ShortConv(make, key_axes)
        self.conv_k = ShortConv(make, key_axes)
        self.conv_v = ShortConv(make, value_axes)
        self.o_norm = RMSNorm(make, ax.VALUE_DIM, config.norm_eps, Role.HEAD_GAIN)
        self.o = Projection(make, value_axes, (ax.EMBED,))

    def __call__(
        self,
        x: Float[jax.Array, "B T D"],
        *,
        segment_ids: Int[jax.Array, "B T"] | None = None,
        tap: Tap = no_tap,
        sequence_axis: str | None = None,
    ) -> Float[jax.Array, "B T D"]:
        """Mixes along time, causally.

        Args:
            x: inputs; the result has their dtype.
            segment_ids: int32 document of each position; nothing crosses a change. 0 is padding: inside a document
                the delta rule skips it, and the convolutions count it as zeros.
            tap: sees the intermediate values, and may change those that are not in ``array_types.SEEN_ONLY``.
            sequence_axis: a mesh axis that is manual in the ``shard_map`` around: each device holds an equal
                part of T, in the order of the axis, of at least ``conv_size - 1`` positions.

        Raises:
            ValueError: ``sequence_axis`` that is not manual here, or parts that are too short for the halo.
        """
        x = tap("mixer_input", x)
        q, k, v = (
            conv(projection(x), segment_ids, sequence_axis=sequence_axis)
            for projection, conv in ((self.q, self.conv_q), (self.k, self.conv_k), (self.v, self.conv_v))
        )
        return self._attend(x, q, k, v, segment_ids, None, tap, sequence_axis)[0]

    def with_cache(
        self,
        x: Float[jax.Array, "B T D"],
        cache: GDNCache,
        *,
        segment_ids: Int[jax.Array, "B T"] | None = None,
    ) -> tuple[Float[jax.Array, "B T D"], GDNCache]:
        """Goes on where ``cache`` ended: pieces of any length give what one call over all would.

        Padding that ends a piece is left out, so prompts padded on the right go on as if they were not.

        Args:
            x: the next inputs.
            cache: from ``init_cache`` or an earlier call; the new one has its dtypes.
            segment_ids: as in ``__call__``; ``None``: all go on with the cache's document.
        """
        if segment_ids is None:
            current = jnp.maximum(cache.last_segment, 1)
            segment_ids = jnp.broadcast_to(current[:, None], x.shape[:2])
        raw = self.q(x), self.k(x), self.v(x)
        taps = self.config.conv_size - 1
        tail_segments = jnp.broadcast_to(cache.last_segment[:, None], (x.shape[0], taps))
        q, k, v = (
            conv(y, segment_ids, tail, tail_segments)
            for conv, y, tail in zip(
                (self.conv_q, self.conv_k, self.conv_v), raw, cache.conv_tail, strict=True
            )
        )
        first = _first_valid(segment_ids)
        # A batch row of nothing but padding keeps its state.
        goes_on = (first == cache.last_segment) | (first == 0)
        entering = jnp.where(goes_on[:, None, None, None], cache.state, 0.0)
        y, state = self._attend(x, q, k, v, segment_ids, entering, no_tap)
        assert state is not None, "a state that enters leaves"
        last = _last_valid(segment_ids)
        last = jnp.where(last == 0, cache.last_segment, last)
        documents = document_numbers(jnp.concatenate([tail_segments, segment_ids], axis=1))
        tails = tuple(
            _last_of_document(jnp.concatenate([tail, y.astype(tail.dtype)], axis=1), documents, taps)
            for tail, y in zip(cache.conv_tail, raw, strict=True)
        )
        return y, GDNCache((tails[0], tails[1], tails[2]), state, last)

    @staticmethod
    def init_cache(config: GDNConfig, batch: int, dtype: DTypeLike | None = None) -> GDNCache:
        """An empty cache.

        Args:
            config: the mixer's.
            batch: number of sequences.
            dtype: of the convolution tails; ``None``: ``config.compute_dtype``. The state is float32.
        """
        taps = config.conv_size - 1
        dtype = jnp.dtype(dtype or config.compute_dtype)
        keys = jnp.zeros((batch, taps, config.num_key_heads, config.key_dim), dtype)
        values = jnp.zeros((batch, taps, config.num_value_heads, config.value_dim), dtype)
        state = jnp.zeros((batch, config.num_value_heads, config.key_dim, config.value_dim), jnp.float32)
        return GDNCache((keys, keys, values), state, jnp.zeros((batch,), jnp.int32))

    def _attend(
        self,
        x: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segment_ids: jax.Array | None,
        state: jax.Array | None,
        tap: Tap,
        sequence_axis: str | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        config = self.config
        q, k, v = tap("q", q), tap("k", k), tap("v", v)
        # The gates decide how long a state lives: float32 from here on.
        a = tap("gate_a", self.a(x, jnp.float32))
        b = tap("gate_b", self.b(x, jnp.float32))
        beta_max = 2.0 if config.allow_negative_eigenvalues else 1.0
        A_log, dt_bias = self.A_log[...], self.dt_bias[...]
        if tap is not no_tap:
            # For the tap's eyes only; the op computes its own.
            tap("log_decay", -jnp.exp(A_log)[None, None] * jax.nn.softplus(a + dt_bias[None, None]))
            tap("beta", beta_max * jax.nn.sigmoid(b))
        o, state = over_batch_and_heads(
            gated_delta_rule_from_gates,
            q,
            k,
            v,
            a,
            b,
            A_log,
            dt_bias,
            beta_max=beta_max,
            initial_state=state,
            segment_ids=segment_ids,
            scale=config.key_dim**config.readout_scale_exponent,
            qk_norm_eps=config.qk_norm_eps,
            return_final_state=state is not None or tap is not no_tap,
            sequence_axis=sequence_axis,
            implementation=config.implementation,
        )
        if tap is not no_tap:
            tap("state", state * config.key_dim**0.5)
        o = keep_layout(tap("o", o))
        normed = keep_layout(tap("o_normed", self.o_norm(o)))
        gate = jax.nn.silu(keep_layout(self.g(x)))
        gated = keep_layout(tap("mixer_hidden", normed * gate))
        return tap("mixer_output", self.o(gated)), state


def _first_valid(segment_ids: jax.Array) -> jax.Array:
    """First nonzero id of each row, 0 for a row of padding."""
    first = jnp.argmax(segment_ids != 0, axis=1)
    return jnp.take_along_axis(segment_ids, first[:, None], axis=1)[:, 0]


def _last_valid(segment_ids: jax.Array) -> jax.Array:
    return _first_valid(segment_ids[:, ::-1])


def _last_of_document(values: jax.Array, documents: jax.Array, count: int) -> jax.Array:
    """``values [B, T, ...]`` at the ``count`` positions up to the last one that is no padding.

    Zeros at positions of another document or of padding. A row of nothing but padding keeps its first ``count``.
    """
    length = documents.shape[1]
    last = length - 1 - jnp.argmax(documents[:, ::-1] >= 0, axis=1)
    last = jnp.where((documents >= 0).any(axis=1), last, count - 1)
    positions = jnp.maximum(last - (count - 1), 0)[:, None] + jnp.arange(count)[None]
    same = jnp.take_along_axis(documents, positions, axis=1) == jnp.take_along_axis(
        documents, last[:, None], axis=1
    )
    picked = jnp.take_along_axis(values, positions[:, :, None, None], axis=1)
    return jnp.where(same[:, :, None, None], picked, jnp.zeros((), values.dtype))
