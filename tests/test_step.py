"""The step: muP = SP at the base, packed = alone, one compilation, the schedule, divergence, evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from train import loop
from train.config import OptimizerOptions
from train.data import prepare, train_batch, validation_batches
from train.mesh import make_mesh
from train.step import Program, compile_program, schedule

STEPS = 10


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    config = tiny.data_config(tmp_path_factory.mktemp("data"))
    data = prepare(config)
    return config, data, [train_batch(data, config, step) for step in range(STEPS)]


def _program(vocab_size, width=8, options=tiny.OPTIMIZER):
    return Program(tiny.MODEL.gdn_config(width, vocab_size, optimizer=options.name), options, STEPS)


def _train(compiled, seed, hparams, batches):
    losses = []
    state = loop.run(
        compiled,
        compiled.init(seed, hparams),
        hparams,
        batches,
        first_step=0,
        last_step=len(batches),
        observe=lambda step, metrics: losses.append(np.asarray(metrics.loss)),
    )
    return state, np.asarray(losses)


@pytest.fixture(scope="module")
def alone(setup):
    _, data, _ = setup
    program = _program(data.vocab_size)
    return program, compile_program(program, make_mesh(), packed=False)


def test_mup_is_sp_at_the_base_bit_for_bit(setup, alone):
    program, compiled = alone
    _, _, batches = setup
    states = [
        _train(compiled, jnp.int32(0), program.hparams(0.02, preset), batches[:3])[0]
        for preset in ("mup", "sp")
    ]
    for mup_leaf, sp_leaf in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(mup_leaf, sp_leaf)


def test_mup_is_not_sp_away_from_the_base(setup):
    _, data, batches = setup
    program = _program(data.vocab_size, width=16)
    compiled = compile_program(program, make_mesh(), packed=False)
    mup_losses, sp_losses = (
        _train(compiled, jnp.int32(0), program.hparams(0.02, preset), batches[:4])[1]
        for preset in ("mup", "sp")
    )
    assert mup_losses[0] == sp_losses[0]
    assert abs(mup_losses[3] - sp_losses[3]) > 1e-3


def test_a_point_alone_is_the_same_point_packed(setup, alone):
    program, single = alone
    _, _, batches = setup
    points = [(0.02, "mup", 0), (0.01, "sp", 1), (0.005, "mup", 2)]
    packed = compile_program(program, make_mesh(), packed=True)
    hparams = [program.hparams(rate, preset) for rate, preset, _ in points]
    _, together = _train(
        packed, loop.as_seeds([seed for *_, seed in points]), loop.stack_hparams(hparams), batches
    )
    for index, (_, _, seed) in enumerate(points):
        _, losses = _train(single, jnp.int32(seed), hparams[index], batches)
        np.testing.assert_allclose(together[:, index], losses, rtol=0, atol=1e-5)


def test_packed_points_end_as_they_do_alone_up_to_the_optimum(setup):
    """Under SGD, which trains here too: AdamW turns one rounding into 1e-3 within 100 steps, packed or not."""
    config, data, _ = setup
    options = OptimizerOptions(name="sgd", momentum=0.9)
    steps, rates = 24, (2**-4, 2**-3, 2**-2)
    program = Program(tiny.MODEL.gdn_config(8, data.vocab_size, optimizer="sgd"), options, steps)
    batches = [train_batch(data, config, step) for step in range(steps)]
    held_out = validation_batches(data, config)
    hparams = [program.hparams(rate, "mup") for rate in rates]
    packed = compile_program(program, make_mesh(), packed=True)
    single = compile_program(program, make_mesh(), packed=False)
    state, _ = _train(packed, loop.as_seeds([0] * len(rates)), loop.stack_hparams(hparams), batches)
    together = loop.mean_validation_loss(packed, state, held_out)
    alone = [
        loop.mean_validation_loss(single, _train(single, jnp.int32(0), point, batches)[0], held_out)
        for point in hparams
    ]
    # Learning goes well at the highest of them: these are no rates at which nothing happens.
    assert alone == sorted(alone, reverse=True)
    assert alone[-1] < 1
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


def test_a_second_step_compiles_nothing(setup, alone):
    program, compiled = alone
    _, _, batches = setup
    hparams = program.hparams(0.02, "mup")
    state = compiled.init(jnp.int32(0), hparams)
    state, _ = compiled.step(state, batches[0], hparams)
    before = compiled.step._cache_size()
    for preset, rate in (("sp", 0.5), ("paper_code", 0.1), ("mup", 0.02)):
        state, _ = compiled.step(state, batches[1], program.hparams(rate, preset))
    assert compiled.step._cache_size() == before


def test_training_lowers_the_loss_and_evaluation_agrees(setup, alone):
    program, compiled = alone
    config, data, batches = setup
    held_out = validation_batches(data, config)
    hparams = program.hparams(0.03, "mup")
    before = loop.mean_validation_loss(compiled, compiled.init(jnp.int32(0), hparams), held_out)
    assert before == pytest.approx(np.log(data.vocab_size), rel=1e-6)
    state, losses = _train(compiled, jnp.int32(0), hparams, batches)
    after = loop.mean_validation_loss(compiled, state, held_out)
    assert after < before - 1
    assert abs(after - losses[-1]) < 1
    total, count = compiled.evaluate(state, held_out[0])
    by_hand = loop.mean_validation_loss(compiled, state, held_out[:1])
    assert by_hand == pytest.approx(float(total) / float(np.sum(held_out[0].loss_mask)), rel=1e-6)
    assert float(count) == np.sum(held_out[0].loss_mask)


def test_divergence_is_recorded_with_its_step_and_ends_the_run(setup, alone):
    program, compiled = alone
    _, _, batches = setup
    # SGD-sized: Adam at a learning rate of 1e38 overflows in its second forward pass.
    state, losses = _train(compiled, jnp.int32(0), program.hparams(1e38, "mup"), batches)
    assert 0 < int(state.diverged_at) <= 2
    assert not np.isfinite(losses[int(state.diverged_at)])
    assert len(losses) < STEPS


def test_schedule():
    options = OptimizerOptions(warmup_fraction=0.1, final_fraction=0.2)
    values = np.asarray(jax.vmap(lambda step: schedule(step, 100, options))(jnp.arange(100)))
    np.testing.assert_allclose(values[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(values[-1], 0.2, rtol=1e-6)
    assert np.all(np.diff(values[10:]) <= 0)
    assert np.max(values) == 1.0
    constant = dataclasses.replace(options, warmup_fraction=0.0, final_fraction=1.0)
    np.testing.assert_allclose(jax.vmap(lambda s: schedule(s, 5, constant))(jnp.arange(5)), 1.0, rtol=1e-6)
