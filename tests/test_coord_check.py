"""The coordinate check measures what it says; the whole check is a long test and a command."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gdn_jax import GDNConfig, GDNLanguageModel, mup
from gdn_jax.mup.coord_check import Tokens, _check_of, measure

ROOT = pathlib.Path(__file__).parents[1]

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


def _start(width):
    """The parameters that a check of this width starts from."""
    config = BASE.widen(width, "heads")
    check = _check_of(config, "adamw", 0.98)
    sizes = {"sizes": config.axis_sizes, "base_sizes": config.base_axis_sizes}
    rules = mup.resolve_rules(check.specs, preset="mup", optimizer="adamw", **sizes)
    return check.init(np.int32(0), rules, np.float32(0.02))[0]


def _measure(width, preset="mup", optimizer="adamw", rate=0.02, at_steps=(0, 2)):
    return measure(
        BASE.widen(width, "heads"),
        preset=preset,
        optimizer=optimizer,
        learning_rate=rate,
        seeds=[0],
        batches=[_tokens(1), _tokens(2)],
        probe=_tokens(3),
        at_steps=at_steps,
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
    """The base's quantiles are repeated: sampled anew, few heads would look like a slope in width."""
    starts = {width: _start(width)["layers"]["mixer"] for width in (16, 64)}
    for name in ("A_log", "dt_bias"):
        base, wide = starts[16][name], starts[64][name]
        assert base.shape == (2, 2)
        assert wide.shape == (2, 8)
        np.testing.assert_array_equal(wide, jnp.tile(base, (1, 4)))
    assert starts[16]["A_log"][0, 0] != starts[16]["A_log"][0, 1]


@pytest.mark.slow
def test_sp_changes_more_with_width_than_mup(rows):
    """One seed and toy widths show the direction; bounds and standard errors are the long check's."""
    sp = {width: _measure(width, "sp") for width in (16, 64)}
    for quantity in ("q", "v", "gate_b", "residual"):
        growth = {
            name: _size(measured[64], "change", quantity, 2) / _size(measured[16], "change", quantity, 2)
            for name, measured in (("mup", rows), ("sp", sp))
        }
        assert growth["sp"] > 1.6 * growth["mup"], (quantity, growth)


@pytest.mark.slow
def test_update_of_a_matrix_recomputed_by_hand():
    """Adam's first step is rate * sign(gradient); mean |dW_b x0| follows from that and the public intermediates."""
    rows = _measure(16, rate=0.02, at_steps=(0, 1))
    config = BASE.widen(16, "heads")
    graphdef, _, rest = nnx.split(GDNLanguageModel(config, rngs=jax.random.key(0)), nnx.Param, ...)
    params = nnx.State(_start(16))
    batch, probe = _tokens(1), _tokens(3)

    def loss(params):
        logits = nnx.merge(graphdef, params, rest)(jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids))
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(batch.targets)[..., None], -1)
        return -picked.mean()

    # A zero readout passes no gradient on, so only the readout moves in step one: its input is the final norm.
    gradient = jax.grad(loss)(params)["readout"]
    model = nnx.merge(graphdef, params, rest)
    _, seen = model.with_intermediates(jnp.asarray(probe.tokens), jnp.asarray(probe.segment_ids))
    effect = jnp.abs(seen["final_norm"] @ (0.02 * jnp.sign(gradient))).mean()
    assert _size(rows, "update", "readout", 1) == pytest.approx(float(effect), rel=1e-4)
    assert _size(rows, "update", "layers/mixer/b/kernel", 1) == 0.0


def _coord_check(folder, *words):
    done = subprocess.run(
        [sys.executable, "-m", "train", "coord-check", "--out", str(folder), *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "coord.json").read_text())


# Heads that grow from width 64; head dims that grow, with enough heads for the gates' statistics, from 128.
CHECKS = {
    "heads": "",
    "head_dim": "--model.key-dim 32 --model.value-dim 32 --model.value-heads 8 --widths 128 256 512 1024 2048 "
    "--data.sequence-length 64 --seeds 0 1 2 3 4 5",
}


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("regime", CHECKS)
def test_mup_passes_its_controls_fail_and_the_papers_code_freezes(tmp_path, regime):
    words = ["--presets", "mup", "sp", "paper_code", "--model.regime", regime, *CHECKS[regime].split()]
    analysis = _coord_check(tmp_path, *words)
    assert analysis["passed"] is True
    assert all(control["fails"] for control in analysis["controls"])
    slopes = {"mup": [], "paper_code": []}
    for entry in analysis["entries"]:
        frozen = any(word in entry["quantity"] for word in ("conv", "gain"))
        if entry["kind"] == "update" and frozen and entry["preset"] in slopes:
            slopes[entry["preset"]].append(entry["slope"])
    assert len(slopes["mup"]) == len(slopes["paper_code"]) == 14
    # 1 / width: what MUP's table avoids.
    assert max(slopes["paper_code"]) < -0.8
    assert max(map(abs, slopes["mup"])) < 0.15


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
