"""The gated delta rule (arXiv:2412.06464) on arrays: no Flax, no Optax, no configuration of ours."""

from kernels_pallas.gated_delta_rule.api import (
    gated_delta_rule,
    gated_delta_rule_from_gates,
    gated_delta_step,
)
from kernels_pallas.gated_delta_rule.choice import check_implementation
from kernels_pallas.gated_delta_rule.reference import segment_masks

__all__ = [
    "check_implementation",
    "gated_delta_rule",
    "gated_delta_rule_from_gates",
    "gated_delta_step",
    "segment_masks",
]
