"""AGUNet and DAUNet: against the official code's numbers, against plain forms of the equations, any size, options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from attn_medseg.config import AGUNetConfig, DAUNetConfig
from attn_medseg.models.agunet import AGUNet, DAUNet, load_official
from attn_medseg.models.base import ImageShape
from attn_medseg.segment.losses import criterion
from attn_medseg.segment.options import SegmentTaskConfig

GOLDEN = Path(__file__).parents[2] / "golden"
OFFICIAL: dict[str, tuple[type[Any], Any]] = {
    "agunet": (AGUNet, AGUNetConfig(channels=(2, 4, 8))),
    "daunet": (DAUNet, DAUNetConfig(channels=(2, 3, 8), guide="deconv", channel_form="transposed")),
}


def _shape(ndim: int, channels: int = 1, classes: int = 3) -> ImageShape:
    return ImageShape(ndim=ndim, channels=channels, classes=classes, size=(16,) * ndim)


def _stirred(net: nn.Module) -> Any:
    """Biases, gammas and running statistics away from where they start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if value.dim() == 1:
                value.copy_(0.4 * torch.rand_like(value) + (0.8 if "var" in name or "weight" in name else 0.1))
    return net.double().eval()


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_official_numbers(name: str, dtype: torch.dtype, tolerance: float) -> None:
    kept = load_file(GOLDEN / f"medseg_{name}.safetensors")
    model, config = OFFICIAL[name]
    net = model(config, ImageShape(ndim=3, channels=2, classes=2, size=(12, 12, 12)))
    variables = [kept[key].double().numpy() for key in sorted(kept) if key.isdigit()]
    load_official(net, variables)
    net = net.to(dtype).eval()
    x = kept["x"].to(dtype).movedim(-1, 1)
    assert min(kept["out0"].std(), kept["out1"].std()) > 0.05
    with torch.no_grad():
        found = net.outputs(x)
        assert (net(x).softmax(dim=1)[:, 0] - kept["out0"]).abs().max() <= tolerance
        # The next level, on its own grid.
        coarse = net.heads[0](net.decode(net.encoder(x))[0])
    assert (found[-1].softmax(dim=1)[:, 0] - kept["out0"]).abs().max() <= tolerance
    assert (coarse.softmax(dim=1)[:, 0] - kept["out1"]).abs().max() <= tolerance
    with pytest.raises(ValueError, match="variables, got"):
        load_official(net, variables[:-1])
    if name == "daunet":
        with pytest.raises(ValueError, match="without another mixer"):
            load_official(DAUNet(config, net.shape, mixer="softmax"), variables)
    with pytest.raises(ValueError, match="variable 0 should have shape"):
        load_official(net, variables[::-1])


def test_gates_in_the_open() -> None:
    """A level of the decoder, written out over voxels one by one."""
    net = _stirred(AGUNet(AGUNetConfig(channels=(4, 6), norm="batch"), _shape(2)))
    level = net.levels[0]
    x, skip = torch.randn(1, 6, 3, 2).double(), torch.randn(1, 4, 6, 4).double()
    found, amounts = level(x, skip)
    up = _same_deconvolution(x, level.up.convolution, 2)
    up = F.relu(_norm(up, level.norm))
    gate = level.gate
    expected = torch.zeros(6, 4).double()
    for i in range(6):
        for j in range(4):
            g = _norm(gate.signal.weight[:, :, 0, 0] @ up[0, :, i, j] + gate.signal.bias, gate.signal_norm)
            own = _norm(gate.input.weight[:, :, 0, 0] @ skip[0, :, i, j] + gate.input.bias, gate.input_norm)
            joined = F.relu(torch.cat([g, own]))
            psi = gate.psi.weight[:, :, 0, 0] @ joined + gate.psi.bias
            expected[i, j] = torch.sigmoid(_norm(psi, gate.psi_norm))[0]
    assert torch.allclose(amounts[0], expected, atol=1e-12)
    assert torch.allclose(found, level.block(torch.cat([up, skip * expected], dim=1)), atol=1e-12)
    assert amounts.std() > 1e-3


def _norm(x: Tensor, norm: Any) -> Tensor:
    shape = (-1,) if x.dim() == 1 else (1, -1, *[1] * (x.dim() - 2))
    mean, var, weight, bias = (
        one.reshape(shape) for one in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (x - mean) / (var + 1e-3).sqrt() * weight + bias


def _same_deconvolution(x: Tensor, convolution: Any, stride: int) -> Tensor:
    """Each coarse pixel adds its kernel from its own place on."""
    weight, bias = convolution.weight, convolution.bias
    height, width = (stride * n for n in x.shape[2:])
    out = torch.zeros(1, weight.shape[1], height + 3, width + 3, dtype=x.dtype)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            kernel = torch.einsum("c,cdhw->dhw", x[0, :, i, j], weight)
            out[0, :, stride * i : stride * i + 3, stride * j : stride * j + 3] += kernel
    return out[:, :, :height, :width] + bias.reshape(1, -1, 1, 1)


@pytest.mark.parametrize("form", ["plain", "transposed"])
def test_dual_attention_in_the_open(form: str) -> None:
    """The coarsest level of DAUNet from the equations, with every map written down."""
    net = _stirred(DAUNet(DAUNetConfig(channels=(4, 16), channel_form=form), _shape(2)))
    dual = net.bottom
    mixer = dual.position.mixer
    x = 0.3 * torch.randn(1, 16, 3, 4).double()
    tokens = x.flatten(2)[0].T
    scores = (tokens @ mixer.q_proj.weight.T) @ (tokens @ mixer.k_proj.weight.T).T
    position = mixer.gamma * scores.softmax(dim=1) @ (tokens @ mixer.v_proj.weight.T) + tokens
    alike = (tokens.T @ tokens).softmax(dim=1)
    read = tokens @ (alike if form == "transposed" else alike.T)
    channel = dual.channel.mixer.gamma * read + tokens

    def after(values: Tensor, part: Any) -> Tensor:
        image = values.T.reshape(1, 16, 3, 4)
        first = F.relu(_norm(F.conv2d(image, part[0].weight, part[0].bias, padding=1), part[1]))
        return F.conv2d(first, part[4].weight, part[4].bias, padding=1)

    both = after(position, dual.after_position) + after(channel, dual.after_channel)
    expected = _norm(F.conv2d(both, dual.join.weight, dual.join.bias), dual.norm)
    assert torch.allclose(dual(x), expected, atol=1e-11)
    assert mixer.gamma.item() != 0
    assert dual.channel.mixer.gamma.item() != 0


def test_only_the_linear_guide_reaches_every_pixel() -> None:
    torch.manual_seed(0)
    reached = {}
    for guide in ("linear", "deconv"):
        net = _stirred(DAUNet(DAUNetConfig(channels=(4, 6, 6, 8), guide=guide), _shape(2)))
        finest = net.levels[-1]
        bottom = torch.randn(1, 8, 4, 4).double()
        skip = torch.zeros(1, 4, 32, 32).double()
        guides = [
            F.interpolate(finest.guide(one), (32, 32), mode="bilinear") if guide == "linear" else finest.guide(one)
            for one in (bottom, bottom + 1.0)
        ]
        assert guides[0].shape == skip.shape
        reached[guide] = ((guides[0] - guides[1]).abs().amax(dim=1) > 0).double().mean().item()
    assert reached["linear"] == 1.0
    # A kernel of 3 every 8 pixels.
    assert reached["deconv"] == pytest.approx((3 / 8) ** 2)
    stride = _stirred(DAUNet(DAUNetConfig(channels=(4, 6, 8), guide="deconv"), _shape(2))).levels[-1].guide
    x = torch.randn(1, 8, 3, 2).double()
    assert torch.allclose(stride(x), _same_deconvolution(x, stride.convolution, 4), atol=1e-12)


@pytest.mark.parametrize("name", ["agunet", "daunet"])
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("options", [{}, {"multiscale": False, "supervision": False}, {"norm": "instance"}])
def test_any_size(name: str, ndim: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, config = (AGUNet, AGUNetConfig) if name == "agunet" else (DAUNet, DAUNetConfig)
    net = model(config(channels=(4, 6, 8), **options), _shape(ndim, channels=2))
    for value in net.parameters():
        if value.numel() == 1 and not value.any():  # what is learned from 0 would stop gradients behind it
            nn.init.constant_(value, 0.5)
    loss = criterion(SegmentTaskConfig())
    for size in ((1,) * ndim, (9, 13, 6)[:ndim], (16,) * ndim):
        x = torch.randn(2, 2, *size)
        assert net(x).shape == (2, 3, *size)
        value = net.loss({"image": x, "label": torch.randint(0, 3, (2, *size))}, loss)
        value.backward()
        assert torch.isfinite(value)
    for key, one in net.named_parameters():
        assert one.grad is not None, key
        assert torch.isfinite(one.grad).all(), key
        # What a norm takes away again, such as the shift before it, may get none.
        assert one.grad.any() or key.endswith("bias"), key
    amounts = net.eval().attention(torch.randn(2, 2, *(9, 13, 6)[:ndim]))
    assert len(amounts) == (2 if name == "agunet" else 1)
    assert all(one.shape == (2, *(9, 13, 6)[:ndim]) and (one >= 0).all() for one in amounts.values())


def test_deep_supervision_is_the_sum_over_levels() -> None:
    torch.manual_seed(0)
    net = AGUNet(AGUNetConfig(channels=(4, 6, 8)), _shape(2)).eval()
    x, label = torch.randn(2, 1, 11, 8), torch.randint(0, 3, (2, 11, 8))
    outputs = net.outputs(x)
    assert [tuple(one.shape) for one in outputs] == [(2, 3, 11, 8)] * 2
    assert torch.equal(outputs[-1], net(x))
    expected = sum(F.cross_entropy(one, label) for one in outputs)
    assert torch.allclose(net.loss({"image": x, "label": label}, F.cross_entropy), torch.as_tensor(expected))
    # Each level has its head's gradient.
    net.loss({"image": x, "label": label}, F.cross_entropy).backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in net.heads)


@pytest.mark.parametrize("mixer", ["softmax", "swin", "channel_affinity", "efficient"])
def test_other_mixers(mixer: str) -> None:
    torch.manual_seed(0)
    config = DAUNetConfig(channels=(4, 8))
    net = DAUNet(config, _shape(2), mixer=mixer).eval()
    x = torch.randn(1, 1, 12, 9)
    assert net(x).shape == (1, 3, 12, 9)
    coarse = torch.randn(1, 8, 6, 5)
    if net.bottom.position.gamma is not None:
        assert torch.equal(net.bottom.position(coarse), coarse)
        nn.init.ones_(net.bottom.position.gamma)
        assert not torch.allclose(net.bottom.position(coarse), coarse)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (4,)}, "two levels"),
        ({"norm": "layer"}, "norm is 'layer'"),
        ({"dropout": 1.0}, "dropout must"),
        ({"attention_dropout": -0.1}, "attention_dropout must"),
        ({"guide": "nearest"}, "guide is 'nearest'"),
        ({"channel_form": "other"}, "form"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DAUNet(DAUNetConfig(**options), _shape(2))
