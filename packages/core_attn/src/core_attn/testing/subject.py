"""The mechanism under test: how `check_mechanism` makes one and calls it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core_attn import registry
from core_attn.api import parameters
from core_attn.contract import MechanismInfo, Pattern, TokenMixer
from core_attn.naming import unknown


class Subject:
    """Makes instances of one mechanism with reproducible weights, and inputs for them.

    Args:
        target: registry name, `file.py:ClassName`, a class, or a function that makes an instance; it is given those of
            dim, heads and causal that it takes by name.
        options: further options of the mechanism; dim (16) and heads (2) may be overridden here.
        seed: of weights and inputs.
        grid_rank: rank of the grids of its inputs; the smallest that it declares by default.
    """

    def __init__(
        self,
        target: str | type | Callable[..., TokenMixer],
        options: dict[str, Any],
        seed: int = 0,
        grid_rank: int | None = None,
    ) -> None:
        made = registry.get(target) if isinstance(target, str) else target
        if not callable(made):
            kind = type(made).__name__
            raise ValueError(
                f"check_mechanism takes a name, a class or a function that makes a mechanism, not a {kind}"
            )
        self.factory: Callable[..., Any] = made
        self.options_given = frozenset(options)
        self.options = {"dim": 16, "heads": 2, "causal": False, **options}
        self.seed = seed
        if isinstance(made, type):
            if not issubclass(made, TokenMixer):
                raise ValueError(f"check_mechanism takes token mixers; {made.__name__} is not a core_attn.TokenMixer")
            taken, self._takes_all = set(parameters(made)), False
        else:
            given = inspect.signature(made).parameters.values()
            taken = {p.name for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
            self._takes_all = any(p.kind is p.VAR_KEYWORD for p in given)
        self._taken = taken
        for option in options:
            if not self.takes(option):
                raise unknown("option of the mechanism", option, taken)
        try:
            with torch.random.fork_rng(devices=[]):
                instance = self._call_factory({})
        except TypeError as error:
            raise ValueError(f"the mechanism cannot be made with the options {self.options}: {error}") from error
        if not isinstance(instance, TokenMixer):
            raise ValueError(f"check_mechanism takes token mixers, this made a {type(instance).__name__}")
        if getattr(type(instance), "info", None) is None:
            raise ValueError(f"{type(instance).__name__} declares no facts; put @core_attn.register(...) on the class")
        self.info: MechanismInfo = instance.info
        self.dim = instance.dim
        self.grid_rank = grid_rank or min(self.info.grid_ranks, default=0)
        if grid_rank is not None and grid_rank not in self.info.grid_ranks:
            raise ValueError(f"{self.info.name} takes no grid of rank {grid_rank}")
        # A factory without `causal` makes one kind only: the other patterns are not its own to test.
        self.patterns = [
            p
            for p in Pattern
            if p in self.info.patterns and (self.takes("causal") or p.value.startswith("causal") == instance.causal)
        ]

    def takes(self, option: str) -> bool:
        """Whether instances can be made with `option`."""
        return self._takes_all or option in self._taken

    def _call_factory(self, arguments: dict[str, Any]) -> Any:
        wanted = {**self.options, **arguments}
        optional = {"dim", "heads", "causal"}
        return self.factory(**{k: v for k, v in wanted.items() if k not in optional or self.takes(k)})

    def make(
        self, pattern: Pattern, dtype: torch.dtype = torch.float64, *, seed: int | None = None, **options: Any
    ) -> TokenMixer:
        """An instance in eval mode. Every parameter is moved off its initial value, so that no zero hides an error."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed if seed is None else seed)
            made: TokenMixer = self._call_factory({"causal": is_causal(pattern), **options}).to(torch.float64)
            with torch.no_grad():
                for p in made.parameters():
                    if p.is_floating_point():
                        p.add_(0.05 * torch.randn_like(p))
        return made.to(dtype).eval()

    def inputs(
        self,
        pattern: Pattern,
        length: int,
        *,
        batch: int = 2,
        context: int | None = None,
        dim: int | None = None,
        dtype: torch.dtype = torch.float64,
        seed: int = 1,
    ) -> dict[str, Any]:
        """Arguments of forward: x, and where they apply context (of `context` tokens, default a few more) and grid."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        dim = dim or self.dim
        call: dict[str, Any] = {
            "x": torch.randn(batch, length, dim, generator=generator, dtype=torch.float64).to(dtype)
        }
        if is_cross(pattern):
            keys = context or length + 3
            call["context"] = torch.randn(batch, keys, dim, generator=generator, dtype=torch.float64).to(dtype)
        if self.info.grid_ranks:
            call["grid"] = balanced_grid(length, self.grid_rank)
        return call

    def lengths(self, *wanted: int) -> list[int]:
        """The wanted lengths that the mechanism's definition allows; its smallest where it allows none of them."""
        return [n for n in wanted if n >= self.info.min_length] or [self.info.min_length]


def is_causal(pattern: Pattern) -> bool:
    return pattern in (Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS)


def is_cross(pattern: Pattern) -> bool:
    return pattern in (Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS)


def run(mixer: TokenMixer, call: dict[str, Any], **more: Any) -> Tensor:
    """forward with the arguments `Subject.inputs` made."""
    arguments = {**call, **more}
    return mixer(arguments.pop("x"), **arguments)


def balanced_grid(length: int, rank: int) -> tuple[int, ...]:
    """A grid of `length` tokens with sides as equal as its divisors allow."""
    if rank == 1:
        return (length,)
    side = next(s for s in range(max(1, round(length ** (1 / rank))), 0, -1) if length % s == 0)
    assert math.prod((side, length // side)) == length
    return (side, *balanced_grid(length // side, rank - 1))
