"""The rule table against tables written by hand, and the invariants that make transfer possible."""

import dataclasses
import io
import math

import jax
import pytest
from flax import nnx

from gdn_jax import GDNConfig, GDNLanguageModel, mup, param_specs, static_rules
from gdn_jax.mup.axes import axis_ratios
from gdn_jax.mup.decay import effective_decay
from train.config import ModelOptions
from train.show_rules import ShowRulesOptions, rule_rows, show_rules

BASE = GDNConfig(
    width=64,
    num_key_heads=2,
    num_value_heads=2,
    key_dim=16,
    value_dim=32,
    mlp_width=128,
    num_layers=3,
    vocab_size=50,
)

# By hand from the paper and from Tensor Programs V, for a width of 4x the base (64 -> 256):
# parameter: (init std, SGD LR x, AdamW LR x). In regime "heads" r_H = r_G = 4, r_K = r_V = 1; in regime
# "head_dim" r_H = r_G = 1, r_K = r_V = 4. fan_in: 256 (embed), 256 (value heads x value dim), 512 (mlp).
_MATRIX = (1 / 16, 1.0, 1 / 4)
_SHARED = {
    "embedding": (1.0, 4.0, 1.0),
    "final_norm/gain": (None, 4.0, 1.0),
    "layers/mixer/conv_q/kernel": (0.5, 4.0, 1.0),
    "layers/mixer/conv_k/kernel": (0.5, 4.0, 1.0),
    "layers/mixer/conv_v/kernel": (0.5, 4.0, 1.0),
    "layers/mixer/q/kernel": _MATRIX,
    "layers/mixer/k/kernel": _MATRIX,
    "layers/mixer/v/kernel": _MATRIX,
    "layers/mixer/g/kernel": _MATRIX,
    "layers/mixer/o/kernel": _MATRIX,
    "layers/mixer_norm/gain": (None, 4.0, 1.0),
    "layers/mlp_norm/gain": (None, 4.0, 1.0),
    "layers/mlp/gate/kernel": _MATRIX,
    "layers/mlp/up/kernel": _MATRIX,
    "layers/mlp/down/kernel": (512**-0.5, 1.0, 1 / 4),
    "readout": (0.0, 4.0, 1.0),
}
BY_HAND = {
    "heads": _SHARED
    | {
        "layers/mixer/a/kernel": (1 / 16, 1.0, 1 / 4),
        "layers/mixer/b/kernel": (1 / 16, 1.0, 1 / 4),
        "layers/mixer/A_log": (None, 4.0, 1.0),
        "layers/mixer/dt_bias": (None, 4.0, 1.0),
        "layers/mixer/o_norm/gain": (None, 1.0, 1.0),
    },
    "head_dim": _SHARED
    | {
        # sqrt(r_K) under SGD for what makes q and k.
        "layers/mixer/q/kernel": (1 / 16, 2.0, 1 / 4),
        "layers/mixer/k/kernel": (1 / 16, 2.0, 1 / 4),
        "layers/mixer/conv_q/kernel": (0.5, 8.0, 1.0),
        "layers/mixer/conv_k/kernel": (0.5, 8.0, 1.0),
        # sqrt(r_V) under SGD for W_b alone.
        "layers/mixer/a/kernel": (1 / 32, 1 / 4, 1 / 4),
        "layers/mixer/b/kernel": (1 / 32, 1 / 2, 1 / 4),
        "layers/mixer/A_log": (None, 1.0, 1.0),
        "layers/mixer/dt_bias": (None, 1.0, 1.0),
        "layers/mixer/o_norm/gain": (None, 1.0, 1.0),
    },
}
_DECAYED = {name for name, row in _SHARED.items() if name.endswith("kernel") and "conv" not in name and row}


@pytest.mark.parametrize("regime", ["heads", "head_dim"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_table_by_hand(regime, optimizer):
    rows = {row["parameter"]: row for row in rule_rows(BASE.widen(256, regime), "mup", optimizer)}
    assert rows.keys() == BY_HAND[regime].keys()
    for name, (init_std, sgd, adamw) in BY_HAND[regime].items():
        row = rows[name]
        assert row["init_std"] == (None if init_std is None else pytest.approx(init_std)), name
        assert row["lr_multiplier"] == pytest.approx(sgd if optimizer == "sgd" else adamw), name
        assert row["decay"] == (1.0 if name in _DECAYED else 0.0), name


@pytest.mark.parametrize("regime", ["heads", "head_dim"])
def test_muon_by_hand(regime):
    """Four times as wide, in and out: the RMS-matched update of a matrix shrinks by the root; the rest is AdamW's."""
    adamw = {row["parameter"]: row for row in rule_rows(BASE.widen(256, regime), "mup", "adamw")}
    for row in rule_rows(BASE.widen(256, regime), "mup", "muon"):
        name = row["parameter"]
        matrix = BY_HAND[regime][name][2] == _MATRIX[2] and name.split("/")[-2] not in ("a", "b")
        assert row["lr_multiplier"] == (0.5 if matrix else adamw[name]["lr_multiplier"]), name
    for row in rule_rows(BASE.widen(256, regime), "sp", "muon"):
        assert row["lr_multiplier"] == 1.0, row


@pytest.mark.parametrize("regime", ["heads", "head_dim"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_show_rules_prints_the_table_by_hand(regime, optimizer):
    from rich.console import Console

    console = Console(width=132, record=True, file=io.StringIO())
    model = ModelOptions(base_width=64, regime=regime)
    console.print(show_rules(ShowRulesOptions(width=256), model, optimizer))
    text = console.export_text()
    lines = {words[0]: words for line in text.splitlines() if (words := line.split())}
    powers = {1 / 4: "2^-2", 1 / 2: "2^-1", 1.0: "1", 2.0: "2^1", 4.0: "2^2", 8.0: "2^3"}
    for name, (init_std, sgd, adamw) in BY_HAND[regime].items():
        *_, shown_std, shown_rate, shown_decay = lines[name]
        assert shown_std == ("own" if init_std is None else f"{init_std:.4g}"), name
        assert shown_rate == powers[sgd if optimizer == "sgd" else adamw], name
        assert shown_decay == ("1" if name in _DECAYED else "0"), name
    assert ("4×256×8×32" if regime == "heads" else "4×256×2×128") in lines["layers/mixer/v/kernel"]
    assert "logits × 2^-2" in text


@pytest.mark.parametrize("preset", mup.PRESETS)
@pytest.mark.parametrize("optimizer", mup.OPTIMIZERS)
def test_every_learning_rate_factor_is_one_at_the_base(preset, optimizer):
    if (preset, optimizer) == ("paper_code", "muon"):
        with pytest.raises(ValueError, match="the paper's code does; got muon"):
            rule_rows(BASE, preset, optimizer)
        return
    for row in rule_rows(BASE, preset, optimizer):
        assert row["lr_multiplier"] == 1.0, row
    model = nnx.eval_shape(lambda: GDNLanguageModel(BASE, rngs=jax.random.key(0)))
    rules = mup.resolve_rules(
        param_specs(model), preset=preset, optimizer=optimizer, sizes=BASE.axis_sizes, base_sizes=None
    )
    assert rules.logits_multiplier == 1.0
    assert rules.epsilon_multiplier == 1.0


def _rules(preset, optimizer, regime="head_dim", width=256):
    return {row["parameter"]: row for row in rule_rows(BASE.widen(width, regime), preset, optimizer)}


def test_presets_differ_where_they_should():
    mup_rows, standard = _rules("mup", "sgd"), _rules("mup_standard", "sgd")
    differing = {name for name in mup_rows if mup_rows[name] != standard[name]}
    assert differing == {"layers/mixer/a/kernel", "layers/mixer/b/kernel"}
    gates = differing | {"layers/mixer/A_log", "layers/mixer/dt_bias"}
    assert all(standard[name]["lr_multiplier"] == 1.0 for name in gates)
    of_heads = _rules("mup", "sgd", "heads"), _rules("mup_standard", "sgd", "heads")
    assert {name for name in gates if of_heads[0][name] != of_heads[1][name]} == gates - differing
    assert _rules("mup", "adamw") == _rules("mup_standard", "adamw")

    sp = _rules("sp", "adamw")
    assert all(row["lr_multiplier"] == 1.0 for row in sp.values())
    stds = {name: row["init_std"] for name, row in mup_rows.items()}
    assert {name: row["init_std"] for name, row in sp.items()} == stds | {
        "layers/mixer/a/kernel": 1 / 16,
        "layers/mixer/b/kernel": 1 / 16,
    }
    embedding = _rules("sp_embedding", "adamw")
    assert embedding["embedding"]["lr_multiplier"] == 4.0
    assert {name for name in sp if sp[name] != embedding[name]} == {"embedding"}
    assert {row["init_std"] for row in _rules("sp_constant", "adamw").values()} == {0.02, None}


def test_gate_matrices_start_as_matrices_where_the_heads_grow_with_the_width():
    for heads, std in ((2, 1 / 32), (4, 1 / 16 / 2**0.5), (8, 1 / 16), (16, 1 / 16)):
        config = dataclasses.replace(BASE.widen(256, "heads"), num_value_heads=heads, num_key_heads=2)
        rows = {row["parameter"]: row for row in rule_rows(config, "mup", "adamw")}
        assert rows["layers/mixer/b/kernel"]["init_std"] == pytest.approx(std), heads


def test_paper_code():
    # Its base width is 256; the same 4x here.
    rows = _rules("paper_code", "adamw")
    for name, row in rows.items():
        own = name in ("embedding", "readout") or name.endswith(("A_log", "dt_bias"))
        assert row["lr_multiplier"] == (1.0 if own else 0.25), name
        gate_scalar_or_norm = name.endswith(("A_log", "dt_bias", "gain"))
        assert row["decay"] == (0.0 if gate_scalar_or_norm else 1.0), name
    assert rows["layers/mixer/q/kernel"]["init_std"] == pytest.approx(0.5 / 16)
    assert rows["embedding"]["init_std"] == 0.02
    sgd = _rules("paper_code", "sgd")
    assert sgd["layers/mixer/q/kernel"]["init_std"] == pytest.approx(0.32 / 16)
    assert sgd["layers/mixer/q/kernel"]["lr_multiplier"] == 1.0
    assert sgd["embedding"]["lr_multiplier"] == 4.0
    assert sgd["layers/mixer/a/kernel"]["lr_multiplier"] == 0.5
    assert sgd["layers/mixer/A_log"]["lr_multiplier"] == 2.0


def test_tied_embedding():
    tied = dataclasses.replace(BASE, tie_embedding=True)
    rows = {row["parameter"]: row for row in rule_rows(tied.widen(256, "heads"), "mup", "adamw")}
    assert "readout" not in rows
    assert rows["embedding"]["init_std"] == 0.02
    with pytest.raises(ValueError, match="untied"):
        rule_rows(tied.widen(256, "heads"), "sp_embedding", "adamw")


def test_effective_decay_modes():
    rule = mup.ParamRule(1.0, 0.25, 1.0)
    assert effective_decay(rule, 0.01, 0.1, 0.5, "coupled") == pytest.approx(0.01 * 0.25 * 0.1)
    assert effective_decay(rule, 0.01, 0.1, 0.5, "width_free") == pytest.approx(0.01 * 0.1)
    assert effective_decay(rule, 0.01, 0.1, 0.5, "independent") == pytest.approx(0.1 * 0.5)
    with pytest.raises(ValueError, match="decay_mode must be one of"):
        effective_decay(rule, 0.01, 0.1, 0.5, "other")


def test_inner_widths_that_lag_are_said_once(caplog):
    sizes = {"embed": 256, "mlp": 128}
    base = {"embed": 64, "mlp": 128}
    from gdn_jax.mup import axes

    axes._already_said.clear()
    axis_ratios(sizes, base)
    axis_ratios(sizes, base)
    assert [record.message for record in caplog.records] == [
        "the MLP width has grown 1-fold since the base model and embed 4-fold; "
        "learning rates are known to transfer when both grow alike."
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: axis_ratios({"embed": 4}, {}), "missing embed"),
        (lambda: axis_ratios({"embed": 4}, {"embed": 0}), "must be positive"),
        (lambda: rule_rows(BASE, "mupp", "adamw"), "preset must be one of mup, "),
        (lambda: rule_rows(BASE, "mup", "adam"), "optimizer must be one of adamw, sgd, muon"),
        (lambda: BASE.widen(96, "head_dims"), "regime must be one of heads, head_dim"),
        (lambda: BASE.widen(80, "heads"), "Use a multiple of 32"),
        (lambda: BASE.widen(-64, "heads"), "width must be a positive integer"),
        (lambda: GDNConfig(64, 4, 6, 16, 32, 128), "Use 8 value heads"),
        (lambda: GDNConfig(64, 2, 2, 16, 32, 0), "mlp_width must be a positive integer; got 0"),
        (lambda: GDNConfig(64, 2, 2, 16, 32, 128, compute_dtype="float16"), "compute_dtype must be"),
        (lambda: GDNConfig(True, 2, 2, 16, 32, 128), "width must be a positive integer; got True"),
        (lambda: BASE.widen(True, "heads"), "width must be a positive integer; got True"),
        (lambda: dataclasses.replace(BASE, norm_eps=math.inf), "norm_eps must be a positive number; got inf"),
        (
            lambda: dataclasses.replace(BASE, qk_norm_eps=0.0),
            "qk_norm_eps must be a positive number; got 0.0",
        ),
        (
            lambda: dataclasses.replace(BASE, qk_norm_eps=None),
            "qk_norm_eps must be a positive number; got None",
        ),
        (lambda: dataclasses.replace(BASE, implementation="mosaic"), "one of .*'mosaic_tpu'.*; got 'mosaic'"),
    ],
)
@pytest.mark.usefixtures("unchecked_annotations")
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.usefixtures("unchecked_annotations")
def test_a_base_that_is_no_config_is_refused():
    with pytest.raises(TypeError, match="base must be a GDNConfig or None; got 5"):
        dataclasses.replace(BASE, base=5)


def test_kernels_of_another_machine_may_be_configured():
    for name in ("chunked", "reference", "mosaic_tpu", "mosaic_gpu", None):
        assert dataclasses.replace(BASE, implementation=name).implementation == name


def test_undeclared_parameters_are_named():
    class Host(nnx.Module):
        def __init__(self):
            self.head = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    with pytest.raises(ValueError, match="head/bias, head/kernel are not"):
        param_specs(Host())


def test_static_rules_follow_the_config():
    config = BASE.widen(128, "heads")
    model = nnx.eval_shape(lambda: GDNLanguageModel(config, rngs=jax.random.key(0)))
    assert static_rules(model, config).logits_multiplier == 0.5
    assert static_rules(model, config, "sgd").groups["embedding:vocab->embed"].lr_multiplier == 2.0
