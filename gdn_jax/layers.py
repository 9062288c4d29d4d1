"""Building blocks: parameter maker, projection, RMSNorm, short causal convolution, SwiGLU."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from gdn_jax.array_types import Tap, no_tap
from gdn_jax.config import GDNConfig
from gdn_jax.mup import axes as ax
from gdn_jax.mup.rules import Rules, init_scale, param_rule
from gdn_jax.mup.spec import ParamSpec, Role
from gdn_jax.params import make_param
from gdn_jax.sharding import over_time, parameter
from kernels_pallas import segment_masks

# Parameters that one layer draws keys for; the mixer has 13.
_MAX_PARAMS = 16

unit_normal = jax.nn.initializers.normal(1.0)


class ParamMaker:
    """Makes the parameters of one layer: draws keys in order, looks sizes and scales up.

    Args:
        config: sizes, preset and base.
        key: PRNG key of this layer.
        rules: rules to take the initial scales from (may be traced); ``None``: those of ``config.preset``.
    """

    def __init__(self, config: GDNConfig, key: jax.Array, rules: Rules | None = None) -> None:
        self.config = config
        self.sizes = config.axis_sizes
        # Split once: a fold_in per parameter would double the time that init takes to compile.
        self._keys = jax.random.split(key, _MAX_PARAMS)
        self._made = 0
        self._init_scale = _static_scale(config) if rules is None else init_scale(rules)

    def __call__(
        self,
        initializer: Callable,
        axes: tuple[str, ...],
        *,
        in_axes: tuple[str, ...] = (),
        out_axes: tuple[str, ...],
        role: Role,
    ) -> nnx.Param:
        """The next parameter; arguments as :func:`gdn_jax.params.make_param`."""
        key = self._keys[self._made]
        self._made += 1
        return make_param(
            key,
            initializer,
            self.sizes,
            axes,
            in_axes=in_axes,
            out_axes=out_axes,
            role=role,
            init_scale=self._init_scale,
        )


# Rows of a TPU's register.
_SUBLANES = 8


def _static_scale(config: GDNConfig) -> Callable[[ParamSpec], float]:
    ratios = ax.axis_ratios(config.axis_sizes, config.base_axis_sizes)
    return lambda spec: param_rule(spec, config.preset, config.optimizer, ratios, config.width).init_std


class Projection(nnx.Module):
    """A bias-free linear map between named axes.

    ``x [..., *in_axes] -> [..., *out_axes]``, computed in the dtype of ``x``.
    """

    def __init__(
        self,
        make: ParamMaker,
        in_axes: tuple[str, ...],
        out_axes: tuple[str, ...],
        role: Role = Role.MATRIX,
    ) -> None:
        self.kernel = make(unit_normal, (*in_axes, *out_axes), in_axes=in_axes, out_axes=out_axes, role=role)
        self.num_in = len(in_axes)

    def __call__(self, x: Array, out_dtype: DTypeLike | None = None) -> Array:
        """Contracts the trailing ``in_axes`` of ``x``; accumulates, and with ``out_dtype`` returns, wider."""
        leading = x.shape[: x.ndim - self.num_in]
        in_shape, out_shape = self.kernel.shape[: self.num_in], self.kernel.shape[self.num_in :]
        # Two axes, whatever they are called: TPUs would lay out (T, heads, dim) otherwise, and copy.
        kernel = parameter(self.kernel, x.dtype).reshape(math.prod(in_shape), math.prod(out_shape))
        y = jnp.matmul(
            x.reshape(*leading, math.prod(in_shape)), kernel, preferred_element_type=out_dtype or x.dtype
        )
        return y.reshape(*leading, *out_shape)


@jax.custom_vjp
def wide_matmul(x: Float[Array, "B T D"], kernel: Float[Array, "D vocab"]) -> Float[Array, "B T vocab"]:
    """``x kernel`` in float32, both of one dtype; its cotangent is rounded to that dtype before it is multiplied.

    As is every other cotangent. JAX's own transpose would make float32 of the operands instead: twice the bytes of the
    largest array of a language model, in products at half the speed.
    """
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _wide_matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return wide_matmul(x, kernel), (x, kernel)


def _wide_matmul_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = saved
    cotangent = cotangent.astype(x.dtype)
    return jnp.matmul(cotangent, kernel.T), jnp.einsum("btd,btv->dv", x, cotangent)


wide_matmul.defvjp(_wide_matmul_forward, _wide_matmul_backward)


def keep_layout(x: Float[Array, "B T heads dim"]) -> Float[Array, "B T heads dim"]:
    """x; on a TPU it, and its gradient, stay laid out as (B, T, heads dim), as projections write and kernels read.

    Left to itself that compiler puts time innermost for the sums of a norm's gradient, and copies both ways.
    """

    def pinned(x: Array) -> Array:
        flat = with_layout_constraint(x.reshape(*x.shape[:2], math.prod(x.shape[2:])), Layout((0, 1, 2)))
        return flat.reshape(x.shape)

    return jax.lax.platform_dependent(x, tpu=pinned, default=lambda x: x)


class RMSNorm(nnx.Module):
    """``x / rms(x) * gain`` over one trailing axis, computed in float32."""

    def __init__(self, make: ParamMaker, axis: str, eps: float, role: Role = Role.NORM_GAIN) -> None:
        self.gain = make(jax.nn.initializers.ones, (axis,), out_axes=(axis,), role=role)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        """Returns the dtype of ``x``."""
        if x.ndim == 4 and x.shape[1] % _SUBLANES == 0:
            return jax.lax.platform_dependent(x, tpu=self._normalise_heads, default=self._normalise)
        return self._normalise(x)

    def _normalise_heads(self, x: Array) -> Array:
        # (B, T, G, V) as (B, T/8, G, 8, V): so a TPU lays out (B, T, G V), and nothing is moved.
        batch, length, heads, dim = x.shape
        tiles = x.reshape(batch, length // _SUBLANES, _SUBLANES, heads, dim).swapaxes(2, 3)
        return self._normalise(tiles).swapaxes(2, 3).reshape(x.shape)

    def _normalise(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        gain = jnp.expand_dims(parameter(self.gain), tuple(range(x.ndim - 1)))
        return (wide * scale * gain).astype(x.dtype)


class ShortConv(nnx.Module):
    """Depthwise causal convolution along time, then SiLU; never looks across a document border."""

    def __init__(self, make: ParamMaker, channels: tuple[str, str]) -> None:
        self.kernel = make(unit_normal, (ax.CONV, *channels), out_axes=channels, role=Role.CONV)

    def __call__(
        self,
        x: Float[Array, "B T heads dim"],
        segment_ids: Int[Array, "B T"] | None = None,
        tail: Float[Array, "B taps heads dim"] | None = None,
        tail_segments: Int[Array, "B taps"] | None = None,
        *,
        sequence_axis: str | None = None,
    ) -> Float[Array, "B T heads dim"]:
        """``y_t = SiLU(sum_j kernel[j] x[t - (J-1) + j])`` in the dtype of ``x``.

        Args:
            x: inputs.
            segment_ids: document of each position; taps of another document, and padding (0), count as zero.
            tail: the ``J - 1`` inputs before ``x``; zeros by default.
            tail_segments: their documents; needed with both ``tail`` and ``segment_ids``.
            sequence_axis: a manual mesh axis that T is split over; the tail comes from the device before.

        Raises:
            ValueError: ``sequence_axis`` that is not manual here, or parts that are too short for the halo.
        """
        kernel = self.kernel[...].astype(x.dtype)
        if tail is not None:
            return _short_conv(kernel, x, segment_ids, tail, tail_segments)
        if sequence_axis is not None:
            return _short_conv_of_part(kernel, x, segment_ids, sequence_axis)
        return over_time(_short_conv_of_part, kernel, x, segment_ids)


def _short_conv_of_part(
    kernel: Float[Array, "taps heads dim"],
    x: Float[Array, "B T heads dim"],
    segment_ids: Int[Array, "B T"] | None,
    axis: str | None,
) -> Float[Array, "B T heads dim"]:
    if axis is None:
        return _short_conv(kernel, x, segment_ids, None, None)
    before = kernel.shape[0] - 1
    tail_segments = None if segment_ids is None else left_halo(segment_ids, before, axis)
    return _short_conv(kernel, x, segment_ids, left_halo(x, before, axis), tail_segments)


def _short_conv(
    kernel: Float[Array, "taps heads dim"],
    x: Float[Array, "B T heads dim"],
    segment_ids: Int[Array, "B T"] | None,
    tail: Float[Array, "B before heads dim"] | None,
    tail_segments: Int[Array, "B before"] | None,
) -> Float[Array, "B T heads dim"]:
    taps, heads, dim = kernel.shape
    kernel = kernel.reshape(taps, heads * dim)
    length = x.shape[1]
    # Channels in one axis, as a projection writes and a kernel reads them: TPUs lay (T, heads, dim) out otherwise.
    x = x.reshape(*x.shape[:2], heads * dim)
    if tail is None:
        padded = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
    else:
        tail = tail.astype(x.dtype).reshape(*tail.shape[:2], heads * dim)
        padded = jnp.concatenate([tail, x], axis=1)
    documents = None
    if segment_ids is not None:
        if tail_segments is None:
            tail_segments = jnp.zeros((x.shape[0], taps - 1), segment_ids.dtype)
        documents = document_numbers(jnp.concatenate([tail_segments, segment_ids], axis=1))
    total = x * kernel[None, None, taps - 1]
    for j in range(taps - 1):
        shifted = padded[:, j : j + length]
        if documents is not None:
            same = documents[:, j : j + length] == documents[:, taps - 1 :]
            shifted = jnp.where(same[..., None], shifted, jnp.zeros((), x.dtype))
        total = total + shifted * kernel[None, None, j]
    return jax.nn.silu(total).reshape(*x.shape[:2], heads, dim)


def document_numbers(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """0, 1, ... per document of a row, one more wherever the gated delta rule resets; -1 for padding.

    An id that comes back after another one is a new document, and one that comes back after padding is not.
    """
    valid, reset = segment_masks(segment_ids)
    return jnp.where(valid, jnp.cumsum(reset, axis=1, dtype=jnp.int32), -1)


def left_halo(x: Shaped[Array, "B T ..."], taps: int, axis: str) -> Shaped[Array, "B taps ..."]:
    """The last ``taps`` positions of the device before this one; zeros on the first.

    Args:
        x: this device's part of a sequence.
        taps: how many positions a convolution looks back.
        axis: the manual mesh axis that the sequence is split over.

    Raises:
        ValueError: the axis is not manual here, or a part is shorter than ``taps``.
    """
    try:
        devices = jax.lax.axis_size(axis)
    except NameError:
        raise ValueError(
            f"sequence_axis must be a mesh axis that is manual where the mixer is called; got {axis!r}, which "
            f"is not. Call it inside jax.shard_map(..., axis_names={{..., {axis!r}}}), or use None."
        ) from None
    length = x.shape[1]
    if length < taps:
        raise ValueError(
            f"each device's part of the sequence must have at least conv_size - 1 = {taps} positions; got "
            f"{length}. Split over fewer devices than {devices}, or use longer sequences."
        )
    return jax.lax.ppermute(x[:, length - taps :], axis, [(i, i + 1) for i in range(devices - 1)])


class SwiGLU(nnx.Module):
    """``W_down (SiLU(W_gate x) * W_up x)`` (arXiv:2002.05202)."""

    def __init__(self, make: ParamMaker) -> None:
        self.gate = Projection(make, (ax.EMBED,), (ax.MLP,))
        self.up = Projection(make, (ax.EMBED,), (ax.MLP,))
        self.down = Projection(make, (ax.MLP,), (ax.EMBED,))

    def __call__(self, x: Float[Array, "B T D"], tap: Tap = no_tap) -> Float[Array, "B T D"]:
        """Same dtype as ``x``."""
        x = tap("mlp_input", x)
        hidden = tap("mlp_hidden", jax.nn.silu(self.gate(x)) * self.up(x))
        return tap("mlp_output", self.down(hidden))


def decay_rate_log(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """``A_log = log A`` with A uniform on (0, 16), and at least 0.01 so that the log stays tame."""
    return jnp.log(jnp.maximum(16.0 * jax.random.uniform(key, shape, dtype), 0.01))


def time_step_bias(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """``dt_bias = softplus^-1(dt)`` with dt log-uniform on [1e-3, 1e-1]."""
    return inverse_softplus(_log_uniform(jax.random.uniform(key, shape, dtype)))


def gate_quantiles(num_heads: int) -> tuple[jax.Array, jax.Array]:
    """``(A_log, dt_bias)`` on a grid of quantiles of their distributions, ``[num_heads]`` float32 each.

    Sampling noise of few heads looks like a dependence on width; coordinate checks start from this.
    The second coordinate is a golden-ratio sequence, so that the pairs fill the square.
    """
    grid = (jnp.arange(num_heads, dtype=jnp.float32) + 0.5) / num_heads
    golden = (jnp.arange(num_heads, dtype=jnp.float32) + 0.5) * ((math.sqrt(5) - 1) / 2) % 1.0
    return jnp.log(jnp.maximum(16.0 * grid, 0.01)), inverse_softplus(_log_uniform(golden))


def _log_uniform(uniform: jax.Array) -> jax.Array:
    low, high = math.log(1e-3), math.log(1e-1)
    return jnp.exp(low + (high - low) * uniform)


def inverse_softplus(x: jax.Array) -> jax.Array:
    """``y`` with ``softplus(y) = x``, for x > 0, without overflow or cancellation."""
    return x + jnp.log(-jnp.expm1(-x))
