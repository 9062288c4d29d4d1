"""The README's promise: the mixer inside somebody's own model, NNX or Linen, trained with its muP optimizer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gdn_jax import GatedDeltaNet, GDNConfig, declare, declared, mup, param_specs

BASE = GDNConfig(width=16, num_key_heads=2, num_value_heads=2, key_dim=8, value_dim=8, mlp_width=32)
WIDE = BASE.widen(32, "heads")
FEATURES, CLASSES = 5, 3


class HostNNX(nnx.Module):
    """A user's model: its own layers, declared once, around a GDN mixer."""

    def __init__(self, config: GDNConfig, rngs: nnx.Rngs):
        self.inp = nnx.Linear(FEATURES, config.width, use_bias=False, rngs=rngs)
        self.mixer = GatedDeltaNet(config, rngs=rngs)
        self.out = nnx.Linear(
            config.width, CLASSES, use_bias=False, kernel_init=nnx.initializers.zeros, rngs=rngs
        )
        declare(
            self.inp.kernel,
            ("vocab", "embed"),
            in_axes=("vocab",),
            out_axes=("embed",),
            role=mup.Role.EMBEDDING,
        )
        declare(
            self.out.kernel,
            ("embed", "vocab"),
            in_axes=("embed",),
            out_axes=("vocab",),
            role=mup.Role.READOUT,
        )

    def __call__(self, x):
        x = self.inp(x)
        x = x + self.mixer(x)
        return self.out(x)


class HostLinen(nn.Module):
    """The same in Linen, through the bridge."""

    config: GDNConfig

    @nn.compact
    def __call__(self, x):
        embed = declared(
            nn.initializers.normal(1.0),
            ("vocab", "embed"),
            in_axes=("vocab",),
            out_axes=("embed",),
            role=mup.Role.EMBEDDING,
        )
        readout = declared(
            nn.initializers.zeros,
            ("embed", "vocab"),
            in_axes=("embed",),
            out_axes=("vocab",),
            role=mup.Role.READOUT,
        )
        x = nn.Dense(self.config.width, use_bias=False, kernel_init=embed)(x)
        x = x + nnx.bridge.ToLinen(GatedDeltaNet, args=(self.config,), name="mixer")(x)
        return nn.Dense(CLASSES, use_bias=False, kernel_init=readout)(x)


def _rules(specs, config):
    return mup.resolve_rules(
        specs, preset="mup", optimizer="adamw", sizes=config.axis_sizes, base_sizes=config.base_axis_sizes
    )


def _task():
    """Which of three channels was largest at the position before: only a mixer along time can tell."""
    x = jax.random.normal(jax.random.key(5), (8, 12, FEATURES))
    labels = jnp.roll(jnp.argmax(x[..., :CLASSES], -1), 1, axis=1)
    return x, labels


def test_mixer_inside_an_nnx_model():
    model = HostNNX(WIDE, nnx.Rngs(0))
    specs = param_specs(nnx.state(model, nnx.Param))
    rules = _rules(specs, WIDE)
    optimizer = nnx.Optimizer(model, mup.adamw(3e-2, specs, rules), wrt=nnx.Param)
    x, labels = _task()

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(x) * rules.logits_multiplier
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(40)]
    assert losses[0] == pytest.approx(np.log(CLASSES), rel=1e-5)
    assert losses[-1] < 0.5 * losses[0], losses


def test_mixer_inside_a_linen_model():
    model = HostLinen(WIDE)
    x, labels = _task()
    boxed = model.init(jax.random.key(0), x)["params"]
    specs = param_specs(boxed)
    assert specs["mixer"]["a"]["kernel"].role is mup.Role.GATE_A_MATRIX
    assert specs["mixer"]["b"]["kernel"].role is mup.Role.GATE_MATRIX
    rules = _rules(specs, WIDE)
    params = nn.unbox(boxed)
    transform = mup.adamw(3e-2, specs, rules)

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = model.apply({"params": params}, x) * rules.logits_multiplier
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = transform.init(params)
    losses = []
    for _ in range(40):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0], losses


def test_undeclared_host_parameters_are_refused():
    class Careless(nnx.Module):
        def __init__(self, rngs):
            self.mixer = GatedDeltaNet(WIDE, rngs=rngs)
            self.out = nnx.Linear(WIDE.width, CLASSES, rngs=rngs)

    with pytest.raises(ValueError, match="out/bias, out/kernel are not"):
        param_specs(nnx.state(Careless(nnx.Rngs(0)), nnx.Param))
    boxed = nn.Dense(3).init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
    with pytest.raises(ValueError, match="bias, kernel are not"):
        param_specs(boxed)
