"""MossFormer and MossFormer2: the official code's numbers, lengths that do not matter, causality, other mixers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from attn_shared.app import load
from attn_shared.errors import UserError
from attn_speech.config import MODELS
from attn_speech.models.base import Separator
from attn_speech.models.convert import from_official
from attn_speech.models.frames import FramesNorm, depthwise

GOLDEN = Path(__file__).parent.parent / "golden"
NOTE = json.loads((GOLDEN / "speech_mossformer.json").read_text(encoding="utf-8"))["cases"]
ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-5}
SMALL: dict[str, dict[str, Any]] = {
    "mossformer": {"filters": 12, "kernel": 16, "dim": 8, "blocks": 2, "group": 16, "qk_dim": 8},
    "mossformer2": {
        "filters": 12,
        "kernel": 16,
        "dim": 8,
        "blocks": 2,
        "group": 16,
        "qk_dim": 8,
        "inner": 6,
        "order": 4,
    },
}


def make(name: str, speakers: int = 2, *, mixer: str | None = None, **config: Any) -> Separator:
    torch.manual_seed(0)
    card = MODELS[name]
    model: Separator = load(card.target)(card.config(**(SMALL[name] | config)), speakers, mixer=mixer)
    with torch.no_grad():  # as they begin, attention would have next to no part
        for key, parameter in model.named_parameters():
            if key.endswith("gamma"):
                parameter.normal_(1.0, 0.3)
    return model.eval()


def drawn(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """The weights with which the official code was run."""
    generator, weights = torch.Generator().manual_seed(7), {}
    for key, shape in shapes.items():
        u = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
        if u.dim() > 1 and not key.endswith("gamma"):
            weights[key] = u * (3 / max(1, u[0].numel())) ** 0.5
        else:
            weights[key] = u * 0.1 if key.endswith(("bias", "beta")) else 1 + 0.3 * u
    return weights


def sines(like: Tensor) -> Tensor:
    return torch.sin(torch.arange(like.numel(), dtype=torch.float64) + 1).view(like.shape).to(like.dtype)


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("case", NOTE)
def test_equals_the_official_code(case: str, dtype: torch.dtype) -> None:
    note, stored = NOTE[case], load_file(GOLDEN / "speech_mossformer.safetensors")
    golden = {key.removeprefix(f"{case}/"): t for key, t in stored.items() if key.startswith(f"{case}/")}
    model = make(note["model"], note["speakers"], **note["config"]).to(dtype)
    official = {key: t.to(dtype).requires_grad_() for key, t in drawn(note["shapes"]).items()}
    ours = from_official(official)
    assert set(ours) == set(model.state_dict())
    x = golden["x"].to(dtype).requires_grad_()
    # Through the converter, so that gradients come back by their official names.
    voices = torch.func.functional_call(model, ours, (x,))
    assert (voices - golden["y"]).abs().max() <= ALLOWED[dtype]
    grads = torch.autograd.grad((voices * sines(voices)).sum(), [x, *official.values()])
    # In units of the largest gradient: in float32 those that sum over all frames have lost their last digits.
    largest = max(1.0, *(t.abs().max().item() for key, t in golden.items() if key.startswith("grad/")))
    for key, grad in zip(("x", *official), grads, strict=True):
        right = golden[f"grad/{key}"]
        found = grad if grad.shape == right.shape else (grad * sines(grad)).sum().view(1)
        assert (found - right).abs().max().item() <= ALLOWED[dtype] * largest, key


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("mossformer_s", 10.81),
        ("mossformer_m", 25.30),
        ("mossformer_l", 42.10),
        ("mossformer2_s", 37.76),
        ("mossformer2_l", 55.74),
    ],
)
def test_published_sizes(name: str, millions: float) -> None:
    card = MODELS[name]
    with torch.device("meta"):
        model = load(card.target)(card.config(), 2)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_padding_changes_nothing(name: str, causal: bool) -> None:
    model = make(name, 3, causal=causal)
    lengths = torch.tensor([900, 611, 264, 16, 3, 0])
    mixture = torch.randn(6, 1000)
    together = model(mixture, lengths)
    assert together.shape == (6, 3, 1000)
    for i, length in enumerate(lengths.tolist()):
        alone = model(mixture[i : i + 1, :length])[0]
        assert alone.shape == (3, length)
        assert (together[i, :, length:] == 0).all()
        if length:
            assert (together[i, :, :length] - alone).abs().max() <= 1e-5 * max(1, alone.abs().max().item())
    nothing = mixture.clone()
    nothing[torch.arange(1000) >= lengths[:, None]] = torch.nan
    assert torch.equal(model(nothing, lengths), together)
    # Gradients too: what lies behind the end does not reach the weights.
    model.train()
    found = [model(m, lengths).square().sum() for m in (mixture, nothing)]
    for a, b in zip(*(torch.autograd.grad(f, list(model.parameters()), allow_unused=True) for f in found)):
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("mixer", [None, "softmax", "gla"])
@pytest.mark.parametrize("name", SMALL)
def test_causal_models_read_no_further_than_the_window(name: str, mixer: str | None) -> None:
    model = make(name, causal=True, mixer=mixer).double()
    assert model.reach == 15
    mixture = torch.randn(1, 700, dtype=torch.float64, requires_grad=True)
    at = 403
    (grad,) = torch.autograd.grad(model(mixture)[0, :, at].sum(), mixture)
    assert (grad[0, at + model.reach + 1 :] == 0).all()
    assert (grad[0, : at - 300] != 0).any()
    assert make(name).reach is None


@pytest.mark.parametrize("mixer", ["softmax", "flow", "inline", "gla", "joint"])
def test_other_mechanisms_take_the_place_of_attention(mixer: str) -> None:
    model = make("mossformer", mixer=mixer)
    mixture, lengths = torch.randn(2, 500), torch.tensor([500, 333])
    voices = model(mixture, lengths)
    alone = model(mixture[1:, :333])
    assert (voices[1, :, :333] - alone[0]).abs().max() <= 1e-5
    model(mixture, lengths).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_dropout_and_training_run() -> None:
    for name in SMALL:
        model = make(name, dropout=0.2).train()
        model(torch.randn(2, 300)).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("mixer", [None, "softmax"])
@pytest.mark.parametrize("name", SMALL)
def test_mixed_precision_is_near_single(name: str, mixer: str | None) -> None:
    model = make(name, mixer=mixer)
    mixture, lengths = torch.randn(2, 500), torch.tensor([500, 301])
    right = model(mixture, lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        voices = model(mixture, lengths)
    voices.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert (voices - right).norm() < 0.05 * right.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("taps", "dilation", "length"), [(17, 1, 50), (17, 1, 3), (7, 2, 21), (39, 2, 1), (1, 1, 4)])
def test_depthwise_is_the_sum_it_says(taps: int, dilation: int, length: int, causal: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(*s, dtype=dtype).requires_grad_() for s in ((2, length, 5), (5, taps)))
    right = torch.zeros(2, length, 5, dtype=torch.float64)
    for t in range(length):
        for j in range(taps):
            at = t + (j - (taps - 1 if causal else (taps - 1) // 2)) * dilation
            if 0 <= at < length:
                right[:, t] = right[:, t] + x[:, at].double() * weight[:, j].double()
    found = depthwise(x, weight, dilation=dilation, causal=causal)
    assert found.dtype is dtype
    allowed = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    assert (found - right).abs().max() < allowed
    probe = sines(right)
    expected = torch.autograd.grad(right, (x, weight), probe)
    for a, b in zip(torch.autograd.grad(found, (x, weight), probe.to(dtype)), expected, strict=True):
        assert (a.double() - b.double()).abs().max() < allowed * 3


def test_norms_are_torchs() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 30, 6, dtype=torch.float64)
    mask = torch.arange(30) < torch.tensor([[30], [11]])
    for together, other in (
        (True, torch.nn.GroupNorm(1, 6, eps=1e-8)),
        (False, torch.nn.InstanceNorm1d(6, eps=1e-8)),
    ):
        norm = FramesNorm(6, eps=1e-8, together=together, causal=False).double()
        other = other.double()
        torch.testing.assert_close(norm(x, None), other(x.mT).mT, rtol=0, atol=1e-12)
        torch.testing.assert_close(norm(x, mask)[1, :11], other(x[1:, :11].mT).mT[0], rtol=0, atol=1e-12)
        so_far = FramesNorm(6, eps=1e-8, together=together, causal=True).double()
        for t in (3, 17, 30):
            torch.testing.assert_close(so_far(x, None)[:, t - 1], other(x[:, :t].mT).mT[:, -1], rtol=0, atol=1e-10)


def test_bad_options_are_one_sentence() -> None:
    for options, words in (
        ({"dim": 9}, "dim and kernel must be even"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"mixer": "edge_gate"}, "edge_gate"),
        ({"mixer": "inline", "causal": True}, "inline cannot compute causal self attention"),
    ):
        with pytest.raises(Exception, match=words):
            make("mossformer", **options)
    with pytest.raises(ValueError, match="order must be at least 1"):
        make("mossformer2", order=0)
    with pytest.raises(ValueError, match=r"shape \(B, T\)"):
        make("mossformer")(torch.zeros(3))
    with pytest.raises(UserError, match=r"'lstm.weight' is not a weight"):
        from_official({"lstm.weight": torch.zeros(1)})
