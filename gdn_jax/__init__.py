"""Gated Delta Networks in Flax, with widths scaled by the maximal update parametrization."""

from gdn_jax import mup
from gdn_jax.config import GDNConfig
from gdn_jax.mixer import GatedDeltaNet, GDNCache
from gdn_jax.model import Block, GDNLanguageModel, Multiplier, static_rules
from gdn_jax.params import declare, declared, make_param, param_specs, stack_layers

__all__ = [
    "Block",
    "GDNCache",
    "GDNConfig",
    "GDNLanguageModel",
    "GatedDeltaNet",
    "Multiplier",
    "declare",
    "declared",
    "make_param",
    "mup",
    "param_specs",
    "stack_layers",
    "static_rules",
]
