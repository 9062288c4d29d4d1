"""The muP engine: axes and roles of parameters, the rule table, and the optimizers that apply it."""

from gdn_jax.mup.axes import axis_ratios
from gdn_jax.mup.decay import DECAY_MODES
from gdn_jax.mup.optim import adamw, group_labels, muon, sgd
from gdn_jax.mup.rules import (
    OPTIMIZERS,
    PRESETS,
    ParamRule,
    Rules,
    adjusted,
    init_scale,
    param_rule,
    resolve_rules,
)
from gdn_jax.mup.spec import RANDOM_ROLES, ParamSpec, Role

__all__ = [
    "DECAY_MODES",
    "OPTIMIZERS",
    "PRESETS",
    "RANDOM_ROLES",
    "ParamRule",
    "ParamSpec",
    "Role",
    "Rules",
    "adamw",
    "adjusted",
    "axis_ratios",
    "group_labels",
    "init_scale",
    "muon",
    "param_rule",
    "resolve_rules",
    "sgd",
]
