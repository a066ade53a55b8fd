"""What linear attention with a fixed decay a head shares: padding, both directions, and the state of constant size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from core_attn.contract import TokenMixer
from core_attn.ops.scalar_decay import pairs_in_chunks, scalar_decay_attention, scalar_decay_step


class DecayedState(NamedTuple):
    """State of decoding: `memory` (B, H, K, V) keys times values so far, `seen` tokens so far."""

    memory: Tensor
    seen: int


class DecayedMixer(TokenMixer):
    """o_i = Σ_j λ^(|i - j|) (q_i · k_j) v_j in each head, over j <= i when causal; padded tokens are no distance.

    A subclass gives `heads_of` and `finish`, the decays, and the sizes of a head.

    Args:
        dim, causal: see `TokenMixer`.
        heads: number of heads H; must divide dim.
        log_decays: log λ of each head, at most 0.
        scale: factor of the products.
        backend: see `core_attn.ops.scalar_decay_attention`.
    """

    def __init__(
        self, dim: int, *, heads: int, causal: bool, log_decays: Sequence[float], scale: float, backend: str
    ) -> None:
        super().__init__(dim, causal=causal)
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        self.heads = heads
        self.head_dim = self.key_dim = self.value_dim = dim // heads
        # Numbers and no buffer: rounded to 16 bits with the module, a decay near 1 would be 1.
        self.log_decays = tuple(log_decays)
        self.scale = scale
        self.backend = backend

    def heads_of(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (B, H, L, K) and v (B, H, L, V) of tokens at `positions`, (L,) or (B, L)."""
        raise NotImplementedError

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        """(B, H, L, V) what the heads read, and the tokens -> (B, L, C)."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        self.check_inputs(x, context=context, key_padding_mask=key_padding_mask, grid=grid, generator=generator)
        positions = torch.arange(x.shape[1], device=x.device)
        decay = self._log_decay(x)
        if key_padding_mask is not None:
            x = x.masked_fill(~key_padding_mask.unsqueeze(-1), 0.0)
            positions = (key_padding_mask.cumsum(1) - 1).clamp(min=0)
            decay = decay[:, None] * key_padding_mask[:, None]
        q, k, v = self.heads_of(x, positions)
        if key_padding_mask is not None:
            padding = ~key_padding_mask[:, None, :, None]
            k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
        out = self._read(q, k, v, decay)
        if not self.causal:
            # From the last token to the first, each reading what is behind it: the token itself is read once.
            back = self._read(q.flip(2), _behind(k), _behind(v), decay if decay.dim() == 1 else _behind(decay))
            own = decay.exp().unsqueeze(-1)
            out = out + ((own if decay.dim() == 3 else own.unsqueeze(-1)) * back.flip(2)).to(out.dtype)
        return self.finish(out, x)

    def _log_decay(self, x: Tensor) -> Tensor:
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        return torch.tensor(self.log_decays, dtype=dtype, device=x.device)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        out = scalar_decay_attention(q, k, v, log_decay=decay, scale=self.scale, backend=self.backend)
        assert isinstance(out, Tensor)
        return out

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, L, H·D) -> (B, H, L, D)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        ways = 1 if self.causal else 2
        return {**sizes, "K": self.key_dim, "V": self.value_dim, "T": pairs_in_chunks(length), "W": ways}

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> DecayedState:
        if not self.causal:
            super().init_state(batch, device=device, dtype=dtype)
        shape = (batch, self.heads, self.key_dim, self.value_dim)
        kept = torch.float64 if dtype is torch.float64 else torch.float32
        return DecayedState(torch.zeros(shape, device=device, dtype=kept), 0)

    def step(self, x: Tensor, state: DecayedState) -> tuple[Tensor, DecayedState]:
        if not self.causal:
            super().step(x, state)
        self.check_inputs(x)
        q, k, v = self.heads_of(x, state.seen + torch.arange(x.shape[1], device=x.device))
        out, memory = scalar_decay_step(q, k, v, log_decay=self._log_decay(x), state=state.memory, scale=self.scale)
        return self.finish(out, x), DecayedState(memory, state.seen + x.shape[1])


def _behind(x: Tensor) -> Tensor:
    """(B, H, L, …) in reverse order, each token in the place of the one before it; zeros in the place of the last."""
    shifted = x[:, :, 1:].flip(2)
    return torch.cat([torch.zeros_like(x[:, :, :1]), shifted], dim=2)


SYMBOLS = {
    "K": "channels of a key",
    "V": "channels of a value",
    "T": "pairs of tokens of one chunk, of all chunks of a sequence",
    "W": "directions: 1 when causal, else 2",
}


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8h / H) for h = 1 … H; where H is no power of two, those of the one below and every second of the next."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    return slopes + (alibi_slopes(2 * power)[0::2][: heads - power] if power < heads else [])


def layer_factor(layer: int, layers: int) -> float:
    """1 in the first of `layers` layers, falling to 0 in the last: deep layers forget less.

    Raises:
        ValueError: no such layer.
    """
    if not 0 <= layer < layers:
        raise ValueError(f"layer must lie in 0 … layers - 1, got layer={layer} of {layers}")
    return 1 - layer / max(1, layers - 1)
