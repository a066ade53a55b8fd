"""Stochastically subsampled self-attention, "The Information Pathways Hypothesis: Transformers are Dynamic
Self-Ensembles" (S88), section 3.

Shapes: B batch, L queries, M keys of which S are read, C channels, H heads, D = C / H.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.softmax.exact import SoftmaxAttention
from core_attn.ops.softmax import reference, softmax_attention
from core_attn.registry import register

_ROWS = 512


class _Drawn(NamedTuple):
    """Keys in a random order, and how many places of it a query reads on each side; None: all of them."""

    order: Tensor
    left: int | None
    right: int | None


@register(
    name="stochastic_subsample",
    title="The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles",
    source="S88",
    year=2023,
    patterns=frozenset(Pattern),
    time=Growth.QUADRATIC,
    memory=Growth.LINEAR,
    decodes=True,
    padding=True,
    maps=True,
    stochastic=True,
    double_backward=False,
    operator="softmax_attention",
    cascade=Cascade(
        einsums=(
            "J = a random part of the keys (in training); all of them (in evaluation)",
            "S[b,h,l,j] = scale * Q[b,h,l,d] * K[b,h,J(j),d]",
            "A[b,h,l,j] = softmax[j] S[b,h,l,j]",
            "Y[b,h,l,d] = A[b,h,l,j] * V[b,h,J(j),d]",
        ),
        passes=1,
        flops="4*B*L*C**2 + 4*B*M*C*G*D + 4*B*H*P*D",
        bytes="E*(B*(2*L + X)*C + 2*C**2 + 2*C*G*D)",
    ),
)
class StochasticSubsample(SoftmaxAttention):
    """Softmax attention that reads a random part of the keys at each training step, and all of them in evaluation.

    Unbiased (the default): the keys are shuffled and cut to the first `keep` of them, the same for all queries, samples
    and heads of a call. Locally biased: the keys are sorted by their place plus noise of `spread` tokens, and each
    query reads the `keep` nearest places of that order, so that near keys are read more often (section 3.2). A causal
    query reads what of this lies in its past; one that finds nothing there gives zeros.

    In evaluation it is dense, unless forward is given a generator or runs inside `sampling`: the mean prediction of
    several sampled passes is the paper's ensemble of sub-models (section 3.4).

    Args:
        dim, heads, causal, bias, kv_heads, dropout, scale, backend: see `SoftmaxAttention`.
        keep: part of the keys that is read, in (0, 1].
        spread: standard deviation of the noise in tokens, positive; None for the unbiased form.

    Raises:
        ValueError: keep or spread out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        bias: bool = True,
        kv_heads: int | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        keep: float = 0.25,
        spread: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            dim, heads=heads, causal=causal, bias=bias, kv_heads=kv_heads, dropout=dropout, scale=scale, backend=backend
        )
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"keep must lie in (0, 1], got {keep}")
        if spread is not None and not spread > 0.0:
            raise ValueError(f"spread must be positive, or None for the unbiased form, got {spread}")
        self.keep = keep
        self.spread = spread
        self._generator: torch.Generator | None = None

    def draw(self, q: Tensor, k: Tensor, generator: torch.Generator | None) -> _Drawn | None:
        """The keys to read in the order they are laid out; None for all, as they are."""
        generator = self._generator if generator is None else generator
        if generator is None and not self.training:
            return None
        keys = k.shape[2]
        count = math.ceil(self.keep * keys)
        device = k.device if generator is None else generator.device
        if self.spread is None:
            chosen = torch.randperm(keys, generator=generator, device=device)[:count].sort().values
            return _Drawn(chosen.to(k.device), None, None)
        noise = torch.randn(keys, generator=generator, device=device).to(k.device)
        order = (torch.arange(keys, device=k.device) + self.spread * noise).argsort()
        return _Drawn(order, count // 2, count - 1 - count // 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: _Drawn | None) -> Tensor:
        if aux is None:
            return super().attend(q, k, v, key_padding_mask=key_padding_mask, aux=None)
        ahead = k.shape[2] - q.shape[2]
        k, v = k.index_select(2, aux.order), v.index_select(2, aux.order)
        real = None if key_padding_mask is None else key_padding_mask.index_select(1, aux.order)
        window = None if aux.left is None else (aux.left, aux.right)
        options: dict[str, Any] = {
            "scale": self.scale,
            "dropout": self.dropout if self.training else 0.0,
            "backend": self.backend,
        }
        if not self.causal:
            return softmax_attention(q, k, v, key_padding_mask=real, window=window, **options)

        def rows(q: Tensor, k: Tensor, v: Tensor, first: int, start: int) -> Tensor:
            stop = start + k.shape[2]
            allowed = _past(aux, q.shape[2], first, start, stop)
            padding = None if real is None else real[:, start:stop]
            return softmax_attention(q, k, v, mask=allowed, key_padding_mask=padding, **options)

        # A mask of all rows would take memory L·S; a block's own is made anew for its backward.
        outs = []
        for r0 in range(0, q.shape[2], _ROWS):
            part = q[:, :, r0 : r0 + _ROWS]
            first = r0 + ahead
            start, stop = 0, k.shape[2]
            if aux.left is not None and aux.right is not None:
                start = min(max(0, first - aux.left), stop)
                stop = max(start, min(stop, first + part.shape[2] + aux.right))
            outs.append(
                checkpoint(rows, part, k[:, :, start:stop], v[:, :, start:stop], first, start, use_reentrant=False)
            )
        return torch.cat(outs, dim=2) if outs else q.new_zeros(*q.shape[:3], v.shape[-1])

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: _Drawn | None) -> Tensor:
        scores = self.attention_scores(q, k, key_padding_mask=key_padding_mask)
        if aux is not None:
            length, keys = q.shape[2], k.shape[2]
            laid = torch.ones(length, aux.order.shape[0], dtype=torch.bool, device=q.device)
            if aux.left is not None and aux.right is not None:
                laid = _near(aux, length, keys - length, 0, aux.order.shape[0])
            read = torch.zeros(length, keys, dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(~read.index_copy(1, aux.order, laid), float("-inf"))
        return reference.weights(scores)


def _near(drawn: _Drawn, rows: int, first: int, start: int, stop: int) -> Tensor:
    """Whether the places start … stop - 1 of the order lie in the windows of `rows` queries from `first` on."""
    place = torch.arange(start, stop, device=drawn.order.device)
    query = torch.arange(first, first + rows, device=drawn.order.device)[:, None]
    assert drawn.left is not None
    assert drawn.right is not None
    return (place >= query - drawn.left) & (place <= query + drawn.right)


def _past(drawn: _Drawn, rows: int, first: int, start: int, stop: int) -> Tensor:
    """The same, and whether the keys at these places lie in the queries' past."""
    query = torch.arange(first, first + rows, device=drawn.order.device)[:, None]
    past = drawn.order[start:stop] <= query
    return past if drawn.left is None else past & _near(drawn, rows, first, start, stop)


@contextmanager
def sampling(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Let every `StochasticSubsample` of a model read random keys in evaluation too.

    Args:
        model: any module.
        generator: source of the draws; each pass through the model draws anew.

    Example:
        >>> with torch.no_grad(), sampling(model.eval(), torch.Generator().manual_seed(0)):
        ...     prediction = torch.stack([model(x).softmax(-1) for _ in range(8)]).mean(0)
    """
    mixers = [m for m in model.modules() if isinstance(m, StochasticSubsample)]
    for mixer in mixers:
        mixer._generator = generator
    try:
        yield
    finally:
        for mixer in mixers:
            mixer._generator = None
