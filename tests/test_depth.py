"""Depth as an axis of the rules: 1/L on what blocks add, and learning rate and epsilon of their parameters."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gdn_jax import GDNConfig, GDNLanguageModel, mup
from gdn_jax.mup.rules import spec_leaves
from train.config import DEFAULT_BASE_WIDTH, ModelOptions
from train.step import Program
from train.sweep import identity


def _program(layers, base_layers, optimizer="adamw", **changes):
    model = ModelOptions(layers=layers, base_layers=base_layers, key_dim=8, value_dim=8, base_width=8)
    config = model.gdn_config(8, 32, optimizer=optimizer)
    return Program(config, dataclasses.replace(tiny.OPTIMIZER, name=optimizer, **changes), 4)


def _of_depth(rules):
    return rules.residual_multiplier, rules.block_lr_multiplier, rules.block_epsilon_multiplier


@pytest.mark.parametrize("preset", ["mup", "mup_standard", "sp", "paper_code"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_rules(preset, optimizer):
    base = _program(3, None, optimizer).hparams(0.1, preset).rules
    assert _of_depth(base) == (1, 1, 1)
    deep = _program(12, 3, optimizer).hparams(0.1, preset).rules
    # Nothing else may depend on depth.
    for name in ("groups", "logits_multiplier", "epsilon_multiplier"):
        assert getattr(deep, name) == getattr(base, name)
    if preset in ("mup", "mup_standard"):
        assert _of_depth(deep) == (0.25, 4 if optimizer == "sgd" else 1, 0.25)
    else:
        assert _of_depth(deep) == (1, 1, 1)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_updates_of_blocks_alone_follow_depth(optimizer):
    """Gradients of 1: Adam's first update is LR / (1 + eps), with eps / 4 in blocks; SGD's LR is 4 x there."""
    updates = []
    for base_layers in (4, 1):
        program = _program(4, base_layers, optimizer, epsilon=1.0, weight_decay=0.0, clip_norm=0.0)
        hparams = program.hparams(0.5, "mup")
        chain = program.optimizer(0.5, 0.5, hparams)
        ones = jax.tree.map(lambda spec: jnp.ones(spec.sizes), program.specs, is_leaf=_is_spec)
        updates.append(chain.update(ones, chain.init(ones), ones)[0])
    ratio = jax.tree.map(lambda new, old: float(jnp.mean(new / old)), updates[1], updates[0])
    blocks = {spec.in_block for spec in spec_leaves(program.specs)}
    assert blocks == {True, False}
    for spec, value in zip(spec_leaves(program.specs), jax.tree.leaves(ratio), strict=True):
        expected = (4.0 if optimizer == "sgd" else 2 / 1.25) if spec.in_block else 1.0
        assert value == pytest.approx(expected, rel=1e-5), spec


def _is_spec(x):
    return isinstance(x, mup.ParamSpec)


def test_a_block_adds_its_share():
    base = GDNConfig(
        width=16,
        num_key_heads=2,
        num_value_heads=2,
        key_dim=8,
        value_dim=8,
        mlp_width=32,
        num_layers=1,
        vocab_size=32,
    )
    config = dataclasses.replace(base, num_layers=4, base=base)
    model = GDNLanguageModel(config, rngs=jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 32)
    _, seen = model.with_intermediates(tokens)
    entering = np.concatenate([np.asarray(seen["embedding"])[None], np.asarray(seen["residual"])[:-1]])
    added = 0.25 * (np.asarray(seen["mixer_output"]) + np.asarray(seen["mlp_output"]))
    np.testing.assert_allclose(seen["residual"], entering + added, rtol=1e-5, atol=1e-5)


def test_a_configuration_without_depth_is_as_before(tmp_path):
    data = tiny.data_config(tmp_path)
    plain = identity(tiny.MODEL.with_base(DEFAULT_BASE_WIDTH), tiny.OPTIMIZER, data, None, 4)
    assert "base_layers" not in plain["model"]
    deep = dataclasses.replace(tiny.MODEL, base_layers=1)
    assert json.loads(json.dumps(identity(deep, tiny.OPTIMIZER, data, None, 4)))["model"]["base_layers"] == 1
