"""The coordinate check measures what it says; the whole check is a slow test and a command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gdn_jax import GDNConfig, GDNLanguageModel
from gdn_jax.mup.coord_check import Tokens, measure

BASE = GDNConfig(
    width=16,
    num_key_heads=2,
    num_value_heads=2,
    key_dim=8,
    value_dim=8,
    mlp_width=32,
    num_layers=2,
    vocab_size=11,
)
QUANTITIES = {
    "q", "k", "v", "gate_a", "gate_b", "log_decay", "beta", "state", "o", "o_normed", "mixer_output", "mlp_output",
    "residual", "embedding", "final_norm", "logits",
}  # fmt: skip


def _tokens(seed):
    draw = np.random.default_rng(seed).integers(0, BASE.vocab_size, (2, 25)).astype(np.int32)
    return Tokens(draw[:, :-1], draw[:, 1:], np.ones((2, 24), np.int32), np.ones((2, 24), np.float32))


def _measure(width, preset="mup", optimizer="adamw", rate=0.02):
    return measure(
        BASE.widen(width, "heads"),
        preset=preset,
        optimizer=optimizer,
        learning_rate=rate,
        seeds=[0],
        batches=[_tokens(1), _tokens(2)],
        probe=_tokens(3),
        at_steps=(0, 2),
    )


@pytest.fixture(scope="module")
def rows():
    return {width: _measure(width) for width in (16, 64)}


def _size(rows, kind, quantity, step):
    (size,) = [r["size"] for r in rows if (r["kind"], r["quantity"], r["step"]) == (kind, quantity, step)]
    return size


def test_every_quantity_is_measured(rows):
    for kind, step in (("absolute", 0), ("absolute", 2), ("change", 2)):
        assert {r["quantity"] for r in rows[16] if (r["kind"], r["step"]) == (kind, step)} == QUANTITIES
    assert {r["quantity"] for r in rows[16] if r["kind"] == "gradient"} == {"q", "v", "gate_a", "gate_b", "o"}
    updates = {r["quantity"] for r in rows[16] if r["kind"] == "update"}
    assert len(updates) == 21
    assert not any(r["kind"] in ("change", "update") and r["step"] == 0 for r in rows[16])
    assert all(r["size"] > 0 for r in rows[16] if r["kind"] in ("change", "update"))


def test_absolute_sizes_at_init_are_those_of_the_model(rows):
    model = GDNLanguageModel(BASE, rngs=jax.random.key(0))
    probe = _tokens(3)
    embedded = jnp.abs(model.embedding[...][probe.tokens])
    assert _size(rows[16], "absolute", "embedding", 0) == pytest.approx(float(embedded.mean()), rel=1e-5)
    # A zero readout.
    assert _size(rows[16], "absolute", "logits", 0) == 0.0
    # beta = sigmoid of something centred on 0.
    assert 0.4 < _size(rows[16], "absolute", "beta", 0) < 0.6


def test_gates_start_alike_at_every_width():
    """The base's quantiles are repeated, so decay at initialisation differs by the noise of W_a x alone."""
    sizes = [_size(_measure(width), "absolute", "log_decay", 0) for width in (16, 64)]
    # Seen: 1.31, from W_a x of two heads and one seed. Random A in place of quantiles would scatter by factors.
    assert sizes[1] / sizes[0] == pytest.approx(1.0, abs=0.35)


def test_sp_changes_more_with_width_than_mup(rows):
    """One seed and toy widths show the direction; bounds and standard errors are the slow check's."""
    sp = {width: _measure(width, "sp") for width in (16, 64)}
    for quantity in ("q", "v", "gate_b", "residual"):
        growth = {
            name: _size(measured[64], "change", quantity, 2) / _size(measured[16], "change", quantity, 2)
            for name, measured in (("mup", rows), ("sp", sp))
        }
        assert growth["sp"] > 1.6 * growth["mup"], (quantity, growth)


def test_update_of_a_matrix_is_smaller_than_its_initial_effect(rows):
    """For W_b: mean |dW x0| after two steps lies below mean |W x0|, taken from the public intermediates."""
    model = GDNLanguageModel(BASE, rngs=jax.random.key(0))
    probe = _tokens(3)
    _, seen = model.with_intermediates(jnp.asarray(probe.tokens), jnp.asarray(probe.segment_ids))
    assert seen["mixer_input"].shape == (2, 2, 24, 16)
    kernel = nnx.state(model)["layers"]["mixer"]["b"]["kernel"][...]
    effect = jnp.abs(jnp.einsum("lbti,lio->lbto", seen["mixer_input"], kernel)).mean()
    # W_b starts with sigma = 1/4; two Adam steps of at most 0.02 move it by less than that.
    assert 0 < _size(rows[16], "update", "layers/mixer/b/kernel", 2) < float(effect)


def test_wrong_input():
    with pytest.raises(ValueError, match="batches must be one per step, 10; got 1"):
        measure(
            BASE,
            preset="mup",
            optimizer="adamw",
            learning_rate=0.1,
            seeds=[0],
            batches=[_tokens(1)],
            probe=_tokens(3),
        )
    import dataclasses

    tied = dataclasses.replace(BASE, tie_embedding=True)
    with pytest.raises(ValueError, match="float32 with an untied embedding"):
        measure(
            tied,
            preset="mup",
            optimizer="adamw",
            learning_rate=0.1,
            seeds=[0],
            batches=[_tokens(1)],
            probe=_tokens(3),
            at_steps=(0, 1),
        )
