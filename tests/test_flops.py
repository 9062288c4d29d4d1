"""Model FLOPs by hand, and against what XLA counts in the plain implementation."""

import types

import pytest

from gdn_jax.config import GDNConfig
from train.flops import forward_flops_per_token, peak_flops, train_flops_per_token

CONFIG = GDNConfig(
    width=32, num_key_heads=2, num_value_heads=4, key_dim=8, value_dim=16, mlp_width=64, num_layers=3,
    vocab_size=50,
)  # fmt: skip


def test_by_hand():
    # q k v gate a b o, convolutions of 4 taps, three products with the state, the MLP.
    projections = 32 * (16 + 16 + 64 + 64 + 4 + 4) + 64 * 32
    layer = projections + 4 * (16 + 16 + 64) + 3 * 4 * 8 * 16 + 3 * 32 * 64
    assert forward_flops_per_token(CONFIG) == 2 * (3 * layer + 32 * 50)
    assert train_flops_per_token(CONFIG) == 3 * forward_flops_per_token(CONFIG)


def test_parameters_are_counted_once_each():
    """All but embedding, norms, gates' biases and states multiply a token once: 2 FLOPs each."""
    import jax
    from flax import nnx

    from gdn_jax import GDNLanguageModel

    model = nnx.eval_shape(lambda: GDNLanguageModel(CONFIG, rngs=nnx.Rngs(0)))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    multiplied = sum(
        leaf.size
        for path, leaf in leaves
        if path[0].key == "readout" or (path[0].key == "layers" and path[-1].key == "kernel")
    )
    states = 3 * 3 * 4 * 8 * 16
    assert forward_flops_per_token(CONFIG) == 2 * (multiplied + states)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peak(kind, peak):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == peak
