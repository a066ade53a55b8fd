"""MAAG: against the official code's numbers, both sides of the game apart, its options, any size."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from attn_medseg.config import GatedUNetConfig, MAAGConfig
from attn_medseg.models.base import IGNORE, ImageShape
from attn_medseg.models.maag import MAAG, Discriminator, GatedUNet
from attn_medseg.segment.losses import criterion
from attn_medseg.segment.options import SegmentTaskConfig

GOLDEN = Path(__file__).parents[2] / "golden"
PARTIAL = criterion(SegmentTaskConfig(loss="ce", class_weights=True))


def _net(ndim: int = 2, size: int = 16, **chosen: Any) -> MAAG:
    torch.manual_seed(0)
    shape = ImageShape(ndim=ndim, channels=1, classes=3, size=(size,) * ndim)
    return MAAG(MAAGConfig(channels=(4, 6, 8), discriminator_channels=2, **chosen), shape)


def _batch(net: MAAG, size: int, share: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    grid = (size,) * net.shape.ndim
    label = torch.randint(0, 3, (2, *grid), generator=generator)
    label[torch.rand(label.shape, generator=generator) > share] = IGNORE
    return {
        "image": torch.randn(2, 1, *grid, generator=generator),
        "label": label,
        "masks": torch.randint(0, 3, (2, *grid), generator=generator),
    }


# -- the official code -------------------------------------------------------------------------------------------------


def _variables(net: MAAG) -> list[tuple[Tensor, str]]:
    """The official variables' places in the order in which its code makes them, and what each is."""
    found: list[tuple[Tensor, str]] = []

    def add(part: Any, kinds: str = "kernel bias") -> None:
        found.extend((getattr(part, name), kind) for name, kind in zip(("weight", "bias"), kinds.split()))

    def norm(part: Any) -> None:
        add(part, "gamma bias")
        found.append((part.running_mean, "mean"))
        found.append((part.running_var, "variance"))

    def block(part: Any) -> None:
        add(part[0])
        norm(part[1])

    for one in [block for pair in net.encoder for block in pair] + list(net.bottom):  # type: ignore[misc,arg-type]
        block(one)
    for level in net.levels:
        add(level.up[1])  # type: ignore[index,operator]
        norm(level.norm)
        block(level.first)
        block(level.second)
        add(level.gate.maps, "map map")  # type: ignore[union-attr]
    add(net.head)
    judge = net.discriminator
    assert judge is not None
    add(judge.first, "judge judge")
    for squeeze, convolution in zip(judge.squeezes, judge.convolutions):
        add(squeeze, "judge judge")
        normed: Any = convolution
        weight = normed.parametrizations.weight
        found.append((weight.original, "kernel"))
        found.append((normed.bias, "bias"))
        found.append((weight[0]._u, "u"))
    add(judge.last, "judge judge")
    return found


def _official(net: MAAG) -> None:
    """The variables' values, made by the rule that the kept file tells."""
    last = net.discriminator.last.weight  # type: ignore[union-attr]
    for i, (slot, kind) in enumerate(_variables(net)):
        shape = tuple(slot.shape)
        if slot is last:  # a convolution over the whole map
            shape = (1, 32, 4, 4)
        # Kernels have the channels last; of a spectral norm the vector is a row.
        theirs = (*shape[2:], shape[1], shape[0]) if len(shape) == 4 else (1, *shape) if kind == "u" else shape
        k = np.arange(np.prod(theirs, dtype=int)).reshape(theirs)
        scale = 0.4 if len(theirs) == 1 else 2 / math.sqrt(np.prod(theirs[:-1]))
        value = np.sin(78.233 * k + 12.9898 * (i + 1)) * scale
        value = value * {"judge": 3, "map": 2}.get(kind, 1) + (kind in ("variance", "gamma"))
        found = torch.from_numpy(value.astype(np.float32).astype(np.float64))
        if len(theirs) == 4:
            found = found.permute(3, 2, 0, 1)
        slot.data.copy_(found.reshape(slot.shape))
    for convolution in net.discriminator.convolutions:  # type: ignore[union-attr]
        # The official code turns its vector before each use, torch after it.
        held: Any = convolution
        matrix = held.parametrizations.weight.original.detach().flatten(1)
        norm = held.parametrizations.weight[0]
        norm._v.copy_(F.normalize(matrix.T @ norm._u, dim=0))
        norm._u.copy_(F.normalize(matrix @ norm._v, dim=0))


def _against_cosines(gradient: Tensor, kind: str) -> float:
    if gradient.dim() == 2:
        gradient = gradient.reshape(1, 32, 4, 4)
    theirs = gradient.permute(2, 3, 1, 0).flatten() if gradient.dim() == 4 else gradient
    return float(theirs @ torch.cos(torch.arange(len(theirs), dtype=theirs.dtype)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 5e-6), (torch.float32, 1e-5)])
def test_official_numbers(dtype: torch.dtype, tolerance: float) -> None:
    kept = {name: value.double() for name, value in load_file(GOLDEN / "medseg_maag.safetensors").items()}
    shape = ImageShape(ndim=2, channels=1, classes=4, size=(32, 32))
    config = MAAGConfig(channels=(2, 4, 8, 16, 32), discriminator_channels=2, noise=0, flip=0)
    net = MAAG(config, shape).double().eval()
    _official(net)
    net = net.to(dtype)
    judge = net.discriminator
    assert judge is not None
    x = kept["x"].to(dtype).movedim(-1, 1)

    def close(found: Tensor, name: str) -> None:
        assert (found.double() - kept[name]).abs().max() <= tolerance * max(1.0, float(kept[name].abs().max())), name

    logits, gates = net.decoded(x)
    close(logits.movedim(1, -1), "logits")
    for number, gate in enumerate(gates[-2::-1]):
        close(gate.movedim(1, -1), f"gate{number}")
    made = net.judged(logits, gates)
    real = F.one_hot(kept["masks"].long(), 4)[..., 1:].movedim(-1, 1).to(dtype)
    close(judge([real])[:, None], "answer_real")
    close(judge(made)[:, None], "answer_made")

    # Every term. The official cross-entropy is a mean over all pixels; a factor that the dynamic weight takes away.
    label = kept["label"].long()
    batch = {"image": x, "label": label, "masks": kept["masks"].long()}
    terms = net.losses(batch, PARTIAL)
    drawn = float((label != IGNORE).double().mean())
    close(terms["supervised"] * 4 * drawn, "loss_cross_entropy")
    close(terms["discriminator"], "loss_discriminator")
    close(terms["adversarial"], "loss_generator")
    # Its supervised track weighs by the discriminator's loss and lowers that, in the segmentor too.
    official = MAAG(replace(config, push="both"), shape).double().eval()
    official.load_state_dict(net.state_dict())
    both = official.to(dtype).losses(batch, PARTIAL)
    close(both["segmentor"] - 0.2 * both["adversarial"], "loss_supervised")
    terms_of = {name: float(one.detach()) for name, one in terms.items()}
    assert terms_of["segmentor"] == pytest.approx(1.1 * terms_of["adversarial"], rel=1e-6)

    named = [(slot, kind) for slot, kind in _variables(net) if isinstance(slot, nn.Parameter)]
    sides: dict[str, list[tuple[Tensor, str]]] = {"generator": [], "discriminator": []}
    judges = {id(one) for one in judge.parameters()}
    for slot, kind in named:
        sides["discriminator" if id(slot) in judges else "generator"].append((slot, kind))
    losses = {"generator": terms["adversarial"], "discriminator": judge.loss([one.detach() for one in made], -1.0)}
    for side, slots in sides.items():
        gradients = torch.autograd.grad(losses[side], [slot for slot, _ in slots], allow_unused=True)
        ours = [0.0 if g is None else _against_cosines(g.double(), kind) for g, (_, kind) in zip(gradients, slots)]
        assert kept[f"gradient_{side}"].abs().max() > 0.05
        close(torch.tensor(ours, dtype=torch.float64), f"gradient_{side}")


def test_the_official_flip_does_not_flip() -> None:
    """It turns the answer but not its gradient, so that answers are still moved to where they would have been moved."""
    kept = load_file(GOLDEN / "medseg_maag.safetensors")
    moved = {}
    for form in ("sign", "label"):
        judge = Discriminator(2, 2, (8, 8), 2, channels=2, noise=0, flip=1, flip_form=form)
        answers = torch.tensor([0.3, 1.4, -0.6], requires_grad=True)
        judge.forward = lambda masks, answers=answers: answers  # type: ignore[method-assign]
        judge.loss([], 1.0).backward()
        assert answers.grad is not None
        moved[form] = answers.grad
    assert torch.allclose(moved["sign"], kept["flip_gradient"][:, 0], atol=1e-6)
    assert (moved["sign"][[0, 2]] < 0).all()
    # Told that it was made, -1: (D + 1) / 3.
    assert torch.allclose(moved["label"], (torch.tensor([0.3, 1.4, -0.6]) + 1) / 3, atol=1e-6)


# -- the game ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gates", [True, False])
@pytest.mark.parametrize("ndim", [2, 3])
def test_neither_side_s_gradient_reaches_the_other(ndim: int, gates: bool) -> None:
    net = _net(ndim, gates=gates).double()
    batch = {name: one.double() if name == "image" else one for name, one in _batch(net, 16).items()}
    assert net.discriminator is not None
    judges = dict(net.discriminator.named_parameters())
    own = {name: one for name, one in net.named_parameters() if not name.startswith("discriminator.")}
    state = {name: one.clone() for name, one in net.state_dict().items()}

    def terms() -> dict[str, Tensor]:
        net.load_state_dict(state)
        torch.manual_seed(5)
        return net.losses(batch, PARTIAL)

    none = torch.autograd.grad(terms()["segmentor"], list(judges.values()), allow_unused=True)
    assert all(one is None for one in none)
    none = torch.autograd.grad(terms()["discriminator"], list(own.values()), allow_unused=True)
    assert all(one is None for one in none)
    # And what one step lowers gives each side the gradient of its own loss.
    found = terms()
    (found["segmentor"] + found["discriminator"]).backward()
    for side, values in (("segmentor", own), ("discriminator", judges)):
        wanted = torch.autograd.grad(terms()[side], list(values.values()), allow_unused=True)
        for (name, value), gradient in zip(values.items(), wanted):
            assert gradient is not None, name
            assert value.grad is not None
            assert torch.allclose(value.grad, gradient, atol=1e-12, rtol=1e-9), name
    assert all(one.requires_grad for one in net.parameters())
    # The adversary does reach the gates that it looks at, and the supervised loss alone gives another gradient.
    if gates:
        gate = net.levels[0].gate.maps.weight  # type: ignore[union-attr]
        [push] = torch.autograd.grad(terms()["adversarial"], [gate])  # type: ignore[list-item]
        assert push.abs().max() > 0


def test_one_optimiser_lowers_both() -> None:
    net = _net(noise=0.0, flip=0.0)
    batch = _batch(net, 16)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    net.eval()
    first = net.losses(batch, PARTIAL)
    net.train()
    for _ in range(40):
        optimizer.zero_grad()
        net.loss(batch, PARTIAL).backward()
        optimizer.step()
    last = net.losses(batch, PARTIAL)
    assert last["supervised"] < 0.8 * first["supervised"]
    assert last["discriminator"] < 0.8 * first["discriminator"]


def test_the_weight_follows_and_is_held() -> None:
    batch = _batch(_net(), 16)
    net = _net(noise=0.0, flip=0.0)
    found = net.losses(batch, PARTIAL)
    assert not found["weight"].requires_grad
    terms = {name: float(one.detach()) for name, one in found.items()}
    assert terms["weight"] * terms["supervised"] == pytest.approx(terms["adversarial"])
    assert terms["segmentor"] == pytest.approx(1.1 * terms["adversarial"])
    fixed = _net(noise=0.0, flip=0.0, dynamic=False, adversarial=0.5)
    terms = {name: float(one.detach()) for name, one in fixed.losses(batch, PARTIAL).items()}
    assert terms["segmentor"] == pytest.approx(terms["supervised"] + 0.5 * terms["adversarial"])
    # Where nobody drew, the adversary alone is left.
    nothing = net.losses(batch | {"label": torch.full_like(batch["label"], IGNORE)}, PARTIAL)
    assert float(nothing["segmentor"].detach()) == pytest.approx(0.1 * float(nothing["adversarial"].detach()))
    nothing["segmentor"].backward()
    assert all(torch.isfinite(one.grad).all() for one in net.parameters() if one.grad is not None)


def test_the_official_push_moves_masks_away_from_what_is_drawn() -> None:
    """Answers of made masks are drawn to 1/3 in place of 1: beyond it they are pushed back."""
    net = _net(noise=0.0, flip=0.0, push="both", dynamic=False)
    judge = net.discriminator
    assert judge is not None
    for answer, sign in ((0.0, -1), (0.5, 1)):
        made = torch.tensor(answer, requires_grad=True)
        judge.forward = lambda masks, made=made: made * torch.ones(2)  # type: ignore[method-assign]
        terms = net.losses(_batch(net, 16), lambda logits, label: logits.sum() * 0.0)
        [gradient] = torch.autograd.grad(terms["segmentor"], made)
        # The made masks' share; the real ones answer the same here, and their loss pulls to 1 with 0.1.
        assert float(gradient) == pytest.approx(0.1 * (answer + 1) + 0.1 * (answer - 1) + 0.2 * (answer - 1), abs=1e-6)
        made_alone = gradient - 0.1 * (answer - 1)
        assert float(made_alone.sign()) == sign


def test_without_the_adversary_the_loss_is_the_task_s() -> None:
    net = _net(adversary=False).eval()
    batch = _batch(net, 16)
    assert net.discriminator is None
    assert torch.equal(net.loss(batch, PARTIAL), PARTIAL(net(batch["image"]), batch["label"]))
    # The same segmentor, as its own model too: the same weights, drawn in the same order.
    other = _net().eval()
    torch.manual_seed(0)
    alone = GatedUNet(GatedUNetConfig(channels=(4, 6, 8)), net.shape).eval()
    assert torch.equal(other(batch["image"]), net(batch["image"]))
    assert torch.equal(alone(batch["image"]), net(batch["image"]))
    assert torch.equal(alone.loss(batch, PARTIAL), net.loss(batch, PARTIAL))
    assert MAAG.wants_masks
    assert not GatedUNet.wants_masks
    del batch["masks"]
    with pytest.raises(ValueError, match="needs masks of other images"):
        other.loss(batch, PARTIAL)


def test_noise_and_flips_are_of_training_alone() -> None:
    net = _net(flip=1.0)
    judge = net.discriminator
    assert judge is not None
    real = torch.rand(2, 2, 16, 16)
    assert not torch.equal(judge([real]), judge([real]))
    judge.eval()
    assert torch.equal(judge([real]), judge([real]))
    answer = judge([real])
    assert float(judge.loss([real], 1.0)) == pytest.approx(float(0.5 * (answer - 1).square().mean()))
    with pytest.raises(ValueError, match="reads 2 masks, the finest of size"):
        judge([real[:, :, 1:]])


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("options", [{}, {"upsample": "deconv", "norm": "instance"}, {"gates": False}])
def test_any_size(ndim: int, options: dict[str, Any]) -> None:
    # 13 is padded to 16; around a real mask is background.
    net = _net(ndim, 13, **options)
    net.loss(_batch(net, 13), PARTIAL).backward()
    assert all(one.grad is not None and torch.isfinite(one.grad).all() for one in net.parameters())
    net.eval()
    for size in ((1,) * ndim, (7, 13, 5)[:ndim]):
        x = torch.randn(2, 1, *size)
        assert net(x).shape == (2, 3, *size)
        found = net.attention(x)
        assert list(found) == (["gate of level 2", "gate of level 1"] if net.config.gates else [])
        for amounts in found.values():
            assert amounts.shape == (2, *size)
            assert amounts.min() >= 0
            assert amounts.max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upsample": "linear"}, "upsample is 'linear'"),
        ({"norm": "layer"}, "norm is 'layer'"),
        ({"push": "none"}, "push is 'none'"),
        ({"flip_form": "none"}, "flip_form is 'none'"),
        ({"flip": 1.5}, "flip is a share"),
        ({"noise": -1.0}, "noise and adversarial"),
        ({"squeeze": 0}, "squeeze must be at least 1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _net(**options)
