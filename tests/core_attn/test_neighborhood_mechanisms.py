"""Mechanisms on neighbourhoods of a grid: against NATTEN, the official DiNAT module and CLEAR's rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import core_attn
from core_attn.testing import check_mechanism

GOLDEN = Path(__file__).parents[1] / "golden" / "core_dina"
CASES: dict[str, Any] = json.loads(GOLDEN.with_suffix(".json").read_text(encoding="utf-8"))["cases"]


def _difference(got: Tensor, right: Tensor) -> float:
    return ((got.double() - right.double()).abs().max() / right.double().abs().max()).item()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_dina_equals_the_official_module(case: str, dtype: torch.dtype, tolerance: float, backend: str) -> None:
    golden = {k.removeprefix(f"{case}/"): v for k, v in load_file(GOLDEN.with_suffix(".safetensors")).items()}
    mixer = core_attn.build(
        "dina", dim=8, heads=2, kernel_size=CASES[case]["kernel_size"], dilation=1, backend=backend
    ).to(dtype)
    # One projection to queries, keys and values in that order, each split into heads as here.
    names = ["q_proj", "k_proj", "v_proj"]
    weights = {"rpb": golden["rpb"], "out_proj.weight": golden["proj.weight"], "out_proj.bias": golden["proj.bias"]}
    for kind in ("weight", "bias"):
        weights |= {f"{name}.{kind}": part for name, part in zip(names, golden[f"qkv.{kind}"].chunk(3))}
    mixer.load_state_dict({k: v.to(dtype) for k, v in weights.items()})
    grid = tuple(CASES[case]["grid"])
    x = golden["x"].to(dtype).requires_grad_()
    out = mixer(x.flatten(1, 2), grid=grid).unflatten(1, grid)
    weight = torch.cos(torch.arange(out.numel(), dtype=dtype)).view_as(out)
    leaves = {"x": x, **dict(mixer.named_parameters())}
    gradients = dict(zip(leaves, torch.autograd.grad((out * weight).sum(), list(leaves.values()))))
    found = {"output": out, "grad.x": gradients["x"], "grad.rpb": gradients["rpb"]}
    for kind in ("weight", "bias"):
        found[f"grad.qkv.{kind}"] = torch.cat([gradients[f"{name}.{kind}"] for name in names])
        found[f"grad.proj.{kind}"] = gradients[f"out_proj.{kind}"]
    for what, got in found.items():
        assert _difference(got, golden[f"{str(dtype).removeprefix('torch.')}/{what}"]) <= tolerance, what


@pytest.mark.parametrize(
    ("name", "grid", "options"),
    [
        ("fna", (9, 11), {"kernel_size": (3, 4)}),
        ("fna", (8, 11), {"kernel_size": 3, "dilation": (2, 3)}),
        ("fna", (5, 6, 4), {"kernel_size": 3, "causal_axes": (True, False, False)}),
        ("fna", (23,), {"kernel_size": 4, "dilation": 3, "causal": True}),
        ("gna", (9, 11), {}),
        ("gna", (12, 9), {"kernel_size": (6, 5), "stride": (3, 5), "dilation": (2, 1)}),
        ("gna", (10, 8), {"kernel_size": 4, "stride": 2, "causal": True}),
    ],
)
def test_fna_and_gna_equal_natten(name: str, grid: tuple[int, ...], options: dict[str, Any]) -> None:
    functional = pytest.importorskip("natten.functional")
    torch.manual_seed(0)
    mixer = core_attn.build(name, dim=16, heads=2, **options)
    window = mixer.window(grid)
    x = torch.randn(2, *grid, 16)
    with torch.no_grad():
        # NATTEN's module runs on no CPU; its functions do, forward and in float32.
        q, k, v = (p(x).unflatten(-1, (2, 8)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        sizes = {key: window[key] for key in ("kernel_size", "stride", "dilation")}
        function = getattr(functional, f"na{len(grid)}d")
        right = mixer.out_proj(function(q, k, v, **sizes, is_causal=window["causal"], backend="flex-fna").flatten(-2))
        assert _difference(mixer(x.flatten(1, -2), grid=grid).view_as(right), right) <= 1e-5


def _official_clear_mask(height: int, width: int, text: int, radius: float) -> Tensor:
    """The rule of the official code's `init_local_mask_flex`: text, or squared distance below the squared radius."""
    place = torch.arange(text + height * width) - text
    rows, columns = place // width, place % width
    near = (rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2 < radius**2
    return near | (place[:, None] < 0) | (place < 0)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("grid", "text", "radius"), [((9, 12), 0, 4), ((9, 12), 5, 3), ((4, 13), 3, 6.5), ((7, 7), 2, 1), ((3, 3), 1, 40)]
)
def test_clear_equals_attention_under_its_rule(grid: tuple[int, int], text: int, radius: float, backend: str) -> None:
    torch.manual_seed(0)
    mixer = core_attn.build("clear", dim=16, heads=2, radius=radius, text=text, backend=backend).double()
    dense = core_attn.build("softmax", dim=16, heads=2, backend="reference").double()
    dense.load_state_dict(mixer.state_dict())
    mask = _official_clear_mask(*grid, text, radius)
    x = torch.randn(2, len(mask), 16, dtype=torch.float64, requires_grad=True)

    def masked(x: Tensor) -> Tensor:
        q, k, v = (dense.split_heads(p(x)) for p in (dense.q_proj, dense.k_proj, dense.v_proj))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return dense.out_proj(dense.merge_heads(out))

    got, right = mixer(x, grid=grid), masked(x)
    assert _difference(got, right) <= 1e-12
    weight = torch.cos(torch.arange(got.numel(), dtype=got.dtype)).view_as(got)
    one, two = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, right))
    assert _difference(one, two) <= 1e-12
    assert mixer.sizes(batch=1, length=len(mask), grid=grid)["P"] == mask.sum()
    with core_attn.capture(mixer) as maps:
        mixer(x, grid=grid)
    assert torch.equal(maps[""][0, 0] > 0, mask)


@pytest.mark.parametrize("name", ["fna", "gna", "dina", "clear"])
def test_images_and_lines_of_any_size_just_work(name: str) -> None:
    mixer = core_attn.build(name, dim=64, heads=4)
    assert mixer(torch.randn(1, 56 * 56, 64), grid=(56, 56)).shape == (1, 56 * 56, 64)
    for grid in ((1, 1), (1, 9), (3, 50), (5, 4)):
        assert mixer(torch.randn(2, grid[0] * grid[1], 64), grid=grid).isfinite().all()
    for length in (1, 2, 6, 31):
        assert mixer(torch.randn(2, length, 64)).isfinite().all()


def test_windows_shrink_to_the_grid() -> None:
    mixer = core_attn.build("gna", dim=8, heads=2, kernel_size=(3, 8), stride=(2, 4), dilation=(9, 9))
    window = mixer.window((9, 5))
    assert (window["kernel_size"], window["dilation"], window["stride"]) == ((3, 5), (3, 1), (2, 4))
    x = torch.randn(1, 12, 8)
    whole = core_attn.build("fna", dim=8, heads=2, kernel_size=50)
    full = core_attn.build("softmax", dim=8, heads=2)
    full.load_state_dict(whole.state_dict())
    torch.testing.assert_close(whole(x, grid=(3, 4)), full(x))


def test_the_bias_of_a_shrunken_window_is_the_middle_one() -> None:
    torch.manual_seed(0)
    large, small = (core_attn.build("dina", dim=8, heads=2, kernel_size=k, dilation=1).double() for k in (7, (3, 7)))
    small.load_state_dict(large.state_dict() | {"rpb": large.rpb.detach()[:, 4:9].clone()})
    x = torch.randn(1, 27, 8, dtype=torch.float64)
    torch.testing.assert_close(large(x, grid=(3, 9)), small(x, grid=(3, 9)))


@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_fna_decodes_lines_with_dilation(dilation: int) -> None:
    checks = ["decoding", "causal", "maps", "cost"]
    assert check_mechanism("fna", only=checks, grid_rank=1, kernel_size=5, dilation=dilation).passed
    mixer = core_attn.build("fna", dim=8, heads=2, causal=True, kernel_size=3, dilation=dilation)
    with core_attn.capture(mixer) as maps:
        mixer(torch.randn(1, 10, 8))
    for i, row in enumerate(maps[""][0, 0]):
        assert row.nonzero().flatten().tolist() == [j for j in (i - 2 * dilation, i - dilation, i) if j >= 0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fna", {"kernel_size": 0}, "kernel_size"),
        ("fna", {"kernel_size": (3, 3), "dilation": (1, 2, 3)}, "one number of axes"),
        ("gna", {"kernel_size": 3, "stride": 4}, "at most kernel_size"),
        ("dina", {"kernel_size": (3, 3, 3)}, "2 axes"),
        ("clear", {"radius": 0}, "radius"),
        ("clear", {"text": -1}, "text"),
        ("clear", {"causal": True}, "causal"),
    ],
)
def test_bad_options_are_one_sentence(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        core_attn.build(name, dim=8, heads=2, **options)


def test_a_grid_of_another_rank_is_refused() -> None:
    mixer = core_attn.build("fna", dim=8, heads=2, kernel_size=(3, 3))
    with pytest.raises(ValueError, match="2 axes"):
        mixer(torch.randn(1, 9, 8))
    with pytest.raises(ValueError, match="one axis"):
        core_attn.build("fna", dim=8, heads=2, kernel_size=(3, 3), causal=True).init_state(1)
    with pytest.raises(ValueError, match="holds"):
        core_attn.build("clear", dim=8, heads=2, text=2)(torch.randn(1, 9, 8), grid=(3, 3))
    with pytest.raises(ValueError, match="tokens of text"):
        core_attn.build("clear", dim=8, heads=2, text=12)(torch.randn(1, 9, 8))
