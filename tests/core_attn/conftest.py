"""A mechanism small enough to read at a glance, and ways to break it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from core_attn.contract import Growth, MechanismInfo, Pattern
from core_attn.mechanisms.heads import MultiHeadMixer


@pytest.fixture(scope="session", autouse=True)
def own_extensions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What "auto" takes on the CPU depends on whether the CPU kernel was ever built here; in the tests it was not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        yield


FACTS: dict[str, Any] = {
    "name": "toy",
    "title": "A toy",
    "source": "",
    "year": 2017,
    "patterns": frozenset(Pattern),
    "time": Growth.QUADRATIC,
    "memory": Growth.QUADRATIC,
    "padding": True,
    "maps": True,
}


class Toy(MultiHeadMixer):
    """Softmax attention by its definition, O(L M); `dropout` drops weights of the map in training."""

    info = MechanismInfo(**FACTS)

    def __init__(self, dim: int, *, heads: int = 8, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__(dim, heads=heads, causal=causal)
        self.dropout = dropout

    def attention_scores(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None) -> Tensor:
        scores = q @ k.transpose(-1, -2) / self.head_dim**0.5
        if self.causal:
            ahead = k.shape[-2] - q.shape[-2]
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + ahead)
            scores = scores.masked_fill(future, float("-inf"))
        if key_padding_mask is not None:
            scores = scores.masked_fill(~key_padding_mask[:, None, None], float("-inf"))
        return scores

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        scores = self.attention_scores(q, k, key_padding_mask=key_padding_mask)
        none = (scores == float("-inf")).all(-1, keepdim=True)
        return torch.softmax(scores.masked_fill(none, 0.0), dim=-1).masked_fill(none, 0.0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        weights = self.attention_map(q, k, key_padding_mask=key_padding_mask, aux=aux)
        return torch.nn.functional.dropout(weights, self.dropout, self.training) @ v


@pytest.fixture(scope="session")
def toy() -> type[Toy]:
    return Toy


@pytest.fixture(scope="session")
def variant() -> Callable[..., type[Toy]]:
    """variant(facts..., methods={...}): the toy with other facts or other methods, not entered in the registry."""

    def make(methods: dict[str, Any] | None = None, **facts: Any) -> type[Toy]:
        return type("ToyVariant", (Toy,), {"info": MechanismInfo(**{**FACTS, **facts}), **(methods or {})})

    return make
