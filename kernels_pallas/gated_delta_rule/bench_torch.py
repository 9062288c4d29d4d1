"""The chunked form of Hugging Face `transformers` (Qwen3-Next) as a contestant of `bench.py`.

Run by its path, by an interpreter that has torch and need not have JAX. It answers each line on its standard
input, `forward` or `both`, with the seconds of one call.
"""

import sys
import time


def main() -> None:
    """Serve timings until the input ends."""
    # Another interpreter's packages: the one that checks types here has neither.
    import torch  # pyright: ignore[reportMissingImports]
    from transformers.models.qwen3_next import (  # pyright: ignore[reportMissingImports]
        modeling_qwen3_next,
    )

    batch, length, key_heads, value_heads, key_dim, value_dim, threads = map(int, sys.argv[1:])
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    q = torch.randn(batch, length, key_heads, key_dim)
    k = torch.nn.functional.normalize(torch.randn(batch, length, key_heads, key_dim), dim=-1)
    v, do = torch.randn(2, batch, length, value_heads, value_dim)
    log_decay = -torch.rand(batch, length, value_heads)
    beta = torch.rand(batch, length, value_heads)
    leaves = [x.requires_grad_() for x in (q, k, v, log_decay, beta)]
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        if line.strip() == "forward":
            with torch.no_grad():
                modeling_qwen3_next.torch_chunk_gated_delta_rule(*leaves)
        else:
            o, _ = modeling_qwen3_next.torch_chunk_gated_delta_rule(*leaves)
            torch.autograd.grad(o, leaves, do)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
