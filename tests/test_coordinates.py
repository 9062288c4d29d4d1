"""The live coordinate log of `gdn train`: per-channel terms add up to the gates' gradients; a run writes its rows."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gdn_jax.mup.coord_check import update_sizes
from train.config import ModelOptions
from train.coordinates import coherence_exponent, gate_gradient_terms, measurement
from train.data import Batch
from train.step import Program
from train.train_run import TrainOptions, run_training


def test_coherence_of_planted_sums():
    noise = jax.random.normal(jax.random.key(0), (4000, 64))
    assert float(coherence_exponent(noise)) == pytest.approx(0.5, abs=0.03)
    assert float(coherence_exponent(jnp.ones((7, 64)))) == pytest.approx(1.0, abs=1e-6)
    assert 0.6 < float(coherence_exponent(noise + 0.2)) < 0.95


@pytest.fixture(scope="module")
def measured():
    model = ModelOptions(layers=2, key_dim=4, value_dim=8, base_width=16, key_heads=1, value_heads=2)
    program = Program(model.gdn_config(16, 32), tiny.OPTIMIZER, 4)
    hparams = program.hparams(0.01, "mup")
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 32)
    segments = jnp.asarray([[1] * 12, [1] * 5 + [2] * 5 + [0] * 2], jnp.int32)
    mask = jnp.asarray(segments > 0, jnp.float32)
    batch = Batch(*map(np.asarray, (tokens, jnp.roll(tokens, -1, 1), segments, mask)))
    state = program.init(jnp.int32(3), hparams)
    # As after some training: the zero readout would let no gradient through.
    moved = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), state.params)
    return program, hparams, batch, state, moved


@pytest.mark.slow
def test_terms_of_the_channels_add_up_to_the_gates_gradients(measured):
    program, _, batch, state, moved = measured
    tokens, targets, segments, mask = map(jnp.asarray, batch)

    def loss(added):
        logits = program.model(moved, state.constants).with_intermediates(tokens, segments, added)[0]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * mask) / jnp.sum(mask)

    seen = program.model(moved, state.constants).with_intermediates(tokens, segments)[1]
    grads = jax.grad(loss)({name: jnp.zeros_like(seen[name]) for name in ("gate_a", "gate_b", "o")})
    for layer in range(2):
        mixer = {name: moved["layers"]["mixer"][name][layer] for name in ("A_log", "dt_bias")}
        here = {name: seen[name][layer] for name in ("q", "k", "v", "gate_a", "gate_b")}
        terms = gate_gradient_terms(
            mixer, here, grads["o"][layer], segments, scale=4**0.5, qk_norm_eps=program.config.qk_norm_eps
        )
        for name, term in zip(("gate_a", "gate_b"), terms, strict=True):
            assert term.shape == (2, 12, 2, 8)
            expected = grads[name][layer]
            error = jnp.sqrt(jnp.mean((term.sum(-1) - expected) ** 2) / jnp.mean(expected**2))
            assert float(error) < 1e-4, name


@pytest.mark.slow
def test_rows(measured):
    program, hparams, batch, state, moved = measured
    row = measurement(program, tiny.one_device(), 3, hparams, batch)(state._replace(params=moved))
    assert all(len(row["absolute"][name]) == 2 for name in ("gate_a", "beta", "residual", "mlp_output"))
    assert isinstance(row["absolute"]["logits"], float)
    assert "mixer_input" not in row["absolute"]
    assert len(row["update"]["layers/mixer/q/kernel"]) == 2
    tokens, segments = jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids)
    seen = program.model(state.params, state.constants).with_intermediates(tokens, segments)[1]
    delta = jax.tree.map(jnp.subtract, moved, state.params)
    averaged = update_sizes(delta, program.specs, seen, tokens)
    for name, size in row["update"].items():
        assert np.mean(size) == pytest.approx(float(averaged[name]), rel=1e-4), name
    gates = row["gates"]
    assert all(0 <= share <= 1 for share in gates["beta_low"] + gates["beta_high"])
    # By Cauchy and Schwarz; below, few positions prove nothing.
    assert all(exponent < 1.0001 for exponent in gates["coherence_a"] + gates["coherence_b"])
    assert all(size > 0 for size in gates["gradient_a"] + gates["gradient_b"])
    at_start = measurement(program, tiny.one_device(), 3, hparams, batch)(state)
    # Made again within another program, the start differs by rounding.
    assert max(jax.tree.leaves(at_start["update"])) < 1e-6
    # The zero readout lets no gradient through, and an exponent of nothing is no number.
    assert at_start["gates"]["coherence_a"] == [None, None]


def test_a_run_writes_rows(tmp_path):
    options = TrainOptions(out=tmp_path / "run", width=8, learning_rate=0.02, steps=3, coordinates_every=2)
    run_training(options, tiny.MODEL, tiny.OPTIMIZER, tiny.data_config(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "run/coordinates.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3]
    # A row costs no checkpoint.
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["3"]
    assert rows[0]["update"]["layers/mixer/b/kernel"][0] > 0
