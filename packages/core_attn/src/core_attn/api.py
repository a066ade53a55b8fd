"""The public face: build a mechanism, call its operator, read its facts, ask which backend would run."""

from __future__ import annotations

import builtins
import dataclasses
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core_attn import dispatch, ops, registry
from core_attn.contract import FeatureGate, Mechanism, MechanismInfo, Pattern, TokenMixer
from core_attn.einsums import Cascade
from core_attn.naming import unknown


def build(
    name: str, *, dim: int, heads: int = 8, causal: bool = False, cross: bool = False, **options: Any
) -> TokenMixer:
    """Make the token mixer registered under `name`.

    Args:
        name: registry name (`core_attn.list()`), or `path/to/file.py:ClassName`; the latter runs that file's code.
        dim: channels C.
        heads: number of heads; ignored by mechanisms that have none.
        causal: token i reads only tokens <= i.
        cross: the mixer will be called with `context`. Nothing changes in it; a mechanism that cannot is refused here
            instead of at the first call.
        options: the mechanism's own options, see `core_attn.describe(name)`.

    Raises:
        UnknownNameError: unknown mechanism or option; the message names the nearest valid one.
        ValueError: the mechanism cannot compute that pattern, lacks a required option, or refuses a value.

    Example:
        >>> mixer = core_attn.build("softmax", dim=64, heads=4, causal=True)
        >>> mixer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """
    cls = registry.get(name)
    if not issubclass(cls, TokenMixer):
        raise ValueError(f"{name} is no token mixer and cannot be built with dim and heads; use {cls.__name__} itself")
    if not cls.info.supports(causal=causal, cross=cross):
        raise ValueError(
            f"{cls.info.name} cannot compute {_words(Pattern.of(causal=causal, cross=cross))} attention; "
            f"it computes: {', '.join(_words(p) for p in sorted(cls.info.patterns))}"
        )
    taken = parameters(cls)
    for option in options:
        if option not in taken:
            raise unknown(f"option of {cls.info.name}", option, [p for p in taken if p not in ("dim", "causal")])
    arguments = {"dim": dim, **options}
    arguments |= {key: value for key, value in (("heads", heads), ("causal", causal)) if key in taken}
    missing = [key for key, p in taken.items() if p.default is p.empty and key not in arguments]
    if missing:
        raise ValueError(f"{cls.info.name} needs the option {', '.join(missing)}")
    return cls(**arguments)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mechanism: str = "softmax",
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    """The operator of a mechanism as a function of queries, keys and values, without any parameters.

    Args:
        q: (B, H, L, D).
        k, v: (B, H, M, D).
        mechanism: registry name.
        causal: query i reads keys up to i + M - L.
        key_padding_mask: (B, M), bool, True = real token.
        backend: "auto" takes the fastest that is correct for these inputs; see `core_attn.explain`.
        options: the operator's own options, see `core_attn.describe(mechanism)`.

    Returns:
        (B, H, L, D), dtype of q.

    Raises:
        UnknownNameError: unknown mechanism, option or backend.
        ValueError: the mechanism cannot compute this; BackendError where the backend asked for cannot.
    """
    info = registry.get(mechanism).info
    function = operator_function(info)
    if function is None:
        raise ValueError(
            f"{mechanism} has no operator of its own; build the module with core_attn.build({mechanism!r})"
        )
    if causal and not any(p in info.patterns for p in (Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS)):
        raise ValueError(f"{mechanism} has no causal form")
    if key_padding_mask is not None and not info.padding:
        raise ValueError(f"{mechanism} does not support key_padding_mask; pass sequences of one length without it")
    taken = inspect.signature(function).parameters
    for option in options:
        if option not in taken:
            raise unknown(f"option of {function.__name__}", option, [p for p in taken if p not in ("q", "k", "v")])
    asked = {"causal": causal, "key_padding_mask": key_padding_mask, "backend": backend}
    return function(q, k, v, **{key: value for key, value in asked.items() if key in taken}, **options)


def list(
    *,
    pattern: str | Pattern | Collection[str] | None = None,
    grid_rank: int | None = None,
    decodes: bool | None = None,
    constant_state: bool | None = None,
    padding: bool | None = None,
    maps: bool | None = None,
    stochastic: bool | None = None,
) -> builtins.list[MechanismInfo]:
    """The facts of every registered mechanism that fits, by name. A filter left at None lets everything pass.

    Args:
        pattern: a pattern, such as "causal_self", or several that must all be there.
        grid_rank: uses token grids of this rank (2 for images, 3 for volumes and videos).
        decodes, constant_state, padding, maps, stochastic: as in `MechanismInfo`.

    Raises:
        UnknownNameError: no such pattern.
    """
    asked = [pattern] if isinstance(pattern, str) else [*(pattern or ())]
    for p in asked:
        if p not in [*Pattern]:
            raise unknown("pattern", p, [known.value for known in Pattern])
    wanted = {Pattern(p) for p in asked}
    flags = {
        "decodes": decodes,
        "constant_state": constant_state,
        "padding": padding,
        "maps": maps,
        "stochastic": stochastic,
    }
    infos = [registry.get(name).info for name in registry.names()]
    return [
        info
        for info in infos
        if wanted <= info.patterns
        and (grid_rank is None or grid_rank in info.grid_ranks)
        and all(value is None or getattr(info, flag) == value for flag, value in flags.items())
    ]


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is known of a mechanism; `str()` of it is the text that `core-attn describe` prints.

    Attributes:
        info: the facts the class declares.
        target: "module.Class".
        text: the class's docstring: the equation and where it stands in the paper.
        options: option -> default, of `core_attn.build`; required ones have `inspect.Parameter.empty`.
        operator: name of its function in `core_attn.ops`, with its signature; empty where it has none.
        backends: backends of the operator in order of preference.
    """

    info: MechanismInfo
    target: str
    text: str
    options: dict[str, Any]
    operator: str
    backends: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        options = {key: _default(value) for key, value in self.options.items()}
        return {
            **facts(self.info),
            "class": self.target,
            "text": self.text,
            "options": options,
            "operator": self.operator,
            "backends": [*self.backends],
        }

    def __str__(self) -> str:
        info = self.info
        able = [
            (
                "decodes token by token" + (", with a state of constant size" if info.constant_state else ""),
                info.decodes,
            ),
            ("key_padding_mask", info.padding),
            ("readable attention maps", info.maps),
            ("torch.compile and torch.export", info.compiles),
            ("gradients of gradients", info.double_backward),
        ]
        rows = [
            ("paper", f"{info.title} ({', '.join(filter(None, [info.source, str(info.year)]))})"),
            ("class", self.target),
            ("patterns", ", ".join(_words(p) for p in sorted(info.patterns))),
            ("grids", ", ".join(f"rank {r}" for r in sorted(info.grid_ranks)) or "plain sequences"),
            ("cost", f"time {info.time}, extra memory {info.memory}"),
            ("supports", ", ".join(text for text, yes in able if yes) or "-"),
            ("lacks", ", ".join(text for text, yes in able if not yes) or "-"),
        ]
        if info.stochastic:
            rows.append(("random", "draws at random; forward takes generator=, and evaluation uses a fixed seed"))
        if info.batch_dependent_training:
            rows.append(("training", "a sample's output depends on the rest of its batch (not in evaluation)"))
        if info.min_length > 1:
            rows.append(("length", f"at least {info.min_length}"))
        rows.append(("options", ", ".join(f"{k}={_default(v)}" for k, v in self.options.items()) or "-"))
        if self.operator:
            rows.append(("operator", f"core_attn.ops.{self.operator}"))
            rows.append(("backends", ", ".join(self.backends) or "-"))
        width = max(len(key) for key, _ in rows)
        table = "\n".join(f"  {key:<{width}}  {value}" for key, value in rows)
        costs = "" if info.cascade is None else f"\n\n{_cascade_text(info.cascade)}"
        return f"{info.name}\n{table}\n\n{self.text}".rstrip() + costs


def describe(name: str) -> Description:
    """Everything known of a mechanism: paper, patterns, options, operator, backends, its einsums and their costs.

    Raises:
        UnknownNameError: no such mechanism; the message names the nearest.
    """
    cls = registry.get(name)
    function = operator_function(cls.info)
    operator = operator_of(cls.info)
    return Description(
        info=cls.info,
        target=f"{cls.__module__}.{cls.__qualname__}",
        text=inspect.getdoc(cls) or "",
        options={key: p.default for key, p in parameters(cls).items() if key not in ("dim", "channels")},
        operator=_signature(function) if function is not None else "",
        backends=tuple(b.name for b in operator.backends) if operator is not None else (),
    )


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Which backend runs and why each other would not; `str()` gives it in words.

    Attributes:
        mechanism: registry name.
        operator: name of its operator.
        request: the call that was asked about.
        choices: one a backend, in order of preference.
    """

    mechanism: str
    operator: str
    request: dispatch.Request
    choices: tuple[dispatch.Choice, ...]

    @property
    def chosen(self) -> str | None:
        """Name of the backend that runs; None where none can."""
        return next((c.backend for c in self.choices if c.chosen), None)

    def __str__(self) -> str:
        r = self.request
        facts = [
            f"q {r.query}, k {r.key}, {str(r.dtype).removeprefix('torch.')} on {r.device}",
            "training" if r.requires_grad else "inference",
            *[word for word, yes in (("causal", r.causal), ("mask", r.mask), ("bias", r.bias)) if yes],
            *(["key padding"] if r.key_padding else []),
            *([f"window {r.window}"] if r.window is not None else []),
            *([f"dropout {r.dropout}"] if r.dropout else []),
            *(["compiled"] if r.compiling else []),
        ]
        head = f"{self.mechanism} ({self.operator}): {', '.join(facts)}"
        width = max(len(c.backend) for c in self.choices)
        lines = [
            f"  {c.backend:<{width}}  {'RUNS' if c.chosen else 'could run' if c.runs else 'cannot'}: {c.reason}"
            for c in self.choices
        ]
        return "\n".join([head, *lines])


def explain(
    name: str,
    *,
    length: int,
    batch: int = 1,
    heads: int = 8,
    head_dim: int = 64,
    key_heads: int | None = None,
    context: int | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
    causal: bool = False,
    requires_grad: bool = False,
    **request: Any,
) -> Explanation:
    """Which backend "auto" would run for a call of these sizes, and in words why each other would not.

    Args:
        name: registry name of the mechanism, or name of an operator.
        length, context: number of queries L, and of keys M (default L).
        batch, heads, head_dim: B, H and D.
        key_heads: heads of k and v, fewer than `heads` in grouped attention.
        dtype: torch dtype or its name, such as "bfloat16".
        device: "cpu" or "cuda".
        causal: query i reads keys up to i + M - L.
        requires_grad: gradients will be asked for, as in training.
        request: further facts of `core_attn.dispatch.Request`: mask, bias, key_padding (bool), window (left, right),
            dropout, compiling, and `options`.

    Raises:
        UnknownNameError: no such mechanism, fact or dtype.
        ValueError: the mechanism has no choice of backends.
    """
    operators = dispatch.operators()
    operator = operators[name] if name in operators else operator_of(registry.get(name).info)
    if operator is None:
        raise ValueError(f"{name} has a single form, so there is no backend to choose")
    for key in request:
        if key not in dispatch.Request._fields:
            raise unknown("fact of a call", key, [*dispatch.Request._fields])
    keys = (batch, key_heads or heads, context or length, head_dim)
    asked = dispatch.Request(
        query=(batch, heads, length, head_dim),
        key=keys,
        value=keys,
        dtype=as_dtype(dtype),
        device=torch.device(device).type,
        requires_grad=requires_grad,
        causal=causal,
        **request,
    )
    return Explanation(mechanism=name, operator=operator.name, request=asked, choices=tuple(operator.explain(asked)))


def facts(info: MechanismInfo) -> dict[str, Any]:
    """What a mechanism declares, as plain JSON types."""
    held = {key: getattr(info, key) for key in info.__dataclass_fields__}
    held["patterns"] = sorted(p.value for p in info.patterns)
    held["grid_ranks"] = sorted(info.grid_ranks)
    if info.cascade is not None:
        held["cascade"] = {**dataclasses.asdict(info.cascade), "symbols": info.cascade.meaning()}
    return {key: str(value) if isinstance(value, str) else value for key, value in held.items()}


def parameters(cls: type[Mechanism]) -> dict[str, inspect.Parameter]:
    """Constructor parameters of a mechanism by name, those that **kwargs hand on to its bases included."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        given = [*inspect.signature(vars(base)["__init__"]).parameters.values()][1:]
        for p in given:
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                found.setdefault(p.name, p)
        if base in (TokenMixer, FeatureGate) or not any(p.kind is p.VAR_KEYWORD for p in given):
            break
    return found


def operator_of(info: MechanismInfo) -> dispatch.Operator | None:
    """The operator a mechanism computes with, None where it has a single form."""
    operators = dispatch.operators()
    return next((operators[n] for n in _operator_names(info) if n in operators), None)


def operator_function(info: MechanismInfo) -> Callable[..., Tensor] | None:
    """The public function of a mechanism's operator in `core_attn.ops`, None where it has none."""
    functions = (getattr(ops, n, None) for n in _operator_names(info))
    return next((f for f in functions if callable(f)), None)


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A torch dtype from itself or its name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    names = [n for n in vars(torch) if isinstance(getattr(torch, n), torch.dtype)]
    if dtype not in names:
        raise unknown("dtype", dtype, names)
    found: torch.dtype = getattr(torch, dtype)
    return found


def _operator_names(info: MechanismInfo) -> builtins.list[str]:
    return [info.operator] if info.operator else [f"{info.name}_attention", info.name]


def _signature(function: Callable[..., Any]) -> str:
    """name(parameters and defaults), without the types."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return f"{function.__name__}{signature.replace(parameters=bare, return_annotation=signature.empty)}"


def _cascade_text(cascade: Cascade) -> str:
    """The cascade with its costs and what their letters mean, for people."""
    meaning = cascade.meaning()
    width = max(map(len, meaning), default=0)
    return "\n".join(
        [
            "As einsums, in order:",
            *[f"  {einsum}" for einsum in cascade.einsums],
            f"Passes over the keys: {cascade.passes}",
            f"FLOPs of forward: {cascade.flops}",
            f"Bytes moved at least: {cascade.bytes}",
            "where",
            *[f"  {symbol:<{width}}  {meaning[symbol]}" for symbol in meaning],
        ]
    )


def _words(pattern: Pattern) -> str:
    return pattern.value.replace("_", " ")


def _default(value: Any) -> Any:
    if value is inspect.Parameter.empty:
        return "required"
    return value if isinstance(value, bool | int | float | str | type(None)) else str(value)
