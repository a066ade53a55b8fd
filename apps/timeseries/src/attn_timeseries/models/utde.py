"""Predictions from irregular series and notes: UTDE and interleaved fusion, S198.

X. Zhang, S. Li, Z. Chen, X. Yan and L. Petzold, "Improving Medical Predictions by Irregular Multimodal Electronic
Health Records Modeling", ICML 2023.

Shapes: B stays, N time points with an observation, V variables, T steps of the regular grid, M notes, E numbers that
describe a note, D = d_model channels, K labels. Times are shares of the period, from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_shared.layers import Dropout
from attn_timeseries.models.layers import FeedForward, cross_mixer, self_mixer

if TYPE_CHECKING:
    from attn_timeseries.config import UTDEConfig


@dataclass(frozen=True, kw_only=True)
class RecordsShape:
    """The shape of a prediction from records.

    Attributes:
        variables: V.
        steps: T.
        text: E; 0 = there are no notes.
        labels: K.
    """

    variables: int
    steps: int
    text: int
    labels: int


class TimeEmbedding(nn.Module):
    """A time as one linear and E_t - 1 periodic features with learned frequencies and phases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.periodic = nn.Linear(1, width - 1)

    def forward(self, time: Tensor) -> Tensor:
        """(B, N) -> (B, N, E_t)."""
        time = time.unsqueeze(-1)
        return torch.cat([self.linear(time), torch.sin(self.periodic(time))], dim=-1)


class TimeAttention(nn.Module):
    """Values at irregular times as an embedding at given times: mTAND ("Multi-Time Attention Networks for Irregularly
    Sampled Time Series", Shukla and Marlin, ICLR 2021), as Section 3.2 of S198 uses it.

    Each head compares embedded times; every variable is averaged with these weights over the times at which it was
    observed. What was never observed counts as 0. Numerator and denominator are two products with one (B, H, T, N)
    matrix for all variables, so no weight is held for each variable. Dropout draws once for all variables of a head.

    Args:
        variables: V.
        dim: D.
        time_dim: width of the embedded times.
        heads: divides time_dim.
        dropout: probability of dropping a weight.
    """

    def __init__(self, variables: int, dim: int, time_dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        if heads < 1 or time_dim % heads:
            raise ValueError(f"time_heads must divide embed_time, got {heads} and {time_dim}")
        self.heads = heads
        self.query = nn.Linear(time_dim, time_dim)
        self.key = nn.Linear(time_dim, time_dim)
        self.out = nn.Linear(variables * heads, dim)
        self.dropout = Dropout(dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, observed: Tensor) -> Tensor:
        """Embed.

        Args:
            query: (1, T, E_t) embedded times at which an embedding is wanted.
            key: (B, N, E_t) embedded times of the values.
            value: (B, N, V); anything where not observed.
            observed: (B, N, V), bool.

        Returns:
            (B, T, D).
        """
        q, k = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key))
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        mean = self._mean(scores, value.masked_fill(~observed, 0.0), observed)
        return self.out(mean.transpose(1, 2).flatten(2))

    def _mean(self, scores: Tensor, value: Tensor, observed: Tensor) -> Tensor:
        """(B, H, T, N), (B, N, V) -> (B, H, T, V): softmax over the observed times, variable by variable."""
        if scores.shape[-1] == 0:
            return scores.new_zeros(*scores.shape[:-1], value.shape[-1])
        ever = observed.any(dim=-1)[:, None, None]
        scores = scores.masked_fill(~ever, -torch.inf)
        top = scores.detach().amax(dim=-1, keepdim=True)
        weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0.0))
        known = observed.to(weights.dtype)[:, None]
        total = weights @ known
        wanted = observed.any(dim=1)[:, None, None]
        # A variable seen only where another's weights are e^80 times larger: its own maximum is needed.
        if bool(((total < 1e-30) & wanted).any()):
            return self._mean_of_each(scores, value, observed)
        return (self.dropout(weights) @ value[:, None]) / total.masked_fill(~wanted, 1.0)

    def _mean_of_each(self, scores: Tensor, value: Tensor, observed: Tensor) -> Tensor:
        each = scores.unsqueeze(-1).masked_fill(~observed[:, None, None], torch.finfo(scores.dtype).min)
        weights = self.dropout(each.softmax(dim=-2))
        return (weights * value[:, None, None]).sum(dim=-2)


class FusionLayer(nn.Module):
    """One layer of interleaved attention (Section 3.4): in every modality self-attention, then, where there are two,
    cross-attention of each to the other, then feed-forward; each after a LayerNorm and added to its input.
    """

    def __init__(
        self, modalities: int, dim: int, heads: int, *, mixer: str, options: Mapping[str, Any], dropout: float
    ) -> None:
        super().__init__()
        each = range(modalities)
        self.self_norm = nn.ModuleList(nn.LayerNorm(dim) for _ in each)
        self.self_attention = nn.ModuleList(
            self_mixer(mixer, dim, heads, dropout=dropout, options=options) for _ in each
        )
        pair = each if modalities == 2 else ()
        self.cross_norm = nn.ModuleList(nn.LayerNorm(dim) for _ in pair)
        self.cross_attention = nn.ModuleList(
            cross_mixer(mixer, dim, heads, dropout=dropout, options=options) for _ in pair
        )
        self.ff_norm = nn.ModuleList(nn.LayerNorm(dim) for _ in each)
        self.feed_forward = nn.ModuleList(FeedForward(dim, 4 * dim, dropout=dropout, activation="relu") for _ in each)
        self.dropout = Dropout(dropout)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """A (B, T, D) for each modality -> the same."""
        normed = [norm(x) for norm, x in zip(self.self_norm, xs)]
        xs = [x + self.dropout(mix(n)) for x, mix, n in zip(xs, self.self_attention, normed)]
        if len(xs) == 2:
            normed = [norm(x) for norm, x in zip(self.cross_norm, xs)]
            others = normed[::-1]
            xs = [x + self.dropout(mix(n, context=o)) for x, mix, n, o in zip(xs, self.cross_attention, normed, others)]
        return [x + ff(norm(x)) for x, ff, norm in zip(xs, self.feed_forward, self.ff_norm)]


class UTDE(nn.Module):
    """Records -> logits.

    The series become an embedding of T steps by UTDE (Section 3.2): a learned gate mixes, for each stay, step or
    channel, a convolution over the imputed regular grid with learned time attention (mTAND) over the observations as
    they are. Notes become T steps by time attention alone (mTAND_txt, Section 3.3). Layers of interleaved self- and
    cross-attention fuse both; the last steps of both are classified by a residual block and a linear layer.

    Args:
        config: sizes and what is left out.
        shape: the problem.
        mixer: name of the `core_attn` mechanism of self-attention, and of cross-attention where it has that pattern;
            None = softmax.
        mixer_args: its options.

    Raises:
        ValueError: an option out of its range, or a mechanism that does not fit.
    """

    def __init__(
        self,
        config: UTDEConfig,
        shape: RecordsShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        c, dim, dropout = config, config.d_model, config.dropout
        if c.kernel_size < 1 or c.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be a positive odd number of steps, got {c.kernel_size}")
        if c.embed_time < 2:
            raise ValueError(f"embed_time must be at least 2, got {c.embed_time}")
        if c.layers < 0:
            raise ValueError(f"layers must be 0 or more, got {c.layers}")
        self.config, self.shape = config, shape
        self.grid: Tensor
        self.register_buffer("grid", torch.linspace(0, 1, shape.steps), persistent=False)
        self.time = TimeEmbedding(c.embed_time) if c.series != "imputation" or shape.text else None
        self.series_attention: TimeAttention | None = None
        self.note_attention: TimeAttention | None = None
        self.imputed: nn.Conv1d | None = None
        self.gate: nn.Sequential | None = None
        if c.series != "imputation":
            self.series_attention = TimeAttention(2 * shape.variables, dim, c.embed_time, c.time_heads, dropout)
        if c.series != "mtand":
            half = c.kernel_size // 2
            self.imputed = nn.Conv1d(2 * shape.variables, dim, c.kernel_size, padding=half, bias=False)
        if c.series == "utde":
            width = dim if c.gate == "channel" else 1
            self.gate = nn.Sequential(
                Dropout(dropout), nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, width), nn.Sigmoid()
            )
            for layer in self.gate:
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_normal_(layer.weight)
        if shape.text:
            self.note_attention = TimeAttention(shape.text, dim, c.embed_time, c.time_heads, dropout)
        modalities = 2 if shape.text else 1
        self.positions = nn.Parameter(torch.randn(shape.steps, dim) * 0.02)
        self.layers = nn.ModuleList(
            FusionLayer(modalities, dim, c.n_heads, mixer=mixer or "softmax", options=mixer_args or {}, dropout=dropout)
            for _ in range(c.layers)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(modalities))
        self.proj1 = nn.Linear(modalities * dim, modalities * dim)
        self.proj2 = nn.Linear(modalities * dim, modalities * dim)
        self.out = nn.Linear(modalities * dim, shape.labels)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        observed: Tensor,
        time: Tensor,
        regular: Tensor,
        notes: Tensor | None = None,
        note_time: Tensor | None = None,
        note_mask: Tensor | None = None,
    ) -> Tensor:
        """Classify.

        Args:
            x: (B, N, V) values, scaled; anything where not observed.
            observed: (B, N, V), bool; False in rows that fill a stay up.
            time: (B, N).
            regular: (B, T, 2 V) the imputed grid and, behind it, 1 where a step holds an observation.
            notes: (B, M, E).
            note_time: (B, M).
            note_mask: (B, M), bool: real notes.

        Returns:
            (B, K).
        """
        xs = [self.embed_series(x, observed, time, regular)[0]]
        if self.note_attention is not None:
            assert notes is not None
            assert note_time is not None
            assert note_mask is not None
            assert self.time is not None
            known = note_mask.unsqueeze(-1).expand_as(notes)
            xs.insert(0, self.note_attention(self.time(self.grid[None]), self.time(note_time), notes, known))
        scale = math.sqrt(self.config.d_model)
        xs = [self.dropout(scale * one + self.positions) for one in xs]
        for layer in self.layers:
            xs = layer(xs)
        last = torch.cat([norm(one[:, -1]) for norm, one in zip(self.norm, xs)], dim=-1)
        return self.out(self.proj2(self.dropout(F.relu(self.proj1(last)))) + last)

    def embed_series(self, x: Tensor, observed: Tensor, time: Tensor, regular: Tensor) -> tuple[Tensor, Tensor | None]:
        """The series as T steps (B, T, D), and the gate: the share of time attention (B, 1 or T, 1 or D), or None."""
        if self.config.hide_missingness:
            values, _ = regular.chunk(2, dim=-1)
            x, observed = values, torch.ones_like(values, dtype=torch.bool)
            time = self.grid.expand(len(x), -1)
            regular = torch.cat([values, torch.ones_like(values)], dim=-1)
        learned = imputed = None
        if self.series_attention is not None:
            assert self.time is not None
            both = torch.cat([x, observed.to(x.dtype)], dim=-1)
            learned = self.series_attention(
                self.time(self.grid[None]), self.time(time), both, torch.cat([observed, observed], dim=-1)
            )
        if self.imputed is not None:
            imputed = self.imputed(regular.transpose(1, 2)).transpose(1, 2)
        if learned is None or imputed is None:
            one = learned if learned is not None else imputed
            assert one is not None
            return one, None
        assert self.gate is not None
        if self.config.gate == "stay":
            share = self.gate(torch.cat([learned.amax(dim=1), imputed.amax(dim=1)], dim=-1)).unsqueeze(1)
        else:
            share = self.gate(torch.cat([learned, imputed], dim=-1))
        return share * learned + (1 - share) * imputed, share
