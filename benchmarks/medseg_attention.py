"""The attention of medical segmentation beside what people use for it on a CPU.

    python benchmarks/medseg_attention.py [efficient] [windows] [position] [transport]

efficient: the mixer, B2 L3136 C128, beside 1 x 1 convolutions and a loop over heads on images, as DAE-Former has it,
between which its blocks turn tokens into images and back. windows: the mixers swin and swin_3d beside the window
attention of MONAI's SwinUNETR block, with and without shift. position: position attention of a volume of 32^3 voxels,
its memory beside that of the map alone. transport: sinkhorn in the setting of MOTCat beside POT, where that is
installed. Sides alternate in one run on one thread; process CPU time, the least of all rounds. Before anything is timed
both sides must give the same outputs. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence

import torch
from monai.networks.nets.swin_unetr import SwinTransformerBlock, compute_mask
from torch import Tensor, nn

import core_attn
from attn_shared.profiling import machine, peak_memory
from core_attn.mechanisms.channel.dual import PositionGate
from core_attn.ops import sinkhorn

Call = Callable[[], Tensor]


def main() -> None:
    parts = {"efficient": efficient, "windows": windows, "position": position, "transport": transport}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)}; all by default")
    parser.add_argument("--rounds", type=int, default=8, help="timed calls a side")
    args = parser.parse_args()
    for name in args.parts:
        if name not in parts:
            parser.error(f"there is no part {name!r}; there are {', '.join(parts)}")
    torch.set_num_threads(1)
    print(f"{', '.join(f'{key} {value}' for key, value in machine().items())}\n")
    for name in args.parts or parts:
        parts[name](args.rounds)


def compare(
    calls: dict[str, tuple[Call, Sequence[Tensor]]], rounds: int, allowed: float = 1e-4
) -> dict[str, tuple[float, float]]:
    """Least milliseconds of forward, and of forward and backward, of sides that must agree."""
    (_, (first, _)), *others = calls.items()
    with torch.no_grad():
        right = first()
        for name, (call, _) in others:
            error = ((call() - right).abs().max() / right.abs().max()).item()
            if not error <= allowed:
                raise SystemExit(f"{name} differs by {error:.1e}: nothing was timed")
    upstream = torch.randn_like(right)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, leaves) in calls.items():
            start = time.process_time()
            out = call()
            middle = time.process_time()
            torch.autograd.grad(out, leaves, upstream)
            times[name].append((1e3 * (middle - start), 1e3 * (time.process_time() - start)))
    return {name: (min(t[0] for t in took), min(t[1] for t in took)) for name, took in times.items()}


class LoopOverHeads(nn.Module):
    """Efficient attention on images: 1 x 1 convolutions, then each head by itself."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Conv2d(dim, dim, 1) for _ in range(4))

    def forward(self, tokens: Tensor, side: int) -> Tensor:
        image = tokens.mT.reshape(*tokens.shape[::2], side, side)
        q, k, v = (f(image).flatten(2).chunk(self.heads, 1) for f in (self.q_proj, self.k_proj, self.v_proj))
        read = [(k[h].softmax(2) @ v[h].mT).mT @ q[h].softmax(1) for h in range(self.heads)]
        out: Tensor = self.out_proj(torch.cat(read, 1).unflatten(2, (side, side)))
        return out.flatten(2).mT.contiguous()


def efficient(rounds: int) -> None:
    print("| heads | loop: forward, with backward | ours | times as fast |\n|---|---|---|---|")
    for heads in (1, 2, 4, 8):
        torch.manual_seed(0)
        loop, ours = LoopOverHeads(128, heads), core_attn.build("efficient", dim=128, heads=heads)
        ours.load_state_dict({k: v.flatten(1) if v.dim() == 4 else v for k, v in loop.state_dict().items()})
        x = torch.randn(2, 3136, 128, requires_grad=True)
        took = compare(
            {
                "loop": (lambda loop=loop, x=x: loop(x, 56), [x, *loop.parameters()]),  # type: ignore[misc]
                "ours": (lambda ours=ours, x=x: ours(x), [x, *ours.parameters()]),  # type: ignore[misc]
            },
            rounds,
        )
        row(str(heads), took["loop"], took["ours"])
    print()


def row(name: str, theirs: tuple[float, float], ours: tuple[float, float]) -> None:
    cells = [f"{a:.1f}, {b:.1f} ms" for a, b in (theirs, ours)]
    print(f"| {name} | {' | '.join(cells)} | {theirs[0] / ours[0]:.2f}, {theirs[1] / ours[1]:.2f} |")


def windows(rounds: int) -> None:
    print("| grid, channels, heads, window, shift | MONAI: forward, with backward | ours | times as fast |")
    print("|---|---|---|---|")
    cases = [((56, 56), 96, 3), ((28, 28), 192, 6), ((14, 14), 384, 12), ((28, 28, 28), 48, 3), ((14, 14, 14), 96, 6)]
    for grid, dim, heads in cases:
        both = [(0.0, 0.0), (0.0, 0.0)]
        for shift in (0, 3):
            torch.manual_seed(0)
            rank = len(grid)
            block = SwinTransformerBlock(dim, heads, (7,) * rank, (shift,) * rank, qkv_bias=True)
            block.norm1 = nn.Identity()
            mixer = core_attn.build("swin" if rank == 2 else "swin_3d", dim=dim, heads=heads, window=7, shift=shift)
            state = block.attn.state_dict()
            new = {f"out_proj.{kind}": state[f"proj.{kind}"] for kind in ("weight", "bias")}
            for kind in ("weight", "bias"):
                new |= {f"{n}_proj.{kind}": part for n, part in zip("qkv", state[f"qkv.{kind}"].chunk(3), strict=True)}
            new["rpb"] = state["relative_position_bias_table"].T.unflatten(1, (13,) * rank)
            mixer.load_state_dict(new)
            mask = compute_mask(grid, (7,) * rank, (shift,) * rank, "cpu") if shift else None
            x = torch.randn(1, *grid, dim, requires_grad=True)

            def theirs(block: nn.Module = block, x: Tensor = x, mask: Tensor | None = mask, rank: int = rank) -> Tensor:
                return block.forward_part1(x, mask).flatten(1, rank)  # type: ignore[operator, no-any-return]

            def ours(mixer: nn.Module = mixer, x: Tensor = x, grid: tuple[int, ...] = grid, rank: int = rank) -> Tensor:
                return mixer(x.flatten(1, rank), grid=grid)  # type: ignore[no-any-return]

            took = compare(
                {"MONAI": (theirs, [x, *block.attn.parameters()]), "ours": (ours, [x, *mixer.parameters()])}, rounds
            )
            row(f"{grid}, {dim}, {heads}, 7, {shift}", took["MONAI"], took["ours"])
            both = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(both, (took["MONAI"], took["ours"]), strict=True)]
        row(f"{grid}: the two layers of a pair", *both)
    print()


def position(rounds: int) -> None:
    print("| voxels, channels | forward, with backward | peak memory | the map alone |\n|---|---|---|---|")
    for channels in (32, 64):
        torch.manual_seed(0)
        gate = PositionGate(channels)
        nn.init.ones_(gate.mixer.gamma)
        x = torch.randn(1, channels, 32, 32, 32, requires_grad=True)
        with peak_memory() as peak:
            start = time.process_time()
            out = gate(x)
            middle = time.process_time()
            out.square().sum().backward()
            end = time.process_time()
        print(
            f"| 32,768, {channels} | {middle - start:.1f}, {end - start:.1f} s | {peak.bytes / 1e6:.0f} MB | "
            f"{4 * 32768**2 / 1e6:.0f} MB |"
        )
    print()


def transport(rounds: int) -> None:
    if importlib.util.find_spec("ot") is None:
        print("transport: POT is not installed (package POT), so there is nothing to compare with")
        return
    import ot

    print("| patches, gene groups | POT | ours |\n|---|---|---|")
    for patches in (300, 4000):
        torch.manual_seed(0)
        cost = torch.rand(patches, 6, dtype=torch.float64)
        a, b, given = torch.full((patches,), 1 / patches).double().numpy(), [1 / 6] * 6, cost.numpy()
        times: list[tuple[float, float]] = []
        for _ in range(rounds):
            start = time.process_time()
            right = ot.unbalanced.sinkhorn_knopp_unbalanced(a, b, given, 0.1, 0.5, reg_type="entropy", stopThr=1e-9)
            middle = time.process_time()
            found = sinkhorn(cost, tau=0.5)
            times.append((middle - start, time.process_time() - middle))
            if not (found - torch.from_numpy(right)).abs().max() <= 1e-9:
                raise SystemExit("the plans differ: nothing is reported")
        print(f"| {patches}, 6 | {1e3 * min(t[0] for t in times):.1f} ms | {1e3 * min(t[1] for t in times):.1f} ms |")
    print()


if __name__ == "__main__":
    main()
