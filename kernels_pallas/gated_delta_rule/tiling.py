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


# TPU kernels. Tokens of a chunk: on a v6e with K = V = 128 and 8 heads, 64 takes 4.9 bundles per token and head
# forward and 10.8 backward, where 128 takes 3.3 and 5.8.
TPU_CHUNK = 128
# Heads of 64 that make a pack, in chunks of TPU_CHUNK / TPU_PACK: 2.3 and 4.3, where heads one by one take 3.8 and
# 6.2. A program has as many packs as it would have heads.
TPU_PACK = 2
# Value heads of a program, which take turns in every stage. Forward and backward at 2 / 4 / 8: 6.1 / 4.6 / 3.5
# and 11.1 / 8.5 / 6.0. Wider heads fill the VMEM sooner: at most so many bytes of a token's q, k or v.
TPU_HEADS = 8
TPU_TOKEN_BYTES = 2048
# How many packs go through a stage side by side: more hide more latency and spill more. Forward at 8 / 4, when it
# was last measured: 3.4 / 3.6, with 10.4 / 9.7 % of the store slots spilling. Backward at 8 / 4: 5.8 / 6.1. What
# follows the walk backward goes pack by pack.
TPU_HEADS_MERGE = 8
TPU_HEADS_FORWARD = 4
TPU_HEADS_BACKWARD = 8
# A v4, v5e or v5p stores one register a bundle, and forward spilled into 18 % of them (K = V = 128). So there the
# scores and every two packs of the walk are regions of their own: 8 %, for 4.9 bundles in place of 4.4 on a v5e.
TPU_ONE_STORE = ("TPU v2", "TPU v3", "TPU v4", "TPU v5")
TPU_HEADS_FORWARD_ONE_STORE = 2
# Elements of the states that are updated in one region backward: eight of 128 x 128, two of 256 x 256. All four of
# these in one spill into 12.7 % of the stores, where two take 9.6 % (v6e; 10.07 and 10.31 bundles).
TPU_REGION_STATE_ELEMENTS = 8 * 128 * 128
# States of a program of the single step, which are in VMEM four times: two buffers each way.
TPU_STEP_BYTES = 2 * 2**20
# More than the compiler's default share, less than what the smallest chip has (v4: 16 MiB).
TPU_VMEM_BYTES = 16 * 2**20

# Hopper kernels. Multiprocessors of an H100 or H200.
_GPU_SMS = 132
# What a program costs before its first chunk, in chunks: barriers, descriptors, an empty pipeline.
_GPU_PROGRAM_START = 0.4


def gpu_run(chunks: int, stride: int, rows: int) -> int:
    """How many chunks one program of the gradients does one after the other; divides `chunks`.

    Args:
        chunks: N of a sequence.
        stride: chunks for each state that is saved; the program begins with one, so it does a multiple of them.
        rows: programs that run side by side for every run of chunks: B · G, times blocks of K.
    """

    def cost(run: int) -> float:
        waves = -(-(chunks // run * rows) // _GPU_SMS)
        return waves * (run + _GPU_PROGRAM_START)

    return min((run for run in range(stride, chunks + 1, stride) if chunks % run == 0), key=cost)


# A sequence that is cut is walked twice, the first time in pieces and only as far as states live, which takes about
# half of the time of the second; and its parts' ends are put together. In the time of a walk's chunk: what that takes
# for each part, and whatever their number, for a few small kernels and the gaps between them.
_GPU_PART = 4
_GPU_CUT = 14
# Pieces of a part, of no fewer chunks than that. More share out better what few heads that forget slowly leave to do,
# and make longer chains. With the decays that Mamba 2 begins with, µs of the first walks, forward and backward, and of
# the parts' ends: at T = 16,384, in four parts of 64 chunks, in 1, 2, 4 pieces, 85 + 87 and 14 + 19, 49 + 49 and
# 21 + 28, 54 + 48 and 37 + 46; at K = V = 256 and T = 8,192, in two parts, 148 + 167 and 9 + 20, 82 + 88 and 17 + 28,
# 79 + 64 and 38 + 48 (the forward pass alone, which needs fewer M, takes 305 µs in two and 292 in four; both, 1208 and
# 1219). At T = 65,536 (parts of 256) by count: in 1, 4, 8, 16 pieces the first walk has
# 48, 66, 103, 220 programs, the longest of 104, 64, 32, 16 chunks, and the longest chain is of 0, 3, 9, 18 steps.
_GPU_PIECES = 8
_GPU_PIECE_CHUNKS = 32


def gpu_parts(chunks: int, rows: int) -> int:
    """Into how many parts of equal length the walks cut a sequence; divides `chunks`.

    Args:
        chunks: N of a sequence.
        rows: programs that a walk has if it cuts none: B · G · V / 64.
    """

    def cost(parts: int) -> float:
        if parts == 1:
            return float(chunks)
        return 1.5 * chunks / parts + _GPU_PART * parts + _GPU_CUT

    # More programs than multiprocessors would wait for one another.
    most = max(1, _GPU_SMS // rows)
    return min((parts for parts in range(1, min(chunks, most) + 1) if chunks % parts == 0), key=cost)


def gpu_pieces(part_chunks: int, *, finer: bool) -> int:
    """Into how many pieces of equal length a part is cut for its first walk; divides `part_chunks`.

    Args:
        part_chunks: of which a part is.
        finer: whether K is 256 and no gradients follow.
    """
    most = min(_GPU_PIECES, part_chunks // (_GPU_PIECE_CHUNKS // (1 + finer)))
    return next(pieces for pieces in range(max(most, 1), 0, -1) if part_chunks % pieces == 0)
