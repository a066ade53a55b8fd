"""Landmark attention: blocks are found by a token that stands for them.

Random-Access Infinite Context Length for Transformers (S124), section 3.

Shapes: B batch, H heads, L tokens, C channels, D channels of a head, nb blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from core_attn import ops
from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.ops.landmark import reference
from core_attn.registry import register
from core_attn.state import FullCache


class _Landmarks(NamedTuple):
    """keys: (B, H, nb, D). readable: (B, L) tokens that may be read; None where all may."""

    keys: Tensor
    readable: Tensor | None


class LandmarkState:
    """Keys and values so far, and the landmarks of the blocks that are complete.

    Attributes:
        tokens: cache of keys and values.
        landmarks: cache of the landmarks' keys; it holds no values.
    """

    def __init__(self, tokens: FullCache, landmarks: FullCache) -> None:
        self.tokens = tokens
        self.landmarks = landmarks

    def select(self, rows: Tensor) -> LandmarkState:
        """A new state with the samples `rows` (int64) of this one, in that order."""
        return LandmarkState(self.tokens.select(rows), self.landmarks.select(rows))


@register(
    name="landmark",
    title="Random-Access Infinite Context Length for Transformers",
    source="S124",
    year=2023,
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    time=Growth.QUADRATIC,
    memory=Growth.LINEAR,
    decodes=True,
    padding=True,
    maps=True,
    selects=True,
    double_backward=False,
    operator="landmark_attention",
    cascade=Cascade(
        einsums=(
            "QK[b,h,l,j,m] = Q[b,h,l,d] * K[b,h,j,m,d]",
            "QG[b,h,l,j] = Q[b,h,l,d] * G[b,h,j,d]",
            "W[b,h,l,j,m] = softmax[m] QK[b,h,l,j,m]",
            "S[b,h,l,:] = softmax[m of the own block, other blocks j] (QK[b,h,l,own,m], QG[b,h,l,j])",
            "P[b,h,l,j,m] = W[b,h,l,j,m] * S[b,h,l,j]",
            "P[b,h,l,own,m] = S[b,h,l,m]",
            "Z[b,h,l,d] = P[b,h,l,j,m] * V[b,h,j,m,d]",
        ),
        passes=2,
        flops="8*B*L*C**2 + 2*B*T*C**2 + 4*B*H*P*D + 2*B*H*A*D",
        bytes="E*(2*B*L*C + 5*C**2)",
        symbols={"T": "landmarks of a sequence", "A": "pairs of a query and a landmark that a head reads"},
    ),
)
class LandmarkAttention(MultiHeadMixer):
    """The own block's tokens compete with the landmarks of the others; a landmark's share goes to its block's tokens.

    In the paper a landmark token is put into the text after every block, and its key is trained to say whether the
    block is worth reading; nothing is ever read from it. A mixer is given tokens, and which of them are landmarks is
    for the model to decide: with `landmark_tokens` every block_size-th is one, exactly as in the paper. By default the
    last token of a block is an ordinary one, and the block's landmark key is a projection of it of its own, so that any
    sequence will do. With padding it is the last real token. Without `causal`, which the paper does not treat, blocks
    after the query are read like those before it.

    Args:
        dim, heads, causal, bias: see `MultiHeadMixer`.
        block_size: tokens of a block, the landmark token included where there are such.
        landmark_tokens: the last token of every block is a landmark (needs `causal`).
        top: in eval mode each query reads only the `top` blocks with the largest landmark scores beside its own, in
            each head, as in the paper's inference; all by default. Training reads all.
        backend: see `core_attn.ops.landmark_attention`. Gradients of gradients need "reference".

    Raises:
        ValueError: an option out of its range, or landmark tokens without `causal`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        bias: bool = True,
        block_size: int = 64,
        landmark_tokens: bool = False,
        top: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if block_size < 1 + landmark_tokens:
            raise ValueError(f"block_size must be at least {1 + landmark_tokens}, got {block_size}")
        if landmark_tokens and not causal:
            raise ValueError("landmark_tokens needs causal=True: a block's landmark comes after what it stands for")
        if top is not None and top < 0:
            raise ValueError(f"top must be at least 0, or None for all blocks, got {top}")
        self.block_size = block_size
        self.landmark_tokens = landmark_tokens
        self.top = top
        self.backend = backend
        self.landmark_proj = None if landmark_tokens else nn.Linear(dim, dim, bias=bias)

    def _landmark_keys(self, x: Tensor) -> Tensor:
        """The keys (B, H, nb, D) of the landmarks made from the tokens x (B, nb, C)."""
        return self.split_heads((self.landmark_proj or self.k_proj)(x))

    def _is_landmark(self, start: int, stop: int, device: torch.device) -> Tensor:
        return (torch.arange(start, stop, device=device) + 1) % self.block_size == 0

    def side_input(
        self,
        q: Tensor,
        k: Tensor,
        *,
        x: Tensor,
        query_padding_mask: Tensor | None,
        grid: tuple[int, ...] | None,
        generator: torch.Generator | None,
    ) -> _Landmarks:
        length = x.shape[1]
        block = torch.arange(-(-length // self.block_size), device=x.device) * self.block_size
        last = (block + self.block_size).clamp(max=length) - 1
        readable = query_padding_mask
        if query_padding_mask is None:
            tokens = x[:, last]
        else:
            # The last real token of each block; where there is none the block has nothing to read either.
            at = torch.arange(length, device=x.device).masked_fill(~query_padding_mask, -1).cummax(-1).values[:, last]
            tokens = x.gather(1, at.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
        if self.landmark_tokens:
            words = ~self._is_landmark(0, length, x.device)[None]
            readable = words.expand(x.shape[0], -1) if readable is None else readable & words
        return _Landmarks(self._landmark_keys(tokens), readable)

    def _options(self, aux: _Landmarks) -> dict[str, Any]:
        return {
            "landmarks": aux.keys,
            "block_size": self.block_size,
            "causal": self.causal,
            "top": None if self.training else self.top,
            "key_padding_mask": aux.readable,
        }

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return ops.landmark_attention(q, k, v, backend=self.backend, **self._options(aux))

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        options = {**self._options(aux), "scale": self.head_dim**-0.5}
        return reference.probabilities(q, k, **options).to(q.dtype)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LandmarkState:
        """An empty state.

        Raises:
            ValueError: this module is not causal.
        """
        if not self.causal:
            raise ValueError("landmark decodes token by token only when it is built with causal=True")
        weight = self.k_proj.weight
        place: dict[str, Any] = {"device": device or weight.device, "dtype": dtype or weight.dtype}
        return LandmarkState(
            FullCache(batch, self.heads, self.head_dim, **place),
            FullCache(batch, self.heads, self.head_dim, value_dim=0, **place),
        )

    def step(self, x: Tensor, state: LandmarkState) -> tuple[Tensor, LandmarkState]:
        """The next T tokens (B, T, C) -> their outputs (B, T, C); `state` is updated in place and returned.

        A single token reads no more than the landmarks, the blocks it chose and its own block.
        """
        self.check_inputs(x)
        start = state.tokens.seen
        q = self.split_heads(self.q_proj(x))
        k, v = state.tokens.append(self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x)))
        complete = self._is_landmark(start, start + x.shape[1], x.device)
        found = self._landmark_keys(x[:, complete])
        landmarks, _ = state.landmarks.append(found, found[..., :0])
        if self.top is not None and not self.training and x.shape[1] == 1:
            k, v, landmarks = self._retrieve(q, k, v, landmarks)
        keys = k.shape[2]
        # The last block is not complete: nobody asks for its landmark, the operator only wants as many as blocks.
        missing = -(-keys // self.block_size) - landmarks.shape[2]
        landmarks = nn.functional.pad(landmarks, (0, 0, 0, missing))
        readable = ~self._is_landmark(0, keys, x.device)[None].expand(x.shape[0], -1) if self.landmark_tokens else None
        out = self.attend(q, k, v, key_padding_mask=None, aux=_Landmarks(landmarks, readable))
        return self.out_proj(self.merge_heads(out)), state

    def _retrieve(self, q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The blocks that the one query q (B, H, 1, D) chooses among those before its own, then its own."""
        assert self.top is not None
        own = (k.shape[2] - 1) // self.block_size
        if own <= self.top:
            return k, v, landmarks
        chosen = (q @ landmarks[:, :, :own].mT).squeeze(2).topk(self.top, -1).indices.sort(-1).values
        rows = chosen[..., None] * self.block_size + torch.arange(self.block_size, device=k.device)
        rows = rows.flatten(2)[..., None].expand(-1, -1, -1, self.head_dim)
        k, v = (torch.cat([x.gather(2, rows), x[:, :, own * self.block_size :]], 2) for x in (k, v))
        return k, v, landmarks.gather(2, chosen[..., None].expand(-1, -1, -1, self.head_dim))

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        blocks = -(-length // self.block_size)
        pairs = sum(i // self.block_size for i in range(length)) if self.causal else length * (blocks - 1)
        return {**sizes, "T": 0 if self.landmark_tokens else blocks, "A": pairs}

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}, block_size={self.block_size}, top={self.top}"
