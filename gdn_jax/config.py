"""Sizes and options of a Gated Delta Network, checked on construction."""

import dataclasses
import math
import numbers

from gdn_jax.mup import axes as ax
from gdn_jax.mup.rules import check_preset
from kernels_pallas import check_implementation

REGIMES = ("heads", "head_dim")

# What the backward pass finds of a block, by the name in jax.checkpoint_policies; all else it computes again.
# In a block the matrix products with parameters have no batch dimension, those inside the delta rule have.
REMAT_POLICIES = {
    "none": "everything_saveable",
    "block": "nothing_saveable",
    "projections": "dots_with_no_batch_dims_saveable",
    "products": "dots_saveable",
}


@dataclasses.dataclass(frozen=True)
class GDNConfig:
    """Sizes of the mixer and of the language model around it.

    A config with ``base`` is a width-scaled relative of that base: initialisation and learning rates
    follow from the ratios of their axis sizes. ``base.widen(1024, "heads")`` makes one.

    Attributes:
        width: model width (``embed``).
        num_key_heads: heads of q and k.
        num_value_heads: heads of v, of the gates and of the output; a multiple of ``num_key_heads``.
        key_dim: size of one q or k head.
        value_dim: size of one value head.
        mlp_width: inner width of the SwiGLU MLP.
        num_layers: residual blocks, each a mixer and an MLP.
        vocab_size: number of tokens.
        conv_size: taps of the short causal convolution.
        tie_embedding: one matrix for embedding and readout.
        allow_negative_eigenvalues: beta in (0, 2) in place of (0, 1) (arXiv:2411.12537). Where it comes near 2 for
            keys that are alike, bfloat16 kernels lose several per cent (kernels_pallas/gated_delta_rule/README.md);
            ``implementation="chunked"`` does not.
        readout_scale_exponent: the op multiplies its output by ``key_dim ** exponent``. 1/2 keeps it
            Theta(1) at every width; Hugging Face's weights want -1/2. The output's RMSNorm makes it a
            no-op except through ``norm_eps``, where it matters.
        norm_eps: epsilon of every RMSNorm.
        qk_norm_eps: epsilon added to the squared norm of q and k.
        compute_dtype: ``"float32"`` or ``"bfloat16"``; parameters are float32 always.
        remat: what the backward pass computes again, in place of keeping it: ``"none"``; ``"block"``, all of a
            block but its input; ``"projections"``, all but the products with parameters; ``"products"``, all but
            matrix products.
        implementation: of the gated delta rule; ``None``: the best there is.
        preset: row set of the rule table (``mup.PRESETS``).
        optimizer: the optimizer that training will use; the initialisation of ``paper_code`` depends on it.
        base: the base model; ``None``: this is one.
    """

    width: int
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    mlp_width: int
    num_layers: int = 4
    vocab_size: int = 256
    conv_size: int = 4
    tie_embedding: bool = False
    allow_negative_eigenvalues: bool = False
    readout_scale_exponent: float = 0.5
    norm_eps: float = 1e-6
    qk_norm_eps: float = 1e-6
    compute_dtype: str = "float32"
    remat: str = "none"
    implementation: str | None = None
    preset: str = "mup"
    optimizer: str = "adamw"
    base: "GDNConfig | None" = None

    def __post_init__(self) -> None:
        for name in (
            "width", "num_key_heads", "num_value_heads", "key_dim", "value_dim", "mlp_width", "num_layers",
            "vocab_size", "conv_size",
        ):  # fmt: skip
            _check_size(name, getattr(self, name))
        if self.num_value_heads % self.num_key_heads:
            above = -(-self.num_value_heads // self.num_key_heads) * self.num_key_heads
            raise ValueError(
                "num_value_heads must be a multiple of num_key_heads; got "
                f"{self.num_value_heads} and {self.num_key_heads}. Use {above} value heads."
            )
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute_dtype must be float32 or bfloat16; got {self.compute_dtype!r}.")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat must be one of {', '.join(REMAT_POLICIES)}; got {self.remat!r}.")
        for name in ("norm_eps", "qk_norm_eps"):
            value = getattr(self, name)
            if not (isinstance(value, numbers.Real) and 0 < float(value) < math.inf):
                raise ValueError(f"{name} must be a positive number; got {value!r}. Use 1e-6.")
        check_implementation(self.implementation)
        check_preset(self.preset, self.optimizer)
        if not isinstance(self.base, GDNConfig | None):
            raise TypeError(f"base must be a GDNConfig or None; got {self.base!r}. base.widen(...) sets it.")

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Axis name to size, of every axis that a parameter may have."""
        return {
            ax.EMBED: self.width,
            ax.KEY_HEADS: self.num_key_heads,
            ax.VALUE_HEADS: self.num_value_heads,
            ax.KEY_DIM: self.key_dim,
            ax.VALUE_DIM: self.value_dim,
            ax.MLP: self.mlp_width,
            ax.VOCAB: self.vocab_size,
            ax.CONV: self.conv_size,
            ax.LAYERS: self.num_layers,
        }

    @property
    def base_axis_sizes(self) -> dict[str, int]:
        """``axis_sizes`` of the base model; the model's own when it is its own base."""
        return (self.base or self).axis_sizes

    def widen(self, width: int, regime: str) -> "GDNConfig":
        """The relative of this base at another width.

        Args:
            width: model width of the result.
            regime: ``"heads"``: head dims stay and head counts grow, what practitioners do;
                ``"head_dim"``: head counts stay and head dims grow, as arXiv:2606.04048 does.

        Returns:
            A config whose ``base`` is this one (or this one's base).

        Raises:
            ValueError: unknown regime, or a size that would not be a whole number; the message names
                the multiple that ``width`` must be.
        """
        if regime not in REGIMES:
            raise ValueError(f"regime must be one of {', '.join(REGIMES)}; got {regime!r}.")
        _check_size("width", width)
        grown = ("num_key_heads", "num_value_heads") if regime == "heads" else ("key_dim", "value_dim")
        sizes = {}
        for name in (*grown, "mlp_width"):
            size, rest = divmod(getattr(self, name) * width, self.width)
            if rest:
                raise ValueError(
                    f"width must make {name} a whole number ({getattr(self, name)} at width {self.width}); "
                    f"got {width}. Use a multiple of {self.width // math.gcd(self.width, getattr(self, name))}."
                )
            sizes[name] = size
        return dataclasses.replace(self, width=width, base=self.base or self, **sizes)


def _check_size(name: str, value: object) -> None:
    # True is an int.
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer; got {value!r}.")
