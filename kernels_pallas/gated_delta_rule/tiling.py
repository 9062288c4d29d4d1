"""Frozen tile choices, each with its reason or its measurement."""


def chunk_and_block(length: int, platform: str) -> tuple[int, int]:
    """(C, tokens per block) of the chunked form; C is a power of two and divides the block."""
    chunk, blocked = (16, True) if platform == "cpu" else (64, False)
    # A sequence shorter than a chunk is not padded beyond the next power of two.
    chunk = min(chunk, 1 << (length - 1).bit_length())
    return chunk, chunk if blocked else -(-length // chunk) * chunk
