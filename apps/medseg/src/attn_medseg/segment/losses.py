"""Losses of segmentation over drawn voxels, from MONAI's parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_medseg.models.base import IGNORE, Criterion
from attn_medseg.segment.options import SegmentTaskConfig


def criterion(config: SegmentTaskConfig) -> Criterion:
    """The loss that the options name.

    Returns:
        (B, K, *S') logits and (B, *S) labels -> a scalar, the mean over voxels that are not IGNORE. Logits of a coarser
        grid are brought to that of the labels linearly. 0 where no voxel is drawn.
    """
    parts: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = []
    if config.loss in ("dice_ce", "dice"):
        parts.append(_dice(config.dice_background))
    if config.loss in ("dice_ce", "ce"):
        parts.append(_cross_entropy(config.class_weights))
    if config.loss == "focal":
        parts.append(_focal(config.class_weights))

    def loss(logits: Tensor, label: Tensor) -> Tensor:
        logits = resized(logits, label.shape[1:])
        drawn = label != IGNORE
        target = torch.where(drawn, label.long(), 0)
        if not drawn.any():
            return logits.sum() * 0.0
        return torch.stack([part(logits, target, drawn) for part in parts]).sum()

    return loss


def resized(logits: Tensor, size: torch.Size) -> Tensor:
    """(B, K, *S') -> (B, K, *S), linearly where they differ."""
    if logits.shape[2:] == size:
        return logits
    return F.interpolate(logits, size=tuple(size), mode="trilinear" if len(size) == 3 else "bilinear")


def _dice(background: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from monai.losses import DiceLoss

    # Over the batch as a whole: a structure that a patch lacks would else cost the same however little is invented.
    dice = DiceLoss(include_background=background, batch=True)

    def loss(logits: Tensor, target: Tensor, drawn: Tensor) -> Tensor:
        probability = logits.softmax(dim=1)
        truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1)
        kept = drawn[:, None]
        value: Tensor = dice(probability * kept, truth.to(probability.dtype) * kept)
        return value

    return loss


def _cross_entropy(balanced: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(logits: Tensor, target: Tensor, drawn: Tensor) -> Tensor:
        return _mean(F.cross_entropy(logits, target, reduction="none"), target, drawn, balanced, logits.shape[1])

    return loss


def _focal(balanced: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from monai.losses import FocalLoss

    focal = FocalLoss(use_softmax=True, to_onehot_y=True, reduction="none")

    def loss(logits: Tensor, target: Tensor, drawn: Tensor) -> Tensor:
        # Of the classes only the true one has a term.
        each = focal(logits, target[:, None]).sum(dim=1)
        return _mean(each, target, drawn, balanced, logits.shape[1])

    return loss


def _mean(each: Tensor, target: Tensor, drawn: Tensor, balanced: bool, classes: int) -> Tensor:
    """The mean over drawn voxels, or over the means of the classes that are drawn."""
    each, target = each[drawn], target[drawn]
    if not balanced:
        return each.mean()
    total = each.new_zeros(classes).index_add(0, target, each)
    count = torch.bincount(target, minlength=classes)
    there = count > 0
    return (total[there] / count[there]).mean()
