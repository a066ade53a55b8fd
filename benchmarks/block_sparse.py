"""Block-sparse attention and S2-Attention beside scaled_dot_product_attention with the same mask, on one core.

    python benchmarks/block_sparse.py [--length 8192] [--rounds 3]

Times are the least process time over the rounds, the alternatives taking turns; memory is counted, not sampled.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from core_attn.mechanisms.sparse.s2 import S2Attention
from core_attn.ops import block_sparse_attention
from core_attn.ops.block_sparse.reference import expand
from core_attn.testing.growth import count

HEADS, WIDTH, BLOCK = 8, 64, 64


def patterns(length: int) -> dict[str, tuple[Tensor, bool]]:
    """Name -> (blocks, causal)."""
    n = -(-length // BLOCK)
    torch.manual_seed(0)
    eye = torch.eye(n, dtype=torch.bool)
    s2 = S2Attention(HEADS * WIDTH, heads=HEADS, causal=True, block_size=BLOCK, local_blocks=4, stride=16)
    return {
        "10 % of blocks, all heads": ((torch.rand(n, n) < 0.1) | eye, False),
        "10 % of blocks, each head": ((torch.rand(HEADS, n, n) < 0.1) | eye, False),
        "10 % of blocks, causal": ((torch.rand(HEADS, n, n) < 0.1) | eye, True),
        "S2, 4 local, stride 16": (s2.blocks(length, length), True),
    }


def timed(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    length = args.length
    q, k, v = (torch.randn(1, HEADS, length, WIDTH, requires_grad=True) for _ in range(3))
    print(f"B 1, H {HEADS}, L {length}, D {WIDTH}, float32, 1 thread, forward + backward")
    print(f"{'pattern':28} {'read':>6} {'ours':>9} {'SDPA':>9} {'ratio':>6} {'difference':>11} {'ours, MB':>9}")
    for name, (blocks, causal) in patterns(length).items():
        mask = expand(blocks, (BLOCK, BLOCK), length, length)
        if causal:
            mask = mask & torch.ones(length, length, dtype=torch.bool).tril()
        mask = mask[(None,) * (4 - mask.dim())]

        def ours(blocks: Tensor = blocks, causal: bool = causal) -> Tensor:
            return block_sparse_attention(q, k, v, blocks=blocks, block_size=BLOCK, causal=causal)

        def theirs(mask: Tensor = mask) -> Tensor:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask)

        def both_ways(forward: Callable[[], Tensor]) -> None:
            q.grad = k.grad = v.grad = None
            forward().sum().backward()

        with torch.no_grad():
            difference = (ours() - theirs()).abs().max().item()
        best = {ours: float("inf"), theirs: float("inf")}
        for _ in range(args.rounds):
            for form in best:
                best[form] = min(best[form], timed(lambda form=form: both_ways(form)))
        peak = count(lambda: both_ways(ours)).peak_bytes / 2**20
        print(
            f"{name:28} {mask.float().mean().item():6.1%} {best[ours]:7.2f} s {best[theirs]:7.2f} s "
            f"{best[theirs] / best[ours]:5.1f}x {difference:11.1e} {peak:9.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
