"""Hiformer (S9): fields attend to fields, and what a field asks, offers and tells is made from all fields together.

"Hiformer: Heterogeneous Feature Interactions Learning with Transformers for Recommender Systems" (Gui et al., 2023).
Token 0 is the task's; L counts it. There is no official code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_recsys.models.autoint import head_mixer
from attn_recsys.models.clicks import ClickModel, ClicksShape
from attn_recsys.models.fields import FieldVectors
from attn_shared.layers import Dropout
from core_attn import build
from core_attn.contract import TokenMixer
from core_attn.mechanisms.softmax.exact import SoftmaxAttention


class FieldLinear(nn.Module):
    """A linear map of each field's own: (B, l, C) -> (B, l, O) for the first l fields.

    Args:
        fields: how many fields L.
        inputs, outputs: C and O.
        bias: whether there is one.
    """

    def __init__(self, fields: int, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fields, inputs, outputs).uniform_(-1, 1) * inputs**-0.5)
        self.bias = nn.Parameter(torch.zeros(fields, outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[1]
        if count == 1:
            y = (x[:, 0] @ self.weight[0]).unsqueeze(1)
        else:
            y = torch.bmm(x.transpose(0, 1), self.weight[:count]).transpose(0, 1)
        return y if self.bias is None else y + self.bias[:count]


class CompositeLinear(nn.Module):
    """What each field gets is made from all fields: [y_1 … y_L] = [x_1 … x_L] W, W of (L·C) × (L·O).

    With a rank r, W = left · right with left of (L·C) × r and right of r × (L·O); r counts all heads together.

    Args:
        fields: how many fields L.
        inputs, outputs: C and O.
        rank: r; 0 = full.
    """

    def __init__(self, fields: int, inputs: int, outputs: int, *, rank: int = 0) -> None:
        super().__init__()
        if rank < 0:
            raise ValueError(f"rank must be 0 or more, got {rank}")
        self.fields, self.outputs = fields, outputs
        wide, far = fields * inputs, fields * outputs
        self.left = nn.Parameter(torch.empty(rank, wide).uniform_(-1, 1) * wide**-0.5) if rank else None
        scale = (rank if rank else wide) ** -0.5
        self.right = nn.Parameter(torch.empty(far, rank if rank else wide).uniform_(-1, 1) * scale)

    def forward(self, x: Tensor, count: int | None = None) -> Tensor:
        """(B, L, C) -> (B, count, O), the first `count` fields' only."""
        count = self.fields if count is None else count
        flat = x.flatten(1)
        if self.left is not None:
            flat = F.linear(flat, self.left)
        return F.linear(flat, self.right[: count * self.outputs]).unflatten(1, (count, self.outputs))

    @torch.no_grad()
    def low_rank(self, rank: int) -> CompositeLinear:
        """The nearest map of that rank, by singular values; the same map where the rank is full."""
        whole = (self.right if self.left is None else self.right @ self.left).double()
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        rank = min(rank, len(s))
        made = CompositeLinear(self.fields, whole.shape[1] // self.fields, self.outputs, rank=rank).double()
        root = s[:rank].sqrt()
        assert made.left is not None
        made.left.copy_(root[:, None] * v[:rank])
        made.right.copy_(u[:, :rank] * root)
        return made.to(self.right.device, self.right.dtype)


class FieldBlock(nn.Module):
    """Attention among fields and a feed-forward layer of each field's own, each added to its input and normalised.

    Args:
        config: Hiformer's options.
        fields: L, the task token included.
        mixer, mixer_args: what attends.
        last: whether nothing but the task token is read of what comes out.
    """

    def __init__(self, config: Any, fields: int, mixer: str, mixer_args: Mapping[str, Any], *, last: bool) -> None:
        super().__init__()
        dim, shared = config.embed_dim, config.projection == "shared"
        self.mixer: TokenMixer
        if shared:
            self.mixer = build(mixer, dim=dim, heads=config.heads, **mixer_args)
        else:
            heads = head_mixer(mixer, dim, config.heads, mixer_args)
            for name in ("q_proj", "k_proj", "v_proj"):
                width = getattr(heads, name).out_features
                if config.projection == "composite":
                    made: nn.Module = CompositeLinear(fields, dim, width, rank=config.rank)
                else:
                    made = FieldLinear(fields, dim, width, bias=False)
                setattr(heads, name, made)
            heads.out_proj = FieldLinear(fields, dim, dim)  # type: ignore[assignment]
            self.mixer = heads
        # Other mechanisms may read a row of their own in another way than the same row among others.
        self.pruned = last and config.pruned and type(self.mixer) is SoftmaxAttention
        self.last = last
        inner = config.ffn_factor * dim
        if shared:
            self.widen, self.narrow = nn.Linear(dim, inner), nn.Linear(inner, dim)
        else:
            self.widen, self.narrow = FieldLinear(fields, dim, inner), FieldLinear(fields, inner, dim)  # type: ignore[assignment]
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C), or (B, 1, C) where it is the last."""
        if self.pruned:
            mixed, x = self._task(x), x[:, :1]
        else:
            mixed = self.mixer(x)
        x = self.attention_norm(x + self.dropout(mixed))
        x = self.feed_forward_norm(x + self.dropout(self.narrow(F.gelu(self.widen(x)))))
        return x[:, :1] if self.last else x

    def _task(self, x: Tensor) -> Tensor:
        """(B, 1, C) what the task token alone reads."""
        mixer = self.mixer
        assert isinstance(mixer, SoftmaxAttention)
        project: Any = mixer.q_proj
        q = project(x, 1) if isinstance(project, CompositeLinear) else project(x[:, :1])
        q, k, v = mixer.split_heads(q), mixer.split_heads(mixer.k_proj(x)), mixer.split_heads(mixer.v_proj(x))
        out = mixer.attend(q, k, v, key_padding_mask=None, aux=None)
        found: Tensor = mixer.out_proj(mixer.merge_heads(out))
        return found


class Hiformer(ClickModel):
    """Layers of attention among a task token and the fields' vectors; the task token's last vector tells.

    The head of a layer weighs field j for field i by softmax_j(q_i k_jᵀ / √D). With "heterogeneous" projections q_i =
    e_i Q_i, k_j = e_j K_j, v_j = e_j V_j (the heterogeneous attention layer); with "composite" ones [q_1 … q_L] =
    [e_1 … e_L] Q and so on (Hiformer), of full or low rank. Feed-forward layers and what joins heads are each field's
    own. As only the task token is read in the end, the last layer need not compute the others (pruned).

    Raises:
        ValueError: heads that do not divide embed_dim; no layer; a mechanism that does not fit.
    """

    def __init__(
        self,
        config: Any,
        shape: ClicksShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape)
        if config.layers < 1:
            raise ValueError(f"layers must be 1 or more, got {config.layers}")
        dim, together = config.embed_dim, config.numeric_tokens if shape.numeric else 0
        self.vectors = FieldVectors(shape, dim, numeric=not together)
        self.together = None
        if together:
            self.together = nn.Sequential(
                nn.Linear(len(shape.numeric), 2 * together * dim),
                nn.GELU(),
                nn.Linear(2 * together * dim, together * dim),
            )
        self.task = nn.Parameter(torch.empty(dim).normal_(std=0.05))
        fields = 1 + len(self.vectors) + together
        name = mixer or "softmax"
        options = dict(mixer_args or {})
        if name == "softmax" and config.projection == "shared":
            options = {"bias": False, **options}
        self.blocks = nn.ModuleList(
            FieldBlock(config, fields, name, options, last=i == config.layers - 1) for i in range(config.layers)
        )
        self.dropout = Dropout(config.dropout)
        self.score = nn.Linear(dim, 1)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        x = self.vectors(batch)
        if self.together is not None:
            numbers = self.together(batch["numbers"].to(x.dtype))
            x = torch.cat([x, numbers.unflatten(1, (-1, x.shape[-1]))], dim=1)
        x = self.dropout(torch.cat([self.task.expand(x.shape[0], 1, -1), x], dim=1))
        for block in self.blocks:
            x = block(x)
        odds: Tensor = self.score(x[:, 0]).squeeze(-1)
        return odds


def low_rank(model: Hiformer, rank: int) -> Hiformer:
    """`model` with every composite projection replaced, in place, by its nearest one of that rank."""
    for block in model.blocks:
        for name in ("q_proj", "k_proj", "v_proj"):
            old = getattr(block.mixer, name, None)
            if isinstance(old, CompositeLinear):
                setattr(block.mixer, name, old.low_rank(rank))
    return model
