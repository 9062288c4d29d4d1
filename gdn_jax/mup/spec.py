"""What a parameter declares of itself: axis names and a role."""

import dataclasses
import enum
import math


class Role(enum.StrEnum):
    """What a parameter does, as far as its scaling is concerned; the rows of ``mup.rules``."""

    MATRIX = "matrix"
    GATE_MATRIX = "gate_matrix"
    # W_a, of the decay; its rate is not W_b's under SGD.
    GATE_A_MATRIX = "gate_a_matrix"
    GATE_SCALAR = "gate_scalar"
    CONV = "conv"
    NORM_GAIN = "norm_gain"
    # A gain that all heads share.
    HEAD_GAIN = "head_gain"
    EMBEDDING = "embedding"
    TIED_EMBEDDING = "tied_embedding"
    READOUT = "readout"


# Roles whose initial values are zero-mean draws of a standard deviation; the others start from
# constants or distributions of their own, which no width changes.
RANDOM_ROLES = frozenset(
    {
        Role.MATRIX,
        Role.GATE_MATRIX,
        Role.GATE_A_MATRIX,
        Role.CONV,
        Role.EMBEDDING,
        Role.TIED_EMBEDDING,
        Role.READOUT,
    }
)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Declaration of one parameter.

    Attributes:
        axes: the axis name of each array dimension, in order.
        in_axes: the axes summed over when the parameter acts.
        out_axes: the axes that it produces. ``layers`` and the depthwise ``conv`` axis are in neither.
        role: which row of the rule table applies.
        fan_in: number of terms summed per output: the size of the in axes (of ``conv`` for a conv kernel).
        sizes: the size of each dimension; ``layers`` included once stacked.
    """

    axes: tuple[str, ...]
    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]
    role: Role
    fan_in: int
    sizes: tuple[int, ...]

    @property
    def fan_out(self) -> int:
        """Number of values that it produces: the size of the out axes."""
        return math.prod(
            size for axis, size in zip(self.axes, self.sizes, strict=True) if axis in self.out_axes
        )

    @property
    def in_block(self) -> bool:
        """Whether this is a parameter of the residual blocks, which depth rules concern: once stacked."""
        return "layers" in self.axes

    @property
    def group(self) -> str:
        """Name of the optimizer group: parameters of one role with the same in and out axes."""
        arrow = f"{'.'.join(self.in_axes)}->{'.'.join(self.out_axes)}"
        return f"{self.role}:{arrow}"
