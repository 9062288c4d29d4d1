"""The named shapes that users run; tests and bench read them."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one call."""

    batch: int
    length: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int


SHAPES = {
    # The acceptance shape of the chunked form on two CPU cores.
    "cpu": Shape(2, 2048, 4, 4, 64, 64),
    # Small models on a CPU, as `gdn sweep` runs them for its demonstration.
    "demo": Shape(8, 256, 4, 4, 16, 16),
    "demo_wide": Shape(8, 128, 8, 8, 32, 32),
    # For the TPU profiler, which counts instructions: a longer T only repeats them, but in a shorter one XLA
    # keeps the operands in VMEM.
    "tpu_profile": Shape(1, 16384, 8, 8, 128, 128),
    # GPU and TPU.
    "train_4k": Shape(4, 4096, 16, 16, 128, 128),
    "long_16k": Shape(1, 16384, 16, 16, 128, 128),
    "narrow_heads": Shape(8, 2048, 16, 16, 64, 64),
    "wide_heads": Shape(2, 8192, 8, 8, 256, 256),
    "qwen3_next": Shape(4, 4096, 16, 32, 128, 128),
    "paper": Shape(4, 4096, 6, 6, 128, 256),
    "long_64k": Shape(1, 65536, 16, 16, 128, 128),
}
