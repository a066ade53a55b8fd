"""Short causal convolution of every channel by itself, as many recurrent mixers have it behind their projections.

Shapes: B batch, L tokens, C channels, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """y_t = Σ_j w_j x_(t-K+1+j) + bias in every channel, with zeros before the first token.

    Args:
        dim: channels C.
        size: number of taps K.
        bias: whether there is a bias.
    """

    def __init__(self, dim: int, size: int, *, bias: bool = False) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"a short convolution has at least one tap, got size={size}")
        self.size = size
        # Drawn as those of nn.Conv1d.
        self.weight = nn.Parameter(torch.empty(size, dim).uniform_(-(size**-0.5), size**-0.5))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-(size**-0.5), size**-0.5)) if bias else None

    def init_past(self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """What a sequence begins with: zeros (B, K - 1, C)."""
        shape = (batch, self.size - 1, self.weight.shape[1])
        return torch.zeros(shape, device=device or self.weight.device, dtype=dtype or self.weight.dtype)

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, C) and the K - 1 tokens before it -> outputs (B, T, C), and the K - 1 tokens before the next."""
        length = x.shape[1]
        if past is None:
            past = self.init_past(x.shape[0], device=x.device, dtype=x.dtype)
        x = torch.cat([past.to(x.dtype), x], dim=1)
        weight = self.weight.to(x.dtype)
        # K products in place of nn.Conv1d, which on the CPU takes three times as long for so few taps.
        out = x[:, self.size - 1 :] * weight[-1]
        if self.bias is not None:
            out = out + self.bias.to(x.dtype)
        for tap in range(self.size - 1):
            out = torch.addcmul(out, x[:, tap : tap + length], weight[tap])
        # A copy: a view would keep all of a long prompt alive in a decoding state.
        return out, x[:, length:].clone()
