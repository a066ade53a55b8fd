"""DAF: the official network and every term of its loss, any size, volumes, other mixers, official weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from attn_medseg.config import DAFConfig
from attn_medseg.models.base import ImageShape
from attn_medseg.models.daf import DAF, ResNeXt, from_official
from attn_shared.errors import UserError

GOLDEN = Path(__file__).parents[2] / "golden"
NOTE = json.loads((GOLDEN / "medseg_daf.json").read_text(encoding="utf-8"))
ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-5}


def make(ndim: int = 2, *, mixer: str | None = None, **config: Any) -> DAF:
    torch.manual_seed(0)
    settings = DAFConfig(**({"channels": (4, 6, 8, 8), "width": 8} | config))
    return DAF(settings, ImageShape(ndim=ndim, channels=2, classes=3, size=(64,) * ndim), mixer=mixer)


def drawn(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """The weights with which the official code was run."""
    generator, weights = torch.Generator().manual_seed(7), {}
    for key, shape in shapes.items():
        u = 2 * torch.rand(shape, generator=generator, dtype=torch.float32) - 1
        if len(shape) > 1:
            weights[key] = 0.75 * u * (3 / u[0].numel()) ** 0.5
        elif key.endswith(("gamma", "bn3.weight")):
            # Attention and residual branches are small, as near the start of training: with ones there, the official
            # code's own float32 is 9e-5 from its float64.
            weights[key] = 0.1 + 0.03 * u if key.endswith("gamma") else 0.2 + 0.06 * u
        else:
            weights[key] = u * 0.1 if key.endswith(("bias", "running_mean")) else 1 + 0.3 * u
    return weights


def image(*shape: int) -> Tensor:
    t = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (torch.sin(t * 0.37) + torch.cos(t * t * 0.011)).view(shape)


def close(found: Tensor, right: Tensor, allowed: float) -> None:
    """Largest error, relative to the largest element."""
    assert found.shape == right.shape
    assert (found.double() - right).abs().max() <= allowed * right.abs().max()


@pytest.fixture(scope="module")
def official() -> DAF:
    """The published size, 85 million parameters, with the weights of the run of the official code."""
    with torch.device("meta"):
        shape = ImageShape(ndim=2, channels=1, classes=5, size=(64, 64))
        net = DAF(DAFConfig(backbone="resnext101", width=64), shape)
    weights = {key: tensor.double() for key, tensor in from_official(drawn(NOTE["shapes"])).items()}
    counters = {key: torch.tensor(0) for key, _ in net.named_buffers() if key.endswith("num_batches_tracked")}
    net.load_state_dict(weights | counters, assign=True)
    return net


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
def test_it_is_the_official_network(official: DAF, dtype: torch.dtype) -> None:
    golden, allowed = load_file(GOLDEN / "medseg_daf.safetensors"), ALLOWED[dtype]
    net = official.to(dtype).eval()
    kept = {name: one.clone() for name, one in net.named_buffers()}
    x = image(2, 1, 64, 64).to(dtype).requires_grad_()
    with torch.no_grad():
        out = net(x).double()
    close(out[..., ::2, ::2], golden["output"], allowed)
    net.train()
    batch = {"image": x, "label": (torch.arange(2 * 64 * 64) * 7 // 13 % 5).view(2, 64, 64)}
    with torch.set_grad_enabled(dtype == torch.float64):
        terms = net.terms(batch, F.cross_entropy)
    close(terms["segmentation"], golden["segmentation"], allowed)
    close(terms["guided"].flip(0), golden["guided"], allowed)
    close(terms["reconstruction"], golden["reconstruction"], allowed)
    loss = terms["segmentation"].sum() + 0.25 * terms["guided"].sum() + 0.1 * terms["reconstruction"].sum()
    close(loss[None], golden["loss"], allowed)
    if dtype == torch.float64:
        total = (out * torch.cos(torch.arange(out.numel(), dtype=dtype)).view_as(out)).sum()
        close(total[None], golden["output.sum"], allowed)
        named = dict(net.named_parameters())
        at_x, *found = torch.autograd.grad(loss, [x, *named.values()])
        close(at_x[..., ::4, ::4], golden["grad.x"], allowed)
        gradients = dict(zip(named, found))
        # Buffers, and what the official code never uses, have no gradient.
        ours = [next(iter(from_official({key: torch.ones(1, 1)})), "") for key in sorted(NOTE["shapes"])]
        ordered = [gradients[name] for name in ours if name in gradients]
        sums = [(g * torch.sin(torch.arange(g.numel(), dtype=dtype)).view_as(g)).sum() for g in ordered]
        close(torch.stack(sums), golden["grad.weights"], allowed)
    net.load_state_dict(kept, strict=False)


@pytest.mark.parametrize("ndim", [2, 3])
def test_any_size(ndim: int) -> None:
    net = make(ndim)
    for size in ((1, 1, 1)[:ndim], (7, 50, 5)[:ndim]):
        x = torch.randn(1, 2, *size)
        assert net.eval()(x).shape == (1, 3, *size)
    value = net.train().loss({"image": x, "label": torch.randint(0, 3, (1, *size))}, F.cross_entropy)
    value.backward()
    assert torch.isfinite(value)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_one_image_alone_can_be_learned(norm: str) -> None:
    net = make(norm=norm)
    x = torch.randn(1, 2, 9, 9)
    assert torch.isfinite(net.loss({"image": x, "label": torch.zeros(1, 9, 9, dtype=torch.long)}, F.cross_entropy))


def test_what_the_loss_is_made_of() -> None:
    net = make(guided=2.0, reconstruction=0.5)
    batch = {"image": torch.randn(2, 2, 64, 64), "label": torch.randint(0, 3, (2, 64, 64))}
    terms = net.terms(batch, F.cross_entropy)
    assert {name: len(one) for name, one in terms.items()} == {"segmentation": 8, "guided": 4, "reconstruction": 8}
    right = terms["segmentation"].sum() + 2 * terms["guided"].sum() + 0.5 * terms["reconstruction"].sum()
    assert torch.allclose(net.loss(batch, F.cross_entropy), right)


def test_attention_starts_at_nothing_and_then_counts() -> None:
    """γ is 0 at the start, in both branches of all scales and passes."""
    net = make().eval()
    x = torch.randn(1, 2, 48, 48)
    before = net(x)
    gammas = {name: one for name, one in net.named_parameters() if name.endswith("gamma")}
    assert len(gammas) == 16
    for gamma in gammas.values():
        with torch.no_grad():
            assert gamma == 0
            gamma.fill_(1.0)
            assert (net(x) - before).abs().max() > 1e-6
            gamma.zero_()
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("mixer", ["softmax", "efficient"])
def test_other_mixers(mixer: str) -> None:
    net = make(mixer=mixer).eval()
    assert net(torch.randn(1, 2, 48, 48)).shape == (1, 3, 48, 48)
    assert net.attention(torch.randn(1, 2, 48, 48)) == {}


@pytest.mark.parametrize("ndim", [2, 3])
def test_what_is_read_is_a_share(ndim: int) -> None:
    net = make(ndim).eval()
    size = (32, 48, 48)[:ndim]
    found = net.attention(torch.randn(1, 2, *size))
    assert list(found) == [f"read by all, scale {i}" for i in (1, 2, 3, 4)]
    for one in found.values():
        assert one.shape == (1, *size)
        assert one.min() >= 0
        assert torch.allclose(one.mean(), torch.ones(()), atol=0.05)


def test_the_published_backbone_in_volumes() -> None:
    net = ResNeXt(3, 1, blocks=(1, 1, 1, 1), groups=4, group_width=2).eval()
    found = net(torch.randn(1, 1, 33, 40, 32))
    assert [tuple(one.shape[1:]) for one in found] == [
        (256, 9, 10, 8),
        (512, 5, 5, 4),
        (1024, 3, 3, 2),
        (2048, 2, 2, 1),
    ]


def test_official_weights_by_their_names() -> None:
    assert from_official({"module.conv8_13.bias": torch.ones(1)}).keys() == {"passes.1.scales.1.mix.bias"}
    assert from_official({"conv7_2.1.bias": torch.ones(1)}) == {}
    with pytest.raises(UserError, match=r"'bottleneck\.weight' is not a weight of DAF_stack"):
        from_official({"bottleneck.weight": torch.ones(2)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "vgg"}, "backbone is 'vgg'"),
        ({"channels": (8,)}, "two levels"),
        ({"norm": "layer"}, "norm is 'layer'"),
        ({"width": 0}, "width must be at least 1"),
        ({"guided": -1.0}, "guided and reconstruction at least 0"),
        ({"mixer": "retention"}, "cannot compute noncausal self"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
