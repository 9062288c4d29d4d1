"""THE table: role x optimizer -> initial standard deviation, learning rate x, decay, forward x.

Everything is a function of the ratios of a parameter's in and out axes to the base model's; at the
base every factor is exactly 1. One form gives both regimes: head dims fixed and head counts growing,
and head counts fixed and head dims growing (arXiv:2606.04048). Sources: Tensor Programs V
(arXiv:2203.03466, table 8), arXiv:2606.04048 for the gates under SGD, arXiv:2407.05872 for Adam's
epsilon, arXiv:2310.17813 for Muon. Derivation: a coordinate of a hidden vector of width m has a gradient
of Theta(1/m); a per-head gate collects d_v such terms, which add incoherently.

A preset is a table of rows, never a copy of the model. The values may be traced: a compiled step
takes them as arguments, so that one program serves every preset.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_args

import jax

from gdn_jax.mup import axes as ax
from gdn_jax.mup.spec import RANDOM_ROLES, ParamSpec, Role

# Of the table, by optimizer, where head dims grow: what was measured with another one is not to be mixed with this
# one's. 2: the initial standard deviation of gate matrices, and under SGD the rates of gate scalars and o_norm's gain;
# 3: SGD's rates of W_q, W_k and their conv kernels; 4: SGD's rate of W_a. Where head counts grow nothing changed.
HEAD_DIM_VERSIONS = {"adamw": 2, "sgd": 4, "muon": 2}

type Preset = Literal["mup", "mup_standard", "sp", "sp_embedding", "sp_constant", "paper_code"]
type OptimizerName = Literal["adamw", "sgd", "muon"]
PRESETS: tuple[str, ...] = get_args(Preset.__value__)
OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName.__value__)


class ParamRule(NamedTuple):
    """What the table says of one parameter group; numbers, or traced scalars."""

    # None where parameters of the group have other fans: `param_rule` has each one's.
    init_std: Any
    lr_multiplier: Any
    # 1 where weight decay applies, else 0.
    decay: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules of a whole model: a pytree of scalars.

    Attributes:
        optimizer: the one whose rules these are.
        groups: ``ParamSpec.group`` to :class:`ParamRule`.
        logits_multiplier: factor on the logits.
        epsilon_multiplier: factor on Adam's epsilon.
        residual_multiplier: factor on what every mixer and MLP adds to the residual stream.
        block_lr_multiplier: further factor on the learning rates of the blocks' parameters.
        block_epsilon_multiplier: further factor on Adam's epsilon for them.
    """

    optimizer: str = dataclasses.field(metadata={"static": True})
    groups: dict[str, ParamRule]
    logits_multiplier: Any
    epsilon_multiplier: Any
    residual_multiplier: Any = 1.0
    block_lr_multiplier: Any = 1.0
    block_epsilon_multiplier: Any = 1.0


@dataclasses.dataclass(frozen=True)
class _Dims:
    """What a rule may depend on."""

    fan_in: int
    fan_out: int
    r_in: float
    r_out: float
    # Ratio of the value head dim: the number of terms that a per-head gate's gradient collects.
    r_value_dim: float
    # Ratio of the key head dim where the parameter produces q or k, else 1.
    r_key_dim: float
    # Model width, and its ratio.
    n: int
    r: float


type _Factor = Callable[[_Dims], float]


@dataclasses.dataclass(frozen=True)
class _Row:
    init_std: _Factor
    sgd: _Factor
    adamw: _Factor
    decay: bool = False
    # None: as AdamW, which trains all but the matrices then.
    muon: _Factor | None = None


def _one(_: _Dims) -> float:
    return 1.0


def _fan_in_std(d: _Dims) -> float:
    # 1/sqrt(fan_in) at the base, times r_in^(-1/2): one formula, exact at the base.
    return d.fan_in**-0.5


def _gate_std(d: _Dims) -> float:
    # As a matrix where the heads grow with the width. Where their number stays a gate matrix is a readout: what it
    # sends back moves x along its few rows, and with rows of norm 1 W x change of x would grow as sqrt(n)
    # (arXiv:2310.17813; docs/derivation.md).
    return d.fan_in**-0.5 * min(1.0, (d.r_out / d.r_in) ** 0.5)


def _muon_rate(d: _Dims) -> float:
    # The update is orthogonal, times sqrt(max(fan_in, fan_out)) for its RMS (`optim.muon`). To move a vector of
    # entries Theta(1) by as much, its spectral norm must grow as sqrt(fan_out / fan_in).
    largest, at_base = max(d.fan_in, d.fan_out), max(d.fan_in / d.r_in, d.fan_out / d.r_out)
    return (d.r_out / d.r_in * at_base / largest) ** 0.5


def _constant(value: float) -> _Factor:
    return lambda _: value


# Rows: matrix to readout as in Tensor Programs V, table 8, in axis ratios; W_b from arXiv:2606.04048 (theorem on
# SGD): r_out sqrt(r_v) over the ratio of what is summed. Where head dims grow, rows depart from both as they say.
_MUP: dict[Role, _Row] = {
    # sqrt(r_k) for what makes q and k under SGD, its convolutions as well: SiLU gives all keys a common mean, beside
    # which the gradient of q and k falls by as much more (docs/derivation.md).
    Role.MATRIX: _Row(
        _fan_in_std,
        lambda d: d.r_out * d.r_key_dim**0.5 / d.r_in,
        lambda d: 1 / d.r_in,
        decay=True,
        muon=_muon_rate,
    ),
    # The theorem's sqrt(r_v) under SGD for W_b alone: what a batch's gradients of the decay add up to, at W_a as at
    # A_log and dt_bias, was measured to fall by as much less, but with small heads or batches (docs/derivation.md).
    Role.GATE_MATRIX: _Row(_gate_std, lambda d: d.r_out * d.r_value_dim**0.5 / d.r_in, lambda d: 1 / d.r_in),
    Role.GATE_A_MATRIX: _Row(_gate_std, lambda d: d.r_out / d.r_in, lambda d: 1 / d.r_in),
    Role.GATE_SCALAR: _Row(_one, lambda d: d.r_out, _one),
    Role.CONV: _Row(_fan_in_std, lambda d: d.r_out * d.r_key_dim**0.5, _one),
    Role.NORM_GAIN: _Row(_one, lambda d: d.r_out, _one),
    # Under SGD not r_v, though a channel's gradient is Theta(1/d_v) when all have equal shares: with r_v the largest
    # rate that trains falls with the width (docs/results, sgd-head-dim), perhaps since training gathers a head's
    # output in few channels. A gain that learns slower costs little: what it would learn W_o can.
    Role.HEAD_GAIN: _Row(_one, _one, _one),
    Role.EMBEDDING: _Row(_one, lambda d: d.r_out, _one),
    # 0.02: a tied embedding is the readout as well, and rows of unit variance would start
    # at a loss of hundreds of nats.
    Role.TIED_EMBEDDING: _Row(_constant(0.02), lambda d: d.r_out, _one),
    Role.READOUT: _Row(_constant(0.0), lambda d: d.r_in, _one),
}

_GATE_MATRICES = frozenset({Role.GATE_MATRIX, Role.GATE_A_MATRIX})
_GATES = _GATE_MATRICES | {Role.GATE_SCALAR}

# What arXiv:2606.04048 calls original muP, for the gates alone: under SGD they keep the base learning rate. All other
# rows are ours.
_MUP_STANDARD = _MUP | {role: dataclasses.replace(_MUP[role], sgd=_one) for role in _GATES}

# Standard parametrization with the same base as mup, so that the two coincide there.
_SP = {role: dataclasses.replace(row, sgd=_one, adamw=_one, muon=_one) for role, row in _MUP.items()}
_SP |= {role: dataclasses.replace(_SP[role], init_std=_fan_in_std) for role in _GATE_MATRICES}

# Ablation: embedding learning rate alone (arXiv:2605.21486 says it explains most of muP's gain).
_SP_EMBEDDING = _SP | {
    Role.EMBEDDING: dataclasses.replace(
        _SP[Role.EMBEDDING], adamw=lambda d: d.r, sgd=lambda d: d.r, muon=None
    )
}

# The paper's baseline: standard deviation 0.02 for everything drawn at random, one learning rate.
_SP_CONSTANT = {
    role: dataclasses.replace(row, init_std=row.init_std if role not in RANDOM_ROLES else _constant(0.02))
    for role, row in _SP.items()
}

# What the paper's public code does, faults included: under AdamW conv kernels and gains freeze as 1/n.
# Decay on all but gate scalars and norms; Adam's epsilon unscaled.
_PAPER_HIDDEN_STD: dict[str, float] = {"adamw": 0.5, "sgd": 0.32}


def _paper_code(optimizer: str) -> dict[Role, _Row]:
    def hidden_std(d: _Dims) -> float:
        return _PAPER_HIDDEN_STD[optimizer] * d.n**-0.5

    def conv_std(d: _Dims) -> float:
        return 0.5 * d.n**-0.5

    def shrink(d: _Dims) -> float:
        return 1 / d.r

    embedding = _Row(_constant(0.02), lambda d: d.r, _one, decay=True)
    gate_matrix = _Row(hidden_std, lambda d: d.r**-0.5, shrink, decay=True)
    return {
        Role.MATRIX: _Row(hidden_std, _one, shrink, decay=True),
        Role.GATE_MATRIX: gate_matrix,
        Role.GATE_A_MATRIX: gate_matrix,
        Role.GATE_SCALAR: _Row(_one, lambda d: d.r**0.5, _one),
        Role.CONV: _Row(conv_std, _one, shrink, decay=True),
        Role.NORM_GAIN: _Row(_one, _one, shrink),
        Role.HEAD_GAIN: _Row(_one, _one, shrink),
        Role.EMBEDDING: embedding,
        Role.TIED_EMBEDDING: embedding,
        Role.READOUT: embedding,
    }


def _table(preset: str, optimizer: str) -> dict[Role, _Row]:
    tables = {
        "mup": _MUP,
        "mup_standard": _MUP_STANDARD,
        "sp": _SP,
        "sp_embedding": _SP_EMBEDDING,
        "sp_constant": _SP_CONSTANT,
    }
    return _paper_code(optimizer) if preset == "paper_code" else tables[preset]


# Depth, as in CompleteP (arXiv:2505.01618, alpha = 1): L blocks whose updates are aligned add up to Theta(1) when each
# adds 1/L. A block's gradients carry that factor as well: Adam takes it away again, all but its epsilon; SGD's
# learning rate makes up for it.
_SCALED_DEPTH = frozenset({"mup", "mup_standard"})

# Presets that shrink the logits and Adam's epsilon with width.
_SCALED_LOGITS = frozenset({"mup", "mup_standard", "paper_code"})
_SCALED_EPSILON = frozenset({"mup", "mup_standard"})


def check_preset(preset: str, optimizer: str) -> None:
    """Raises ValueError for a preset or an optimizer that does not exist, naming those that do."""
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}.")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {optimizer!r}.")
    if preset == "paper_code" and optimizer == "muon":
        raise ValueError(
            "preset paper_code knows adamw and sgd, as the paper's code does; got muon. Use mup or sp."
        )


def param_rule(spec: ParamSpec, preset: str, optimizer: str, ratios: ax.AxisRatios, width: int) -> ParamRule:
    """The table's row for one parameter.

    Args:
        spec: the parameter's declaration.
        preset: one of ``PRESETS``.
        optimizer: one of ``OPTIMIZERS``.
        ratios: axis name to size / base size.
        width: size of the ``embed`` axis (only ``paper_code`` uses it).

    Raises:
        ValueError: unknown preset or optimizer, an axis without a ratio, or a tied embedding
            under ``sp_embedding``, which is defined for an untied one.
    """
    check_preset(preset, optimizer)
    if preset == "sp_embedding" and spec.role is Role.TIED_EMBEDDING:
        raise ValueError("preset sp_embedding is defined for an untied embedding; use tie_embedding=False.")
    row = _table(preset, optimizer)[spec.role]
    dims = _Dims(
        fan_in=spec.fan_in,
        fan_out=spec.fan_out,
        r_in=ax.product(ratios, spec.in_axes),
        r_out=ax.product(ratios, spec.out_axes),
        r_value_dim=ratios.get(ax.VALUE_DIM, 1.0),
        r_key_dim=ratios[ax.KEY_DIM] if ax.KEY_DIM in spec.out_axes else 1.0,
        n=width,
        r=ratios[ax.EMBED],
    )
    factor = {"adamw": row.adamw, "sgd": row.sgd, "muon": row.muon or row.adamw}[optimizer]
    return ParamRule(row.init_std(dims), factor(dims), float(row.decay))


def resolve_rules(
    specs: Any, *, preset: str, optimizer: str, sizes: ax.AxisSizes, base_sizes: ax.AxisSizes | None
) -> Rules:
    """The rules of a model, as Python floats.

    Args:
        specs: tree of :class:`ParamSpec` (``params.param_specs``).
        preset: one of ``PRESETS``.
        optimizer: one of ``OPTIMIZERS``.
        sizes: axis sizes of the model.
        base_sizes: axis sizes of the base model; ``None``: the model is its own base.

    Raises:
        ValueError: see :func:`param_rule`, :func:`axes.axis_ratios`.
    """
    check_preset(preset, optimizer)
    ratios = ax.axis_ratios(sizes, sizes if base_sizes is None else base_sizes)
    groups: dict[str, ParamRule] = {}
    for spec in spec_leaves(specs):
        rule = param_rule(spec, preset, optimizer, ratios, sizes[ax.EMBED])
        known = groups.setdefault(spec.group, rule)
        if known == rule:
            continue
        # As many axes, but other sizes: a host's D x D and 4D x D, which it initialises itself.
        groups[spec.group] = known._replace(init_std=None)
        if groups[spec.group] != rule._replace(init_std=None):
            raise ValueError(f"parameters of group {spec.group} must share one rule; got {known} and {rule}.")
    r = ratios[ax.EMBED]
    depth = ratios.get(ax.LAYERS, 1.0) if preset in _SCALED_DEPTH else 1.0
    return Rules(
        optimizer,
        groups,
        logits_multiplier=1 / r if preset in _SCALED_LOGITS else 1.0,
        epsilon_multiplier=1 / r if preset in _SCALED_EPSILON else 1.0,
        residual_multiplier=1 / depth,
        block_lr_multiplier=depth if optimizer == "sgd" else 1.0,
        block_epsilon_multiplier=1 / depth,
    )


# The roles that factors of :func:`adjusted` act on, and `_GATES`.
_EMBEDDINGS = frozenset({Role.EMBEDDING, Role.TIED_EMBEDDING})
_MATRICES = _GATE_MATRICES | {Role.MATRIX}


def adjusted(
    rules: Rules,
    specs: Any,
    *,
    embedding_lr: float = 1.0,
    gate_lr: float = 1.0,
    init_scale: float = 1.0,
    o_norm_lr: float = 1.0,
    readout_lr: float = 1.0,
) -> Rules:
    """The rules with some values multiplied, the same at every width: further hyperparameters that may transfer.

    Args:
        rules: of a model.
        specs: its parameters' declarations.
        embedding_lr: factor on the embedding's learning rate, tied or not.
        gate_lr: factor on the learning rates of gate matrices and gate scalars.
        init_scale: factor on the initial standard deviation of matrices, gate matrices included.
        o_norm_lr: factor on the learning rate of the gain of the mixer's output norm.
        readout_lr: factor on the readout's learning rate.

    Raises:
        ValueError: a factor on the readout of a model that has none of its own.
    """
    specs_of = {spec.group: spec for spec in spec_leaves(specs)}
    if readout_lr != 1 and Role.READOUT not in {spec.role for spec in specs_of.values()}:
        raise ValueError(
            "readout_lr: no parameter is a readout. A tied one is the embedding: vary embedding_lr."
        )
    groups = {}
    for group, rule in rules.groups.items():
        role = specs_of[group].role
        rate = (embedding_lr if role in _EMBEDDINGS else 1.0) * (gate_lr if role in _GATES else 1.0)
        if role is Role.HEAD_GAIN:
            rate *= o_norm_lr
        if role is Role.READOUT:
            rate *= readout_lr
        groups[group] = rule._replace(
            init_std=None
            if rule.init_std is None
            else rule.init_std * (init_scale if role in _MATRICES else 1.0),
            lr_multiplier=rule.lr_multiplier * rate,
        )
    return dataclasses.replace(rules, groups=groups)


def spec_leaves(specs: Any) -> Iterable[ParamSpec]:
    """The specs of a tree, in the order of ``jax.tree.leaves``."""
    return jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, ParamSpec))


def init_scale(rules: Rules) -> Callable[[ParamSpec], Any]:
    """Looks a parameter's initial standard deviation up in ``rules``; ValueError where its group has several."""

    def look_up(spec: ParamSpec) -> Any:
        std = rules.groups[spec.group].init_std
        if std is None:
            raise ValueError(
                f"parameters of group {spec.group} have several fans: ask param_rule for each one's std."
            )
        return std

    return look_up
