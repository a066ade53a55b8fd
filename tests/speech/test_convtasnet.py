"""Conv-TasNet: agreement with torchaudio's, padding, causality, short inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from attn_speech.config import ConvTasNetConfig
from attn_speech.models.convtasnet import ConvTasNet, from_torchaudio

GOLDEN = Path(__file__).parent.parent / "golden"
SMALL: dict[str, Any] = {"N": 16, "L": 8, "B": 8, "Sc": 8, "H": 12, "X": 3, "R": 2}


def model(causal: bool = False, speakers: int = 2, **options: Any) -> ConvTasNet:
    torch.manual_seed(0)
    made = ConvTasNet(ConvTasNetConfig(**{**SMALL, **options}, causal=causal), speakers).eval()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn_like(p)
    return made


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["sigmoid", "relu"])
def test_agrees_with_torchaudio(case: str, dtype: torch.dtype) -> None:
    tensors = load_file(GOLDEN / "speech_convtasnet.safetensors")
    tensors = {key.split(":", 1)[1]: t.to(dtype) for key, t in tensors.items() if key.startswith(f"{case}:")}
    options = json.loads((GOLDEN / "speech_convtasnet.json").read_text(encoding="utf-8"))["cases"][case]
    speakers, _ = options.pop("speakers"), options.pop("samples")
    ours = ConvTasNet(ConvTasNetConfig(**options), speakers).to(dtype)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}

    ours.load_state_dict(from_torchaudio(part("weight/")))
    x = tensors["x"].requires_grad_()
    y = ours(x)
    (y * tensors["w"]).sum().backward()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert (y - tensors["y"]).abs().max() <= tolerance
    gradients = part("grad/")
    assert x.grad is not None
    scale = 1 if dtype == torch.float64 else 10
    assert (x.grad - gradients.pop("x")).abs().max() <= scale * tolerance
    expected = from_torchaudio(gradients)
    for name, p in ours.named_parameters():
        assert p.grad is not None
        limit = scale * tolerance * max(1.0, float(expected[name].abs().max()))
        assert (p.grad - expected[name]).abs().max() <= limit, name


def test_published_size() -> None:
    found = sum(p.numel() for p in ConvTasNet(ConvTasNetConfig(), 2).parameters())
    assert found == 4_984_881  # torchaudio's own count; the paper says 5.1 million
    with pytest.raises(ValueError, match="no weight 'other"):
        from_torchaudio({"other.weight": torch.zeros(1)})


@pytest.mark.parametrize("causal", [False, True])
def test_batch_with_lengths_is_each_alone(causal: bool) -> None:
    network = model(causal)
    lengths = torch.tensor([500, 333, 1, 8, 499])
    x = torch.randn(5, 500)
    padded = x.clone()
    for row, size in zip(padded, lengths.tolist()):
        row[size:] = torch.nan
    with torch.no_grad():
        together = network(padded, lengths)
        for row, size in enumerate(lengths.tolist()):
            alone = network(x[row : row + 1, :size])[0]
            assert (together[row, :, :size] - alone).abs().max() <= 1e-5
            assert not together[row, :, size:].any()
        assert torch.equal(network(x, torch.full((5,), 500)), network(x))


def test_gradients_of_a_batch_with_lengths_are_finite() -> None:
    network = model()
    x = torch.randn(2, 300)
    x[1, 100:] = torch.nan
    network(x, torch.tensor([300, 100])).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_causal_reads_no_further_than_the_encoder_window() -> None:
    network = model(causal=True).double()
    assert network.reach == 7
    x = torch.randn(1, 400, dtype=torch.float64)
    with torch.no_grad():
        before = network(x)
        for place in (100, 203, 304):
            other = x.clone()
            other[:, place:] += torch.randn(400 - place, dtype=torch.float64)
            changed = (network(other) - before).abs().amax(dim=(0, 1))
            assert not changed[: place - network.reach].any()
            assert changed[place:].any()
    assert model().reach is None


@pytest.mark.parametrize("size", [1, 3, 7, 8, 9, 101])
def test_any_length(size: int) -> None:
    y = model(speakers=3)(torch.randn(2, size))
    assert y.shape == (2, 3, size)
    assert y.isfinite().all()


def test_silence_gives_silence() -> None:
    assert not model()(torch.zeros(1, 100)).any()


@pytest.mark.parametrize(
    ("options", "sentence"), [({"L": 7}, "L must be even"), ({"P": 2}, "P must be odd"), ({"H": 0}, "H must be")]
)
def test_wrong_options(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        model(**options)
    with pytest.raises(ValueError, match="no mixer"):
        ConvTasNet(ConvTasNetConfig(**SMALL), 2, mixer="softmax")
