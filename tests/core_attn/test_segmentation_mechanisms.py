"""The mechanisms of medical segmentation against the official code, and against the definitions of their papers.

The golden tensors come from the official code run with the stored weights; the .json files beside them say which.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets.swin_unetr import SwinTransformerBlock, compute_mask
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import core_attn
from core_attn.mechanisms.channel.dual import ChannelAffinityGate, PositionChannelGate, PositionGate
from core_attn.mechanisms.local.window_cross import WindowCrossAttention
from core_attn.ops import efficient_attention
from core_attn.testing import growth

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
EFFICIENT = {"queries": "q_proj", "keys": "k_proj", "values": "v_proj", "reprojection": "out_proj"}
POSITION = {"query_conv": "q_proj", "key_conv": "k_proj", "value_conv": "v_proj"}
GATES = {"position": PositionGate, "channel_affinity": ChannelAffinityGate, "position_channel": PositionChannelGate}


def golden_of(name: str, case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    stored = load_file(GOLDEN / f"core_{name}.safetensors")
    facts = json.loads((GOLDEN / f"core_{name}.json").read_text(encoding="utf-8"))["cases"][case]
    return {k.removeprefix(f"{case}/"): v for k, v in stored.items() if k.startswith(f"{case}/")}, facts


def part_of(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}


def difference(found: Tensor, right: Tensor) -> float:
    """Largest error, relative to the largest element where that is above 1."""
    assert found.shape == right.shape
    return ((found - right).abs().max() / right.abs().max().clamp(min=1)).item()


def as_linear(official: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """1 × 1 convolutions of the official code (or their gradients) as linear layers under our names."""
    found = {}
    for key, value in official.items():
        for theirs, mine in names.items():
            key = key.replace(theirs, mine)
        found[key] = value.flatten(1) if value.dim() == 4 else value
    return found


def check(module: torch.nn.Module, golden: dict[str, Tensor], rename: Any, dtype: torch.dtype) -> None:
    """Output and all gradients of `module(x)` are those of the official code."""
    module.to(dtype).load_state_dict({k: v.to(dtype) for k, v in rename(part_of(golden, "weight.")).items()})
    x = golden["x"].to(dtype).requires_grad_()
    out = module(x)
    loss = (out * torch.cos(torch.arange(out.numel(), dtype=dtype)).view_as(out)).sum()
    leaves = {"x": x, **dict(module.named_parameters())}
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
    kind = str(dtype).removeprefix("torch.")
    gradients = part_of(golden, f"{kind}/grad.")
    right = {"x": gradients.pop("x"), **rename(gradients)}
    assert difference(out, golden[f"{kind}/output"]) <= TOLERANCE[dtype]
    assert found.keys() == right.keys()
    for what, gradient in right.items():
        assert difference(found[what], gradient) <= TOLERANCE[dtype], what


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("case", ["one_head", "two_heads"])
def test_efficient_is_the_official_one(case: str, backend: str, dtype: torch.dtype) -> None:
    golden, facts = golden_of("efficient", case)
    mixer = core_attn.build("efficient", dim=8, backend=backend, **facts)
    check(mixer, golden, lambda w: as_linear(w, EFFICIENT), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_efficient_operator_in_the_official_cross_attention(dtype: torch.dtype) -> None:
    """The decoder of DAE-Former: queries and keys from the skip, values from below, then a convolution and a norm."""
    golden, facts = golden_of("efficient", "cross")
    heads = facts["heads"]
    lower, higher = (golden[k].to(dtype).requires_grad_() for k in ("lower", "higher"))
    split = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (higher, higher, lower)]
    weights = {k: v.to(dtype) for k, v in part_of(golden, "weight.").items()}
    read = efficient_attention(*split).transpose(1, 2).flatten(-2)
    wide = F.linear(read, weights["reprojection.weight"].flatten(1), weights["reprojection.bias"])
    out = F.layer_norm(wide, wide.shape[-1:], weights["norm.weight"], weights["norm.bias"])
    loss = (out * torch.cos(torch.arange(out.numel(), dtype=dtype)).view_as(out)).sum()
    kind = str(dtype).removeprefix("torch.")
    assert difference(out, golden[f"{kind}/output"]) <= TOLERANCE[dtype]
    for name, found in zip(("lower", "higher"), torch.autograd.grad(loss, (lower, higher))):
        assert difference(found, golden[f"{kind}/grad.{name}"]) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", ["plain", "bias"])
def test_channel_is_the_official_one(case: str, dtype: torch.dtype) -> None:
    def rename(official: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for key, value in official.items():
            module, _, kind = key.rpartition(".")
            if module == "qkv":
                found |= {f"{n}_proj.{kind}": part for n, part in zip("qkv", value.chunk(3))}
            else:
                found[key.replace("proj", "out_proj")] = value.flatten() if key == "temperature" else value
        return found

    golden, facts = golden_of("channel", case)
    check(core_attn.build("channel", dim=8, **facts), golden, rename, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", GATES)
def test_dual_attention_is_the_official_one(case: str, dtype: torch.dtype) -> None:
    golden, _ = golden_of("dual", case)
    check(GATES[case](16), golden, lambda w: {f"mixer.{k}": v for k, v in as_linear(w, POSITION).items()}, dtype)


@pytest.mark.parametrize("name", GATES)
def test_gates_change_nothing_at_the_start_but_the_sum_of_two(name: str) -> None:
    x = torch.randn(2, 12, 3, 4, 5)
    out = GATES[name](12)(x)
    assert torch.equal(out, 2 * x if name == "position_channel" else x)
    assert GATES[name].info is GATES[name](12).mixer.info
    with pytest.raises(ValueError, match="with C = 12"):
        GATES[name](12)(x[:, :5])


@pytest.mark.parametrize("form", ["inverse", "plain", "transposed"])
def test_channels_read_channels(form: str) -> None:
    """Every form by its definition, weight by weight; the weights of a channel sum to 1 but in the form of S227."""
    torch.manual_seed(0)
    gate = ChannelAffinityGate(3, form=form).double()
    with torch.no_grad():
        gate.mixer.gamma.fill_(0.7)
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    flat = x[0].flatten(1)
    right = flat.clone()
    for c in range(3):
        for e in range(3):
            row, column = (e, c) if form == "transposed" else (c, e)
            products = [(flat[row] * flat[i]).sum() for i in range(3)]
            scores = [max(products) - p if form == "inverse" else p for p in products]
            right[c] += 0.7 * scores[column].exp() / sum(s.exp() for s in scores) * flat[e]
    assert difference(gate(x)[0].flatten(1), right) <= 1e-12


def test_gates_read_volumes() -> None:
    """Position attention of a volume by its definition, voxel by voxel."""
    torch.manual_seed(0)
    gate = PositionGate(8, reduction=2).double()
    with torch.no_grad():
        gate.mixer.gamma.fill_(0.7)
    x = torch.randn(1, 8, 2, 3, 4, dtype=torch.float64)
    tokens = x.flatten(2).mT
    q, k, v = (f(tokens) for f in (gate.mixer.q_proj, gate.mixer.k_proj, gate.mixer.v_proj))
    right = 0.7 * torch.softmax(q @ k.mT, dim=-1) @ v + tokens
    assert difference(gate(x), right.mT.unflatten(2, (2, 3, 4))) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_position_attention_never_holds_the_map(dtype: torch.dtype, padded: bool) -> None:
    """4,096 voxels: bytes alive in forward and backward against a tenth of the map alone."""
    mixer = core_attn.build("position", dim=16).to(dtype)
    x = torch.randn(1, 4096, 16, dtype=dtype, requires_grad=True)
    mask = torch.arange(4096)[None] < 4000 if padded else None
    counted = growth.count(lambda: mixer(x, key_padding_mask=mask).sum().backward())
    assert counted.peak_bytes < 4096**2 * x.element_size() / 10


def swin_weights(official: dict[str, Tensor], window: tuple[int, ...]) -> dict[str, Tensor]:
    """Weights of Swin's window attention (or their gradients) under our names."""
    found = {}
    for key, value in official.items():
        name, _, kind = key.removeprefix("attn.").rpartition(".")
        if name == "qkv":
            found |= {f"{n}_proj.{kind}": part for n, part in zip("qkv", value.chunk(3))}
        elif name == "proj":
            found[f"out_proj.{kind}"] = value
        else:
            found["rpb"] = value.T.unflatten(1, [2 * w - 1 for w in window])
    return found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", ["plain", "shifted"])
def test_swin_is_the_official_one(case: str, dtype: torch.dtype) -> None:
    golden, facts = golden_of("swin", case)

    class OnImages(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = core_attn.build("swin", dim=8, **facts)

        def forward(self, x: Tensor) -> Tensor:
            return self.mixer(x, grid=(6, 9))

    def rename(official: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"mixer.{k}": v for k, v in swin_weights(official, (3, 3)).items()}

    check(OnImages(), golden, rename, dtype)


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [((8, 12), (4, 4), (0, 0)), ((8, 12), (4, 4), (2, 2)), ((4, 6, 4), (2, 2, 2), (1, 1, 1)), ((3, 8), (4, 4), (0, 0))],
)
def test_swin_is_monais(grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]) -> None:
    """Images and volumes, shifted or not; the last is lower than a window, which then is lower too."""
    torch.manual_seed(0)
    block = SwinTransformerBlock(8, 2, window, shift, qkv_bias=True).double()
    block.norm1 = torch.nn.Identity()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    small = tuple(min(n, w) for n, w in zip(grid, window))
    mixer = core_attn.build(
        "swin" if len(grid) == 2 else "swin_3d", dim=8, heads=2, window=window, shift=shift
    ).double()
    state = {k: v for k, v in block.attn.state_dict().items() if "index" not in k}
    mixer.load_state_dict(swin_weights(state, window))
    if small != window:  # MONAI takes the first entries of its table there, whatever offsets they are for
        mixer.rpb = None
        torch.nn.init.zeros_(block.attn.relative_position_bias_table)
    mask = compute_mask(grid, window, shift, "cpu").double() if any(shift) else None
    x = torch.randn(2, *grid, 8, dtype=torch.float64, requires_grad=True)
    right = block.forward_part1(x, mask).flatten(1, len(grid))
    found = mixer(x.flatten(1, len(grid)), grid=grid)
    assert difference(found, right) <= 1e-12
    leaves = [x, *mixer.parameters()]
    probe = torch.cos(torch.arange(right.numel(), dtype=right.dtype)).view_as(right)
    own = dict(zip(["x", *dict(mixer.named_parameters())], torch.autograd.grad(found, leaves, probe)))
    names, theirs = zip(*block.attn.named_parameters())
    on_x, *gradients = torch.autograd.grad(right, [x, *theirs], probe)
    wanted = {"x": on_x, **swin_weights(dict(zip(names, gradients)), window)}
    for what, gradient in own.items():
        assert difference(gradient, wanted[what]) <= 1e-12, what


def test_swin_reads_nothing_beyond_the_image() -> None:
    """Filled up by hand to whole windows it is MONAI's, which reads the filling; by itself it reads the image only."""
    torch.manual_seed(0)
    mixer = core_attn.build("swin", dim=8, heads=2, window=4).double()
    x = torch.randn(1, 6, 7, 8, dtype=torch.float64)
    alone = mixer(x.flatten(1, 2), grid=(6, 7)).unflatten(1, (6, 7))
    wide = F.pad(x, (0, 0, 0, 1, 0, 2))
    filled = mixer(wide.flatten(1, 2), grid=(8, 8)).unflatten(1, (8, 8))
    assert difference(alone[:, :4, :4], filled[:, :4, :4]) <= 1e-12
    assert (alone[:, 4:] - filled[:, 4:6, :7]).abs().max() > 1e-3
    real = (F.pad(torch.ones(1, 6, 7), (0, 1, 0, 2)) > 0).flatten(1)
    masked = mixer(wide.flatten(1, 2), grid=(8, 8), key_padding_mask=real).unflatten(1, (8, 8))
    assert difference(alone, masked[:, :6, :7]) <= 1e-12


@pytest.mark.parametrize(("fine", "coarse"), [((8, 8), (4, 4)), ((7, 9), (4, 5)), ((5, 6, 7), (3, 3, 4))])
def test_window_cross_attention_reads_its_window(fine: tuple[int, ...], coarse: tuple[int, ...]) -> None:
    """Pixels of the result depend on the coarse pixels of their window, and on nothing else of the coarse map."""
    torch.manual_seed(0)
    module = WindowCrossAttention(6, 10, out_dim=8, heads=2, axes=len(fine), window=2).double()
    x = torch.randn(2, 6, *fine, dtype=torch.float64)
    context = torch.randn(2, 10, *coarse, dtype=torch.float64, requires_grad=True)
    out = module(x, context)
    assert out.shape == (2, 8, *fine)
    for place in ((0,) * len(fine), tuple(n - 1 for n in fine), tuple(n // 2 for n in fine)):
        (gradient,) = torch.autograd.grad(out[(0, slice(None), *place)].sum(), context, retain_graph=True)
        read = gradient[0].abs().sum(0) > 0
        window = tuple(slice(p // 4 * 2, p // 4 * 2 + 2) for p in place)
        wanted = torch.zeros(coarse, dtype=torch.bool)
        wanted[window] = True
        assert torch.equal(read, wanted)
        assert gradient[1].abs().max() == 0
    with pytest.raises(ValueError, match="must be of size"):
        module(x, context[..., :-1])
