"""Routing attention against a third party's code, its causal selection, its limits and its centroids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import core_attn
from core_attn.testing import check_mechanism

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "core_routing.json").read_text(encoding="utf-8"))["cases"]


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    return core_attn.build("routing", **{"dim": 16, "heads": 2, **options}).double()


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("case", CASES)
def test_a_third_partys_outputs_gradients_and_centroids(case: str) -> None:
    stored = load_file(GOLDEN / "core_routing.safetensors")
    golden = {k.removeprefix(f"{case}/"): v for k, v in stored.items() if k.startswith(f"{case}/")}
    facts = CASES[case]
    mixer = build(
        dim=12,
        causal=facts["causal"],
        clusters=facts["clusters"],
        local_heads=0,
        selection="paper",
        decay=facts["ema_decay"],
    )
    mixer.train()
    mixer.centroids.copy_(golden["centroids"])
    leaves = {n: golden[n].requires_grad_() for n in ("q", "k", "v")}
    out = mixer.attend(*leaves.values(), key_padding_mask=None, aux=None)
    weight = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    names = [n for n in leaves if f"grad.{n}" in golden]
    assert difference(mixer.centroids, golden["centroids"]) == 0  # forward moves nothing
    gradients = torch.autograd.grad((out * weight).sum(), [leaves[n] for n in names])
    assert difference(out, golden["output"]) < 1e-10
    assert (golden["output"] == 0).all(-1).any()  # some tokens no centroid took
    for n, g in zip(names, gradients, strict=True):
        assert difference(g, golden[f"grad.{n}"]) < 1e-10
    assert difference(mixer.centroids, golden["moved"]) < 1e-12


def test_causal_selection_is_the_equation_of_section_4_1() -> None:
    """X_i = sum over the j up to i of i's cluster; with one cluster that is everything before."""
    mixer = build(causal=True, clusters=3, local_heads=0)
    x = torch.randn(2, 70, 16, dtype=torch.float64, requires_grad=True)
    q, v = (mixer.split_heads(p(x)) for p in (mixer.q_proj, mixer.v_proj))
    u = F.layer_norm(q, (8,))
    near = torch.einsum("bhld,hcd->bhlc", u, mixer.centroids).argmax(-1)
    mask = (near[..., :, None] == near[..., None, :]) & torch.ones(70, 70, dtype=torch.bool).tril()
    weights = torch.softmax((u @ u.mT / 8**0.5).masked_fill(~mask, float("-inf")), -1)
    right = mixer.out_proj(mixer.merge_heads(weights @ v))
    out = mixer(x)
    assert difference(out, right) < 1e-13
    (da,), (db,) = (torch.autograd.grad(o.square().sum(), x, retain_graph=True) for o in (out, right))
    assert difference(da, db) < 1e-12
    # A sequence's beginning does not depend on where it ends.
    assert difference(mixer(x[:, :41]), out[:, :41]) < 1e-13


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("selection", ["causal", "paper"])
def test_full_budget_is_dense_attention(causal: bool, selection: str) -> None:
    whole = causal and selection == "causal"
    options: dict[str, Any] = {"clusters": 1} if whole else {"clusters": 5, "window": 90}
    mixer = build(causal=causal, selection=selection, local_heads=0, **options)
    x = torch.randn(2, 90, 16, dtype=torch.float64)
    q, k, v = (mixer.split_heads(p(x)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q = F.layer_norm(q, (8,))
    k = q if causal else F.layer_norm(k, (8,))
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert difference(mixer(x), mixer.out_proj(mixer.merge_heads(dense))) < 1e-12


def test_all_heads_local_is_a_window() -> None:
    mixer = build(causal=True, local_heads=2, local_window=7)
    exact = core_attn.build("softmax", dim=16, heads=2, causal=True, window=7).double()
    exact.load_state_dict({k: v for k, v in mixer.state_dict().items() if k != "centroids"})
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    assert difference(mixer(x), exact(x)) < 1e-13


def test_the_papers_selection_leaks_the_future() -> None:
    """Whether a token is among its centroid's nearest depends on the tokens after it."""
    report = check_mechanism("routing", selection="paper", only=["causal"], raise_on_failure=False)
    assert not report.passed


def test_contract_of_the_papers_selection_but_for_the_leak() -> None:
    check_mechanism("routing", selection="paper", only=["shape", "lengths", "batch", "padding", "maps", "gradients"])
    check_mechanism("routing", window=3, selection="paper", only=["lengths", "padding", "maps"])
    check_mechanism("routing", heads=1, only=["lengths", "causal", "padding", "maps"])


def test_float32() -> None:
    mixer = build(clusters=4, causal=True)
    x = torch.randn(2, 200, 16, dtype=torch.float64)
    right = mixer(x)
    assert difference(mixer.float()(x.float()).double(), right) < 1e-5


def test_centroids_follow_the_tokens() -> None:
    """After training on tokens around few directions the centroids point there."""
    mixer = build(heads=1, dim=4, clusters=2, local_heads=0, decay=0.5).train()
    with torch.no_grad():
        for p in (mixer.q_proj, mixer.k_proj):
            p.weight.copy_(torch.eye(4))
            p.bias.zero_()
    directions = torch.tensor([[3.0, -1.0, -1.0, -1.0], [-1.0, -1.0, 1.0, 1.0]], dtype=torch.float64)
    mixer.centroids.copy_(F.normalize(directions + torch.randn(2, 4), dim=-1)[None])
    for _ in range(20):
        x = directions[torch.randint(2, (4, 30))] + 0.01 * torch.randn(4, 30, 4)
        mixer(x.requires_grad_()).sum().backward()
    assert difference(mixer.centroids[0], F.normalize(directions, dim=-1)) < 0.01
    kept = mixer.centroids.clone()
    mixer.eval()
    mixer(x).sum().backward()
    assert torch.equal(mixer.centroids, kept)


def test_padding_moves_no_centroid() -> None:
    x = torch.randn(3, 20, 16, dtype=torch.float64)
    mask = torch.arange(20) < torch.tensor([[12], [20], [5]])
    moved = []
    for value in (0.0, 1e3):
        mixer = build(decay=0.0).train()
        mixer(torch.where(mask[..., None], x, value).requires_grad_(), key_padding_mask=mask).sum().backward()
        moved.append(mixer.centroids.clone())
    assert torch.equal(*moved)
    alone = build(decay=0.0).train()
    alone(x[2:, :5].requires_grad_()).sum().backward()
    other = build(decay=0.0).train()
    other(x[2:].clone().requires_grad_(), key_padding_mask=mask[2:]).sum().backward()
    assert difference(alone.centroids, other.centroids) < 1e-14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 0}, "clusters, window and local_window must be positive, got 0, None and 64"),
        ({"local_heads": 3}, "local_heads must lie from 0 to heads = 2, got 3"),
        ({"selection": "papr"}, "paper"),
        ({"decay": 1.5}, r"decay must lie in \[0, 1\], got 1.5"),
        ({"causal": True, "window": 8}, "the causal selection reads whole clusters, so leave it out"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)
