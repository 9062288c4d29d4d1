"""Declarations of other code's parameters: what is refused, and that what is advised in its place is right."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gdn_jax import GDNConfig, declare, declared, mup, param_specs, stack_layers

BASE = GDNConfig(
    width=8, num_key_heads=2, num_value_heads=2, key_dim=4, value_dim=4, mlp_width=16, num_layers=4
)
LAYERS = 4
MISSHAPEN = r"layers/up/kernel was declared with \(8, 16\) and has \(4, 8, 16\)"


class Layer(nnx.Module):
    """A matrix from embed to mlp."""

    def __init__(self, key, declared=True):
        self.up = nnx.Linear(8, 16, use_bias=False, rngs=nnx.Rngs(key))
        if declared:
            declare(
                self.up.kernel,
                ("embed", "mlp"),
                in_axes=("embed",),
                out_axes=("mlp",),
                role=mup.Role.MATRIX,
            )


class Stack(nnx.Module):
    """Layers in one module, by the way that is asked for."""

    def __init__(self, stack, *, rngs):
        self.layers = stack(jax.random.split(rngs.params(), LAYERS))

    def __call__(self, x):
        return jax.lax.scan(
            lambda x, kernel: (x + x @ kernel @ kernel.T, None), x, self.layers.up.kernel[...]
        )[0]


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        init = declared(
            nn.initializers.lecun_normal(),
            ("embed", "mlp"),
            in_axes=("embed",),
            out_axes=("mlp",),
            role=mup.Role.MATRIX,
        )
        return nn.Dense(8, use_bias=False, kernel_init=init, name="up")(x), None


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(LinenLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return scanned(name="layers")(x, None)[0]


def properly(keys):
    return stack_layers(Layer, keys)


def test_layers_stacked_by_nnx_vmap_are_refused():
    model = Stack(nnx.vmap(Layer), rngs=nnx.Rngs(0))
    for params in (model, nnx.state(model, nnx.Param)):
        with pytest.raises(ValueError, match=MISSHAPEN) as e:
            param_specs(params)
        assert "Stack layers with gdn_jax.stack_layers" in str(e.value)


@pytest.mark.parametrize("make", [jax.eval_shape, lambda init, *args: init(*args)])
def test_layers_stacked_by_linen_are_refused(make):
    boxed = make(LinenStack().init, jax.random.key(0), jnp.ones((1, 8)))["params"]
    with pytest.raises(ValueError, match=r"layers/up/kernel was .* \(8, 8\) and has \(4, 8, 8\)") as e:
        param_specs(boxed)
    assert "stack NNX layers inside nnx.bridge.ToLinen" in str(e.value)


def test_stack_layers_is_right_in_nnx_and_in_linen():
    in_nnx = param_specs(Stack(properly, rngs=nnx.Rngs(0)))
    bridge = nnx.bridge.ToLinen(Stack, args=(properly,))
    boxed = bridge.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    assert param_specs(boxed) == in_nnx
    spec = in_nnx["layers"]["up"]["kernel"]
    assert (spec.axes, spec.sizes) == (("layers", "embed", "mlp"), (LAYERS, 8, 16))
    assert (spec.fan_in, spec.fan_out, spec.in_block) == (8, 16, True)
    assert jax.tree.leaves(nn.unbox(boxed))[0].shape == spec.sizes


def test_muon_keeps_stacked_layers_apart():
    specs = param_specs(Stack(properly, rngs=nnx.Rngs(0)))
    rules = mup.resolve_rules(specs, preset="mup", optimizer="muon", sizes=BASE.axis_sizes, base_sizes=None)
    transform = mup.muon(1.0, specs, rules, clip_norm=None)
    gradient = jax.random.normal(jax.random.key(1), (LAYERS, 8, 16))

    def update(gradient):
        tree = {"layers": {"up": {"kernel": gradient}}}
        return transform.update(tree, transform.init(tree), tree)[0]["layers"]["up"]["kernel"]

    changed = update(gradient.at[0].mul(-3.0))
    np.testing.assert_allclose(changed[1:], update(gradient)[1:], rtol=1e-5)


def test_stack_layers_names_what_is_not_declared():
    with pytest.raises(ValueError, match="up/kernel is not"):
        stack_layers(lambda key: Layer(key, declared=False), jax.random.split(jax.random.key(0), LAYERS))
    with pytest.raises(ValueError, match=MISSHAPEN):
        stack_layers(
            lambda key: Stack(nnx.vmap(Layer), rngs=nnx.Rngs(key)), jax.random.split(jax.random.key(0), 2)
        )
