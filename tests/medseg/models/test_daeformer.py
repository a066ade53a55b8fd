"""DAE-Former: the official code's numbers, images of any size, volumes, other mixers, official weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from attn_medseg.config import DAEFormerConfig
from attn_medseg.models.base import ImageShape
from attn_medseg.models.convolutions import as_image
from attn_medseg.models.daeformer import DAEFormer, from_official
from attn_shared.errors import UserError

GOLDEN = Path(__file__).parents[2] / "golden"
NOTE = json.loads((GOLDEN / "medseg_daeformer.json").read_text(encoding="utf-8"))["cases"]
ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-5}
CHANNELS = {"grey": 1, "colour": 3}


def make(ndim: int = 2, *, mixer: str | None = None, classes: int = 3, **config: Any) -> DAEFormer:
    torch.manual_seed(0)
    settings = DAEFormerConfig(**({"channels": (8, 16, 24), "blocks": 1, "expansion": 2} | config))
    shape = ImageShape(ndim=ndim, channels=2, classes=classes, size=(16,) * ndim)
    return DAEFormer(settings, shape, mixer=mixer).eval()


def drawn(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """The weights with which the official code was run."""
    generator, weights = torch.Generator().manual_seed(7), {}
    for key, shape in shapes.items():
        u = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
        if len(shape) > 1 and not key.endswith("temperature"):
            weights[key] = u * (3 / u[0].numel()) ** 0.5
        else:
            weights[key] = u * 0.1 if key.endswith("bias") else 1 + 0.3 * u
    return weights


def image(*shape: int) -> Tensor:
    t = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (torch.sin(t * 0.37) + torch.cos(t * t * 0.011)).view(shape)


def difference(found: Tensor, right: Tensor) -> float:
    """Largest error, relative to the largest element where that is above 1."""
    assert found.shape == right.shape
    return ((found - right).abs().max() / right.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("case", NOTE)
def test_it_is_the_official_network(case: str, dtype: torch.dtype) -> None:
    facts, golden = NOTE[case], load_file(GOLDEN / "medseg_daeformer.safetensors")
    channels, size = CHANNELS[case], facts["size"]
    shape = ImageShape(ndim=2, channels=channels, classes=facts["classes"], size=tuple(size))
    net = DAEFormer(DAEFormerConfig(channels=tuple(facts["channels"])), shape).to(torch.float64)
    net.load_state_dict(from_official(drawn(facts["shapes"]), channels=channels))
    net.to(dtype)
    x = image(1, channels, *size).to(dtype).requires_grad_()
    out = net(x)
    assert difference(out.double(), golden[f"{case}/output"]) <= ALLOWED[dtype]
    if dtype == torch.float32:
        return
    # The official first layer of greyscale images has three times the weights, each with the gradient of ours.
    named = dict(sorted(net.named_parameters()))
    loss = (out * torch.cos(torch.arange(out.numel(), dtype=dtype)).view_as(out)).sum()
    at_x, *found = torch.autograd.grad(loss, [x, *named.values()])
    assert difference(at_x, golden[f"{case}/grad.x"]) <= ALLOWED[dtype]
    if channels == 1:
        first = list(named).index("stages.0.embedding.conv.weight")
        found[first] = found[first].expand(-1, 3, -1, -1)
    sums = [(g * torch.sin(torch.arange(g.numel(), dtype=dtype)).view_as(g)).sum() for g in found]
    assert difference(torch.stack(sums), golden[f"{case}/grad.weights"]) <= ALLOWED[dtype]


@pytest.mark.parametrize("ndim", [2, 3])
def test_any_size(ndim: int) -> None:
    net = make(ndim)
    for size in ((1,) * ndim, (7, 21, 5)[:ndim], (16, 32, 16)[:ndim]):
        x = torch.randn(2, 2, *size, requires_grad=True)
        label = torch.randint(0, 3, (2, *size))
        assert net(x).shape == (2, 3, *size)
        net.zero_grad()
        value = net.loss({"image": x, "label": label}, torch.nn.functional.cross_entropy)
        value.backward()
        assert torch.isfinite(value)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("ndim", [2, 3])
def test_finer_tokens_lie_where_they_belong(ndim: int) -> None:
    """A token's finer ones are the cells of its own part of the image, in the order of the linear layer's rows."""
    expand = make(ndim).expand
    expand.norm = torch.nn.Identity()
    grid, out = (2, 3, 4)[:ndim], 12
    tokens = torch.randn(2, torch.Size(grid).numel(), 24)
    finer, fine = expand(tokens, grid)
    assert fine == tuple(2 * size for size in grid)
    coarse, found = as_image(expand.proj(tokens), grid), as_image(finer, fine)
    for part in range(2**ndim):
        at = tuple(slice(part >> (ndim - 1 - axis) & 1, None, 2) for axis in range(ndim))
        assert torch.equal(found[(..., *at)], coarse[:, part * out : (part + 1) * out])


def test_every_cell_reads_every_other() -> None:
    net = make().double()
    x = torch.randn(1, 2, 48, 48, dtype=torch.float64, requires_grad=True)
    net(x)[0, :, 0, 0].sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, -1, -1].abs().min() > 0


@pytest.mark.parametrize("mixer", ["softmax", "swin", "channel"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_other_mixers(mixer: str, ndim: int) -> None:
    net = make(ndim, mixer=mixer)
    assert {type(b.attention).info.name for b in net.modules() if hasattr(b, "use_grid")} == {mixer}
    assert net(torch.randn(1, 2, *(16,) * ndim)).shape == (1, 3, *(16,) * ndim)
    assert (net.attention(torch.randn(1, 2, *(16,) * ndim)) == {}) == (mixer != "efficient")


@pytest.mark.parametrize("ndim", [2, 3])
def test_what_is_read_is_a_share(ndim: int) -> None:
    net = make(ndim)
    size = (32, 48, 16)[:ndim]
    x = torch.randn(2, 2, *size)
    (found,) = net.attention(x).values()
    assert found.shape == (2, *size)
    assert found.min() >= 0
    # By the definition: the mean of the rows of the map of all cells by all cells.
    seen: list[Tensor] = []
    block = net.stages[-1].blocks[-1]
    block.attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(x)
    q, k = block.attention.q_proj(seen[0]), block.attention.k_proj(seen[0])
    full = q.softmax(dim=-1) @ k.softmax(dim=1).mT
    assert torch.allclose(full.sum(dim=-1), torch.ones(()))
    right = full.mean(dim=1).unflatten(1, tuple(one // 16 for one in size))[:, None]
    right = torch.nn.functional.interpolate(right, size=size, mode="bilinear" if ndim == 2 else "trilinear")
    assert torch.allclose(found, right[:, 0], rtol=0, atol=1e-7)


def test_official_weights_by_their_names() -> None:
    shapes = NOTE["grey"]["shapes"]
    weights = drawn(shapes)
    parallel = {f"module.{key}": tensor for key, tensor in weights.items()}
    unused = {"decoder_2.cross_attn.norm1.weight": torch.ones(24), "backbone.block1.0.mlp1.norm3.bias": torch.ones(32)}
    found = from_official(parallel | unused)
    assert found.keys() == from_official(weights).keys()
    assert found["stages.0.embedding.conv.weight"].shape[1] == 3
    with pytest.raises(UserError, match=r"'bottleneck\.weight' is not a weight of DAE-Former"):
        from_official({"bottleneck.weight": torch.ones(2)})
    with pytest.raises(UserError, match="1 or 3 channels, not 2"):
        from_official(weights, channels=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (8,)}, "two levels"),
        ({"channels": (8, 12)}, "multiple of heads = 8, got 12"),
        ({"channels": (9, 27), "heads": 3}, "must be even"),
        ({"patch": 0}, "patch must be at least 1"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"mixer": "no_such"}, "no_such"),
        ({"mixer": "retention"}, "cannot compute noncausal self"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
