"""Gated attention pooling of bags, with several branches and masking of the instances that score highest.

"Attention-based Deep Multiple Instance Learning" (2018), eq. 8-9, and "Attention-Challenging Multiple Instance Learning
for Whole Slide Image Classification" (S142), section 3. A pooling does not give a token back for each it is given, so
it is no `TokenMixer` and not among the registered mechanisms.

Shapes: B bags, N instances, C channels, K branches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Pooled:
    """What a bag is pooled to.

    Attributes:
        features: (B, K, C), the mean of the instances with the weights of each branch.
        bag: (B, C), with the mean of the branches' weights.
        weights: (B, K, N), each branch's, 0 at padding and at masked instances; they sum to 1, or to 0 in an empty bag.
        scores: (B, K, N) before the softmax, -inf at padding and at masked instances.
    """

    features: Tensor
    bag: Tensor
    weights: Tensor
    scores: Tensor


class GatedAttentionPooling(nn.Module):
    """softmax_N(w_kᵀ (tanh(V x) ⊙ σ(U x))) for K branches, and the weighted means of the instances.

    In training, with `top` > 0, of the `top` instances that score highest in a branch a random share `drop` is masked
    and the softmax goes over the rest, so that a branch cannot live on a few instances (S142, section 3.3). The draw
    differs from bag to bag and from branch to branch.

    Args:
        dim: channels C.
        hidden: channels of V x and U x.
        branches: K; 5 in ACMIL, 1 is gated attention pooling as it was.
        top: number of instances of which some are masked in training; 10 in ACMIL, 0 masks none.
        drop: share of them that is masked, in [0, 1); 0.6 in ACMIL. Of m instances, int(m · drop) are: bags with fewer
            instances than `top` lose fewer, and never all.
        bias: whether the three linear layers have a bias.
        dropout: probability of dropping a channel of tanh(V x) or of σ(U x) in training; 0.25 in MOTCat (S8).

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: int = 128,
        branches: int = 1,
        top: int = 0,
        drop: float = 0.6,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(dim, hidden, branches) < 1:
            raise ValueError(f"dim, hidden and branches must be positive, got {dim}, {hidden} and {branches}")
        if top < 0 or not 0.0 <= drop < 1.0:
            raise ValueError(f"top must not be negative and drop must lie in [0, 1), got {top} and {drop}")
        self.dim = dim
        self.top = top
        self.drop = drop
        self.value = nn.Linear(dim, hidden, bias=bias)
        self.gate = nn.Linear(dim, hidden, bias=bias)
        self.score = nn.Linear(hidden, branches, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Pooled:
        """Pool bags.

        Args:
            x: (B, N, C) instances.
            mask: (B, N) bool, True = real, for bags of different sizes. Values under False never matter.
            generator: where the draw of masked instances comes from; the global generator where None.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"the pooling takes instances (B, N, C) with C = {self.dim}, got {tuple(x.shape)}")
        if mask is not None:
            if mask.shape != x.shape[:2] or mask.dtype is not torch.bool:
                raise ValueError(
                    f"mask must be boolean of shape (B, N) = {tuple(x.shape[:2])}, got {mask.dtype} of "
                    f"{tuple(mask.shape)}"
                )
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        value, gate = torch.tanh(self.value(x)), torch.sigmoid(self.gate(x))
        scores = self.score(self.dropout(value) * self.dropout(gate)).mT
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], -torch.inf)
        if self.training and self.top:
            masked = top_instances(scores.detach(), self.top, self.drop, mask=mask, generator=generator)
            scores = scores.masked_fill(masked, -torch.inf)
        if mask is None:
            weights = torch.softmax(scores, dim=-1)
        else:
            empty = ~mask.any(dim=1)[:, None, None]
            weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
        features = weights @ x
        return Pooled(features, features.mean(dim=1), weights, scores)

    def extra_repr(self) -> str:
        return f"top={self.top}, drop={self.drop}"


def top_instances(
    scores: Tensor,
    top: int,
    drop: float,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which instances are masked: int(m · drop) at random of the m = min(top, instances) that score highest.

    Args:
        scores: (B, K, N), -inf at padding.
        top, drop, mask, generator: as in `GatedAttentionPooling`.

    Returns:
        (B, K, N) bool, True = masked.
    """
    batch, branches, size = scores.shape
    kept = min(top, size)
    best = scores.topk(kept, dim=-1).indices
    # In the order of the official code, so that the same state of the generator draws the same instances.
    draw = torch.rand(batch, branches, kept, generator=generator, device=scores.device)
    if mask is None:
        count = torch.full((batch, 1, 1), kept, device=scores.device)
    else:
        count = mask.sum(dim=1).clamp(max=kept)[:, None, None]
        place = torch.arange(kept, device=scores.device)
        draw = draw.masked_fill(place >= count, torch.inf)  # the last of the best are padding
    rank = draw.argsort(dim=-1).argsort(dim=-1)
    # In float64, as int(m * drop) is counted in Python.
    chosen = rank < (count.double() * drop).long()
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, chosen)
