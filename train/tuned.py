"""`gdn train --tuned-by SWEEP`: the learning rate that a sweep found, used at another width, or a reason not to.

The optimum counts for what the sweep ran: another depth, length, batch, amount of tokens, schedule, vocabulary, dtype,
decay, optimizer setting or corpus moves it, and only those that the user names are accepted. The base sizes are the
sweep's always: the rules start from them.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from train.config import ModelOptions, OptimizerOptions
from train.data import DataConfig
from train.ledger import CONFIG_FILE, ROWS_FILE, fingerprint
from train.report import analyse, read_rows, strays
from train.report_analysis import power_of_two, trusted_from
from train.report_figure import amount, signed
from train.vary import WEIGHT_DECAY, not_default

type ChangeName = Literal[
    "depth",
    "sequence_length",
    "batch",
    "tokens",
    "schedule",
    "vocabulary",
    "dtype",
    "decay",
    "optimizer",
    "corpus",
    "rules",
]
CHANGES: tuple[str, ...] = get_args(ChangeName.__value__)

# Where each change shows in the configuration; tokens, vocabulary and corpus are compared as such.
_FIELDS = {
    "depth": (("model", "layers"),),
    "sequence_length": (("data", "sequence_length"),),
    "batch": (("data", "batch_size"),),
    "schedule": (("optimizer", "warmup_fraction"), ("optimizer", "final_fraction")),
    "dtype": (("model", "compute_dtype"),),
    "decay": (("optimizer", "weight_decay"), ("optimizer", "decay_mode")),
    "optimizer": tuple(
        ("optimizer", name) for name in ("beta1", "beta2", "epsilon", "momentum", "clip_norm")
    ),
}
# Fields of the model that are no base sizes: two are changes by name, and recomputing moves no optimum.
_NOT_BASE = {"layers", "compute_dtype", "remat"}

# Under these the wide model's optimum is the base's by construction; of the others a sweep must show it.
_SCALED_PRESETS = frozenset({"mup", "mup_standard", "paper_code"})


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What a sweep says of one preset.

    Attributes:
        folder: of the sweep.
        config: its `sweep.json`.
        preset: parametrization that was tuned.
        log2_lr: the optimum at `width`, log2.
        interval: of it, or None.
        width: at which it was found.
        widths: that were swept.
        factors: on the rules, of every run of the sweep (`gdn_jax.mup.adjusted`), by name.
        verdict: the report's sentence.
    """

    folder: pathlib.Path
    config: Mapping[str, Any]
    preset: str
    log2_lr: float
    interval: Sequence[float] | None
    width: int
    widths: Sequence[int]
    factors: Mapping[str, float]
    verdict: str

    @property
    def learning_rate(self) -> float:
        """The optimum, at the base width."""
        return 2.0**self.log2_lr


def sweep_config(folder: pathlib.Path) -> dict[str, Any]:
    """The configuration that a sweep was begun with; ValueError where there is none."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        for part in ("model", "optimizer", "data", "steps"):
            config[part]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--tuned-by must be a folder that `gdn sweep --out` wrote; {path} cannot be read "
            f"({type(error).__name__}: {error})."
        ) from None
    return config


def sweep_options(
    config: Mapping[str, Any], data: DataConfig
) -> tuple[ModelOptions, OptimizerOptions, DataConfig]:
    """The options of a sweep; where the text lies is taken from `data`, since a sweep does not know that."""
    fields = {key: value for key, value in config["data"].items() if key != "fingerprint"}
    model = {key: value for key, value in config["model"].items() if key != "remat"}
    try:
        return (
            ModelOptions(**model),
            OptimizerOptions(**config["optimizer"]),
            dataclasses.replace(data, **fields),
        )
    except TypeError as error:
        raise ValueError(f"--tuned-by must be a sweep that this version can read; {error}.") from None


def read_tuning(folder: pathlib.Path, preset: str | None, width: int) -> Tuning:
    """The optimum of a sweep, read from its rows.

    Args:
        folder: of the sweep.
        preset: which parametrization; None: the one that transfers.
        width: at which it is to be used.

    Raises:
        ValueError: no such sweep, one that varies more than learning rates (a factor that all its runs have is taken
            over), or an optimum that is not resolved, lies on an edge or does not transfer.
    """
    config = sweep_config(folder)
    rows = read_rows(folder / ROWS_FILE)
    if rows[0]["config_fingerprint"] != fingerprint(config):
        raise ValueError(
            f"{folder / CONFIG_FILE} is not the configuration of the rows beside it; put back the one that the sweep "
            "was begun with."
        )
    report = analyse(rows)
    if report["varied"]:
        raise ValueError(
            f"{folder} varies {' and '.join(report['varied'])}, which a run here does not take over; "
            "use a sweep over learning rates alone."
        )
    # The same in all rows.
    factors = dict(not_default(rows[0], config["optimizer"]["weight_decay"]))
    if WEIGHT_DECAY in factors:
        decay = factors[WEIGHT_DECAY]
        raise ValueError(
            f"every run of {folder} has the weight decay {decay:g} by --vary, which a run here does not take over; "
            f"sweep with --optimizer.weight-decay {decay:g}."
        )
    preset = _preset(report, preset, folder)
    found = report["presets"][preset]
    _require_optimum(found, preset, width, folder)
    base = str(found["base_width"])
    return Tuning(
        folder,
        config,
        preset,
        found["optimum_log2_x"][base],
        found["interval"][base],
        found["base_width"],
        [int(w) for w in found["optimum_log2_x"]],
        factors,
        report["verdict"],
    )


def _preset(report: Mapping[str, Any], preset: str | None, folder: pathlib.Path) -> str:
    known = report["presets"]
    if preset is not None:
        if preset not in known:
            raise ValueError(
                f"--preset must be one that {folder} swept ({', '.join(known)}); got {preset!r}."
            )
        return preset
    if len(known) == 1:
        return next(iter(known))
    transferring = [name for name, found in known.items() if found["transfers"]]
    if len(transferring) == 1:
        return transferring[0]
    if transferring:
        raise ValueError(
            f"{folder} has several optima that transfer: use --preset {' or '.join(transferring)}."
        )
    # None does: say why of the one that should.
    return "mup" if "mup" in known else next(iter(known))


def _require_optimum(found: Mapping[str, Any], preset: str, width: int, folder: pathlib.Path) -> None:
    if found["transfers"] is False:
        drift = found["drift_octaves_per_doubling"]
        why = found["regret_reason"] if found["regret_diverged"] else f"moving {signed(drift or 0.0)} octave"
        stays = trusted_from(found)
        raise ValueError(
            f"{folder} shows that the optimum of {preset} does not transfer ({why}"
            f"{'' if found['regret_diverged'] else f' per doubling of width{strays(found)}'}); sweep the width itself"
            f"{f', or from width {stays} on, where it stays within half an octave' if stays else ''}."
        )
    for swept, reason in found["reason"].items():
        if reason:
            where = "lies on an edge" if int(swept) in found["edge_minima"] else "is not resolved"
            raise ValueError(
                f"{folder}: the optimum of {preset} at width {swept} {where}: {reason}; extend the sweep."
            )
    if len(found["reason"]) == 1 and preset not in _SCALED_PRESETS and width != found["base_width"]:
        raise ValueError(
            f"{folder} has one width, which does not show that the optimum of {preset} transfers; "
            "sweep a second width, or tune mup."
        )


def differences(config: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between a sweep and a run, as `before -> now` by the name that accepts it.

    Args:
        config: the sweep's `sweep.json`.
        now: the run's, made by `sweep.identity`; its data may lack a fingerprint, which then is not compared.

    Raises:
        ValueError: base sizes or the optimizer differ, which nothing can accept.
    """
    changed: dict[str, str] = {}
    for name, fields in _FIELDS.items():
        told = [
            f"{field} {config[part][field]} -> {now[part][field]}"
            for part, field in fields
            if config[part][field] != now[part][field]
        ]
        if told:
            changed[name] = ", ".join(told)
    for name, of in (("tokens", _tokens), ("vocabulary", _vocabulary)):
        before, after = of(config), of(now)
        if before != after:
            changed[name] = f"{before} -> {after}"
    # The fingerprint covers length and vocabulary too: where these differ, the text cannot be compared.
    if not changed.keys() & {"sequence_length", "vocabulary"}:
        before, after = config["data"]["fingerprint"], now["data"].get("fingerprint")
        if after is not None and before != after:
            changed["corpus"] = f"{before[:12]} -> {after[:12]}"
    before, after = config.get("rules", 1), now.get("rules", 1)
    if before != after:
        changed["rules"] = (
            f"version {before} -> {after} of the rule table where head dims grow, which only a new sweep has"
        )
    fixed = [
        f"{field} {value} -> {now['model'].get(field)}"
        for field, value in ({"base_layers": None} | config["model"]).items()
        if field not in _NOT_BASE and value != now["model"].get(field)
    ]
    if config["optimizer"]["name"] != now["optimizer"]["name"]:
        fixed.append(f"optimizer {config['optimizer']['name']} -> {now['optimizer']['name']}")
    if fixed:
        raise ValueError(
            f"base sizes and optimizer must be those of the sweep ({'; '.join(fixed)}); leave them out, or sweep anew."
        )
    return changed


def _tokens(config: Mapping[str, Any]) -> int:
    return config["steps"] * config["data"]["batch_size"] * config["data"]["sequence_length"]


def _vocabulary(config: Mapping[str, Any]) -> str:
    data = config["data"]
    return "bytes" if data["tokenizer"] == "bytes" else f"{data['tokenizer']} {data['vocab_size']}"


def require_accepted(changed: Mapping[str, str], accepted: Sequence[str], folder: pathlib.Path) -> None:
    """ValueError unless every difference is named."""
    missing = [name for name in changed if name not in accepted]
    if missing:
        told = "; ".join(f"{name}: {changed[name]}" for name in missing)
        raise ValueError(
            f"{folder} was tuned otherwise ({told}), which may move the optimum; use its values, or add "
            f"--accept-change {' '.join([*accepted, *missing])}."
        )


def plan(tuning: Tuning, width: int, now: Mapping[str, Any], changed: Mapping[str, str]) -> list[str]:
    """What the run will do and why, line by line."""
    model, data = now["model"], now["data"]
    heads = model["value_heads"] or model["base_width"] // model["value_dim"]
    interval = "no interval"
    if tuning.interval:
        interval = " to ".join(power_of_two(end) for end in tuning.interval) + " (95 %)"
    lines = [
        f"plan: width {width}, tuned by {tuning.folder} at width {tuning.width}",
        f"  learning rate {tuning.learning_rate:.3g} = {power_of_two(tuning.log2_lr)} at the base, {interval}; "
        f"preset {tuning.preset}, {now['optimizer']['name']}",
        f"  base: width {model['base_width']}, {model['key_heads'] or heads} key heads of {model['key_dim']}, {heads} "
        f"value heads of {model['value_dim']}; what grows: {model['regime']}",
        f"  {model['layers']} layers, {model['compute_dtype']}; T {data['sequence_length']}, batch "
        f"{data['batch_size']}, {now['steps']} steps = {amount(_tokens(now))} tokens; vocabulary {_vocabulary(now)}; "
        f"decay {now['optimizer']['weight_decay']:g} ({now['optimizer']['decay_mode']})",
        f"  the sweep: {tuning.verdict}",
    ]
    if tuning.factors:
        told = ", ".join(f"{name} {value:g}" for name, value in tuning.factors.items())
        lines.append(f"  factors on the rules, as in the sweep: {told}")
    if len(tuning.widths) == 1:
        lines.append(
            f"  one width was swept: that the optimum transfers is what {tuning.preset} promises, not shown"
        )
    elif width > max(tuning.widths):
        lines.append(
            f"  width {width} lies beyond the swept ones, {min(tuning.widths)} to {max(tuning.widths)}"
        )
    lines += [f"  accepted change of {name}: {told}" for name, told in changed.items()]
    if changed.keys() & {"sequence_length", "vocabulary"}:
        lines.append("  whether the text is the sweep's cannot be told with another length or vocabulary")
    return lines
