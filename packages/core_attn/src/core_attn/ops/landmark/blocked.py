"""Landmark attention in plain PyTorch, a few rows at a time: any device, memory linear in L and M.

With L_ij the log-sum-exp of query i's scores in block j and g_ij its score of the block's landmark, the grouped softmax
is one softmax over e = s + (g_ij - L_ij) for the tokens of other blocks and e = s for the own. So the backward is that
of softmax attention, computed again from the saved log-sum-exp ("FlashAttention" (S66), algorithm 4), followed by that
of the offset. Statistics and accumulators are float32, or float64 for float64.

Shapes: N samples times heads, R queries of a tile, nb blocks of b keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_INF = float("inf")
_OPTIONS = (
    "Tensor q, Tensor k, Tensor v, Tensor landmarks, Tensor? padding, "
    "int block_size, bool causal, int? top, float scale"
)
# Scores of a tile: about what a core's cache holds; on accelerators what keeps them busy. Fewer for few channels, so
# that the tile does not outweigh what grows with the length.
_SCORES_ON_CPU, _SCORES = 2**18, 2**26


class _Tile(NamedTuple):
    """Which heads and queries (slices), how many blocks they may read, and the offset's parts.

    scores: (n, R, blocks, b), -inf where reading is not allowed.
    level: (n, R, blocks, 1), the log-sum-exp of each block's scores, 0 where it is empty.
    offset: (n, R, blocks, 1), g - L; 0 in the own block; -inf in blocks that are not read.
    own: (R, blocks, 1).
    """

    heads: slice
    rows: slice
    blocks: int
    scores: Tensor
    level: Tensor
    offset: Tensor
    own: Tensor


class _Call:
    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        landmarks: Tensor,
        padding: Tensor | None,
        block_size: int,
        causal: bool,
        top: int | None,
        scale: float,
    ) -> None:
        self.batch, self.heads, self.queries, _ = q.shape
        self.keys, self.number, self.size = k.shape[2], landmarks.shape[2], block_size
        self.causal, self.top, self.scale = causal, top, scale
        self.dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
        self.device = q.device
        self.elements = q.numel()
        room = self.number * self.size - self.keys
        self.q = self.flat(q) * scale
        self.k, self.v = (F.pad(self.flat(x), (0, 0, 0, room)) for x in (k, v))
        self.landmarks = self.flat(landmarks)
        real = F.pad(
            torch.ones(1, self.keys, dtype=torch.bool, device=q.device) if padding is None else padding, (0, room)
        )
        self.real = real.expand(self.batch, -1).repeat_interleave(self.heads, 0)
        self.masked = padding is not None or room > 0

    def flat(self, x: Tensor) -> Tensor:
        """(B, H, L, D) -> (B·H, L, D) in the working dtype."""
        return x.to(self.dtype).flatten(0, 1)

    def tiles(self) -> Iterator[_Tile]:
        count = self.q.shape[0]
        limit = min(_SCORES_ON_CPU if self.device.type == "cpu" else _SCORES, max(self.elements, 2**12))
        width = max(1, self.number * self.size)
        rows = max(1, min(64, limit // width))
        heads = max(1, limit // (width * rows))
        for h0 in range(0, count, heads):
            for r0 in range(0, self.queries, rows):
                yield self._tile(slice(h0, min(h0 + heads, count)), slice(r0, min(r0 + rows, self.queries)))

    def _tile(self, heads: slice, rows: slice) -> _Tile:
        position = torch.arange(rows.start, rows.stop, device=self.device) + (self.keys - self.queries)
        last = rows.stop - 1 + self.keys - self.queries
        blocks = min(self.number, max(0, last // self.size + 1)) if self.causal else self.number
        q = self.q[heads, rows]
        scores = torch.bmm(q, self.k[heads, : blocks * self.size].mT)
        token = torch.arange(blocks * self.size, device=self.device)
        if self.masked:
            torch.minimum(scores, _ceiling(self.real[heads, None, : blocks * self.size]), out=scores)
        if self.causal:
            torch.minimum(scores, _ceiling(token <= position[:, None]), out=scores)
        scores = scores.unflatten(-1, (blocks, self.size))
        block = torch.arange(blocks, device=self.device)
        own = block == position[:, None].div(self.size, rounding_mode="floor")
        level = torch.logsumexp(scores, -1) if blocks else scores.sum(-1)
        gates = torch.bmm(q, self.landmarks[heads, :blocks].mT)
        closed = own | (level == -_INF)
        if self.causal:
            closed = closed | (block * self.size > position[:, None])
        gates = gates.masked_fill(closed, -_INF)
        if self.top is not None and self.top < blocks:
            chosen = torch.zeros_like(gates, dtype=torch.bool).scatter(-1, gates.topk(self.top, -1).indices, True)
            gates = gates.masked_fill(~chosen, -_INF)
        level = level.masked_fill(level == -_INF, 0.0)
        offset = (gates - level).masked_fill(own, 0.0)
        return _Tile(heads, rows, blocks, scores, level[..., None], offset[..., None], own[..., None])


def _ceiling(keep: Tensor) -> Tensor:
    return torch.where(keep, _INF, -_INF)


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        c = _Call(q, k, v, *options)
        out = c.q.new_zeros(*c.q.shape[:2], v.shape[-1])
        # +inf where nothing may be read: exp(score - inf) is then the zero weight that the backward wants.
        lse = c.q.new_full((*c.q.shape[:2], 1), _INF)
        for t in c.tiles():
            if not t.blocks:
                continue
            p = (t.scores + t.offset).flatten(2)
            top = p.amax(dim=-1, keepdim=True)
            top.masked_fill_(top == -_INF, 0.0)
            p.sub_(top).exp_()
            total = p.sum(dim=-1, keepdim=True)
            empty = total == 0
            read = torch.bmm(p, c.v[t.heads, : p.shape[-1]])
            out[t.heads, t.rows] = read.div_(total.masked_fill(empty, 1.0))
            lse[t.heads, t.rows] = top.add_(total.log()).masked_fill_(empty, _INF)
        return out.view(*q.shape[:3], v.shape[-1]).to(q.dtype), lse.view(q.shape[:3])


def _backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        c = _Call(q, k, v, landmarks, *options)
        d = c.flat(dout)
        mean = (d * c.flat(out)).sum(dim=-1, keepdim=True)
        stats = lse.flatten(0, 1)[..., None]
        dq, dk, dv, dlandmarks = (torch.zeros_like(x) for x in (c.q, c.k, c.v, c.landmarks))
        for t in c.tiles():
            if not t.blocks:
                continue
            rows, keys, back = c.q[t.heads, t.rows], t.blocks * c.size, d[t.heads, t.rows]
            p = (t.scores + t.offset).flatten(2).sub_(stats[t.heads, t.rows]).exp_()
            dv[t.heads, :keys].baddbmm_(p.mT, back)
            ds = torch.bmm(back, c.v[t.heads, :keys].mT).sub_(mean[t.heads, t.rows]).mul_(p)
            ds = ds.unflatten(-1, (t.blocks, c.size))
            # The offset g - L: its gradient goes to the landmark's score, and less the block's softmax to the tokens'.
            doffset = ds.sum(-1, keepdim=True).masked_fill(t.own, 0.0)
            ds = ds.sub_((t.scores - t.level).exp_().mul_(doffset)).flatten(2)
            dgates = doffset.squeeze(-1)
            dk[t.heads, :keys].baddbmm_(ds.mT, rows)
            dlandmarks[t.heads, : t.blocks].baddbmm_(dgates.mT, rows)
            dq[t.heads, t.rows] = torch.bmm(ds, c.k[t.heads, :keys]).baddbmm_(dgates, c.landmarks[t.heads, : t.blocks])
        dq *= c.scale
        return (
            dq.view(q.shape).to(q.dtype),
            dk[:, : c.keys].reshape(k.shape).to(k.dtype),
            dv[:, : c.keys].reshape(v.shape).to(v.dtype),
            dlandmarks.view(landmarks.shape).to(landmarks.dtype),
        )


_op = torch.library.custom_op(
    "core_attn::landmark", _forward, mutates_args=(), schema=f"({_OPTIONS}) -> (Tensor, Tensor)"
)
_backward_op = torch.library.custom_op(
    "core_attn::landmark_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    statistics = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=statistics)


@_backward_op.register_fake
def _(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), landmarks.new_empty(landmarks.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, landmarks, padding, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, landmarks, padding)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, landmarks, padding = ctx.saved_tensors
    grads = _backward_op(dout, out, lse, q, k, v, landmarks, padding, *ctx.numbers)
    return *grads, None, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "blocked landmark attention has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    landmarks: Tensor,
    block_size: int,
    causal: bool,
    top: int | None,
    key_padding_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """The grouped softmax times v, arguments as `core_attn.ops.landmark_attention` hands them on.

    Time O(L·M); memory O(L·D + M·D) and at most one query's scores.
    """
    block_size = max(1, min(block_size, k.shape[2]))  # a block longer than the sequence would only be filled up
    out: Tensor = _op(q, k, v, landmarks, key_padding_mask, block_size, causal, top, scale)[0]
    return out
