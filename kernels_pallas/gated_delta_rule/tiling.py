"""Frozen tile choices, each with its reason or its measurement."""

# Two shared CPU cores (AVX2), float32, forward + backward, best ms at C = 8 / 16 / 32: 155 / 100 / 260 for
# B2 T2048 H4 K=V=64; 10 / 8 / 14 for B8 T256 H4 K=V=16; 24 / 17 / 23 for K=V=32. Small chunks do least
# arithmetic, and the smallest ones drown in the cost of each matmul's call.
_CPU_CHUNK = 16
# Elements of one (B, block, G, max(K, V)) temporary on a CPU; about 25 live at once. 2^15 and 2^16 took 100 ms at
# the first shape above, 2^17 130, all of T (2^20) 227: they no longer fit the cache, nor the heap's free list.
_CPU_BLOCK_ELEMENTS = 2**16
# Batched matmuls over all of T at once, in tiles that fill a tensor core's or an MXU's.
_ACCELERATOR_CHUNK = 64


def chunk_and_block(
    batch: int, length: int, value_heads: int, head_dim: int, platform: str
) -> tuple[int, int]:
    """(C, tokens whose temporaries live at once) of the chunked form; C is a power of two and divides the latter.

    Args:
        batch: B.
        length: T.
        value_heads: G.
        head_dim: the larger of K and V.
        platform: "cpu", "gpu" or "tpu".
    """
    on_cpu = platform == "cpu"
    # A sequence shorter than a chunk is not padded beyond the next power of two.
    chunk = min(_CPU_CHUNK if on_cpu else _ACCELERATOR_CHUNK, 1 << (length - 1).bit_length())
    chunks = -(-length // chunk)
    if on_cpu:
        most = max(1, _CPU_BLOCK_ELEMENTS // (batch * value_heads * head_dim * chunk))
        # Blocks of equal length, so that the last one is not mostly filling.
        chunks = -(-chunks // -(-chunks // most))
    return chunk, chunk * chunks
