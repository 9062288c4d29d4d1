"""Model FLOPs of a Gated DeltaNet language model, and what a device could do at most: their quotient is the MFU.

Counted is what the definition asks for, whatever an implementation does in its place: two FLOPs a multiplication with
a parameter; of the delta rule (arXiv:2412.06464 eq. (10)) three products with the state a token and value head,
k^T S, k (x) delta, q^T S, of 2 K V each. Backward counts twice. What is computed again to save memory does not count,
nor do norms, activations and the lookup of embeddings.
"""

from typing import Any

from gdn_jax.config import GDNConfig

# Dense bfloat16 FLOP/s of one device by the beginning of its kind, from the vendors' data sheets; longest match wins.
_PEAK = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 2307e12,
}


def forward_flops_per_token(config: GDNConfig) -> int:
    """Model FLOPs of the forward pass, per token."""
    keys = config.num_key_heads * config.key_dim
    values = config.num_value_heads * config.value_dim
    # q, k; v, output gate; the two gates a, b; o.
    mixer = config.width * (2 * keys + 2 * values + 2 * config.num_value_heads) + values * config.width
    convolution = config.conv_size * (2 * keys + values)
    delta_rule = 3 * values * config.key_dim
    mlp = 3 * config.width * config.mlp_width
    layers = config.num_layers * (mixer + convolution + delta_rule + mlp)
    return 2 * (layers + config.width * config.vocab_size)


def train_flops_per_token(config: GDNConfig) -> int:
    """Model FLOPs of forward and backward pass, per token."""
    return 3 * forward_flops_per_token(config)


def peak_flops(device: Any) -> float | None:
    """Dense bfloat16 FLOP/s of a jax device; ``None``: not known, as for CPUs."""
    known = [name for name in _PEAK if device.device_kind.startswith(name)]
    return _PEAK[max(known, key=len)] if known else None
