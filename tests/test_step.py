"""The step: muP = SP at the base, packed = alone, one compilation, the schedule, divergence, evaluation."""

import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from train import loop
from train.config import OptimizerOptions
from train.data import prepare, train_batch, validation_batches
from train.diagnose import _first_backward, diagnose, sentence
from train.interrupts import Stopped, StopRequests
from train.mesh import put_batch
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
    return program, compile_program(program, tiny.one_device(), packed=False)


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
    compiled = compile_program(program, tiny.one_device(), packed=False)
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
    packed = compile_program(program, tiny.one_device(), packed=True)
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
    packed = compile_program(program, tiny.one_device(), packed=True)
    single = compile_program(program, tiny.one_device(), packed=False)
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


def test_every_token_that_is_held_out_weighs_the_same(setup, alone):
    """The last batch has rows of padding: a mean of the batches' means would count its tokens for more."""
    program, compiled = alone
    config, data, batches = setup
    hparams = program.hparams(0.03, "mup")
    state, _ = _train(compiled, jnp.int32(0), hparams, batches)
    held_out = validation_batches(data, dataclasses.replace(config, validation_batches=1000))[-3:]
    counts = [np.sum(batch.loss_mask) for batch in held_out]
    assert 0 < counts[2] < 0.9 * min(counts[:2])
    sums = [float(compiled.evaluate(state, batch)[0]) for batch in held_out]
    expected = np.sum(sums) / np.sum(counts)
    assert abs(np.mean(np.divide(sums, counts)) / expected - 1) > 1e-4
    mean = loop.mean_validation_loss(compiled, state, held_out)
    assert mean == pytest.approx(expected, rel=1e-6)


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


def _poisoned(batch):
    mask = np.array(batch.loss_mask)
    mask[2, 3] = np.nan
    return batch._replace(loss_mask=mask)


@pytest.mark.parametrize("bad", [1, 4, STEPS])
@pytest.mark.parametrize("looked_at_once", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(setup, alone, bad, looked_at_once):
    """Left out: the state is that of a run whose schedule goes on, but which never took that step."""
    program, compiled = alone
    _, _, batches = setup
    hparams = program.hparams(0.02, "mup")
    expected = compiled.init(jnp.int32(0), hparams)
    for step, batch in enumerate(batches, 1):
        if step == bad:
            expected = expected._replace(step=expected.step + 1)
        else:
            expected, _ = compiled.step(expected, batch, hparams)
    seen, after = [], []

    def left_out(step, batch, state):
        seen.append((step, int(state.step), bool(np.isnan(batch.loss_mask).any())))
        return True

    state = loop.run(
        compiled,
        compiled.init(jnp.int32(0), hparams),
        hparams,
        [_poisoned(batch) if step == bad else batch for step, batch in enumerate(batches, 1)],
        first_step=0,
        last_step=STEPS,
        observe=lambda step, metrics: None,
        due=lambda step: looked_at_once,
        after_step=lambda step, state, stopping: after.append(
            (step, int(state.step), int(state.diverged_at))
        ),
        diverged=left_out,
    )
    # The diagnosis gets the state as the step found it, and its batch.
    assert seen == [(bad, bad - 1, True)]
    assert after == ([(step, step, -1) for step in range(1, STEPS + 1)] if looked_at_once else [])
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_a_run_that_ends_there_keeps_the_state_before(setup, alone):
    program, compiled = alone
    _, _, batches = setup
    hparams = program.hparams(0.02, "mup")
    state, losses = _train(
        compiled, jnp.int32(0), hparams, [*batches[:3], _poisoned(batches[3]), *batches[4:]]
    )
    before, _ = _train(compiled, jnp.int32(0), hparams, batches[:3])
    assert int(state.diverged_at) == int(state.step) == 3
    assert not np.isfinite(losses[3])
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, before.opt_state)


def test_a_stopped_run_has_seen_its_state(setup, alone):
    program, compiled = alone
    _, _, batches = setup
    hparams = program.hparams(0.02, "mup")
    saved = {}
    with StopRequests() as stop:

        def observe(step, metrics):
            if step == 4:
                signal.raise_signal(signal.SIGTERM)

        def train(state, first, stop):
            return loop.run(
                compiled,
                state,
                hparams,
                batches[first:],
                first_step=first,
                last_step=STEPS,
                observe=observe,
                after_step=lambda step, state, stopping: saved.update({step: (state, stopping)}),
                stop=stop,
            )

        with pytest.raises(Stopped):
            train(compiled.init(jnp.int32(0), hparams), 0, stop)
        with pytest.raises(Stopped):
            loop.mean_validation_loss(compiled, saved[5][0], batches[:2], stop)
    assert [(step, stopping) for step, (_, stopping) in saved.items()] == [(5, True)]
    state = train(saved[5][0], 5, None)
    whole, _ = _train(compiled, jnp.int32(0), hparams, batches)
    jax.tree.map(np.testing.assert_array_equal, state, whole)


def test_parts_of_a_batch_add_up(setup, alone):
    """Rows of unequal weight: the mean is over tokens, not over parts."""
    program, compiled = alone
    _, _, batches = setup
    hparams = program.hparams(0.02, "mup")
    mask = np.array(batches[0].loss_mask)
    mask[1:6] = 0
    batches = [batches[0]._replace(loss_mask=mask), *batches[1:4]]
    in_parts = compile_program(dataclasses.replace(program, accumulate=4), tiny.one_device(), packed=False)
    state, losses = _train(compiled, jnp.int32(0), hparams, batches)
    other, other_losses = _train(in_parts, jnp.int32(0), hparams, batches)
    np.testing.assert_allclose(other_losses, losses, rtol=0, atol=1e-5)
    for left, right in zip(jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def deep(setup):
    """Three layers, so that one of them can be the one; a few steps on, so that gradients reach all."""
    _, data, batches = setup
    model = dataclasses.replace(tiny.MODEL, layers=3)
    program = Program(model.gdn_config(8, data.vocab_size), tiny.OPTIMIZER, STEPS)
    compiled = compile_program(program, tiny.one_device(), packed=False)
    hparams = program.hparams(0.02, "mup")
    state, _ = _train(compiled, jnp.int32(0), hparams, batches[:3])
    return program, compiled.mesh, state, put_batch(compiled.mesh, batches[3])


def _with(state, change, *path):
    """The state with one parameter changed."""
    params = jax.tree.map(lambda x: x, state.params)
    inner = params
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = change(inner[path[-1]])
    return state._replace(params=params)


MLP_DOWN = ("layers", "mlp", "down", "kernel")


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_layer_of_a_parameter_is_named(deep, layer):
    program, mesh, state, batch = deep
    bad = _with(state, lambda x: x.at[layer, 0, 0].set(jnp.nan), *MLP_DOWN)
    report = diagnose(program, mesh, 4, bad, batch)
    assert (report["where"], report["layer"], report["name"]) == ("parameters", layer, ".".join(MLP_DOWN))
    assert report["batch"]["places"] == [24, 31]
    assert f"parameter layers.mlp.down.kernel of layer {layer} is not finite" in sentence(report)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_layer_of_a_value_is_named(deep, layer):
    """Finite parameters, whose product overflows."""
    program, mesh, state, batch = deep
    bad = _with(state, lambda x: x.at[layer].multiply(1e20), "layers", "mlp", "up", "kernel")
    bad = _with(bad, lambda x: x.at[layer].set(1e30), *MLP_DOWN)
    report = diagnose(program, mesh, 4, bad, batch)
    assert (report["where"], report["layer"], report["name"]) == ("forward", layer, "mlp_output")
    assert f"mlp_output of layer {layer}, in the forward pass" in sentence(report)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_layer_of_a_gradient_is_named(deep, layer):
    """A product with 0 of which only the derivative overflows."""
    program, mesh, state, batch = deep
    bad = _with(state, lambda x: x.at[layer].multiply(1e25), "layers", "mlp", "gate", "kernel")
    bad = _with(bad, lambda x: x.at[layer].set(0), "layers", "mlp", "up", "kernel")
    bad = _with(bad, lambda x: x.at[layer].multiply(1e25), *MLP_DOWN)
    report = diagnose(program, mesh, 4, bad, batch)
    assert (report["where"], report["layer"]) == ("backward", layer)
    assert f"the first gradient that is not finite is that of {report['name']} of layer" in sentence(report)


def test_gradients_are_searched_from_the_loss_backward():
    def first(**flags):
        found = {"embedding": True, "final_norm.gain": True, "readout": True, "layers.a": [True] * 3} | flags
        after_layer = np.array(found.pop("after_layer", [True] * 3))
        return _first_backward({name: np.array(fine) for name, fine in found.items()}, after_layer)

    assert first() == ("nowhere", None, "")
    assert first(embedding=False) == ("backward", None, "embedding")
    top = {"after_layer": [False] * 3, "layers.a": [False] * 3, "embedding": False}
    assert first(**top) == ("backward", None, "final_norm")
    assert first(**top, readout=False) == ("backward", None, "readout")
    assert first(**{"layers.a": [False, True, False], "embedding": False}) == ("backward", 2, "layers.a")
    assert first(after_layer=[False, True, True], embedding=False) == ("backward", 1, "residual")


def test_the_batch_and_a_fault_that_does_not_come_again_are_named(deep):
    program, mesh, state, batch = deep
    report = diagnose(program, mesh, 4, state, put_batch(mesh, _poisoned(batch)))
    assert (report["where"], report["layer"], report["name"]) == ("batch", None, "loss_mask")
    assert report["batch"]["rows_not_finite"] == [2]
    assert len(report["batch"]["sha256_of_tokens"]) == 64
    assert "look for a faulty device" in sentence(diagnose(program, mesh, 4, state, batch))
