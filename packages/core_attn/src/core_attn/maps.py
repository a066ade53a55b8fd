"""Read or rewrite the attention maps of a running model.

While `capture` or `edit` is active each readable mechanism of the model holds a tap: `MultiHeadMixer.forward` hands it
q, k, v and the output just before the output projection. With no tap nothing is computed and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core_attn.contract import TokenMixer
from core_attn.mechanisms.heads import MultiHeadMixer

Stage = Literal["weights", "scores"]


class AttentionMaps(Mapping[str, Tensor]):
    """Maps by module name: `maps[name]` is the latest one, (B, H, L, M), detached.

    Attributes:
        calls: every map of every module in the order of the calls, for modules that run more than once.
        skipped: the model's mechanisms whose maps cannot be read: module name -> why.
    """

    def __init__(self) -> None:
        self.calls: dict[str, list[Tensor]] = {}
        self.skipped: dict[str, str] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.calls and name in self.skipped:
            raise KeyError(f"{name}: {self.skipped[name]}")
        return self.calls[name][-1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.calls)

    def __len__(self) -> int:
        return len(self.calls)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name!r}: {tuple(self[name].shape)}" for name in self)
        skipped = f", skipped: {', '.join(self.skipped)}" if self.skipped else ""
        return f"AttentionMaps({{{shapes}}}{skipped})"


class _Tap:
    """What a mechanism calls instead of returning its own output: first the edits, then the readers."""

    def __init__(self) -> None:
        self.readers: list[tuple[str, AttentionMaps]] = []
        self.editors: list[tuple[str, Callable[[str, Tensor], Tensor], Stage]] = []

    # Reading keeps tensors in Python lists, which does not belong into a compiled graph.
    @torch.compiler.disable
    def __call__(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, key_padding_mask: Tensor | None, aux: Any
    ) -> Tensor:
        if not self.editors:
            # The map must cost the model nothing: no graph, and no draw from the random state its dropout uses.
            with torch.no_grad(), torch.random.fork_rng(devices=_cuda_devices(q)):
                weights = module.attention_map(q, k, key_padding_mask=key_padding_mask, aux=aux)
        else:
            weights = self._edited(module, q, k, key_padding_mask, aux)
            values = v if v.shape[1] == weights.shape[1] else v.repeat_interleave(weights.shape[1] // v.shape[1], dim=1)
            out = weights.to(values.dtype) @ values
        for name, maps in self.readers:
            maps.calls.setdefault(name, []).append(weights.detach())
        return out

    def _edited(self, module: Any, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        on_scores = [(name, fn) for name, fn, stage in self.editors if stage == "scores"]
        if on_scores:
            scores = module.attention_scores(q, k, key_padding_mask=key_padding_mask)
            for name, fn in on_scores:
                scores = _same_shape(fn(name, scores), scores, name)
            # A row without any key reads nothing, as in the mechanisms themselves.
            weights = torch.softmax(scores, dim=-1).masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0)
        else:
            weights = module.attention_map(q, k, key_padding_mask=key_padding_mask, aux=aux)
        for name, fn, stage in self.editors:
            if stage == "weights":
                weights = _same_shape(fn(name, weights), weights, name)
        return weights


def _same_shape(edited: Any, given: Tensor, name: str) -> Tensor:
    if not isinstance(edited, Tensor) or edited.shape != given.shape:
        got = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
        raise ValueError(f"the edit of {name!r} must return a tensor of shape {tuple(given.shape)}, it returned {got}")
    return edited


def _cuda_devices(x: Tensor) -> list[torch.device]:
    return [x.device] if x.device.type == "cuda" else []


def _mixers(model: nn.Module) -> dict[str, TokenMixer]:
    found = {
        name.removeprefix("_orig_mod").removeprefix("."): module  # the wrapper torch.compile puts around a model
        for name, module in model.named_modules()
        if isinstance(module, TokenMixer)
    }
    if not found:
        raise ValueError(f"{type(model).__name__} holds no token mixer of core_attn, so there are no maps to read")
    return found


def _readable(mixers: Mapping[str, TokenMixer], stage: Stage) -> tuple[dict[str, TokenMixer], dict[str, str]]:
    readable, skipped = {}, {}
    for name, module in mixers.items():
        if not module.info.maps:
            skipped[name] = f"{module.info.name} has no attention map that could be read"
        elif stage == "scores" and not _has_scores(module):
            skipped[name] = f"{module.info.name} has no scores before a softmax; edit stage='weights' instead"
        else:
            readable[name] = module
    if not readable:
        raise ValueError("; ".join(sorted(set(skipped.values()))))
    return readable, skipped


def _has_scores(module: TokenMixer) -> bool:
    own = getattr(type(module), "attention_scores", None)
    return own is not None and own is not MultiHeadMixer.attention_scores


@contextmanager
def _taps(modules: Mapping[str, TokenMixer], add: Callable[[_Tap, str], tuple[list[Any], Any]]) -> Iterator[None]:
    """Enter one reader or editor into each module's tap, and take exactly that one out again at the end."""
    entered: list[tuple[TokenMixer, list[Any], Any]] = []
    try:
        for name, module in modules.items():
            if module._tap is None:
                module._tap = _Tap()
            assert isinstance(module._tap, _Tap)
            where, entry = add(module._tap, name)
            where.append(entry)
            entered.append((module, where, entry))
        yield
    finally:
        for module, where, entry in entered:
            where[:] = [e for e in where if e is not entry]
            tap = module._tap
            if isinstance(tap, _Tap) and not tap.readers and not tap.editors:
                module._tap = None


@contextmanager
def capture(model: nn.Module) -> Iterator[AttentionMaps]:
    """Attention maps of everything `model` computes inside the block, without changing its result.

    Bitwise: the model runs its fast forms as ever, and each map is computed beside them from the mechanism's reference,
    which costs O(L M) time and memory a head. Random mechanisms give the map of the very draw the forward used; the
    weights of attention dropout are those before dropout. Under `edit` the maps are the edited ones. Token-by-token
    decoding (`step`) is not read.

    Args:
        model: any module that holds token mixers of core_attn, or is one (then its name is the empty string).

    Yields:
        AttentionMaps: module name, as in `model.named_modules()`, -> (B, H, L, M). It stays readable after the block.

    Raises:
        ValueError: no mechanism in the model, or none whose maps can be read (`MechanismInfo.maps`).

    Example:
        >>> with core_attn.capture(model) as maps:
        ...     model(x)
        >>> maps["encoder.0.attention"].shape
        torch.Size([8, 4, 96, 96])
    """
    maps = AttentionMaps()
    readable, maps.skipped = _readable(_mixers(model), "weights")
    with _taps(readable, lambda tap, name: (tap.readers, (name, maps))):
        yield maps


@contextmanager
def edit(
    model: nn.Module, fn: Callable[[str, Tensor], Tensor], *, stage: Stage = "weights"
) -> Iterator[dict[str, str]]:
    """Let `fn` rewrite the attention of everything `model` computes inside the block.

    The output then is `fn(name, weights) @ v`, differentiable in both; attention dropout is not applied. Edits nest:
    they run in the order they were entered, those of scores before those of weights.

    Args:
        model: as in `capture`.
        fn: (module name, tensor (B, H, L, M)) -> tensor of the same shape. Return the tensor as it is to leave a module
            alone.
        stage: "weights" are the rows that multiply v; "scores" come before the softmax, masked with -inf, and exist for
            softmax mechanisms only.

    Yields:
        dict: module name -> why, for the mechanisms that cannot be edited and run as ever.

    Raises:
        ValueError: nothing in the model can be edited at that stage, or `fn` returned another shape.
    """
    if stage not in ("weights", "scores"):
        raise ValueError(f"stage is 'weights' or 'scores', got {stage!r}")
    editable, skipped = _readable(_mixers(model), stage)
    with _taps(editable, lambda tap, name: (tap.editors, (name, fn, stage))):
        yield skipped
