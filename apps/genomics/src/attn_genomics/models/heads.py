"""From what a backbone says of every place to classes or bases.

Shapes: B sequences, P places, C channels, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_shared.layers import Dropout

Pool = Literal["mean", "max", "last", "attention", "positional"]


class ClassHead(nn.Module):
    """One vector of all places, then classes.

    Args:
        width: channels C.
        classes: K.
        pool: see `SequencesTaskConfig`.
        bins: parts of "positional".
        hidden: width of a layer between; 0 = none.
        dropout: before each layer.
    """

    def __init__(self, width: int, classes: int, *, pool: Pool, bins: int, hidden: int, dropout: float) -> None:
        super().__init__()
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        self.pool, self.bins = pool, bins
        self.weigh = nn.Linear(width, 1) if pool == "attention" else None
        size = width * bins if pool == "positional" else width
        self.dropout = Dropout(dropout)
        self.hidden = nn.Linear(size, hidden) if hidden else None
        self.out = nn.Linear(hidden or size, classes)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, P, C), mask (B, P) True = real -> (B, K)."""
        x = self.dropout(self.summary(features, mask))
        if self.hidden is not None:
            x = self.dropout(F.relu(self.hidden(x)))
        return self.out(x)

    def summary(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """(B, P, C) -> (B, C), or (B, bins C) of "positional". Padding changes nothing."""
        if mask is None:
            mask = features.new_ones(features.shape[:2], dtype=torch.bool)
        counts = mask.sum(dim=1)
        real = mask.unsqueeze(-1)
        if self.pool == "max":
            return features.masked_fill(~real, -torch.inf).amax(dim=1)
        if self.pool == "last":
            return features[torch.arange(len(features), device=features.device), counts - 1]
        if self.pool == "attention":
            assert self.weigh is not None
            weights = self.weigh(features).squeeze(-1).masked_fill(~mask, -torch.inf).softmax(dim=1)
            return torch.einsum("bp,bpc->bc", weights, features)
        features = features.masked_fill(~real, 0.0)
        if self.pool == "positional":
            return self._parts(features, counts)
        return features.sum(dim=1) / counts.unsqueeze(1).to(features.dtype)

    def _parts(self, features: Tensor, counts: Tensor) -> Tensor:
        """Means of `bins` parts as equal as can be, each of at least one place: (B, bins C)."""
        edges = torch.arange(self.bins + 1, device=features.device)
        starts = edges[:-1] * counts[:, None] // self.bins
        ends = torch.maximum((edges[1:] * counts[:, None] + self.bins - 1) // self.bins, starts + 1)
        place = torch.arange(features.shape[1], device=features.device)
        inside = (place >= starts[..., None]) & (place < ends[..., None])
        weights = inside.to(features.dtype) / (ends - starts)[..., None].to(features.dtype)
        return torch.bmm(weights, features).flatten(1)
