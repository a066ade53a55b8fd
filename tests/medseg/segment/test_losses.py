"""Losses against their formulas and MONAI's own, and which voxels they count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attn_medseg.models.base import IGNORE
from attn_medseg.segment.losses import criterion
from attn_medseg.segment.options import SegmentTaskConfig


def loss(**chosen: object) -> object:
    return criterion(SegmentTaskConfig(**chosen))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 4, 9, 7, dtype=torch.float64), torch.randint(0, 4, (3, 9, 7))


def test_losses_are_their_formulas(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, label = batch
    p, y = logits.softmax(1), F.one_hot(label, 4).movedim(-1, 1).double()
    share = 2 * (p * y).sum((0, 2, 3)) / (p + y).sum((0, 2, 3))
    ce = F.cross_entropy(logits, label)
    assert loss(loss="ce")(logits, label) == pytest.approx(float(ce), abs=1e-12)
    assert loss(loss="dice")(logits, label) == pytest.approx(float(1 - share[1:].mean()), abs=1e-6)
    assert loss(loss="dice", dice_background=True)(logits, label) == pytest.approx(float(1 - share.mean()), abs=1e-6)
    assert loss()(logits, label) == pytest.approx(float(1 - share[1:].mean() + ce), abs=1e-6)
    true = (p * y).sum(1)
    assert loss(loss="focal")(logits, label) == pytest.approx(float(-((1 - true) ** 2 * true.log()).mean()), abs=1e-6)
    means = torch.stack([F.cross_entropy(logits, label, reduction="none")[label == k].mean() for k in range(4)])
    assert loss(loss="ce", class_weights=True)(logits, label) == pytest.approx(float(means.mean()), abs=1e-12)


def test_losses_are_monais() -> None:
    from monai.losses import DiceCELoss

    torch.manual_seed(1)
    logits, label = torch.randn(2, 3, 5, 6, 4), torch.randint(0, 3, (2, 5, 6, 4))
    right = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)(logits, label[:, None])
    assert loss()(logits, label) == pytest.approx(float(right), abs=1e-6)


@pytest.mark.parametrize("name", ["dice_ce", "dice", "ce", "focal"])
@pytest.mark.parametrize("balanced", [False, True])
def test_voxels_that_nobody_drew_count_nowhere(name: str, balanced: bool) -> None:
    torch.manual_seed(2)
    logits = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    label = torch.randint(0, 3, (2, 8, 8))
    label[:, 2:6] = IGNORE
    value = loss(loss=name, class_weights=balanced)
    first = logits.clone().requires_grad_()
    found = value(first, label)
    found.backward()
    assert first.grad is not None
    assert first.grad[:, :, 2:6].abs().max() == 0
    assert first.grad[:, :, :2].abs().max() > 0
    changed = logits.clone()
    changed[:, :, 2:6] = 50 * torch.randn(2, 3, 4, 8, dtype=torch.float64)
    assert value(changed, label) == pytest.approx(found.item(), abs=1e-12)
    nothing = value(logits.clone().requires_grad_(), torch.full_like(label, IGNORE))
    assert nothing.item() == 0
    nothing.backward()


def test_coarser_logits_are_resized() -> None:
    logits, label = torch.randn(1, 2, 4, 4), torch.randint(0, 2, (1, 8, 8))
    fine = F.interpolate(logits, size=(8, 8), mode="bilinear")
    assert loss()(logits, label) == loss()(fine, label)
    assert torch.isfinite(loss()(torch.randn(1, 2, 2, 2, 2), torch.randint(0, 2, (1, 4, 5, 3))))
