"""PatchTST: A Time Series is Worth 64 Words: Long-term Forecasting with Transformers (Nie et al., 2023).

Shapes: B batch, L look-back, C channels, N patches, P patch length, D = d_model, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_shared.layers import Dropout
from attn_timeseries.config import PatchTSTConfig
from attn_timeseries.models.base import ForecastModel, SeriesShape
from attn_timeseries.models.layers import ChannelLinear, FeedForward, WindowNorm, self_mixer
from core_attn.contract import Growth, MechanismInfo, Pattern, TokenMixer
from core_attn.mechanisms.heads import MultiHeadMixer


class PatchTST(ForecastModel):
    """Section 3.1: every channel by itself is cut into overlapping patches, and each patch is a token.

    Instance normalisation; the end extended by `stride` copies of the last value; patches of P steps every `stride`;
    tokens W_p patch + W_pos; encoder layers with BatchNorm; all tokens of a channel together mapped to the horizon.

    Args:
        config, shape, mixer, mixer_args: see `ForecastModel`. The mixer is the attention of every layer. With the
            paper's own, softmax, and `res_attention`, each layer adds the scores of the layer before to its own.

    Raises:
        ValueError: a mixer that cannot compute self-attention; a look-back shorter than one patch;
            mixer_args for softmax with `res_attention`, which has no options.
    """

    config: PatchTSTConfig

    def __init__(
        self,
        config: PatchTSTConfig,
        shape: SeriesShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape)
        c, name = config, mixer or "softmax"
        if c.stride < 1 or not 1 <= c.patch_len <= shape.seq_len:
            raise ValueError(
                f"patch_len must lie between 1 and seq_len ({shape.seq_len}) and stride be at least 1, "
                f"got patch_len={c.patch_len} and stride={c.stride}"
            )
        residual = c.res_attention and name == "softmax"
        if residual and mixer_args:
            raise ValueError(
                f"with res_attention the softmax mixer takes no options, got {', '.join(mixer_args)}; "
                f"set res_attention to false"
            )
        patches = (shape.seq_len - c.patch_len) // c.stride + 2

        def attention() -> TokenMixer:
            if residual:
                return ResidualAttention(c.d_model, heads=c.n_heads)
            return self_mixer(name, c.d_model, c.n_heads, ordered=True, options=mixer_args or {})

        self.norm_window = (
            WindowNorm(shape.channels, affine=c.affine, subtract_last=c.subtract_last) if c.revin else None
        )
        self.patch_embedding = nn.Linear(c.patch_len, c.d_model)
        self.positions = nn.Parameter(torch.empty(patches, c.d_model).uniform_(-0.02, 0.02))
        self.dropout = Dropout(c.dropout)
        self.encoder = nn.ModuleList(
            PatchEncoderLayer(attention(), c.d_ff, dropout=c.dropout) for _ in range(c.e_layers)
        )
        self.head = ChannelLinear(shape.channels if c.individual else 1, patches * c.d_model, shape.pred_len)
        self.head_dropout = Dropout(c.head_dropout)

    def forward(self, x: Tensor, x_mark: Tensor, y_mark: Tensor) -> Tensor:
        self.check_inputs(x, x_mark, y_mark)
        c = self.config
        if self.norm_window is not None:
            x, statistics = self.norm_window(x)
        x = torch.cat([x, x[:, -1:].expand(-1, c.stride, -1)], dim=1).transpose(1, 2)
        patches = x.flatten(0, 1).unfold(-1, c.patch_len, c.stride)  # (B C, N, P)
        tokens = self.dropout(self.patch_embedding(patches) + self.positions)
        scores = None
        for layer in self.encoder:
            tokens, scores = layer(tokens, scores)
        tokens = tokens.flatten(1).unflatten(0, (-1, self.shape.channels))  # (B, C, N D)
        y = self.head_dropout(self.head(tokens.transpose(1, 2)))
        return self.norm_window.undo(y, statistics) if self.norm_window is not None else y


class PatchEncoderLayer(nn.Module):
    """Attention, then feed-forward, each added to its input and batch-normalised after."""

    def __init__(self, attention: TokenMixer, hidden: int, *, dropout: float) -> None:
        super().__init__()
        self.attention = attention
        self.norm1 = nn.BatchNorm1d(attention.dim)
        self.feed_forward = FeedForward(attention.dim, hidden, dropout=dropout, activation="gelu")
        self.norm2 = nn.BatchNorm1d(attention.dim)
        # The official layer drops the attention's result twice, each with `dropout`: the same as once with this.
        self.dropout = Dropout(1 - (1 - dropout) ** 2)

    def forward(self, x: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, N, D), scores of the layer before -> (B, N, D), this layer's scores; None where there are none."""
        if isinstance(self.attention, ResidualAttention):
            mixed, scores = self.attention.with_scores(x, scores)
        else:
            mixed = self.attention(x)
        x = self._batch_norm(self.norm1, x + self.dropout(mixed))
        return self._batch_norm(self.norm2, x + self.feed_forward(x)), scores

    @staticmethod
    def _batch_norm(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
        return norm(x.flatten(0, 1)).view_as(x)


class ResidualAttention(MultiHeadMixer):
    """Softmax attention whose scores add those of the layer before: S_l = Q K^T / sqrt(D / H) + S_{l-1}.

    "RealFormer: Transformer Likes Residual Attention" (He et al., 2021), Section 3.2. Its maps can be captured.
    """

    info: ClassVar[MechanismInfo] = MechanismInfo(
        name="residual_softmax",
        title="RealFormer: Transformer Likes Residual Attention",
        source="He et al. 2021",
        year=2021,
        patterns=frozenset({Pattern.NONCAUSAL_SELF}),
        time=Growth.QUADRATIC,
        memory=Growth.QUADRATIC,
        maps=True,
    )

    def with_scores(self, x: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, N, D), (B, H, N, N) -> mixed (B, N, D) and scores (B, H, N, N), both layers' sum."""
        q, k, v = (self.split_heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        scores = self._scores(q, k, previous)
        out = F.softmax(scores, dim=-1) @ v
        if self._tap is not None:
            out = self._tap(self, q, k, v, out, None, previous)
        return self.out_proj(self.merge_heads(out)), scores

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return F.softmax(self._scores(q, k, aux), dim=-1)

    def _scores(self, q: Tensor, k: Tensor, previous: Tensor | None) -> Tensor:
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        return scores if previous is None else scores + previous
