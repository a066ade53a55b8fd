"""RBTransformer, from "A Brain Wave Encodes a Thousand Tokens" (S19).

Shapes: B batch, C electrodes, F bands, D = embed_dim, H heads of width d = head_dim, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attn_eeg.config import RBTransformerConfig
from attn_eeg.models.base import EegModel, EegShape
from attn_shared.layers import Dropout
from core_attn import registry
from core_attn.api import build, parameters
from core_attn.contract import Pattern, TokenMixer
from core_attn.mechanisms.softmax.exact import SoftmaxAttention


class RBTransformer(EegModel):
    """An electrode is a token, and attention runs between electrodes (section III).

        tokens = dropout(Linear(band differential entropies) + identity embedding of the electrode)
        tokens = tokens + dropout(attention(LN(tokens)));  tokens = tokens + feed_forward(LN(tokens)),  depth times
        logits = MLP(LN(mean over electrodes)),  MLP of widths D, 2D, 2D, D, K with GELU and dropout between

    The paper's attention is softmax over electrodes; queries, keys and values have no bias, and H·d need not be D.

    Args:
        config, shape, mixer, mixer_args: see `EegModel`. The mixer is the attention of every block; its sequence is the
            C electrodes, so a mechanism that reads the order of tokens reads the order of electrodes. Another mechanism
            than the paper's is built at width D with its own projections, and with as many of the heads as divide D.

    Raises:
        ValueError: raw windows; a mixer that cannot compute noncausal self-attention; an option out of its range.
    """

    config: RBTransformerConfig

    def __init__(
        self,
        config: RBTransformerConfig,
        shape: EegShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape)
        c = config
        if not shape.features:
            raise ValueError("RBTransformer reads band features, not raw windows; set data_args.features to bde")
        sizes = ("embed_dim", "depth", "heads", "head_dim", "mlp_hidden_dim")
        for name in sizes:
            if getattr(c, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(c, name)}")
        self.embedding = nn.Linear(shape.features, c.embed_dim)
        self.identity = nn.Parameter(torch.randn(shape.channels, c.embed_dim))
        self.dropout = Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            Block(electrode_mixer(mixer or "softmax", c, mixer_args or {}), c.mlp_hidden_dim, dropout=c.dropout)
            for _ in range(c.depth)
        )
        d = c.embed_dim
        self.norm = nn.LayerNorm(d)
        self.head = nn.Sequential(
            *(nn.Linear(d, 2 * d), nn.GELU(), Dropout(c.dropout)),
            *(nn.Linear(2 * d, 2 * d), nn.GELU(), Dropout(c.dropout)),
            *(nn.Linear(2 * d, d), nn.GELU(), Dropout(c.dropout)),
            nn.Linear(d, shape.classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        self.check_inputs(x)
        tokens = self.dropout(self.embedding(x) + self.identity)
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens.mean(dim=1)))
        return logits


class Block(nn.Module):
    """Attention between electrodes, then a feed-forward layer, each on normalised tokens and added to its input."""

    def __init__(self, attention: TokenMixer, hidden: int, *, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(attention.dim)
        self.attention = attention
        self.dropout = Dropout(dropout)
        self.feed_forward_norm = nn.LayerNorm(attention.dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(attention.dim, hidden),
            nn.GELU(),
            Dropout(dropout),
            nn.Linear(hidden, attention.dim),
            Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D) -> (B, C, D)."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.feed_forward(self.feed_forward_norm(x))


def electrode_mixer(name: str, config: RBTransformerConfig, options: Mapping[str, Any]) -> TokenMixer:
    """The attention of a block: the published one, or the mechanism `name` in its place.

    Raises:
        ValueError: the mechanism does not exist, cannot mix a sequence with itself, or refuses an option.
    """
    mechanism = registry.get(name)
    if not issubclass(mechanism, TokenMixer) or Pattern.NONCAUSAL_SELF not in mechanism.info.patterns:
        raise ValueError(f"{name} cannot compute noncausal self attention, which is what mixes electrodes here")
    if "dropout" in parameters(mechanism):
        options = {"dropout": config.dropout, **options}
    if name != "softmax":
        heads = max(h for h in range(1, config.heads + 1) if config.embed_dim % h == 0)
        return build(name, dim=config.embed_dim, heads=heads, **options)
    inner = config.heads * config.head_dim
    mixer = build(name, dim=inner, heads=config.heads, **options)
    assert isinstance(mixer, SoftmaxAttention)
    # Heads are cut by their width, so that only what enters and leaves them has to know of D.
    mixer.dim = config.embed_dim
    for projection in ("q_proj", "k_proj", "v_proj"):
        width = getattr(mixer, projection).out_features  # narrower with fewer heads of keys and values
        setattr(mixer, projection, nn.Linear(config.embed_dim, width, bias=False))
    mixer.out_proj = nn.Linear(inner, config.embed_dim)
    return mixer
