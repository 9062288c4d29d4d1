"""Frozen tile choices, each with its reason or its measurement."""


def chunk_length(length: int) -> int:
    """C, a power of two, for a sequence of `length` tokens."""
    limit = 64
    # A sequence shorter than a chunk is not padded beyond the next power of two.
    return min(limit, 1 << (length - 1).bit_length())
