"""Block-sparse attention in plain PyTorch, any device: only the blocks that are read are computed.

Each block of queries with the blocks of keys it reads, set side by side, is one piece of work; pieces of about the same
number of key blocks are computed together, in batches small enough to stay in the cache. The backward is that of
"FlashAttention" (S66), algorithm 4 (block-sparse: algorithm 5): the weights are computed again from the saved
log-sum-exp. Statistics and accumulators are float32, or float64 for float64.

Shapes: B batch, N = Hkv key heads, G query heads that read the same blocks of the same key head and so are one matrix,
nq and nk blocks of rows and columns tokens. R pieces in a batch, c key blocks in each of them, U = B·(H / G)·nq pieces
in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_INF = float("inf")
_OPTIONS = (
    "Tensor q, Tensor k, Tensor v, Tensor blocks, Tensor? padding, int rows, int columns, bool causal, float scale"
)
# Scores of a batch of pieces: about what a core's cache holds; on accelerators what keeps them busy. Never more than
# there are elements of the queries, unless a single piece is.
_SCORES_ON_CPU, _SCORES = 2**18, 2**26


class _Batch(NamedTuple):
    """Pieces that are computed together: which they are (R,), and their key blocks (R·c,) among all of all heads."""

    pieces: Tensor
    taken: Tensor
    key_ceiling: Tensor | None
    causal_ceiling: Tensor | None


class _Pieces:
    """One call, cut into pieces."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Tensor,
        padding: Tensor | None,
        rows: int,
        columns: int,
        causal: bool,
        scale: float,
    ) -> None:
        self.batch, self.heads, self.queries, _ = q.shape
        self.key_heads, self.keys = k.shape[1:3]
        self.rows, self.columns, self.causal, self.scale = rows, columns, causal, scale
        self.row_blocks, self.key_blocks = blocks.shape[2:]
        shared = self.heads // self.key_heads if self.key_heads else 1
        self.group = shared if blocks.shape[1] == 1 else 1
        self.dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
        self.device = q.device
        self.elements = q.numel()
        self.padding = padding
        self.k, self.v = self.by_key_block(k), self.by_key_block(v)
        if causal:
            blocks = blocks & self._reachable()
        lists = (self.batch, self.heads // self.group, self.row_blocks)
        counts = blocks.sum(-1)
        # Entry n of the list of all active blocks is key block `active[n]`; a piece's own entries end before `ends`.
        self.active = blocks.nonzero()[:, 3]
        self.ends = counts.flatten().cumsum(0).view(counts.shape).expand(lists).flatten()
        self.counts = counts.expand(lists).flatten()
        head = torch.arange(lists[0] * lists[1], device=self.device) // (shared // self.group)
        self.head = head.repeat_interleave(self.row_blocks)  # of each piece, among all samples' key heads

    def by_key_block(self, x: Tensor) -> Tensor:
        """(B, N, M, D) -> (B·N·nk, columns, D) in the working dtype, zeros behind the last token."""
        x = F.pad(x.to(self.dtype), (0, 0, 0, self.key_blocks * self.columns - self.keys))
        return x.unflatten(2, (self.key_blocks, self.columns)).flatten(0, 2)

    def from_key_blocks(self, x: Tensor, like: Tensor) -> Tensor:
        whole = x.view(self.batch, self.key_heads, self.key_blocks * self.columns, x.shape[-1])
        return whole[:, :, : self.keys].to(like.dtype).contiguous()

    def by_piece(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(B, H, L, D) -> (U, G·rows, D) in the working dtype."""
        x = F.pad(x.to(self.dtype), (0, 0, 0, self.row_blocks * self.rows - self.queries), value=fill)
        x = x.view(self.batch, self.heads // self.group, self.group, self.row_blocks, self.rows, x.shape[-1])
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def from_pieces(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.view(self.batch, self.heads // self.group, self.row_blocks, self.group, self.rows, x.shape[-1])
        x = x.transpose(2, 3).reshape(self.batch, self.heads, self.row_blocks * self.rows, x.shape[-1])
        return x[:, :, : self.queries].to(dtype).contiguous()

    def batches(self) -> Iterator[_Batch]:
        """All pieces that read anything, those of about equal counts together."""
        counts, order = self.counts.sort()
        limit = min(_SCORES_ON_CPU if self.device.type == "cpu" else _SCORES, self.elements)
        numbers = counts.tolist()
        first = next((n for n, count in enumerate(numbers) if count), len(numbers))
        while first < len(numbers):
            most = numbers[first] + numbers[first] // 8  # so much padding is cheaper than a batch of its own
            stop = first + 1
            while stop < len(numbers) and numbers[stop] <= most:
                if (stop + 1 - first) * numbers[stop] * self.group * self.rows * self.columns > limit:
                    break
                stop += 1
            yield self._batch(order[first:stop], numbers[first], numbers[stop - 1])
            first = stop

    def _batch(self, pieces: Tensor, least: int, most: int) -> _Batch:
        # Lists are set flush right, so that the blocks that causality cuts are the last in all of them.
        entry = self.ends[pieces, None] - most + torch.arange(most, device=self.device)
        block = self.active[entry.clamp(min=0)]
        taken = self.head[pieces, None] * self.key_blocks + block
        filled = entry >= (self.ends - self.counts)[pieces, None] if least < most else None
        causal_ceiling = self._causal_ceiling(pieces, block) if self.causal else None
        return _Batch(pieces, taken.flatten(), self._key_ceiling(pieces, block, filled), causal_ceiling)

    def _key_ceiling(self, pieces: Tensor, block: Tensor, filled: Tensor | None) -> Tensor | None:
        """(R, 1, c·columns): which keys are real."""
        keep = None if filled is None else filled[..., None].expand(*block.shape, self.columns)
        if self.padding is not None:
            real = F.pad(self.padding, (0, self.key_blocks * self.columns - self.keys))
            sample = self.head[pieces, None] // self.key_heads
            real = real.view(self.batch, self.key_blocks, self.columns)[sample, block]
            keep = real if keep is None else keep & real
        elif self.keys % self.columns:
            real = self._key_places(block) < self.keys
            keep = real if keep is None else keep & real
        return None if keep is None else _ceiling(keep.flatten(1)[:, None])

    def _causal_ceiling(self, pieces: Tensor, block: Tensor) -> Tensor:
        """(R, rows, n·columns) of the last n blocks, the only ones that may hold keys after some of the queries."""
        offset = self.keys - self.queries
        aligned = offset % self.columns == 0 and self.rows % self.columns == 0
        last = self.rows // self.columns if aligned else (self.rows + self.columns - 2) // self.columns + 1
        places = self._key_places(block[:, -last:]).flatten(1)
        query = (pieces % self.row_blocks)[:, None] * self.rows + torch.arange(self.rows, device=self.device) + offset
        return _ceiling(places[:, None] <= query[..., None])

    def _key_places(self, block: Tensor) -> Tensor:
        return block[..., None] * self.columns + torch.arange(self.columns, device=self.device)

    def _reachable(self) -> Tensor:
        """(nq, nk): key blocks that begin no later than the last query of a block of queries."""
        last = ((torch.arange(self.row_blocks, device=self.device) + 1) * self.rows).clamp(max=self.queries) - 1
        first = torch.arange(self.key_blocks, device=self.device) * self.columns
        return first <= last[:, None] + (self.keys - self.queries)

    def take(self, x: Tensor, batch: _Batch) -> Tensor:
        """The key blocks of a batch side by side: (R, c·columns, D)."""
        return x.index_select(0, batch.taken).unflatten(0, (len(batch.pieces), -1)).flatten(1, 2)

    def add(self, x: Tensor, batch: _Batch, increment: Tensor) -> None:
        x.index_add_(0, batch.taken, increment.view(len(batch.taken), *x.shape[1:]))

    def scores(self, q: Tensor, k: Tensor, batch: _Batch) -> Tensor:
        """(R, G·rows, c·columns) scores of scaled queries, -inf where reading is not allowed."""
        s = torch.bmm(q, k.transpose(1, 2))
        if batch.key_ceiling is not None:
            torch.minimum(s, batch.key_ceiling, out=s)
        if batch.causal_ceiling is not None:
            cut = s.unflatten(1, (self.group, self.rows))[..., -batch.causal_ceiling.shape[-1] :]
            torch.minimum(cut, batch.causal_ceiling[:, None], out=cut)
        return s


def _ceiling(keep: Tensor) -> Tensor:
    """+inf where reading is allowed, -inf elsewhere; the minimum with it is much faster than a masked fill on CPUs."""
    return torch.where(keep, _INF, -_INF)


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        b = _Pieces(q, k, v, *options)
        rows = b.by_piece(q)
        out = rows.new_zeros(*rows.shape[:2], v.shape[-1])
        # +inf where nothing may be read: exp(score - inf) is then the zero weight that the backward wants.
        lse = rows.new_full((*rows.shape[:2], 1), _INF)
        for batch in b.batches():
            p = b.scores(rows[batch.pieces].mul_(b.scale), b.take(b.k, batch), batch)
            top = p.amax(dim=-1, keepdim=True)
            top.masked_fill_(top == -_INF, 0.0)
            p.sub_(top).exp_()
            total = p.sum(dim=-1, keepdim=True)
            empty = total == 0
            out[batch.pieces] = torch.bmm(p, b.take(b.v, batch)).div_(total.masked_fill(empty, 1.0))
            lse[batch.pieces] = top.add_(total.log()).masked_fill_(empty, _INF)
        return b.from_pieces(out, q.dtype), b.from_pieces(lse, b.dtype).squeeze(-1)


def _backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        b = _Pieces(q, k, v, *options)
        rows, d = b.by_piece(q), b.by_piece(dout)
        mean = (d * b.by_piece(out)).sum(dim=-1, keepdim=True)
        stats = b.by_piece(lse.unsqueeze(-1), fill=_INF)
        drows, dk, dv = torch.zeros_like(rows), torch.zeros_like(b.k), torch.zeros_like(b.v)
        for batch in b.batches():
            taken, block = rows[batch.pieces].mul_(b.scale), b.take(b.k, batch)
            back = d[batch.pieces]
            p = b.scores(taken, block, batch).sub_(stats[batch.pieces]).exp_()
            b.add(dv, batch, torch.bmm(p.transpose(1, 2), back))
            ds = torch.bmm(back, b.take(b.v, batch).transpose(1, 2)).sub_(mean[batch.pieces]).mul_(p)
            b.add(dk, batch, torch.bmm(ds.transpose(1, 2), taken))
            drows[batch.pieces] = torch.bmm(ds, block).mul_(b.scale)
        return b.from_pieces(drows, q.dtype), b.from_key_blocks(dk, k), b.from_key_blocks(dv, v)


_op = torch.library.custom_op(
    "core_attn::block_sparse", _forward, mutates_args=(), schema=f"({_OPTIONS}) -> (Tensor, Tensor)"
)
_backward_op = torch.library.custom_op(
    "core_attn::block_sparse_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    statistics = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=statistics)


@_backward_op.register_fake
def _(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, blocks, padding, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, blocks, padding)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, blocks, padding = ctx.saved_tensors
    grads = _backward_op(dout, out, lse, q, k, v, blocks, padding, *ctx.numbers)
    return *grads, None, None, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "blocked block-sparse attention has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    blocks: Tensor,
    block_size: tuple[int, int],
    causal: bool,
    key_padding_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """softmax(q kᵀ · scale) v, arguments as `core_attn.ops.block_sparse_attention` hands them on.

    Time O(blocks read), forward and backward; memory O(L·D + M·D) and at most one row of blocks of scores.
    """
    # A block longer than the sequence would only be filled up.
    rows, columns = (max(1, min(n, x.shape[2])) for n, x in zip(block_size, (q, k), strict=True))
    out: Tensor = _op(q, k, v, blocks, key_padding_mask, rows, columns, causal, scale)[0]
    return out
