"""The mixer and the language model: documents, caches, dtypes, remat, and muP = SP at the base."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gdn_jax import GatedDeltaNet, GDNConfig, GDNLanguageModel
from gdn_jax.layers import wide_matmul
from gdn_jax.model import unrolled
from gdn_jax.sharding import lookup

CONFIG = GDNConfig(
    width=16,
    num_key_heads=1,
    num_value_heads=2,
    key_dim=8,
    value_dim=8,
    mlp_width=32,
    num_layers=2,
    vocab_size=13,
)
LENGTH = 40


def rms_ratio(actual, expected):
    """RMS(error) / RMS(expected), in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


def gradients(model, tokens):
    """Of a loss that every logit is in, one array per parameter."""
    return jax.tree.leaves(nnx.grad(lambda m: jnp.mean(m(tokens) ** 2))(model))


def _randomized(model, key=7):
    """The model with a readout and gains that are not constants, so that nothing is hidden by a zero."""
    params = nnx.state(model, nnx.Param)
    keys = iter(jax.random.split(jax.random.key(key), 100))
    nnx.update(model, jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), params))
    return model


@pytest.fixture(scope="module")
def mixer():
    return _randomized(GatedDeltaNet(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def model():
    return _randomized(GDNLanguageModel(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (2, LENGTH, CONFIG.width))


def test_mixer_is_causal(mixer, x):
    y = mixer(x)
    changed = mixer(x.at[:, 25:].set(3.0))
    np.testing.assert_array_equal(y[:, :25], changed[:, :25])
    assert rms_ratio(changed[:, 25:], y[:, 25:]) > 0.1


def test_packed_documents_are_apart(mixer, x):
    # The second row's last document has the id of its first, one token of another between them.
    segments = jnp.asarray([[1] * 17 + [2] * 23, [3] * 12 + [4] + [3] * 17 + [0] * 10], jnp.int32)
    packed = mixer(x, segment_ids=segments)
    for row, start, end in ((0, 0, 17), (0, 17, 40), (1, 0, 12), (1, 12, 13), (1, 13, 30)):
        document = np.s_[row : row + 1, start:end]
        assert rms_ratio(packed[document], mixer(x[document])) < 1e-6


@pytest.mark.parametrize("cuts", [(1, 2, 3, 20), (5, 6, 30), (40,)])
def test_pieces_with_a_cache_are_the_whole(mixer, x, cuts):
    # Documents that begin inside a piece, padding between them, rows that pause, and an id that comes back.
    ids = [[1] * 4 + [0] * 3 + [2] * 33, [5] * 22 + [6] * 6 + [5] * 4 + [0] * 8]
    segments = jnp.asarray(ids, jnp.int32)
    whole = mixer(x, segment_ids=segments)
    cache = GatedDeltaNet.init_cache(CONFIG, 2)
    start, pieces = 0, []
    for cut in (*cuts, LENGTH):
        if cut > start:
            y, cache = mixer.with_cache(x[:, start:cut], cache, segment_ids=segments[:, start:cut])
            pieces.append(y)
        start = cut
    valid = np.asarray(segments)[..., None] != 0
    assert rms_ratio(np.where(valid, np.concatenate(pieces, 1), 0), np.where(valid, whole, 0)) < 1e-6


def test_cache_without_segments_goes_on(mixer, x):
    whole = mixer(x)
    first, cache = mixer.with_cache(x[:, :7], GatedDeltaNet.init_cache(CONFIG, 2))
    second, _ = mixer.with_cache(x[:, 7:], cache)
    assert rms_ratio(jnp.concatenate([first, second], 1), whole) < 1e-6


def test_prompts_padded_on_the_right_go_on_as_if_they_were_not(mixer, x):
    padded = jnp.asarray([[1] * 7 + [0] * 3, [1] * 10], jnp.int32)
    first, cache = mixer.with_cache(x[:, :10], GatedDeltaNet.init_cache(CONFIG, 2), segment_ids=padded)
    second, _ = mixer.with_cache(x[:, 10:], cache)
    short = mixer(jnp.concatenate([x[:1, :7], x[:1, 10:]], axis=1))
    assert rms_ratio(jnp.concatenate([first[:1, :7], second[:1]], axis=1), short) < 1e-6
    assert rms_ratio(second[1:], mixer(x[1:])[:, 10:]) < 1e-6


def test_a_row_that_pauses_inside_a_document_goes_on(mixer, x):
    """A piece of nothing but padding is no end: neither the state nor the convolutions begin anew behind it."""
    segments = jnp.asarray([[3] * 3 + [0] * 2 + [3] * 4, [3] * 9], jnp.int32)
    cache, pieces = GatedDeltaNet.init_cache(CONFIG, 2), []
    for piece in (np.s_[:, 0:3], np.s_[:, 3:5], np.s_[:, 5:9]):
        y, cache = mixer.with_cache(x[piece], cache, segment_ids=segments[piece])
        pieces.append(y)
    short = mixer(jnp.concatenate([x[:1, :3], x[:1, 5:9]], axis=1))
    assert rms_ratio(jnp.concatenate([pieces[0][:1], pieces[2][:1]], axis=1), short) < 1e-6
    assert rms_ratio(jnp.concatenate(pieces, 1)[1:], mixer(x[1:, :9])) < 1e-6


@pytest.mark.parametrize("tails", ["float32", "bfloat16"])
def test_a_cache_keeps_its_dtypes_so_that_decoding_can_be_scanned(mixer, x, tails):
    cache = GatedDeltaNet.init_cache(CONFIG, 2, tails)
    steps = jnp.moveaxis(x[:, :5, None].astype("float32" if tails == "bfloat16" else "bfloat16"), 1, 0)
    _, y = jax.lax.scan(lambda cache, x: mixer.with_cache(x, cache)[::-1], cache, steps)
    assert rms_ratio(jnp.moveaxis(y[:, :, 0], 0, 1), mixer(x[:, :5])) < 0.05


@pytest.mark.parametrize("policy", ["block", "projections", "products"])
@pytest.mark.slow
def test_remat_changes_nothing(model, policy):
    tokens = jax.random.randint(jax.random.key(2), (2, LENGTH), 0, CONFIG.vocab_size)
    remat = GDNLanguageModel(dataclasses.replace(CONFIG, remat=policy), rngs=nnx.Rngs(0))
    nnx.update(remat, nnx.state(model, nnx.Param))

    for got, expected in zip(gradients(remat, tokens), gradients(model, tokens), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_unrolled_layers_change_nothing(model, monkeypatch):
    tokens = jax.random.randint(jax.random.key(2), (2, LENGTH), 0, CONFIG.vocab_size)
    looped = gradients(model, tokens)
    monkeypatch.setattr("gdn_jax.model.unrolled", lambda num_layers: True)
    assert f"unroll={CONFIG.num_layers}" in str(jax.make_jaxpr(model.__call__)(tokens))
    for got, expected in zip(gradients(model, tokens), looped, strict=True):
        # Float32, in another order, as with remat; entries that cancel have errors of the size of what cancels.
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_layers_are_unrolled_on_a_gpu_only_and_not_along_fsdp(monkeypatch):
    assert not unrolled(2)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert unrolled(16)
    assert not unrolled(17)
    monkeypatch.setattr("gdn_jax.model.free_axes", lambda: {"fsdp": 2})
    assert not unrolled(2)


def test_a_frequent_token_keeps_its_gradient_in_bfloat16():
    """1,000 times the same small cotangent: added up in bfloat16 they would stop at 256 of them."""
    tokens = jnp.ones((1, 1000), jnp.int32)

    def total(table):
        return jnp.sum(lookup(nnx.Param(table), tokens, jnp.bfloat16).astype(jnp.float32))

    # The sum is rounded once, to the eight bits of bfloat16.
    np.testing.assert_allclose(jax.grad(total)(jnp.zeros((3, 2)))[1], 1000.0, rtol=2**-8)


def test_the_readout_multiplies_in_its_own_dtype():
    """Its cotangents are those of plain matmuls; in bfloat16 no float32 operand is left."""
    x, kernel = jax.random.normal(jax.random.key(0), (2, 3, 4)), jax.random.normal(jax.random.key(1), (4, 5))
    cotangent = jax.random.normal(jax.random.key(2), (2, 3, 5))
    plain, wide = (jax.vjp(f, x, kernel)[1](cotangent) for f in (jnp.matmul, wide_matmul))
    for got, expected in zip(wide, plain, strict=True):
        # Float32, in another order.
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    low = (x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    for got, expected in zip(jax.vjp(wide_matmul, *low)[1](cotangent), plain, strict=True):
        assert got.dtype == jnp.bfloat16
        assert rms_ratio(got, expected) < 0.02
    program = jax.make_jaxpr(lambda x, kernel: jax.vjp(wide_matmul, x, kernel)[1](cotangent))(*low)
    products = [eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert len(products) == 2
    assert {str(operand.aval.dtype) for eqn in products for operand in eqn.invars} == {"bfloat16"}


def test_bfloat16_compute_is_close(model):
    tokens = jax.random.randint(jax.random.key(2), (2, LENGTH), 0, CONFIG.vocab_size)
    low = GDNLanguageModel(dataclasses.replace(CONFIG, compute_dtype="bfloat16"), rngs=nnx.Rngs(0))
    nnx.update(low, nnx.state(model, nnx.Param))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(low, nnx.Param)))
    logits = low(tokens)
    assert logits.dtype == jnp.float32
    # bf16 has 8 bits; errors of 1/256 an operation add up to a few percent over two blocks.
    assert 1e-4 < rms_ratio(logits, model(tokens)) < 0.05


@pytest.mark.usefixtures("optimized")
@pytest.mark.slow
def test_intermediates_do_not_change_the_logits(model):
    tokens = jax.random.randint(jax.random.key(2), (2, LENGTH), 0, CONFIG.vocab_size)
    logits, seen = model.with_intermediates(tokens)
    np.testing.assert_allclose(logits, model(tokens), rtol=1e-5, atol=1e-6)
    assert seen["q"].shape == (2, 2, LENGTH, 1, 8)
    assert seen["state"].shape == (2, 2, 2, 8, 8)
    assert seen["logits"].shape == (2, LENGTH, 13)
    added = {"o": jnp.zeros_like(seen["o"])}
    grad = jax.grad(lambda a: jnp.sum(model.with_intermediates(tokens, None, a)[0] ** 2))(added)["o"]
    assert float(jnp.min(jnp.sum(grad**2, axis=(1, 2, 3, 4)))) > 0


@pytest.mark.parametrize("name", ["beta", "state", "logits", "nonsense"])
def test_a_perturbation_that_would_do_nothing_is_refused(model, name):
    with pytest.raises(ValueError, match=rf"go on with; got {name}\. Use .*gate_b"):
        jax.eval_shape(
            lambda x: model.with_intermediates(jnp.zeros((1, 4), jnp.int32), None, {name: x})[0],
            jnp.zeros((CONFIG.num_layers, 1, 4, 2)),
        )


def test_a_mesh_of_explicit_axes_is_refused(model, mixer):
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(ValueError, match=r"got Explicit data.*AxisType.Auto"),
    ):
        jax.eval_shape(model, jax.ShapeDtypeStruct((2, 4), jnp.int32))
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(ValueError, match=r"got Explicit data.*AxisType.Auto"),
    ):
        jax.eval_shape(mixer, jax.ShapeDtypeStruct((2, 4, CONFIG.width), jnp.float32))


def test_tied_embedding_is_its_own_readout():
    tied = GDNLanguageModel(dataclasses.replace(CONFIG, tie_embedding=True), rngs=nnx.Rngs(0))
    tokens = jnp.arange(8)[None] % CONFIG.vocab_size
    assert tied.readout is None
    before = tied(tokens)
    tied.embedding[...] = 2 * tied.embedding[...]
    assert rms_ratio(tied(tokens), before) > 0.5


def test_untied_readout_starts_at_zero():
    fresh = GDNLanguageModel(CONFIG, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(fresh(jnp.zeros((1, 4), jnp.int32)), 0.0)


def test_logits_multiplier_is_no_parameter():
    wide = GDNLanguageModel(CONFIG.widen(64, "heads"), rngs=nnx.Rngs(0))
    assert float(wide.logits_multiplier[...]) == 0.25
    assert "logits_multiplier" not in nnx.to_pure_dict(nnx.state(wide, nnx.Param))
