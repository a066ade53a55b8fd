"""One process of `test_parallel.py`: python parallel_worker.py RANK WORLD FOLDER. Runs every case, writes what it saw.

Each case is the same on all processes: whole tensors from a seed, computed by one process and by all together.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import core_attn
from core_attn.ops import softmax_attention
from core_attn.parallel import head_parallel_attention, parallelize, ring_attention, shard, unshard

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def error(got, right, whole=None):
    """Largest difference over the largest value of the whole tensor: a share of it may be zero up to rounding."""
    scale = (right if whole is None else whole).double().abs().max().clamp(min=1e-6)
    return ((got.double() - right.double()).abs().max() / scale).item()


def compare(whole, split, tensors, layout="contiguous", options=None):
    """Largest relative error of this process's outputs and gradients; `whole` is what one process computes."""
    options = options or {}
    weight = None
    results = []
    for function, cut in ((whole, lambda t: t), (split, lambda t: shard(t, dim=2, layout=layout))):
        leaves = [cut(t).detach().clone().requires_grad_() for t in tensors]
        mask = options.get("key_padding_mask")
        if mask is not None and function is split:
            mask = shard(mask, dim=1, layout=layout)
        out = function(*leaves, **{**options, **({} if mask is None else {"key_padding_mask": mask})})
        if weight is None:
            weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
        gradients = torch.autograd.grad((out * cut(weight)).sum(), leaves)
        results.append([out.detach(), *gradients])
    right, got = results
    assert all(g.isfinite().all() for g in got)
    return max(error(g, shard(r, dim=2, layout=layout), r) for g, r in zip(got, right))


def operators(world):
    """Ring and heads against the operator of one process."""
    found = {}
    random = torch.Generator().manual_seed(0)
    for number, (causal, window, (heads, groups), (queries, keys), padded) in enumerate(
        itertools.product(
            (False, True),
            (None, 3, (5, 1), (None, 2)),
            ((4, 4), (8, 2), (4, 1)),
            ((6, 6), (2, 6), (6, 4)),
            (False, True),
        )
    ):
        name = "float64" if number % 3 else "float32"
        shapes = [(2, heads, queries * world, 4), (2, groups, keys * world, 4), (2, groups, keys * world, 3)]
        tensors = [torch.randn(s, generator=random, dtype=torch.float64).to(DTYPES[name]) for s in shapes]
        options = {"causal": causal, "window": window}
        if padded:
            mask = torch.rand(2, keys * world, generator=random) < 0.7
            mask[1] = number % 2 == 0  # a sample that is all padding, or whole
            options["key_padding_mask"] = mask
            for t in tensors[1:]:
                t.masked_fill_(~mask[:, None, :, None], float("nan"))
        case = f"{name} causal={causal} window={window} heads={heads}/{groups} L={queries} M={keys} padded={padded}"

        def ours(function, **more):
            return lambda q, k, v, **o: function(q, k, v, **o, **more)

        def whole(q, k, v, **o):
            return softmax_attention(q, k, v, **o, backend="reference")

        for layout in ("contiguous", "zigzag"):
            found[f"ring {layout} {case}"] = compare(
                whole, ours(ring_attention, layout=layout), tensors, layout, options
            )
        found[f"heads {case}"] = compare(whole, ours(head_parallel_attention), tensors, options=options)
    return found


def half_precision(world):
    """Error of bfloat16 against float64, and that of scaled_dot_product_attention on the same problem."""
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 4, 32 * world, 16, generator=random).bfloat16() for _ in range(3))
    right = softmax_attention(q.double(), k.double(), v.double(), causal=True, backend="reference")
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    local = [shard(t, dim=2, layout="zigzag") for t in (q, k, v)]
    ring = unshard(ring_attention(*local, causal=True, layout="zigzag"), dim=2, layout="zigzag")
    return {"ours": error(ring, right), "sdpa": error(sdpa, right)}


def modules(world):
    """Whole mixers on shares of the tokens: outputs, gradients of the inputs, and of the weights summed up."""
    found = {}
    cases = [
        ("softmax", "ring", "zigzag", {"causal": True, "kv_heads": 2}),
        ("softmax", "ring", "contiguous", {"window": 5}),
        ("softmax", "heads", "contiguous", {"causal": True, "kv_heads": 1}),
        ("flow", "heads", "contiguous", {}),
        ("flow", "heads", "contiguous", {"causal": True}),
        ("prob_sparse", "heads", "contiguous", {"causal": True}),
    ]
    for name, how, layout, options in cases:
        for padded in (False, True):
            torch.manual_seed(3)
            mixer = core_attn.build(name, dim=16, heads=4, **options).double().eval()
            if padded and not mixer.info.padding:
                continue
            x = torch.randn(2, 12 * world, 16, dtype=torch.float64)
            mask = {"key_padding_mask": torch.rand(2, 12 * world) < 0.8} if padded else {}

            def cut(t, layout=layout):
                return shard(t, dim=1, layout=layout)

            x.requires_grad_()
            right = mixer(x, **mask)
            leaves = [x, *mixer.parameters()]
            wanted = torch.autograd.grad(right.square().sum(), leaves)
            local = cut(x).detach().requires_grad_()
            with parallelize(torch.nn.Sequential(mixer)[0], how=how, layout=layout):
                out = mixer(local, **{k: cut(m) for k, m in mask.items()})
            got = torch.autograd.grad(out.square().sum(), [local, *mixer.parameters()])
            for g in got[1:]:
                dist.all_reduce(g)
            assert torch.equal(mixer(x, **mask), right), "the mixer is itself again"
            # The key bias shifts all scores of a row alike: its gradient is zero up to rounding.
            errors = [(g - w).abs().max().item() for g, w in zip(got[1:], wanted[1:])]
            scale = max(w.abs().max().item() for w in wanted[1:])
            found[f"{name} {how} {layout} {options} padded={padded}"] = max(
                error(out, cut(right), right), error(got[0], cut(wanted[0]), wanted[0]), max(errors) / scale
            )
    return found


def mistakes(rank, world):
    """name -> the message; every process must raise, or the others would wait for it."""
    x = torch.randn(1, 2 * world, 6, 4)
    build = core_attn.build
    attempts = {
        "length": lambda: shard(torch.zeros(1, 2 * world + 1), dim=1),
        "zigzag length": lambda: shard(torch.zeros(1, 3 * world), dim=1, layout="zigzag"),
        "layout": lambda: ring_attention(x, x, x, layout="zigzack"),
        "odd shares": lambda: ring_attention(x[:, :, :5], x, x, layout="zigzag"),
        "shapes differ": lambda: ring_attention(x[:, :, : 4 + rank], x, x),
        "options differ": lambda: ring_attention(x, x, x, causal=rank == 0),
        "heads": lambda: head_parallel_attention(x[:, :-1], x[:, :1], x[:, :1]),
        "heads differ": lambda: head_parallel_attention(x[:, :, : 4 + rank], x, x),
        "mask": lambda: ring_attention(x, x, x, key_padding_mask=torch.ones(1, 5, dtype=torch.bool)),
        "no heads to split": lambda: parallelize(build("flow", dim=12, heads=3), how="heads").__enter__(),
        "dependent": lambda: parallelize(build("auto_correlation", dim=16, heads=4), how="heads").__enter__(),
        "no softmax": lambda: parallelize(build("flow", dim=16, heads=4)).__enter__(),
        "no mixer": lambda: parallelize(torch.nn.Linear(2, 2)).__enter__(),
        "way": lambda: parallelize(build("flow", dim=16, heads=4), how="rings").__enter__(),
        "dropout": lambda: dropped(),
        "maps": lambda: read_maps(),
    }

    def dropped():
        mixer = build("softmax", dim=16, heads=4, dropout=0.1)
        with parallelize(mixer):
            mixer(torch.randn(1, 4, 16))

    def read_maps():
        mixer = build("softmax", dim=16, heads=4)
        with core_attn.capture(mixer), parallelize(mixer, how="heads"):
            mixer(torch.randn(1, 4, 16))

    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            said[name] = "accepted"
        except ValueError as mistake:
            said[name] = str(mistake)
    return said


def subgroup(rank, world):
    """Groups that are not all processes: every second one, each half on its own."""
    halves = [dist.new_group(list(range(half, world, 2))) for half in range(2)]
    mine = halves[rank % 2]
    random = torch.Generator().manual_seed(rank % 2)
    q, k, v = (torch.randn(1, 2, 8, 4, generator=random, dtype=torch.float64) for _ in range(3))
    local = [shard(t, dim=2, group=mine) for t in (q, k, v)]
    out = unshard(ring_attention(*local, group=mine, causal=True), dim=2, group=mine)
    others = halves[1 - rank % 2]
    try:
        ring_attention(*local, group=others)
        said = "accepted"
    except ValueError as mistake:
        said = str(mistake)
    return {"error": error(out, softmax_attention(q, k, v, causal=True, backend="reference")), "outside": said}


def main():
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    seen = {
        "operators": operators(world),
        "half": half_precision(world),
        "modules": modules(world),
        "mistakes": mistakes(rank, world),
        "subgroup": subgroup(rank, world),
    }
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
