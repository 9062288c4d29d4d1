"""The optimizer chains: factors of the first update, decay modes, one clip, agreement with plain Optax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gdn_jax import GDNConfig, GDNLanguageModel, mup, param_specs, static_rules
from train.show_rules import rule_rows

BASE = GDNConfig(
    width=16,
    num_key_heads=2,
    num_value_heads=2,
    key_dim=4,
    value_dim=8,
    mlp_width=32,
    num_layers=2,
    vocab_size=11,
)


def _flat(tree):
    return {"/".join(path): value for path, value in nnx.traversals.flatten_mapping(tree).items()}


def _abstract(config):
    model = nnx.eval_shape(lambda: GDNLanguageModel(config, rngs=jax.random.key(0)))
    return model, param_specs(model), nnx.to_pure_dict(nnx.state(model, nnx.Param))


def _first_update(config, optimizer, preset="mup", **options):
    """Update from a gradient of ones on parameters of ones."""
    _, specs, shapes = _abstract(config)
    rules = mup.resolve_rules(
        specs, preset=preset, optimizer=optimizer, sizes=config.axis_sizes, base_sizes=config.base_axis_sizes
    )
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    transform = getattr(mup, optimizer)(0.01, specs, rules, clip_norm=None, **options)
    updates, _ = transform.update(ones, transform.init(ones), ones)
    return _flat(updates)


@pytest.mark.parametrize("regime", ["heads", "head_dim"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("preset", mup.PRESETS)
def test_ratio_of_first_updates_is_the_tables_factor(preset, optimizer, regime):
    wide = BASE.widen(64, regime)
    narrow_updates = _first_update(BASE, optimizer, preset)
    wide_updates = _first_update(wide, optimizer, preset)
    for row in rule_rows(wide, preset, optimizer):
        name = row["parameter"]
        ratio = np.unique(np.asarray(wide_updates[name])) / np.asarray(narrow_updates[name]).flat[0]
        np.testing.assert_allclose(ratio, row["lr_multiplier"], rtol=2e-7, err_msg=name)


def test_muon_makes_matrices_orthogonal_and_leaves_the_rest_to_adamw():
    wide = BASE.widen(64, "heads")
    _, specs, shapes = _abstract(wide)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    gradients = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), shapes)

    def first(optimizer):
        rules = mup.resolve_rules(
            specs,
            preset="mup",
            optimizer=optimizer,
            sizes=wide.axis_sizes,
            base_sizes=wide.base_axis_sizes,
        )
        transform = getattr(mup, optimizer)(0.01, specs, rules, clip_norm=None)
        return _flat(transform.update(gradients, transform.init(gradients), gradients)[0]), rules

    (updates, rules), (plain, _) = first("muon"), first("adamw")
    for name, spec in _flat(specs).items():
        if spec.role is not mup.Role.MATRIX:
            np.testing.assert_array_equal(updates[name], plain[name], name)
            continue
        # Each layer by itself, all heads as one matrix.
        matrices = np.asarray(updates[name]).reshape(wide.num_layers, spec.fan_in, spec.fan_out)
        size = 0.2 * max(spec.fan_in, spec.fan_out) ** 0.5 * 0.01 * rules.groups[spec.group].lr_multiplier
        values = np.linalg.svd(matrices, compute_uv=False) / size
        # Five steps of Newton-Schulz bring singular values to about 1, small ones less so.
        assert np.all(values < 1.3), name
        assert np.median(values) > 0.6, name


@pytest.mark.parametrize(("mode", "expected"), [("coupled", 0.25), ("width_free", 1.0), ("independent", 1.0)])
def test_decay_modes(mode, expected):
    wide = BASE.widen(64, "heads")
    without = _first_update(wide, "adamw")
    decayed = _first_update(wide, "adamw", weight_decay=0.5, decay_mode=mode)
    rate = 1.0 if mode == "independent" else 0.01
    for row in rule_rows(wide, "mup", "adamw"):
        name = row["parameter"]
        change = np.asarray(without[name] - decayed[name])
        np.testing.assert_allclose(
            change, row["decay"] * 0.5 * rate * expected, rtol=1e-5, atol=1e-9, err_msg=name
        )


def test_independent_decay_follows_the_schedule():
    """Gradients of zero leave the decay alone: lambda x rate / peak, whatever the peak is."""
    model, specs, shapes = _abstract(BASE)
    rules = static_rules(model, BASE)
    ones, zeros = (jax.tree.map(lambda x, fill=fill: jnp.full(x.shape, fill), shapes) for fill in (1.0, 0.0))
    peak, fractions = 0.02, jnp.asarray([0.5, 1.0, 0.25])

    def transform(rate):
        return mup.adamw(
            rate, specs, rules, weight_decay=0.3, decay_mode="independent", peak_learning_rate=peak
        )

    @jax.jit
    def once(rate):
        """As a program's step has it: a chain of this step's rate, made anew."""
        return transform(rate).update(zeros, transform(rate).init(ones), ones)[0]

    scheduled = transform(lambda count: peak * fractions[count])
    state, update = scheduled.init(ones), jax.jit(scheduled.update)
    for fraction in fractions:
        updates, state = update(zeros, state, ones)
        at_rate = once(peak * fraction)
        for name, spec in _flat(specs).items():
            expected = -0.3 * fraction if spec.role is mup.Role.MATRIX else 0.0
            np.testing.assert_allclose(_flat(updates)[name], expected, rtol=1e-6, err_msg=name)
            np.testing.assert_allclose(_flat(at_rate)[name], expected, rtol=1e-6, err_msg=name)


def test_at_the_base_it_is_plain_optax():
    model, specs, shapes = _abstract(BASE)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), shapes)
    rules = static_rules(model, BASE)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.01, 2, 6)
    ours = mup.adamw(schedule, specs, rules, weight_decay=0.1, clip_norm=1.0)
    decayed = jax.tree.map(
        lambda s: s.role is mup.Role.MATRIX, specs, is_leaf=lambda x: isinstance(x, mup.ParamSpec)
    )
    plain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=decayed),
    )
    ours_params, plain_params = params, params
    ours_state, plain_state = ours.init(params), plain.init(params)
    ours_update, plain_update = jax.jit(ours.update), jax.jit(plain.update)
    for step in range(4):
        grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(step), x.shape), params)  # noqa: B023
        updates, ours_state = ours_update(grads, ours_state, ours_params)
        ours_params = optax.apply_updates(ours_params, updates)
        updates, plain_state = plain_update(grads, plain_state, plain_params)
        plain_params = optax.apply_updates(plain_params, updates)
    for name, value in _flat(ours_params).items():
        np.testing.assert_allclose(value, _flat(plain_params)[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_clip_is_global():
    """Clipped inside the groups, a small group's gradient would stay; clipped once, it shrinks with the rest."""
    model, specs, shapes = _abstract(BASE)
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    transform = mup.sgd(1.0, specs, static_rules(model, BASE, "sgd"), momentum=0.0, clip_norm=1.0)
    updates, _ = transform.update(ones, transform.init(ones), ones)
    norm = optax.tree.norm(ones)
    for name, update in _flat(updates).items():
        np.testing.assert_allclose(update, -1 / norm, rtol=1e-5, err_msg=name)


def test_wrong_input():
    model, specs, _ = _abstract(BASE)
    rules = static_rules(model, BASE)
    with pytest.raises(ValueError, match="decay_mode must be one of"):
        mup.adamw(0.1, specs, rules, decay_mode="none")
    with pytest.raises(ValueError, match="peak_learning_rate"):
        mup.adamw(lambda count: 0.1, specs, rules, decay_mode="independent")
    with pytest.raises(ValueError, match=r"missing readout:embed->vocab"):
        mup.adamw(
            0.1,
            specs,
            dataclasses.replace(rules, groups={k: v for k, v in rules.groups.items() if "readout" not in k}),
        )


@pytest.mark.parametrize("optimizer", mup.OPTIMIZERS)
def test_rules_of_another_optimizer_are_refused(optimizer):
    model, specs, _ = _abstract(BASE)
    for other in set(mup.OPTIMIZERS) - {optimizer}:
        with pytest.raises(
            ValueError, match=rf'those of {other}, .* static_rules\(model, config, "{optimizer}"'
        ):
            getattr(mup, optimizer)(0.1, specs, static_rules(model, BASE, other))


def test_muon_keeps_matrices_of_other_layouts_apart():
    """One group, but the update depends on which dimensions are in and out, and on how large they are."""
    axes = {"embed": 4, "mlp": 6}

    def spec(*order):
        sizes = tuple(axes[axis] for axis in order)
        return mup.ParamSpec(order, ("embed",), ("mlp",), mup.Role.MATRIX, 4, sizes)

    specs = {"plain": spec("embed", "mlp"), "transposed": spec("mlp", "embed")}
    specs["wide"] = dataclasses.replace(specs["plain"], sizes=(4, 24))
    rules = mup.resolve_rules(specs, preset="mup", optimizer="muon", sizes=axes, base_sizes=None)
    gradient = jax.random.normal(jax.random.key(0), (4, 24))
    tree = {"plain": gradient[:, :6], "transposed": gradient[:, :6].T, "wide": gradient}

    def updates(names):
        mine, transform = (
            {name: tree[name] for name in names},
            mup.muon(0.1, {name: specs[name] for name in names}, rules, clip_norm=None),
        )
        return transform.update(mine, transform.init(mine), mine)[0]

    together = updates(specs)
    for name in specs:
        # The same sums in another program: float32 rounding.
        np.testing.assert_allclose(together[name], updates([name])[name], rtol=1e-5, err_msg=name)
    # Five Newton-Schulz steps in another order of summation; a wrong layout is off by more than the update.
    np.testing.assert_allclose(together["transposed"], together["plain"].T, rtol=1e-4, atol=1e-6)
