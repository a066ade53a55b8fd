"""Routing attention: tokens read the tokens of their cluster, found by online k-means.

Efficient Content-Based Sparse Attention with Routing Transformers (S225), section 4 and algorithm 1.

Shapes: B batch, H heads of which R route and the others are local, L queries, M keys, D channels of a head, c clusters,
w tokens of a cluster.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn import ops
from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.naming import unknown
from core_attn.ops.softmax import reference
from core_attn.registry import register

SELECTIONS = ("causal", "paper")


class _Segments(NamedTuple):
    """Tokens sorted by cluster, each cluster's filled up to whole blocks: S slots, nb blocks.

    token: (B, R, S) the token in each slot, L where there is none.
    slot: (B, R, L) the slot of each token.
    blocks: (B, R, nb, nb) which blocks belong to one cluster.
    size: slots of a block.
    """

    token: Tensor
    slot: Tensor
    blocks: Tensor
    size: int


@register(
    name="routing",
    title="Efficient Content-Based Sparse Attention with Routing Transformers",
    source="S225",
    year=2020,
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_SELF}),
    time=Growth.QUADRATIC,
    memory=Growth.LINEAR,
    padding=True,
    maps=True,
    selects=True,
    batch_dependent_training=True,
    double_backward=False,
    cascade=Cascade(
        einsums=(
            "W[b,h,k,m] = Q[b,h,m,d] * mu[h,k,d]",
            "I[b,h,k,i] = top[m] W[b,h,k,m]",
            "QK[b,h,k,i,j] = Q[b,h,I[i],d] * K[b,h,I[j],d]",
            "A[b,h,k,i,j] = softmax[j] QK[b,h,k,i,j]",
            "X[b,h,k,i,d] = A[b,h,k,i,j] * V[b,h,I[j],d]",
            "Z[b,h,l,d] = mean[k, i: I[b,h,k,i] = l] X[b,h,k,i,d]",
        ),
        passes=3,
        flops="4*B*L*C**2 + 4*B*M*C**2 + 4*B*H*P*D + 2*B*R*N*K*D",
        bytes="E*(2*B*L*C + B*M*C + 4*C**2 + R*K*D)",
        symbols={"R": "heads that route", "N": "queries and keys that are routed", "K": "clusters"},
    ),
)
class RoutingAttention(MultiHeadMixer):
    """Half of the heads read the tokens of the same cluster, the others a local window.

    Queries and keys are layer-normalised without scale and bias, and compared with the c centroids of their head. In
    algorithm 1 each centroid takes the w = n/c tokens nearest to it, queries and keys apart; these attend among each
    other. A token in several clusters gets the mean of what it read, one in none gets zeros. When causal, the keys are
    the queries (alg. 1).

    Which tokens are the nearest of a whole sequence depends on its end, so that form lets the future choose when it is
    causal: it is `selection="paper"`. The default is the equation of section 4.1 instead, to which the paper's w tokens
    are an approximation of equal size: token i reads those tokens up to itself whose nearest centroid is its own
    nearest centroid, however many. Without `causal` both are the paper's w nearest.

    In train mode every backward moves the centroids towards the mean direction of the tokens that were nearest to them
    in forward, μ ← λ μ + (1 - λ) mean; centroids without tokens stay. (Compiled, forward moves them.) The paper writes
    sums of tokens where spherical k-means, which it names, takes the direction of their mean.

    Args:
        dim, heads, causal, bias: see `MultiHeadMixer`.
        clusters: number of centroids c of a head; the paper takes about √n.
        window: tokens w that a centroid takes; ⌈n / clusters⌉ by default, n the real tokens. Not for the default
            selection when causal.
        local_heads: heads that read a window instead, the first ones; half of all by default.
        local_window: they read the tokens nearer than so many positions.
        selection: "causal" or "paper", see above.
        decay: λ of the centroids' moving mean.

    Raises:
        ValueError: an option out of its range.
        UnknownNameError: no such selection.
    """

    centroids: Tensor

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        bias: bool = True,
        clusters: int = 8,
        window: int | None = None,
        local_heads: int | None = None,
        local_window: int = 64,
        selection: str = "causal",
        decay: float = 0.999,
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        self.local_heads = heads // 2 if local_heads is None else local_heads
        if not 0 <= self.local_heads <= heads:
            raise ValueError(f"local_heads must lie from 0 to heads = {heads}, got {local_heads}")
        if clusters < 1 or local_window < 1 or (window is not None and window < 1):
            raise ValueError(
                f"clusters, window and local_window must be positive, got {clusters}, {window} and {local_window}"
            )
        if selection not in SELECTIONS:
            raise unknown("selection", selection, SELECTIONS)
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        self.whole_clusters = causal and selection == "causal"
        if self.whole_clusters and window is not None:
            raise ValueError(
                "window is the number of tokens a centroid takes with selection='paper'; the causal selection reads "
                "whole clusters, so leave it out"
            )
        self.clusters = clusters
        self.window = window
        self.local_window = local_window
        self.selection = selection
        self.decay = decay
        start = F.normalize(torch.randn(heads - self.local_heads, clusters, self.head_dim), dim=-1)
        self.register_buffer("centroids", start)

    def side_input(
        self,
        q: Tensor,
        k: Tensor,
        *,
        x: Tensor,
        query_padding_mask: Tensor | None,
        grid: tuple[int, ...] | None,
        generator: torch.Generator | None,
    ) -> Tensor | None:
        """The queries' padding mask."""
        return query_padding_mask

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        n = self.local_heads
        outs = []
        if n:
            outs.append(
                ops.softmax_attention(
                    q[:, :n],
                    k[:, :n],
                    v[:, :n],
                    causal=self.causal,
                    key_padding_mask=key_padding_mask,
                    window=self.local_window,
                )
            )
        if n < self.heads:
            q, k = self._normalised(q[:, n:], k[:, n:])
            route = self._whole_clusters if self.whole_clusters else self._nearest
            out = route(q, k, v[:, n:], key_padding_mask, aux)
            if self.training:
                self._move_centroids(out, self._means(q, k, key_padding_mask, aux))
            outs.append(out)
        return torch.cat(outs, dim=1)

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        n = self.local_heads
        options: dict[str, Any] = {"causal": self.causal, "bias": None, "key_padding_mask": key_padding_mask}
        scale = self.head_dim**-0.5
        maps = [
            reference.weights(
                reference.scores(q[:, :n], k[:, :n], mask=None, window=self._local_span(), scale=scale, **options)
            )
        ]
        q, k = self._normalised(q[:, n:], k[:, n:])
        if self.whole_clusters:
            own = self._affinity(q).argmax(-1)
            if aux is not None:
                own = own.masked_fill(~aux[:, None], self.clusters)
            mask = (own[..., :, None] == own[..., None, :]) & (own < self.clusters)[..., None, :]
            maps.append(reference.weights(reference.scores(q, k, mask=mask, window=None, scale=scale, **options)))
        else:
            maps.append(self._nearest_map(q, k, key_padding_mask, aux))
        return torch.cat([m.to(q.dtype) for m in maps], dim=1)

    def _local_span(self) -> tuple[int, int]:
        return self.local_window - 1, 0 if self.causal else self.local_window - 1

    def _normalised(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q = F.layer_norm(q, (self.head_dim,))
        return q, q if self.causal else F.layer_norm(k, (self.head_dim,))

    def _affinity(self, x: Tensor) -> Tensor:
        """(B, R, L, D) -> (B, R, L, c): how near each centroid is, without gradient."""
        precise = torch.float64 if x.dtype is torch.float64 else torch.float32
        return x.detach().to(precise) @ self.centroids.to(precise).mT

    # The w nearest tokens of each centroid

    def _take(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """The tokens (B, R, c, w) that each centroid takes, in order; L where a sample has fewer real tokens."""
        length = x.shape[2]
        affinity = self._affinity(x).mT
        width = min(length, self.window or -(-length // self.clusters))
        if padding is None:
            return affinity.topk(width, dim=-1).indices.sort(dim=-1).values
        real = padding.sum(-1)[:, None, None, None]
        share = -(-real // self.clusters) if self.window is None else real
        affinity = affinity.masked_fill(~padding[:, None, None], float("-inf"))
        # Ranked by affinity, so that a sample with less to take leaves out the last.
        index = affinity.topk(width, dim=-1).indices
        rank = torch.arange(width, device=x.device)
        return index.masked_fill(rank >= torch.minimum(share, real), length).sort(dim=-1).values

    def _both(self, q: Tensor, k: Tensor, key_padding: Tensor | None, query_padding: Tensor | None) -> list[Tensor]:
        queries = self._take(q, query_padding)
        return [queries, queries if self.causal else self._take(k, key_padding)]

    def _nearest(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None, query_padding: Tensor | None
    ) -> Tensor:
        taken, read = self._both(q, k, key_padding, query_padding)
        queries, keys = q.shape[2], k.shape[2]
        out = ops.softmax_attention(
            _gather(q, taken).flatten(0, 2)[:, None],
            _gather(k, read).flatten(0, 2)[:, None],
            _gather(v, read).flatten(0, 2)[:, None],
            causal=self.causal,
            key_padding_mask=None if key_padding is None else (read < keys).flatten(0, 2),
        )
        place = taken.flatten(2)
        found = out.view(*place.shape, out.shape[-1])
        total = out.new_zeros(*q.shape[:2], queries + 1, out.shape[-1])
        total = total.scatter_add(2, place[..., None].expand_as(found), found)[:, :, :queries]
        return total / self._times(place, queries)[..., None].to(out.dtype)

    def _times(self, place: Tensor, queries: int) -> Tensor:
        """(B, R, L): in how many clusters a query is, 1 where in none."""
        times = torch.zeros(*place.shape[:2], queries + 1, dtype=torch.int64, device=place.device)
        return times.scatter_add(2, place, torch.ones_like(place))[..., :queries].clamp(min=1)

    def _nearest_map(self, q: Tensor, k: Tensor, key_padding: Tensor | None, query_padding: Tensor | None) -> Tensor:
        taken, read = self._both(q, k, key_padding, query_padding)
        queries, keys = q.shape[2], k.shape[2]
        total = torch.zeros(*q.shape[:2], queries + 1, keys + 1, dtype=q.dtype, device=q.device)
        for a, b in zip(taken.unbind(2), read.unbind(2), strict=True):
            mask = (b < keys)[..., None, :]
            if self.causal:
                mask = mask & (b[..., None, :] <= a[..., :, None])
            s = _gather(q, a) @ _gather(k, b).mT * self.head_dim**-0.5
            weights = reference.weights(s.masked_fill(~mask, float("-inf")))
            place = a[..., :, None] * (keys + 1) + b[..., None, :]
            total.flatten(2).scatter_add_(2, place.flatten(2), weights.flatten(2))
        return total[..., :queries, :keys] / self._times(taken.flatten(2), queries)[..., None]

    # All tokens of the own cluster so far

    def _whole_clusters(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None, query_padding: Tensor | None
    ) -> Tensor:
        s = self._segments(q, key_padding)
        real = s.token < q.shape[2]
        # One sample a head: each head has an order of its own, so which slots are real differs between them.
        out = ops.block_sparse_attention(
            _gather(q, s.token).flatten(0, 1)[:, None],
            _gather(k, s.token).flatten(0, 1)[:, None],
            _gather(v, s.token).flatten(0, 1)[:, None],
            blocks=s.blocks.flatten(0, 1)[:, None],
            block_size=s.size,
            causal=True,
            key_padding_mask=real.flatten(0, 1),
        )
        return _gather(out.view(*s.token.shape, out.shape[-1]), s.slot)

    def _segments(self, x: Tensor, padding: Tensor | None) -> _Segments:
        length, c = x.shape[2], self.clusters
        share = -(-length // c)
        size = min(64, max(8, 1 << max(share // 2, 1).bit_length() - 1))
        own = self._affinity(x).argmax(-1)
        if padding is not None:
            own = own.masked_fill(~padding[:, None], c)  # a cluster of its own, which nobody reads
        order = own.argsort(dim=-1, stable=True)
        counts = torch.zeros(*own.shape[:2], c + 1, dtype=torch.int64, device=x.device)
        counts = counts.scatter_add(-1, own, torch.ones_like(own))
        whole = (counts + size - 1) // size * size
        start, first = whole.cumsum(-1) - whole, counts.cumsum(-1) - counts
        sorted_own = own.gather(-1, order)
        rank = torch.arange(length, device=x.device) - first.gather(-1, sorted_own)
        place = start.gather(-1, sorted_own) + rank
        number = length // size + c + 1
        token = torch.full((*own.shape[:2], number * size), length, device=x.device).scatter(-1, place, order)
        slot = torch.zeros_like(own).scatter(-1, order, place)
        begin = torch.arange(number, device=x.device) * size
        cluster = (begin[:, None] >= (start + whole)[..., None, :]).sum(-1)
        blocks = (cluster[..., :, None] == cluster[..., None, :]) & (cluster < c)[..., None, :]
        return _Segments(token, slot, blocks, size)

    # Training

    def _move_centroids(self, out: Tensor, means: Tensor) -> None:
        """Move them in the backward of `out`: a forward alone, or one repeated by checkpointing, trains nothing."""

        def move(_: Any) -> None:
            self.centroids.lerp_(means, 1.0 - self.decay)

        if torch.compiler.is_compiling():  # no hooks inside a graph
            move(None)
        elif out.requires_grad:
            out.register_hook(move)

    @torch.no_grad()
    def _means(self, q: Tensor, k: Tensor, key_padding: Tensor | None, query_padding: Tensor | None) -> Tensor:
        """(R, c, D): the mean direction of the tokens nearest to each centroid, itself where there are none."""
        total = torch.zeros_like(self.centroids)
        times = torch.zeros_like(self.centroids[..., :1])
        for x, padding in [(q, query_padding)] + ([] if self.causal else [(k, key_padding)]):
            near = F.one_hot(self._affinity(x).argmax(-1), self.clusters).to(total.dtype)
            if padding is not None:
                near = near * padding[:, None, :, None]
            total += torch.einsum("bhlk,bhld->hkd", near, F.normalize(x, dim=-1).to(total.dtype))
            times += near.sum((0, 2))[..., None]
        return torch.where(times > 0, F.normalize(total, dim=-1), self.centroids)

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        keys = length if context is None else context
        left, right = self._local_span()
        local = sum(
            max(0, min(i + keys - length + right, keys - 1) - max(i + keys - length - left, 0) + 1)
            for i in range(length)
        )
        widths = [min(n, self.window or -(-n // self.clusters)) for n in (length, keys)]
        # How many a cluster holds depends on the data; equal shares are what the centroids tend to.
        routed = self.clusters * widths[0] * widths[1] / (2 if self.causal else 1)
        n = self.local_heads
        return {
            **sizes,
            "P": (n * local + (self.heads - n) * routed) / self.heads,
            "R": self.heads - n,
            "N": length if self.causal else length + keys,
            "K": self.clusters,
        }

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, causal={self.causal}, clusters={self.clusters}, local_heads={self.local_heads}, "
            f"selection={self.selection!r}"
        )


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """(B, R, L, D) by (B, R, …) -> (B, R, …, D); what the index L names is some token, for others to mask."""
    rows = index.flatten(2).clamp(max=max(x.shape[2] - 1, 0))
    return x.gather(2, rows[..., None].expand(*rows.shape, x.shape[3])).unflatten(2, index.shape[2:])
