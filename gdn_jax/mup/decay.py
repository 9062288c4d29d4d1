"""Weight decay: how much of a weight a step removes, in three modes."""

from typing import Any, Literal, get_args

from gdn_jax.mup.rules import ParamRule

type DecayMode = Literal["coupled", "width_free", "independent"]
DECAY_MODES: tuple[str, ...] = get_args(DecayMode.__value__)


def effective_decay(rule: ParamRule, learning_rate: Any, weight_decay: Any, schedule: Any, mode: str) -> Any:
    """Fraction of a weight that one step removes.

    Args:
        rule: the parameter's rule.
        learning_rate: peak learning rate at the base, times ``schedule``.
        weight_decay: lambda, as the user gives it at the base.
        schedule: learning rate / peak learning rate at this step, in [0, 1].
        mode: ``"coupled"``: LR x multiplier x lambda. ``"width_free"``: LR x lambda, free of width
            while it follows the learning rate (arXiv:2510.19093). ``"independent"``: lambda x
            schedule, no learning rate in it (arXiv:2405.13698).
    """
    if mode == "coupled":
        return rule.decay * weight_decay * learning_rate * rule.lr_multiplier
    if mode == "width_free":
        return rule.decay * weight_decay * learning_rate
    if mode == "independent":
        return rule.decay * weight_decay * schedule
    raise ValueError(f"decay_mode must be one of {', '.join(DECAY_MODES)}; got {mode!r}.")
