"""What the op and the Hopper kernels must move and multiply, and the time that takes an H100 at the least."""

import dataclasses

from kernels_pallas.gated_delta_rule.mosaic_gpu_kernel import CHUNK, state_stride
from kernels_pallas.gated_delta_rule.shapes import Shape

# Of a device whose name has the word: bytes and floating-point operations a second, as a copy within its memory and a
# bfloat16 matmul reached them on one H100 80GB.
_RATES = {"H100": (3.02e12, 688e12)}
# Launches of sequences in parts. What they move and multiply depends on how long a state lives.
UNCOUNTED = ("gdn_summary", "gdn_firsts", "gdn_local_walk", "gdn_lasts")
# Of q, k, v, o and what is saved of them; gates are float32.
_HALF, _GATE = 2, 4


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes of device memory, each counted once, and floating-point operations of the tensor cores."""

    moved: int
    operations: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.moved + other.moved, self.operations + other.operations)

    def seconds(self, device_kind: str) -> float | None:
        """The larger of the times that either takes alone; None where the device's rates are not known."""
        for name, (bandwidth, rate) in _RATES.items():
            if name in device_kind:
                return max(self.moved / bandwidth, self.operations / rate)
        return None


def op_costs(shape: Shape) -> tuple[Cost, Cost]:
    """(forward, backward) of any implementation in chunks of 64: operands and results once, nothing in between."""
    keys, values, gates = _elements(shape)
    pairs = shape.batch * shape.length * shape.value_heads
    square, both = shape.key_dim * shape.value_dim, CHUNK * (shape.key_dim + shape.value_dim)
    forward = Cost(
        _HALF * (2 * keys + 2 * values) + 2 * _GATE * gates, 2 * pairs * (3 * square + 2 * both + CHUNK**2)
    )
    backward = Cost(
        _HALF * (4 * keys + 3 * values) + 4 * _GATE * gates,
        2 * pairs * (7 * square + 7 * both + 3 * CHUNK**2),
    )
    return forward, backward


def launch_costs(shape: Shape) -> dict[str, Cost]:
    """What each launch of the Hopper kernels costs, by its name, when states are saved and gradients follow.

    Programs of other columns of V, or of another block of K, read q and k again: that comes out of the L2 cache and is
    not counted; what they multiply again is.
    """
    keys, values, gates = _elements(shape)
    pairs = shape.batch * shape.length * shape.value_heads
    k, v = shape.key_dim, shape.value_dim
    slabs, blocks = -(-v // CHUNK), -(-k // 128)
    square = k * v
    inverse, dstates = CHUNK * pairs, square * pairs // CHUNK
    stride = state_stride(-(-shape.length // CHUNK), k, v)
    states = dstates // stride
    return {
        "gdn_inverse": Cost(
            # Beside k · kᵀ, products of 16 columns: of 64 rows of the diagonal blocks, of fewer above.
            _HALF * (keys + inverse) + 4 * _GATE * gates,
            2 * pairs * (CHUNK * k + 6 * 16 * CHUNK + 11 * 16**2),
        ),
        "gdn_forward": Cost(
            _HALF * (2 * keys + 2 * values + inverse + states) + 2 * _GATE * gates,
            2 * pairs * (3 * square + CHUNK * (2 * v + slabs * k)),
        ),
        "gdn_walk": Cost(
            _HALF * (2 * keys + 2 * values + inverse + dstates) + 2 * _GATE * gates,
            2 * pairs * (3 * square + CHUNK * (2 * v + slabs * k)),
        ),
        "gdn_gradients": Cost(
            _HALF * (2 * keys + 3 * values + inverse + states + dstates + 2 * k * pairs) + 4 * _GATE * gates,
            # Every `stride`-th state is read, the others are made.
            2
            * pairs
            * ((4 + blocks) * square + (stride - 1) * square // stride + CHUNK * (3 * blocks * v + 4 * k)),
        ),
    }


def _elements(shape: Shape) -> tuple[int, int, int]:
    tokens = shape.batch * shape.length
    return (
        tokens * shape.key_heads * shape.key_dim,
        tokens * shape.value_heads * shape.value_dim,
        tokens * shape.value_heads,
    )
