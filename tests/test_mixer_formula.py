"""The mixer against its formula in NumPy, float64 and one token after another; what its gates are drawn from."""

import jax
import numpy as np
import pytest
from flax import nnx

from gdn_jax import GatedDeltaNet, GDNConfig
from gdn_jax.layers import decay_rate_log, time_step_bias

# Every size its own, value heads in groups, and epsilons large enough to be seen.
SIZES = {
    "width": 12,
    "num_key_heads": 2,
    "num_value_heads": 6,
    "key_dim": 5,
    "value_dim": 4,
    "mlp_width": 8,
    "conv_size": 3,
    "norm_eps": 0.03,
    "qk_norm_eps": 0.05,
}
BATCH, LENGTH = 2, 11


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _silu(x):
    return x * _sigmoid(x)


def _softplus(x):
    return np.log1p(np.exp(x))


def _convolved(x, kernel):
    """``x [T, heads, dim]``, causal; the last tap is the token itself."""
    taps = len(kernel)
    y = np.zeros_like(x)
    for t in range(len(x)):
        for j in range(taps):
            if t - (taps - 1) + j >= 0:
                y[t] += kernel[j] * x[t - (taps - 1) + j]
    return _silu(y)


def _expected(params, x, config, beta_max):
    """One sequence, ``x [T, width]``."""
    p = jax.tree.map(lambda value: np.asarray(value, np.float64), params)
    q, k, v = (
        _convolved(np.einsum("td,dhe->the", x, p[name]["kernel"]), p[f"conv_{name}"]["kernel"])
        for name in "qkv"
    )
    q, k = (z / np.sqrt(np.sum(z**2, axis=-1, keepdims=True) + config.qk_norm_eps) for z in (q, k))
    log_decay = -np.exp(p["A_log"]) * _softplus(x @ p["a"]["kernel"] + p["dt_bias"])
    beta = beta_max * _sigmoid(x @ p["b"]["kernel"])
    gate = _silu(np.einsum("td,dgv->tgv", x, p["g"]["kernel"]))
    o = np.zeros_like(v)
    for head in range(config.num_value_heads):
        key_head = head // (config.num_value_heads // config.num_key_heads)
        state = np.zeros((config.key_dim, config.value_dim))
        for t in range(len(x)):
            state = np.exp(log_decay[t, head]) * state
            write = beta[t, head] * (v[t, head] - k[t, key_head] @ state)
            state = state + np.outer(k[t, key_head], write)
            o[t, head] = config.key_dim**config.readout_scale_exponent * (q[t, key_head] @ state)
    normed = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + config.norm_eps) * p["o_norm"]["gain"]
    return np.einsum("tgv,gvd->td", normed * gate, p["o"]["kernel"])


@pytest.mark.parametrize(
    ("beta_max", "options"),
    [(1.0, {}), (2.0, {"allow_negative_eigenvalues": True, "readout_scale_exponent": -0.5})],
)
def test_the_mixer_is_its_formula(beta_max, options):
    config = GDNConfig(**SIZES, **options)
    mixer = GatedDeltaNet(config, rngs=nnx.Rngs(0))
    params = nnx.state(mixer, nnx.Param)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    # No gain of exactly 1, no kernel so small that a gate is a constant.
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), params)
    nnx.update(mixer, params)
    x = jax.random.normal(jax.random.key(2), (BATCH, LENGTH, config.width))
    expected = [
        _expected(nnx.to_pure_dict(params), np.asarray(row, np.float64), config, beta_max) for row in x
    ]
    # Float32 against float64.
    np.testing.assert_allclose(jax.jit(mixer)(x), expected, rtol=1e-4, atol=1e-5 * np.max(np.abs(expected)))


def _assert_uniform(values, low, high):
    """On the whole of (low, high): 20,000 draws have their quantiles within 2 % of the range."""
    assert low <= np.min(values)
    assert np.max(values) <= high
    at = np.linspace(0.01, 0.99, 99)
    np.testing.assert_allclose(
        np.quantile(values, at), low + (high - low) * at, rtol=0, atol=0.02 * (high - low)
    )


def test_decay_rates_are_drawn_uniformly_up_to_16():
    rates = np.exp(np.asarray(decay_rate_log(jax.random.key(0), (20_000,), "float32"), np.float64))
    assert np.min(rates) > 0.0099
    _assert_uniform(rates, 0, 16 * (1 + 1e-6))
    assert np.mean(rates) == pytest.approx(8, abs=0.2)


def test_time_steps_are_drawn_log_uniformly_from_a_thousandth_to_a_tenth():
    steps = _softplus(np.asarray(time_step_bias(jax.random.key(0), (20_000,), "float32"), np.float64))
    _assert_uniform(np.log10(steps), -3 - 1e-5, -1 + 1e-5)


def test_the_gates_of_a_mixer_are_drawn_from_these():
    sizes = SIZES | {"num_value_heads": 2000}
    mixer = GatedDeltaNet(GDNConfig(**sizes), rngs=nnx.Rngs(0))
    assert np.mean(np.exp(mixer.A_log[...])) == pytest.approx(8, abs=0.5)
    assert np.mean(np.log10(_softplus(np.asarray(mixer.dt_bias[...])))) == pytest.approx(-2, abs=0.1)
