"""What a user may choose, one small frozen dataclass per concern; the command line is made from them.

Values that contradict each other are refused on construction, before any array exists.
"""

import dataclasses
import math
from typing import Annotated, Literal

import tyro

from gdn_jax.config import GDNConfig
from gdn_jax.mup.decay import DECAY_MODES
from gdn_jax.mup.rules import PRESETS

type PresetName = Literal["mup", "mup_standard", "sp", "sp_embedding", "sp_constant", "paper_code"]
type OptimizerChoice = Literal["adamw", "sgd", "muon"]
type RematName = Literal["none", "block", "projections", "products"]
type RegimeName = Literal["heads", "head_dim"]


DEFAULT_BASE_WIDTH = 64

# Smallest normal and largest float32, in which learning rates reach the step.
_FLOAT32_MIN, _FLOAT32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The base model. Wider ones are derived from it: --regime says what grows with the width."""

    base_width: int | None = None
    """Model width at which the learning rate is what you say; all muP factors are 1 there. By default the
    smallest width of a sweep or a check, and 64 for a single run."""
    layers: int = 4
    """Residual blocks, each a Gated DeltaNet mixer and a SwiGLU MLP."""
    base_layers: int | None = None
    """Blocks of the base model; depth rules (arXiv:2505.01618) follow from layers / base_layers. By default as many
    as there are."""
    key_dim: int = 16
    """Size of one q or k head at the base width."""
    value_dim: int = 32
    """Size of one value head at the base width."""
    key_heads: int | None = None
    """Heads of q and k at the base width; by default as many as value heads."""
    value_heads: int | None = None
    """Value heads at the base width; by default base_width / value_dim."""
    mlp_ratio: float = 2.0
    """Inner width of the MLP / model width."""
    regime: RegimeName = "heads"
    """What grows with width: the number of heads, or (as in arXiv:2606.04048) the dims of each head."""
    tie_embedding: bool = False
    """One matrix for embedding and readout."""
    negative_eigenvalues: bool = False
    """beta in (0, 2) in place of (0, 1)."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations; parameters and optimizer state are float32."""
    remat: RematName = "none"
    """What the backward pass computes again to save memory: nothing, a whole block (a third more work), all but
    its products with parameters, or all but its matrix products."""

    def __post_init__(self) -> None:
        for name in (
            "base_width",
            "layers",
            "base_layers",
            "key_dim",
            "value_dim",
            "key_heads",
            "value_heads",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{_flag('model', name)} must be positive; got {value}.")
        if not (self.mlp_ratio > 0 and math.isfinite(self.mlp_ratio)):
            raise ValueError(f"--model.mlp-ratio must be positive and finite; got {self.mlp_ratio}.")

    def with_base(self, base_width: int) -> "ModelOptions":
        """These options with ``base_width`` where the user left it open."""
        return self if self.base_width is not None else dataclasses.replace(self, base_width=base_width)

    def gdn_config(
        self, width: int, vocab_size: int, *, preset: str = "mup", optimizer: str = "adamw"
    ) -> GDNConfig:
        """The model at ``width``; ValueError where a size would not be a whole number."""
        base_width = DEFAULT_BASE_WIDTH if self.base_width is None else self.base_width
        if self.value_heads is None and base_width % self.value_dim:
            raise ValueError(
                f"the base width must be a multiple of --model.value-dim ({self.value_dim}) unless "
                f"--model.value-heads is given; got {base_width}."
            )
        value_heads = base_width // self.value_dim if self.value_heads is None else self.value_heads
        base = GDNConfig(
            width=base_width,
            num_key_heads=value_heads if self.key_heads is None else self.key_heads,
            num_value_heads=value_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            mlp_width=round(base_width * self.mlp_ratio),
            num_layers=self.base_layers or self.layers,
            vocab_size=vocab_size,
            tie_embedding=self.tie_embedding,
            allow_negative_eigenvalues=self.negative_eigenvalues,
            compute_dtype=self.compute_dtype,
            remat=self.remat,
            preset=preset,
            optimizer=optimizer,
        )
        return dataclasses.replace(base.widen(width, self.regime), num_layers=self.layers)


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and its schedule; every value is the one at the base width."""

    name: Annotated[OptimizerChoice, tyro.conf.arg(name="optimizer", prefix_name=False)] = "adamw"
    """AdamW; SGD with Nesterov momentum; or Muon for the matrices of the blocks and AdamW for all else."""
    warmup_fraction: float = 0.1
    """Part of the steps over which the learning rate rises from 0."""
    final_fraction: float = 0.1
    """Learning rate at the last step / its peak; the fall between is a cosine."""
    weight_decay: float = 0.0
    """lambda; applied to matrices only."""
    decay_mode: Literal["width_free", "coupled", "independent"] = "width_free"
    """width_free: LR x lambda at every width. coupled: also x the muP factor. independent: lambda x schedule."""
    clip_norm: float = 1.0
    """One clip by the global norm of the gradient; 0: none."""
    beta1: float = 0.9
    """AdamW, also beside Muon: decay of the first moment."""
    beta2: float = 0.95
    """AdamW, also beside Muon: decay of the second moment."""
    epsilon: float = 1e-8
    """AdamW, also beside Muon: epsilon."""
    momentum: float = 0.98
    """SGD: Nesterov momentum."""

    def __post_init__(self) -> None:
        for name in ("warmup_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{_flag('optimizer', name)} must be between 0 and 1; got {getattr(self, name)}."
                )
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{_flag('optimizer', name)} must be in [0, 1); got {getattr(self, name)}.")
        for name in ("weight_decay", "clip_norm"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{_flag('optimizer', name)} must be 0 or more; got {getattr(self, name)}.")
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise ValueError(f"--optimizer.epsilon must be positive and finite; got {self.epsilon}.")
        if self.decay_mode not in DECAY_MODES:
            raise ValueError(
                f"--optimizer.decay-mode must be one of {', '.join(DECAY_MODES)}; got {self.decay_mode!r}."
            )


@dataclasses.dataclass(frozen=True)
class KeepOptions:
    """What is kept of a run, and what happens when something is wrong with it."""

    keep: int = 2
    """Newest checkpoints to keep; of two, one is there to fall back to when the other is damaged."""
    keep_best: int = 0
    """Checkpoints with the lowest validation loss to keep besides."""
    nan_policy: Literal["abort", "skip"] = "abort"
    """When loss or gradient is not finite, the update is withheld and the cause is looked for; then the run ends,
    or leaves the step out and goes on."""
    allow_changes: bool = False
    """Go on with this corpus and configuration although the run was begun with others."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"--keep must be positive; got {self.keep}.")
        if self.keep_best < 0:
            raise ValueError(f"--keep-best must be 0 or more; got {self.keep_best}.")


def check_learning_rate(value: float, flag: str = "--learning-rate") -> None:
    """ValueError unless ``value`` is a usable learning rate."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{flag} must be positive and finite; got {value:g}.")
    if not _FLOAT32_MIN <= value <= _FLOAT32_MAX:
        raise ValueError(
            f"{flag} must be a float32, from {_FLOAT32_MIN:.2g} to {_FLOAT32_MAX:.2g}; got {value:g}."
        )


def check_preset_name(value: str, flag: str = "--presets") -> None:
    """ValueError unless ``value`` names a preset."""
    if value not in PRESETS:
        raise ValueError(f"{flag} must be of {', '.join(PRESETS)}; got {value!r}.")


def _flag(group: str, name: str) -> str:
    return f"--{group}.{name.replace('_', '-')}"
