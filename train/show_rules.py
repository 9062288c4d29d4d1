"""`gdn show-rules`: what the parametrization does to each parameter, to read before a week of GPUs is spent."""

import dataclasses
import math
from typing import Any

import jax
from flax import nnx
from rich import box
from rich.table import Table

from gdn_jax import GDNLanguageModel, mup, param_specs
from gdn_jax.config import GDNConfig
from gdn_jax.mup.axes import product
from train.config import ModelOptions, PresetName


@dataclasses.dataclass(frozen=True)
class ShowRulesOptions:
    """Whose rules to show."""

    width: int = 256
    """Model width."""
    preset: PresetName = "mup"
    """Parametrization."""
    vocab_size: int = 257
    """Number of token ids."""

    def __post_init__(self) -> None:
        for name in ("width", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be positive; got {getattr(self, name)}.")


def rule_rows(config: GDNConfig, preset: str, optimizer: str) -> list[dict[str, Any]]:
    """One row per parameter: name, shape, axes, role, ratios, init std, LR x and decay (0 or 1).

    ``init_std`` is None for parameters that start from constants or from distributions of their own.
    """
    model = nnx.eval_shape(lambda: GDNLanguageModel(config, rngs=jax.random.key(0)))
    specs = param_specs(model)
    sizes = config.axis_sizes
    rules = mup.resolve_rules(
        specs, preset=preset, optimizer=optimizer, sizes=sizes, base_sizes=config.base_axis_sizes
    )
    ratios = mup.axis_ratios(sizes, config.base_axis_sizes)
    flat, _ = jax.tree_util.tree_flatten_with_path(specs, is_leaf=lambda x: isinstance(x, mup.ParamSpec))
    rows = []
    for path, spec in flat:
        rule = rules.groups[spec.group]
        rows.append(
            {
                "parameter": "/".join(str(getattr(key, "key", key)) for key in path),
                "shape": spec.sizes,
                "axes": spec.axes,
                "in_axes": spec.in_axes,
                "out_axes": spec.out_axes,
                "role": spec.role.value,
                "r_in": product(ratios, spec.in_axes),
                "r_out": product(ratios, spec.out_axes),
                "init_std": rule.init_std if spec.role in mup.RANDOM_ROLES else None,
                "lr_multiplier": rule.lr_multiplier,
                "decay": rule.decay,
            }
        )
    return rows


def show_rules(options: ShowRulesOptions, model: ModelOptions, optimizer: str) -> Table:
    """The rows as a table for the terminal; ValueError where width, preset or model do not go together."""
    config = model.gdn_config(options.width, options.vocab_size, preset=options.preset, optimizer=optimizer)
    grown = "number of heads" if model.regime == "heads" else "head dims"
    table = Table(
        title=(
            f"{options.preset} under {optimizer}: width {options.width} from base {config.base_axis_sizes['embed']}, "
            f"where the {grown} grow"
        ),
        caption=_caption(config, options.preset, optimizer),
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
    )
    for name in ("parameter", "shape", "in → out", "role"):
        table.add_column(name, no_wrap=True)
    for name in ("r in", "r out", "init std", "LR ×", "decay ×"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rule_rows(config, options.preset, optimizer):
        table.add_row(
            row["parameter"],
            "×".join(map(str, row["shape"])),
            f"{' '.join(row['in_axes'])} → {' '.join(row['out_axes'])}".strip(),
            row["role"],
            _describe_ratio(row["r_in"]),
            _describe_ratio(row["r_out"]),
            "own" if row["init_std"] is None else f"{row['init_std']:.4g}",
            _describe_ratio(row["lr_multiplier"]),
            f"{row['decay']:g}",
        )
    return table


def _caption(config: GDNConfig, preset: str, optimizer: str) -> str:
    model = nnx.eval_shape(lambda: GDNLanguageModel(config, rngs=jax.random.key(0)))
    rules = mup.resolve_rules(
        param_specs(model),
        preset=preset,
        optimizer=optimizer,
        sizes=config.axis_sizes,
        base_sizes=config.base_axis_sizes,
    )
    text = f"logits × {_describe_ratio(rules.logits_multiplier)}"
    if optimizer != "sgd":
        text += f", Adam ε × {_describe_ratio(rules.epsilon_multiplier)}"
    if rules.residual_multiplier != 1:
        text += f"; blocks, for their depth: what they add × {_describe_ratio(rules.residual_multiplier)}"
        factor, what = (
            (rules.block_lr_multiplier, "LR")
            if rules.block_lr_multiplier != 1
            else (rules.block_epsilon_multiplier, "Adam ε")
        )
        text += f", {what} × {_describe_ratio(factor)}"
    return (
        text
        + ". r: size / base size of the in and out axes. own: gains start at 1, gates at their usual distributions."
    )


def _describe_ratio(value: float) -> str:
    """A factor as a power of two where it is one, else with four digits: ``2^-1.5``, ``0.3333``."""
    if value > 0:
        exponent = math.log2(value)
        if abs(exponent * 2 - round(exponent * 2)) < 1e-9:
            return "1" if exponent == 0 else f"2^{exponent:g}"
    return f"{value:.4g}"
