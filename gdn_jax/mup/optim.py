"""Optax chains that apply the rule table: one ``optax.partition`` over the parameter groups.

Every number may be traced (learning rate, decay, the rules themselves), so a chain can be built
inside a jitted step and one compiled program serves a whole sweep. The state does not depend on them.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import optax
import optax.contrib

from gdn_jax.mup.decay import DECAY_MODES, effective_decay
from gdn_jax.mup.rules import ParamRule, Rules, spec_leaves
from gdn_jax.mup.spec import ParamSpec, Role

type ScalarOrSchedule = Any

# RMS of an entry of AdamW's updates, as measured by arXiv:2502.16982.
_ADAM_RMS = 0.2


def adamw(
    learning_rate: ScalarOrSchedule,
    specs: Any,
    rules: Rules,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: Any = 0.0,
    decay_mode: str = "width_free",
    clip_norm: float | None = 1.0,
    peak_learning_rate: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with the rule table's learning rates, decay and epsilon.

    Args:
        learning_rate: at the base width; a number, a traced scalar, or an optax schedule.
        specs: tree of ``ParamSpec`` with the structure of the parameters (``params.param_specs``).
        rules: ``rules.resolve_rules(specs, optimizer="adamw", ...)``.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: Adam's epsilon at the base width; scaled by ``rules.epsilon_multiplier``.
        weight_decay: lambda at the base width; applied where the rules say so.
        decay_mode: ``"width_free"``, ``"coupled"`` or ``"independent"``; see ``decay.effective_decay``.
        clip_norm: one global-norm clip over all groups; ``None``: none.
        peak_learning_rate: the schedule's maximum; only ``decay_mode="independent"`` needs it, and only
            when ``learning_rate`` is not constant.

    Raises:
        ValueError: an unknown decay mode, ``independent`` with a schedule and no peak, or rules of another optimizer.
    """

    _require("adamw", rules)

    def core(spec: ParamSpec) -> optax.GradientTransformation:
        return _adam(spec, rules, b1, b2, eps)

    return _partitioned(
        core, learning_rate, specs, rules, weight_decay, decay_mode, clip_norm, peak_learning_rate
    )


def _require(optimizer: str, rules: Rules) -> None:
    if rules.optimizer != optimizer:
        raise ValueError(
            f"the rules are those of {rules.optimizer}, whose learning rates are others than {optimizer}'s; resolve "
            f'them for it: static_rules(model, config, "{optimizer}").'
        )


def _adam(spec: ParamSpec, rules: Rules, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    depth = rules.block_epsilon_multiplier if spec.in_block else 1.0
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps * rules.epsilon_multiplier * depth)


def muon(
    learning_rate: ScalarOrSchedule,
    specs: Any,
    rules: Rules,
    *,
    momentum: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: Any = 0.0,
    decay_mode: str = "width_free",
    clip_norm: float | None = 1.0,
    peak_learning_rate: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon for the matrices of the blocks, AdamW for all else, with the rule table's learning rates.

    A matrix's update is its momentum made orthogonal (``optax.contrib.scale_by_muon``; all heads are one matrix, every
    layer has its own), times ``0.2 sqrt(max(fan_in, fan_out))``: its RMS is then about AdamW's, and one
    learning rate and decay serve both (arXiv:2502.16982).

    Arguments as :func:`adamw`; ``momentum`` is Muon's, ``b1``, ``b2`` and ``eps`` are AdamW's. ``rules`` must have
    been resolved for ``optimizer="muon"``.
    """
    _require("muon", rules)

    def core(spec: ParamSpec) -> optax.GradientTransformation:
        if spec.role is not Role.MATRIX:
            return _adam(spec, rules, b1, b2, eps)
        places = optax.contrib.MuonDimensionNumbers(
            tuple(spec.axes.index(axis) for axis in spec.in_axes),
            tuple(spec.axes.index(axis) for axis in spec.out_axes),
        )
        orthogonal = optax.contrib.scale_by_muon(
            beta=momentum,
            weight_dimension_numbers=lambda updates: jax.tree.map(lambda _: places, updates),
        )
        return optax.chain(orthogonal, optax.scale(_ADAM_RMS * max(spec.fan_in, spec.fan_out) ** 0.5))

    return _partitioned(
        core, learning_rate, specs, rules, weight_decay, decay_mode, clip_norm, peak_learning_rate, _form
    )


def _form(spec: ParamSpec) -> Hashable:
    """What Muon's update of a matrix depends on besides its group."""
    return (spec.axes, spec.fan_in, spec.fan_out) if spec.role is Role.MATRIX else None


def sgd(
    learning_rate: ScalarOrSchedule,
    specs: Any,
    rules: Rules,
    *,
    momentum: float = 0.98,
    nesterov: bool = True,
    weight_decay: Any = 0.0,
    decay_mode: str = "width_free",
    clip_norm: float | None = 1.0,
    peak_learning_rate: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD with (Nesterov) momentum and the rule table's learning rates.

    Arguments as :func:`adamw`; ``momentum`` is the decay of the trace. ``rules`` must have been
    resolved for ``optimizer="sgd"``.
    """
    _require("sgd", rules)

    def core(_: ParamSpec) -> optax.GradientTransformation:
        return optax.trace(decay=momentum, nesterov=nesterov)

    return _partitioned(
        core, learning_rate, specs, rules, weight_decay, decay_mode, clip_norm, peak_learning_rate
    )


def group_labels(specs: Any) -> Any:
    """The label tree of ``optax.partition``: each spec's group name, those of blocks apart from others."""
    return _labels(specs, lambda spec: None)


def _label(spec: ParamSpec) -> str:
    return f"{spec.group}@blocks" if spec.in_block else spec.group


def _labels(specs: Any, form: Callable[[ParamSpec], Hashable]) -> Any:
    """As :func:`group_labels`; what has another form than the first of its group gets a label of its own."""
    forms: dict[str, list[Hashable]] = {}

    def label(spec: ParamSpec) -> str:
        known = forms.setdefault(_label(spec), [])
        if form(spec) not in known:
            known.append(form(spec))
        place = known.index(form(spec))
        return f"{_label(spec)}#{place}" if place else _label(spec)

    return jax.tree.map(label, specs, is_leaf=lambda x: isinstance(x, ParamSpec))


def _partitioned(
    core: Callable[[ParamSpec], optax.GradientTransformation],
    learning_rate: ScalarOrSchedule,
    specs: Any,
    rules: Rules,
    weight_decay: Any,
    decay_mode: str,
    clip_norm: float | None,
    peak_learning_rate: Any | None,
    form: Callable[[ParamSpec], Hashable] | None = None,
) -> optax.GradientTransformationExtraArgs:
    if decay_mode not in DECAY_MODES:
        raise ValueError(f"decay_mode must be one of {', '.join(DECAY_MODES)}; got {decay_mode!r}.")
    if decay_mode == "independent" and callable(learning_rate) and peak_learning_rate is None:
        raise ValueError(
            "decay_mode='independent' divides the schedule by its peak: give peak_learning_rate=max of it."
        )
    groups = {spec.group for spec in spec_leaves(specs)}
    unknown = sorted(groups - set(rules.groups))
    if unknown:
        raise ValueError(f"rules must cover every parameter group; missing {', '.join(unknown)}.")
    transforms: dict[Hashable, optax.GradientTransformation] = {}
    labels = group_labels(specs) if form is None else _labels(specs, form)
    for spec, label in zip(spec_leaves(specs), jax.tree.leaves(labels), strict=True):
        rule = rules.groups[spec.group]
        if spec.in_block:
            rule = rule._replace(lr_multiplier=rule.lr_multiplier * rules.block_lr_multiplier)
        step_size = _step_size(rule, learning_rate, weight_decay, decay_mode, peak_learning_rate)
        transforms[label] = optax.chain(core(spec), step_size)
    partition = optax.partition(transforms, labels)
    # One clip, outside the partition: inside, each group would be clipped on its own.
    return (
        optax.chain(optax.clip_by_global_norm(clip_norm), partition) if clip_norm is not None else partition
    )


def _step_size(
    rule: ParamRule,
    learning_rate: ScalarOrSchedule,
    weight_decay: Any,
    decay_mode: str,
    peak_learning_rate: Any | None,
) -> optax.GradientTransformation:
    """``update -> -(LR x multiplier x update + decay x weight)``."""

    def decay_at(rate: Any) -> Any:
        fraction = 1.0 if peak_learning_rate is None else rate / peak_learning_rate
        return -effective_decay(rule, rate, weight_decay, fraction, decay_mode)

    if callable(learning_rate):
        schedule: Any = learning_rate
        return optax.chain(
            optax.scale_by_schedule(lambda count: -schedule(count) * rule.lr_multiplier),
            optax.add_decayed_weights(lambda count: decay_at(schedule(count))),
        )
    return optax.chain(
        optax.scale(-learning_rate * rule.lr_multiplier),
        optax.add_decayed_weights(decay_at(learning_rate)),
    )
