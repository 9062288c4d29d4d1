"""The updates of a program: plain Optax of its options at the base width, and its decay at another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from gdn_jax import mup
from train.config import OptimizerOptions
from train.data import Batch
from train.step import Program

RATE = 0.02
# With a warm-up of half of four steps.
FRACTIONS = (0.5, 1.0)
# No default among them; clipped gradients are of the size of epsilon.
OPTIONS = OptimizerOptions(
    warmup_fraction=0.5,
    weight_decay=0.3,
    clip_norm=0.7,
    beta1=0.6,
    beta2=0.75,
    epsilon=0.02,
    momentum=0.55,
)


class _Linear(Program):
    """A program whose loss is linear in the parameters: its gradient is what `_batch` was given."""

    def loss_sum(self, params, constants, batch):
        return optax.tree.vdot(params, batch.tokens), jnp.float32(1)


def _batch(gradient):
    return Batch(gradient, None, None, None)


def _program(options, width=8):
    return _Linear(tiny.MODEL.gdn_config(width, 11, optimizer=options.name), options, steps=4)


def _is_matrix(specs):
    return jax.tree.map(
        lambda spec: spec.role is mup.Role.MATRIX, specs, is_leaf=lambda x: isinstance(x, mup.ParamSpec)
    )


def _plain(options, matrices):
    """Plain Optax, which multiplies decay by the learning rate."""
    decay = options.weight_decay / (RATE if options.decay_mode == "independent" else 1)
    core = (
        optax.trace(options.momentum, nesterov=True)
        if options.name == "sgd"
        else optax.scale_by_adam(options.beta1, options.beta2, options.epsilon)
    )
    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity(),
        core,
        optax.add_decayed_weights(decay, matrices),
        optax.scale_by_learning_rate(lambda count: RATE * jnp.asarray(FRACTIONS)[count]),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"decay_mode": "width_free"},
        {"decay_mode": "independent"},
        {"name": "sgd"},
        {"name": "sgd", "decay_mode": "independent", "clip_norm": 0.0},
        {"name": "muon", "decay_mode": "independent"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_at_the_base_updates_are_plain_optax_of_the_options(changes):
    options = dataclasses.replace(OPTIONS, **changes)
    program = _program(options)
    step, hparams = jax.jit(program.step), program.hparams(RATE, "mup")
    state = jax.jit(program.init)(jnp.int32(0), hparams)
    matrices = _is_matrix(program.specs)
    plain = _plain(options, matrices)
    params, plain_state = state.params, plain.init(state.params)
    for number in range(len(FRACTIONS)):
        keys = iter(jax.random.split(jax.random.key(number), 100))
        gradient = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), params)  # noqa: B023
        state, metrics = step(state, _batch(gradient), hparams)
        np.testing.assert_allclose(metrics.learning_rate, RATE * FRACTIONS[number], rtol=1e-6)
        updates, plain_state = plain.update(gradient, plain_state, params)
        params = optax.apply_updates(params, updates)
    # Muon's matrices are its own; all else is AdamW's.
    compared = jax.tree.map(lambda is_matrix: not (options.name == "muon" and is_matrix), matrices)
    for (path, got), expected, wanted in zip(
        jax.tree.leaves_with_path(state.params), *map(jax.tree.leaves, (params, compared)), strict=True
    ):
        if wanted:
            np.testing.assert_allclose(
                got, expected, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path)
            )


@pytest.mark.parametrize(
    ("mode", "decay"),
    [("width_free", 0.3 * RATE * 0.5), ("coupled", 0.3 * RATE * 0.5 / 2), ("independent", 0.3 * 0.5)],
)
def test_at_twice_the_width_decay_is_of_the_mode_of_the_options(mode, decay):
    """Gradients of zero: nothing but the decay of the matrices is left."""
    program = _program(dataclasses.replace(OPTIONS, decay_mode=mode), width=16)
    hparams = program.hparams(RATE, "mup")
    before = jax.jit(program.init)(jnp.int32(0), hparams)
    nothing = _batch(jax.tree.map(jnp.zeros_like, before.params))
    after, _ = jax.jit(program.step)(before, nothing, hparams)
    for old, new, is_matrix in zip(
        *map(jax.tree.leaves, (before.params, after.params, _is_matrix(program.specs))), strict=True
    ):
        np.testing.assert_allclose(new, old * (1 - decay * is_matrix), rtol=1e-6)
