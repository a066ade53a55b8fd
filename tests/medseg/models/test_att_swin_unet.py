"""Attention Swin U-Net: the official network in its exact mode, attention that is live, any size, other mixers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from attn_medseg.config import AttSwinUNetConfig
from attn_medseg.models.att_swin_unet import AttSwinUNet, Block, Context, Lent, Merge, from_official
from attn_medseg.models.base import ImageShape
from attn_medseg.models.convolutions import as_image, as_tokens
from attn_shared.errors import UserError
from core_attn import maps

GOLDEN = Path(__file__).parents[2] / "golden"
NOTE = json.loads((GOLDEN / "medseg_att_swin_unet.json").read_text(encoding="utf-8"))["cases"]
ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-5}
CHANNELS = {"colour": 3, "grey": 1}


def make(ndim: int = 2, *, mixer: str | None = None, **config: Any) -> AttSwinUNet:
    torch.manual_seed(0)
    settings = AttSwinUNetConfig(**({"channels": (8, 16, 16), "heads": (1, 2, 2), "patch": 2} | config))
    shape = ImageShape(ndim=ndim, channels=2, classes=3, size=(16,) * ndim)
    return AttSwinUNet(settings, shape, mixer=mixer).eval()


def drawn(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """The weights with which the official code was run."""
    generator, weights = torch.Generator().manual_seed(7), {}
    for key, shape in shapes.items():
        u = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
        if key.endswith("table"):
            weights[key] = u
        elif len(shape) > 1:
            weights[key] = u * (3 / u[0].numel()) ** 0.5
        else:
            weights[key] = u * 0.1 if key.endswith("bias") else 1 + 0.3 * u
    return weights


def official(case: str, **config: Any) -> AttSwinUNet:
    """A network of the official sizes with the weights of the run of the official code."""
    facts = NOTE[case]
    settings = AttSwinUNetConfig(
        channels=tuple(facts["channels"]),
        blocks=tuple(facts["blocks"]),
        heads=tuple(facts["heads"]),
        window=facts["window"],
        context_heads=8,
        context_width=64,
        **config,
    )
    shape = ImageShape(ndim=2, channels=CHANNELS[case], classes=9, size=(facts["size"],) * 2)
    net = AttSwinUNet(settings, shape).double().eval()
    weights = from_official(drawn(facts["shapes"]), window=facts["window"], channels=CHANNELS[case])
    net.load_state_dict(weights)
    return net


def image(*shape: int) -> Tensor:
    t = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (torch.sin(t * 0.37) + torch.cos(t * t * 0.011)).view(shape)


def close(found: Tensor, right: Tensor, allowed: float) -> None:
    """Largest error, relative to the largest element."""
    assert found.shape == right.shape
    assert (found.double() - right).abs().max() <= allowed * right.abs().max()


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("case", NOTE)
def test_exact_it_is_the_official_network(case: str, dtype: torch.dtype) -> None:
    golden, allowed = load_file(GOLDEN / "medseg_att_swin_unet.safetensors"), ALLOWED[dtype]
    net = official(case, exact=True).to(dtype)
    x = image(1, CHANNELS[case], *(NOTE[case]["size"],) * 2).to(dtype).requires_grad_()
    out = net(x)
    close(out[..., ::4, ::4], golden[f"{case}/output"], allowed)
    if dtype == torch.float32:
        return
    total = (out * torch.cos(torch.arange(out.numel(), dtype=dtype)).view_as(out)).sum()
    close(total[None], golden[f"{case}/output.sum"], allowed)
    named = dict(net.named_parameters())
    at_x, *found = torch.autograd.grad(total, [x, *named.values()])
    close(at_x[..., ::4, ::4], golden[f"{case}/grad.x"], allowed)
    squares = {name: one.square().sum() for name, one in zip(named, found)}
    # The official code holds queries, keys and values in one, and has three greyscale channels in the first layer.
    given = {key: torch.ones(1, 1) if "table" in key else torch.ones(12, 12) for key in sorted(NOTE[case]["shapes"])}
    ours = [list(from_official({key: one}, window=1)) for key, one in given.items()]
    ours = [[self_named(name, net) for name in names] for names in ours if names]
    times = [CHANNELS["colour"] / CHANNELS[case] if names == ["embed.weight"] else 1 for names in ours]
    sums = [n * torch.stack([squares[name] for name in names]).sum() for n, names in zip(times, ours)]
    close(torch.stack(sums), golden[f"{case}/grad.squares"], allowed)


def self_named(name: str, net: AttSwinUNet) -> str:
    """A name as it is among all weights: levels of the context are counted from the number of all levels."""
    if ".context." not in name:
        return name
    head, _, rest = name.partition(".context.")
    return f"levels.{int(head.split('.')[1]) + len(net.levels) - 1}.context.{rest}"


@pytest.mark.parametrize("case", NOTE)
def test_the_attention_of_the_encoder_is_live(case: str) -> None:
    """Without it the official output is the same to the last bit; ours is another."""
    golden = load_file(GOLDEN / "medseg_att_swin_unet.safetensors")
    x = image(1, CHANNELS[case], *(NOTE[case]["size"],) * 2)
    assert golden[f"{case}/toggled"] == 0.0
    with torch.no_grad():
        exact = official(case, exact=True)(x)
        assert torch.equal(official(case, exact=True, spatial=False)(x), exact)
        live = official(case)(x)
        assert (official(case, spatial=False)(x) - live).abs().max() > 1e-3
        assert (live - exact).abs().max() > 1e-3


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("ndim", [2, 3])
def test_weights_are_added(ndim: int, shift: int) -> None:
    """The output is (W_d + W_e) V by the maps themselves, in windows of both kinds."""
    net = make(ndim, window=4).double()
    lender, own = net.stages[0].blocks[bool(shift)].attention, net.levels[-1].blocks.blocks[0].attention
    assert set(lender.shift) == {shift}
    grid = (6, 8, 5)[:ndim]
    length = torch.Size(grid).numel()
    seen, x = torch.randn(2, length, 8).double(), torch.randn(2, length, 8).double()
    with maps.capture(torch.nn.ModuleList([lender, own])) as taken:
        lender(seen, grid=grid)
        plain = own(x, grid=grid)
    of_encoder, of_decoder = taken.values()
    v = own.split_heads(own.v_proj(x))
    right = own.out_proj(own.merge_heads((of_decoder + of_encoder) @ v))
    assert torch.allclose(plain + Lent(lender, seen, grid).read(x, own), right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("exact", [False, True])
def test_context_by_the_equations(exact: bool) -> None:
    net = Context(AttSwinUNetConfig(exact=exact, context_heads=2, context_width=3, context_depth=1), 6).double()
    (of_x, of_skip) = net.readers[0]
    x, skip = torch.randn(2, 5, 6).double(), torch.randn(2, 5, 6).double()

    def learned(reader: Any, own: Tensor, other: Tensor) -> Tensor:
        mean = reader.norm(own.mean(dim=1, keepdim=True))
        source = torch.cat((mean, other[:, 1:] if exact else other), dim=1)
        heads = []
        for q, k, v in zip(
            reader.q_proj(mean).chunk(2, -1), reader.k_proj(source).chunk(2, -1), reader.v_proj(source).chunk(2, -1)
        ):
            heads.append((q @ k.mT / 3**0.5).softmax(dim=-1) @ v)
        return reader.out_proj(torch.cat(heads, dim=-1))

    for found, reader, own, other in zip(net(x, skip), (of_x, of_skip), (x, skip), (skip, x)):
        if exact:
            first = own.mean(dim=1, keepdim=True) + learned(reader, own, other)
            right = torch.cat((first, own[:, 1:]), dim=1)
        else:
            right = own + learned(reader, own, other)
        assert torch.allclose(found, right, rtol=0, atol=1e-12)


def test_what_is_far_is_known_everywhere() -> None:
    """The context takes every cell of the skip to every cell of the level, in the official form to one window."""
    x = torch.randn(1, 16, 8)
    skip = torch.randn(1, 16, 8)
    other = skip.clone()
    other[:, 7] += 1.0
    for exact, count in ((False, 16), (True, 1)):
        torch.manual_seed(0)
        context = Context(AttSwinUNetConfig(exact=exact), 8)
        changed = (context(x, other)[0] - context(x, skip)[0]).abs().amax(dim=-1) > 0
        assert changed.sum() == count


def test_cells_are_joined_in_row_major_order() -> None:
    merge = Merge(2, 3, 5)
    x = torch.randn(2, 4 * 6, 3)
    found, grid = merge(x, (4, 6))
    cells = as_image(x, (4, 6))
    parts = [cells[:, :, i::2, j::2] for i in range(2) for j in range(2)]
    assert grid == (2, 3)
    assert torch.equal(found, merge.proj(merge.norm(as_tokens(torch.cat(parts, dim=1)))))


@pytest.mark.parametrize("ndim", [2, 3])
def test_any_size(ndim: int) -> None:
    net = make(ndim).train()
    for size in ((1,) * ndim, (7, 21, 5)[:ndim], (16, 32, 16)[:ndim]):
        x = torch.randn(2, 2, *size)
        assert net(x).shape == (2, 3, *size)
        net.zero_grad()
        value = net.loss({"image": x, "label": torch.randint(0, 3, (2, *size))}, F.cross_entropy)
        value.backward()
        assert torch.isfinite(value)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("mixer", ["softmax", "efficient", "swin"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_other_mixers(mixer: str, ndim: int) -> None:
    net = make(ndim, mixer=mixer)
    assert {type(b.attention).info.name for b in net.modules() if isinstance(b, Block)} == {mixer}
    assert net(torch.randn(1, 2, *(16,) * ndim)).shape == (1, 3, *(16,) * ndim)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("ndim", [2, 3])
def test_what_is_read_is_a_share(ndim: int, exact: bool) -> None:
    net = make(ndim, exact=exact)
    size = (16, 24, 8)[:ndim]
    found = net.attention(torch.randn(2, 2, *size))
    assert list(found) == ["context of level 1", "context of level 2"]
    for one in found.values():
        assert one.shape == (2, *size)
        assert one.min() >= 0
        assert 0.3 < one.mean() < 1
    assert make(context=False).attention(torch.randn(1, 2, 16, 16)) == {}


def test_some_images_pass_by_blocks_in_training() -> None:
    net = make(drop_path=0.5)
    shares = [[getattr(b.drop_path, "drop_prob", 0.0) for b in stage.blocks] for stage in net.stages]
    assert shares == [[0.0, 0.1], [0.2, pytest.approx(0.3)], [0.4, 0.5]]
    x = torch.randn(1, 2, 16, 16)
    assert torch.equal(net(x), net(x))
    net.train()
    assert not torch.equal(net(x), net(x))


def test_official_weights_by_their_names() -> None:
    assert from_official({"module.decoder.output.weight": torch.ones(1)}).keys() == {"head.weight"}
    assert from_official({"encoder.layers.0.blocks.1.attn_mask": torch.ones(1)}) == {}
    with pytest.raises(UserError, match=r"'bottleneck\.weight' is not a weight of SwinAttentionUnet"):
        from_official({"bottleneck.weight": torch.ones(2)})
    with pytest.raises(UserError, match="1 or 3 channels, not 2"):
        from_official({}, channels=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (8,), "blocks": (2,), "heads": (1,)}, "two levels"),
        ({"blocks": (2, 2)}, "a number for each level"),
        ({"blocks": (2, 0, 2)}, "blocks must be at least 1"),
        ({"window": 0}, "window must be at least 1"),
        ({"heads": (3, 2, 2)}, "heads must divide dim"),
        ({"drop_path": 1.0}, "drop_path must be 0 or more and below 1"),
        ({"mixer": "retention"}, "cannot compute noncausal self"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
