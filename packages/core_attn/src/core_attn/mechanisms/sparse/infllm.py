"""InfLLM: the first tokens, a local window, and the blocks of distant tokens that matter now.

InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory (S133), section 3.

Shapes: B batch, H heads, L tokens, D channels of a head, b tokens of a block, E evicted blocks, nc chunks of queries.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn import ops
from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.naming import unknown
from core_attn.ops.block_sparse.reference import expand
from core_attn.ops.softmax import reference
from core_attn.registry import register

SELECTIONS = ("causal", "paper")


class BlockMemory:
    """What InfLLM remembers: the first tokens and the recent ones at hand, evicted blocks in a slower place.

    Blocks that were read lately stay at hand too, those least lately read go first (section 3.3).

    Args:
        resident: blocks at hand for each sample.
        offload: device of the evicted blocks.

    Attributes:
        seen: tokens so far.
        loads: blocks fetched from the slower place so far, counted for each sample.
        representatives: (B, H, E, D) mean representative key of each evicted block; None while there is none.
    """

    def __init__(self, resident: int, offload: torch.device | str) -> None:
        self.resident = resident
        self.offload = offload
        self.seen = 0
        self.loads = 0
        self.initial: tuple[Tensor, Tensor] | None = None
        self.recent: tuple[Tensor, Tensor, Tensor] | None = None  # queries, keys, values
        self.blocks: list[tuple[Tensor, Tensor]] = []
        self.representatives: Tensor | None = None
        self.chosen: list[list[int]] = []
        self._at_hand: OrderedDict[tuple[int, int], tuple[Tensor, Tensor]] = OrderedDict()

    def evict(self, initial: int, size: int, local: int, representatives: int) -> None:
        """Move the oldest recent block of `size` tokens to the slower place; the first `initial` tokens stay."""
        assert self.recent is not None
        q, k, v = self.recent
        if self.initial is None:
            self.initial = k[:, :, :initial], v[:, :, :initial]
            q, k, v = (x[:, :, initial:] for x in (q, k, v))
        found = representative_keys(q, k[:, :, :size], size=size, local=local, count=representatives)
        held = [found] if self.representatives is None else [self.representatives, found]
        self.representatives = torch.cat(held, dim=2)
        self.blocks.append((k[:, :, :size].to(self.offload), v[:, :, :size].to(self.offload)))
        self.recent = q[:, :, size:], k[:, :, size:], v[:, :, size:]

    def append(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        new = (q, k, v)
        if self.recent is not None:
            new = tuple(torch.cat(pair, dim=2) for pair in zip(self.recent, new, strict=True))  # type: ignore[assignment]
        self.recent = new
        self.seen += q.shape[2]

    def load(self, sample: int, block: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (H, b, D) of a block of a sample, on the device of `like`."""
        key = (sample, block)
        if key in self._at_hand:
            self._at_hand.move_to_end(key)
            return self._at_hand[key]
        self.loads += 1
        k, v = (x[sample].to(like.device) for x in self.blocks[block])
        self._at_hand[key] = k, v
        while len(self._at_hand) > self.resident * like.shape[0]:
            self._at_hand.popitem(last=False)
        return k, v

    def visible(self) -> tuple[Tensor, Tensor]:
        """Keys and values that the newest tokens read: first, chosen, recent."""
        assert self.recent is not None
        keys, values = [self.recent[1]], [self.recent[2]]
        if self.initial is not None:
            if self.chosen and self.chosen[0]:
                loaded = [[self.load(s, block, keys[0]) for block in row] for s, row in enumerate(self.chosen)]
                for held, part in ((keys, 0), (values, 1)):
                    held.insert(0, torch.stack([torch.cat([pair[part] for pair in row], dim=1) for row in loaded]))
            keys.insert(0, self.initial[0])
            values.insert(0, self.initial[1])
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def select(self, rows: Tensor) -> BlockMemory:
        """A new memory with the samples `rows` (int64) of this one, in that order."""
        twin = BlockMemory(self.resident, self.offload)
        twin.seen = self.seen

        def pick(*tensors: Tensor) -> Any:
            return tuple(x.index_select(0, rows.to(x.device)) for x in tensors)

        twin.initial = None if self.initial is None else pick(*self.initial)
        twin.recent = None if self.recent is None else pick(*self.recent)
        twin.blocks = [pick(*pair) for pair in self.blocks]
        twin.representatives = None if self.representatives is None else pick(self.representatives)[0]
        twin.chosen = [list(self.chosen[i]) for i in rows.tolist()] if self.chosen else []
        return twin


def representative_keys(
    q: Tensor, k: Tensor, *, size: int, local: int, count: int, real: Tensor | None = None
) -> Tensor:
    """The mean of the `count` representative keys of each whole block of k, the highest r_m (section 3.2).

    r_m = (1/l) Σ_{j=1…l} q_{m+j} · k_m: how much the l = `local` queries after a token read it.

    Args:
        q: (B, H, L, D) with L ≥ M + local.
        k: (B, H, M, D), M a multiple of `size`.
        real: (B, M) bool; padding represents nothing.

    Returns:
        (B, H, M / size, D) without gradient.
    """
    q, k = q.detach(), k.detach()
    keys = k.shape[2]
    # Double precision, as the difference of two long sums is small beside them.
    total = F.pad(q.double().cumsum(2), (0, 0, 1, 0))
    mean = (total[:, :, local + 1 : local + 1 + keys] - total[:, :, 1 : 1 + keys]).to(k.dtype) / local
    rank = (mean * k).sum(-1)
    if real is not None:
        rank = rank.masked_fill(~real[:, None], float("-inf"))
    rank = rank.unflatten(2, (-1, size))
    best = rank.topk(min(count, size), dim=-1)
    blocks = k.unflatten(2, (-1, size))
    chosen = blocks.gather(3, best.indices[..., None].expand(*best.indices.shape, k.shape[-1]))
    weight = (best.values > float("-inf")).to(k.dtype)
    return (chosen * weight[..., None]).sum(3) / weight.sum(-1, keepdim=True).clamp(min=1)


@register(
    name="infllm",
    title="InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory",
    source="S133",
    year=2024,
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    decodes=True,
    padding=True,
    maps=True,
    selects=True,
    double_backward=False,
    operator="block_sparse_attention",
    cascade=Cascade(
        einsums=(
            "R[b,h,m] = mean[j=1..l] Q[b,h,m+j,d] * K[b,h,m,d]",
            "KR[b,h,e,d] = mean[i] K[b,h,top[m of e] R[b,h,m],d]",
            "S[b,c,e] = Q[b,h,first(c),d] * KR[b,h,e,d]",
            "I[b,c,i] = top[e] S[b,c,e]",
            "QK[b,h,l,m] = mask(I)[b,l,m] * Q[b,h,l,d] * K[b,h,m,d]",
            "A[b,h,l,m] = softmax[m] QK[b,h,l,m]",
            "Z[b,h,l,d] = A[b,h,l,m] * V[b,h,m,d]",
        ),
        passes=3,
        flops="8*B*L*C**2 + 4*B*H*P*D + 2*B*H*T*D",
        bytes="E*(2*B*L*C + 4*C**2)",
        symbols={"T": "pairs of a chunk of queries and an evicted block"},
    ),
)
class InfLLMAttention(MultiHeadMixer):
    """Each token reads the first tokens, a local window, and the `top` evicted blocks that match its chunk best.

    A block leaves the window when `local` tokens came after it. It is represented by those of its keys that the local
    queries after them read most; its score for a chunk of queries is the sum of their products with the queries over
    all heads (section 3.2). All blocks of a sample's heads are chosen together.

    The paper scores with all queries of a chunk, so that later ones choose for earlier ones: `selection="paper"`. By
    default the first query of the chunk chooses. With chunk=1, as when the paper decodes, both are the same.

    Reading costs O(L); scoring L²/(chunk·block_size) products of a query with a block stays below it up to some
    hundred thousand tokens. The paper gives distant tokens one common position; a mixer has no positions.

    Args:
        dim, heads, causal, bias: see `MultiHeadMixer`; forward refuses causal=False.
        block_size: tokens of a block.
        initial_blocks: so many first blocks are always read.
        local: tokens a block must be past before it is evicted; the window holds up to block_size + chunk more.
        top: evicted blocks that are read.
        representatives: keys that represent a block.
        chunk: queries that choose together.
        selection: "causal" or "paper", see above.
        resident: evicted blocks of a sample that a decoding state keeps at hand, 2·top by default.
        offload: device to which a decoding state moves the evicted blocks.
        backend: see `core_attn.ops.block_sparse_attention`. Gradients of gradients need "reference".

    Raises:
        ValueError: an option out of its range.
        UnknownNameError: no such selection.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = True,
        bias: bool = True,
        block_size: int = 32,
        initial_blocks: int = 1,
        local: int = 128,
        top: int = 4,
        representatives: int = 4,
        chunk: int = 32,
        selection: str = "causal",
        resident: int | None = None,
        offload: str = "cpu",
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if min(block_size, local, representatives, chunk) < 1 or min(initial_blocks, top) < 0:
            raise ValueError(
                "block_size, local, representatives and chunk must be positive, initial_blocks and top at least 0, got "
                f"{block_size}, {local}, {representatives}, {chunk}, {initial_blocks} and {top}"
            )
        if selection not in SELECTIONS:
            raise unknown("selection", selection, SELECTIONS)
        self.block_size = block_size
        self.initial_blocks = initial_blocks
        self.local = local
        self.top = top
        self.representatives = representatives
        self.chunk = chunk
        self.selection = selection
        self.resident = 2 * top if resident is None else resident
        if self.resident < top:
            raise ValueError(f"resident must be at least top = {top}, got {resident}")
        self.offload = offload
        self.backend = backend

    def evicted(self, seen: int) -> int:
        """How many blocks are evicted before the chunk that begins after `seen` tokens."""
        return max(0, (seen - self.local) // self.block_size - self.initial_blocks)

    def side_input(
        self,
        q: Tensor,
        k: Tensor,
        *,
        x: Tensor,
        query_padding_mask: Tensor | None,
        grid: tuple[int, ...] | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """(B, 1, nc, nb) key blocks that each chunk of queries reads."""
        length, size, device = q.shape[2], self.block_size, q.device
        starts = range(0, length, self.chunk)
        gone = torch.tensor([self.evicted(s) for s in starts], dtype=torch.int64, device=device)
        block = torch.arange(-(-length // size), device=device) - self.initial_blocks
        near = (block < 0) | (block >= gone[:, None])
        if not starts or not (most := self.evicted(starts[-1])) or not self.top:
            return near.expand(q.shape[0], 1, *near.shape)
        past = slice(self.initial_blocks * size, (self.initial_blocks + most) * size)
        represented = representative_keys(
            q[:, :, past.start :],
            k[:, :, past],
            size=size,
            local=self.local,
            count=self.representatives,
            real=None if query_padding_mask is None else query_padding_mask[:, past],
        )
        scores = torch.einsum("bhcd,bhed->bce", self._asking(q.detach(), query_padding_mask), represented)
        scores = scores.masked_fill(torch.arange(most, device=device) >= gone[:, None], float("-inf"))
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen = chosen.scatter(-1, scores.topk(min(self.top, most), dim=-1).indices, True)
        behind = near.shape[1] - self.initial_blocks - most
        return (near | F.pad(chosen & (scores > float("-inf")), (self.initial_blocks, behind)))[:, None]

    def _asking(self, q: Tensor, padding: Tensor | None) -> Tensor:
        """(B, H, nc, D): the query that chooses for each chunk."""
        if self.selection == "causal":
            return q[:, :, :: self.chunk]
        if padding is not None:
            q = q.masked_fill(~padding[:, None, :, None], 0.0)
        # A sum in place of a mean scales all scores of a chunk alike.
        return F.pad(q, (0, 0, 0, -q.shape[2] % self.chunk)).unflatten(2, (-1, self.chunk)).sum(3)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return ops.block_sparse_attention(
            q,
            k,
            v,
            blocks=aux,
            block_size=(self.chunk, self.block_size),
            causal=True,
            key_padding_mask=key_padding_mask,
            backend=self.backend,
        )

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        mask = expand(aux, (self.chunk, self.block_size), q.shape[2], k.shape[2])
        scores = reference.scores(
            q,
            k,
            causal=True,
            mask=mask,
            bias=None,
            key_padding_mask=key_padding_mask,
            window=None,
            scale=self.head_dim**-0.5,
        )
        return reference.weights(scores)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> BlockMemory:
        """An empty memory; it takes device and dtype of the tokens that it is given.

        Raises:
            ValueError: all queries of a chunk choose, which nothing that goes token by token can wait for.
        """
        if self.selection == "paper" and self.chunk > 1:
            raise ValueError("infllm decodes with selection='causal' or chunk=1: else later queries choose for earlier")
        return BlockMemory(self.resident, self.offload)

    def step(self, x: Tensor, state: BlockMemory) -> tuple[Tensor, BlockMemory]:
        """The next T tokens (B, T, C) -> their outputs (B, T, C), chunk by chunk; `state` is updated in place."""
        self.check_inputs(x)
        q, k, v = (self.split_heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        outs = []
        done = 0
        while done < x.shape[1]:
            piece = slice(done, done + min(self.chunk - state.seen % self.chunk, x.shape[1] - done))
            if state.seen % self.chunk == 0:
                self._begin_chunk(q[:, :, done], state)
            state.append(q[:, :, piece], k[:, :, piece], v[:, :, piece])
            outs.append(ops.softmax_attention(q[:, :, piece], *state.visible(), causal=True))
            done = piece.stop
        out = torch.cat(outs, dim=2) if outs else q
        return self.out_proj(self.merge_heads(out)), state

    def _begin_chunk(self, q: Tensor, state: BlockMemory) -> None:
        """Evict what has left the window, then let the query q (B, H, D) choose."""
        for _ in range(len(state.blocks), self.evicted(state.seen)):
            state.evict(self.initial_blocks * self.block_size, self.block_size, self.local, self.representatives)
        if state.representatives is not None:
            scores = torch.einsum("bhd,bhed->be", q.detach(), state.representatives)
            state.chosen = scores.topk(min(self.top, scores.shape[1]), dim=-1).indices.sort(dim=-1).values.tolist()

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        gone = [self.evicted(i - i % self.chunk) for i in range(length)]
        pairs = sum(i + 1 - max(0, n - self.top) * self.block_size for i, n in enumerate(gone))
        scored = len(range(0, length, self.chunk)) * (gone[-1] if gone else 0)
        return {**sizes, "P": pairs, "T": scored}

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, block_size={self.block_size}, initial_blocks={self.initial_blocks}, "
            f"local={self.local}, top={self.top}, chunk={self.chunk}, selection={self.selection!r}"
        )
