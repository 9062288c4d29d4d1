"""Declarations of other code's parameters: what is refused, and that what is advised in its place is right."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gdn_jax import GDNConfig, declare, declared, make_param, mup, param_specs, stack_layers, static_rules

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


def by_declare(shape, axes, **declaration):
    param = nnx.Param(jnp.zeros(shape))
    declare(param, axes, **declaration)
    return param.get_metadata("spec")


def by_make_param(shape, axes, **declaration):
    ones = jax.nn.initializers.ones
    scale = {"init_scale": lambda spec: 1.0}
    sizes = dict(zip(axes, shape, strict=True))
    return make_param(jax.random.key(0), ones, sizes, axes, **declaration, **scale).get_metadata("spec")


def by_declared(shape, axes, **declaration):
    return declared(nn.initializers.ones, axes, **declaration)(jax.random.key(0), shape).metadata["spec"]


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("make", [by_declare, by_make_param, by_declared])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"axes": ("embed", "embed"), "out_axes": ("embed",)},
            r"Of a square matrix .* make it \('embed', 'mlp'\)",
        ),
        ({"in_axes": ("key_dim",)}, "in_axes and out_axes must be among axes .*; got key_dim besides"),
        ({"out_axes": ("heads",)}, "in_axes and out_axes must be among axes .*; got heads besides"),
        (
            {"out_axes": ("embed",)},
            "in in_axes or in out_axes, and once; got .* Of a gain or a bias it is an out",
        ),
        ({"in_axes": ("embed", "embed")}, "in in_axes or in out_axes, and once"),
        ({"role": "matrx"}, "role must be one of matrix, gate_matrix, .*; got 'matrx'"),
        (
            {"role": mup.Role.CONV},
            r"axes of role conv must have 'conv', that of the taps; got \('embed', 'mlp'\)",
        ),
    ],
)
def test_wrong_declarations_are_refused(make, change, message):
    right = {"axes": ("embed", "mlp"), "in_axes": ("embed",), "out_axes": ("mlp",), "role": mup.Role.MATRIX}
    assert make((8, 8), **right).fan_out == 8
    assert make((8, 8), **(right | {"role": "matrix"})).role is mup.Role.MATRIX
    with pytest.raises(ValueError, match=message):
        make((8, 8), **(right | change))


@pytest.mark.parametrize("make", [by_declare, by_declared])
def test_axes_are_as_many_as_dimensions(make):
    with pytest.raises(ValueError, match=r"each dimension of a parameter of shape \(4, 8, 8\)"):
        make((4, 8, 8), ("embed", "mlp"), in_axes=("embed",), out_axes=("mlp",), role=mup.Role.MATRIX)


@pytest.mark.parametrize("regime", ["heads", "head_dim"])
def test_a_square_matrix_declared_as_advised_scales_as_a_matrix(regime):
    class Host(nnx.Module):
        def __init__(self, width):
            self.square = nnx.Linear(width, width, use_bias=False, rngs=nnx.Rngs(0))
            declare(
                self.square.kernel,
                ("embed", "mlp"),
                in_axes=("embed",),
                out_axes=("mlp",),
                role=mup.Role.MATRIX,
            )

    config = BASE.widen(32, regime)
    host = Host(config.width)
    specs = param_specs(host)
    spec = specs["square"]["kernel"]
    assert (spec.fan_in, spec.fan_out) == (32, 32)
    # By hand, four times the base: 1/sqrt(fan_in); 1 under SGD, 1/4 under AdamW; under Muon, whose update's spectral
    # norm is to stay, 1/sqrt(4).
    for optimizer, rate in (("sgd", 1.0), ("adamw", 0.25), ("muon", 0.5)):
        (rule,) = static_rules(host, config, optimizer).groups.values()
        assert (rule.init_std, rule.lr_multiplier) == pytest.approx((32**-0.5, rate)), optimizer
    # Muon's update is that of the plain matrix, times 0.2 sqrt(32) and the learning rates.
    transform = mup.muon(0.1, specs, static_rules(host, config, "muon"), clip_norm=None)
    gradient = jax.random.normal(jax.random.key(1), (32, 32))
    plain = optax.contrib.scale_by_muon(weight_dimension_numbers=optax.contrib.MuonDimensionNumbers())
    expected = plain.update(gradient, plain.init(gradient), gradient)[0]
    tree = {"square": {"kernel": gradient}}
    update = transform.update(tree, transform.init(tree), tree)[0]["square"]["kernel"]
    np.testing.assert_allclose(update, -0.1 * 0.5 * 0.2 * 32**0.5 * expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", mup.OPTIMIZERS)
def test_a_host_may_have_matrices_of_one_group_and_several_sizes(optimizer):
    """A Transformer's projection D x D and the 4D x D of its MLP: one learning rate, two initialisers of its own."""

    class Host(nnx.Module):
        def __init__(self):
            self.out = nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(0))
            self.down = nnx.Linear(32, 8, use_bias=False, rngs=nnx.Rngs(1))
            for layer in (self.out, self.down):
                declare(
                    layer.kernel,
                    ("mlp", "embed"),
                    in_axes=("mlp",),
                    out_axes=("embed",),
                    role=mup.Role.MATRIX,
                )

    host = Host()
    specs, rules = param_specs(host), static_rules(host, BASE, optimizer)
    (group,) = rules.groups
    assert mup.adjusted(rules, specs, init_scale=2.0).groups[group].init_std is None
    with pytest.raises(ValueError, match="have several fans"):
        mup.init_scale(rules)(specs["out"]["kernel"])
    params = nnx.to_pure_dict(nnx.state(host, nnx.Param))
    transform = getattr(mup, optimizer)(0.1, specs, rules, clip_norm=None)
    updates, _ = transform.update(params, transform.init(params), params)
    for name in ("out", "down"):
        mine, alone = {name: params[name]}, {name: specs[name]}
        transform = getattr(mup, optimizer)(0.1, alone, rules, clip_norm=None)
        expected, _ = transform.update(mine, transform.init(mine), mine)
        # The same sums in another program: float32 rounding.
        np.testing.assert_allclose(updates[name]["kernel"], expected[name]["kernel"], rtol=1e-5)
