"""From a trained model with softmax attention to one with Hedgehog: the weights of its attention are distilled.

"The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry" (S193), section 4.2: first the feature
maps learn to give the weights of the softmax layers, with the rest of the model as it is (`distill`); then, where
wanted, the whole model is trained on its task as ever.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from core_attn.contract import TokenMixer
from core_attn.mechanisms.linear.hedgehog import LEAST, HedgehogAttention
from core_attn.mechanisms.softmax.exact import SoftmaxAttention

__all__ = ["attention_distillation_loss", "attention_divergence", "convert", "distill", "hedgehog_from_softmax"]


def hedgehog_from_softmax(teacher: SoftmaxAttention, **options: Any) -> HedgehogAttention:
    """Hedgehog with the projections of a softmax layer, copied, and feature maps that have learned nothing yet.

    Key heads that several query heads share are repeated. Dropout of attention weights has no counterpart.

    Args:
        teacher: the layer; not changed.
        options: activation, eps and backend of `HedgehogAttention`.

    Raises:
        ValueError: the layer has a window, or a scale of its own.
    """
    if teacher.window is not None or teacher.scale != teacher.head_dim**-0.5:
        raise ValueError("Hedgehog can take the place of softmax attention without a window and of scale 1/√D only")
    biased = teacher.q_proj.bias is not None
    made = HedgehogAttention(teacher.dim, heads=teacher.heads, causal=teacher.causal, bias=biased, **options)
    made.to(teacher.q_proj.weight)
    made.train(teacher.training)
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            for key, value in getattr(teacher, name).named_parameters():
                if value.shape[0] != teacher.dim:
                    value = value.unflatten(0, (teacher.kv_heads, -1))
                    value = value.repeat_interleave(teacher.heads // teacher.kv_heads, dim=0).flatten(0, 1)
                getattr(getattr(made, name), key).copy_(value)
    return made


def convert(model: nn.Module, **options: Any) -> nn.Module:
    """A copy of a model with Hedgehog in place of every softmax layer (`core_attn.build("softmax", …)`).

    Args:
        model: any module that holds softmax layers of core_attn, or is one; not changed.
        options: see `hedgehog_from_softmax`.

    Raises:
        ValueError: it holds none, or one that Hedgehog cannot take the place of.

    Example:
        >>> student = convert(teacher)
        >>> losses = distill(student, teacher, batches)
        >>> attention_divergence(student, teacher, held_out)  # nats a query, for every layer
    """
    layers = _softmax_layers(model)
    made = copy.deepcopy(model)
    if "" in layers:
        return hedgehog_from_softmax(made, **options)  # type: ignore[arg-type]
    places = {id(layer): hedgehog_from_softmax(layer, **options) for layer in layers.values()}
    for name, layer in [*model.named_modules(remove_duplicate=False)]:
        if id(layer) in places:
            made.set_submodule(name, places[id(layer)])
    return made


def attention_distillation_loss(
    student: HedgehogAttention,
    teacher: SoftmaxAttention,
    x: Tensor,
    *,
    context: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Cross entropy of the weights of two layers that are given the same tokens, mean over queries (section 4.2).

    -Σ_j a_ij log â_ij with the teacher's weights a and the student's â, both made from the teacher's queries and keys,
    so that only the student's feature maps matter. It is least, the entropy of a, where the weights are the same.
    Queries that are padding or read nothing do not count. Costs O(L M) memory.

    Args:
        student, teacher: layers of one width, number of heads and causality.
        x, context, key_padding_mask: see `TokenMixer.forward`.

    Returns:
        Scalar; its gradient reaches the student's feature maps only.

    Raises:
        ValueError: layers that do not fit, or inputs that the teacher does not take.
    """
    right, learned, counted = _weights(student, teacher, x, context=context, key_padding_mask=key_padding_mask)
    losses = -(right * learned.clamp(min=LEAST).log()).sum(-1)
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def attention_divergence(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    run: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, float]:
    """How far the weights of a converted model are from those of the model it was made from: 0 where they are equal.

    KL(a‖â) = Σ_j a_ij log(a_ij / â_ij) in nats, mean over queries, of each layer when it is given the tokens that the
    teacher's layer in its place is given: `attention_distillation_loss` less the entropy of the teacher's weights.

    Args:
        student, teacher, batches, run: see `distill`; neither model is changed.

    Returns:
        Name of the layer -> KL, in the order of the model.

    Raises:
        ValueError: the student has no Hedgehog where the teacher has a softmax layer, or no layer is called.
    """
    pairs = _pairs(student, teacher)
    sums = {name: [0.0, 0.0] for name in pairs}
    with torch.no_grad():
        for batch in batches:
            for name, args, more in _calls(teacher, batch, run):
                right, learned, counted = _weights(*pairs[name], *args, **more)
                apart = -torch.special.entr(right) - right * learned.clamp(min=LEAST).log()
                sums[name][0] += float((apart.sum(-1) * counted).sum())
                sums[name][1] += float(counted.sum())
    return {name: total / max(count, 1.0) for name, (total, count) in sums.items()}


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    lr: float = 0.01,
    run: Callable[[nn.Module, Any], Any] | None = None,
) -> list[float]:
    """Train the feature maps of a converted model to give the attention weights of the model it was made from.

    The teacher runs; each of its layers and the student's in its place are given the same tokens, and the mean of their
    `attention_distillation_loss` is lowered with Adam, one step a batch. Nothing but feature maps changes.

    Args:
        student: what `convert(teacher)` gave; changed in place.
        teacher: the trained model; put into eval mode meanwhile.
        batches: what the model is given, one a step.
        lr: learning rate.
        run: (model, batch) -> anything, how the model is called; `model(batch)` by default.

    Returns:
        The loss of each step, mean over the layers.

    Raises:
        ValueError: the student has no Hedgehog where the teacher has a softmax layer, or no layer is called.
    """
    pairs = _pairs(student, teacher)
    maps = [p for layer, _ in pairs.values() for p in (layer.q_map, layer.k_map)]
    optimizer = torch.optim.Adam(maps, lr=lr)
    losses = []
    for batch in batches:
        calls = _calls(teacher, batch, run)
        with torch.enable_grad():
            terms = [attention_distillation_loss(*pairs[name], *args, **more) for name, args, more in calls]
            loss = torch.stack(terms).mean()
        for p, gradient in zip(maps, torch.autograd.grad(loss, maps)):
            p.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _weights(
    student: HedgehogAttention,
    teacher: SoftmaxAttention,
    x: Tensor,
    *,
    context: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (B, H, L, M) of the teacher and of the student, and (B, H, L) 1 for each query that counts."""
    if (student.dim, student.heads, student.causal) != (teacher.dim, teacher.heads, teacher.causal):
        raise ValueError(
            "student and teacher must agree in dim, heads and causal, got "
            f"{(student.dim, student.heads, student.causal)} and {(teacher.dim, teacher.heads, teacher.causal)}"
        )
    teacher.check_inputs(x, context=context, key_padding_mask=key_padding_mask)
    with torch.no_grad():
        source = x if context is None else context
        if key_padding_mask is not None:
            source = source.masked_fill(~key_padding_mask.unsqueeze(-1), 0.0)
        q = teacher.split_heads(teacher.q_proj(x if context is not None else source))
        k = teacher.split_heads(teacher.k_proj(source))
        right = teacher.attention_map(q, k, key_padding_mask=key_padding_mask, aux=None)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        counted = (right.sum(-1) > 0).to(right.dtype)
        if key_padding_mask is not None and context is None:
            counted = counted * key_padding_mask[:, None]
    return right, student.attention_map(q, k, key_padding_mask=key_padding_mask, aux=None), counted


def _softmax_layers(model: nn.Module) -> dict[str, SoftmaxAttention]:
    """Those of exactly that class: what a subclass does besides would be lost."""
    found = {name: m for name, m in model.named_modules() if type(m) is SoftmaxAttention}
    if not found:
        others = sorted({m.info.name for m in model.modules() if isinstance(m, TokenMixer)})
        raise ValueError(
            f"{type(model).__name__} holds no softmax attention of core_attn" + (f", only {others}" if others else "")
        )
    return found


def _pairs(student: nn.Module, teacher: nn.Module) -> dict[str, tuple[HedgehogAttention, SoftmaxAttention]]:
    found = {}
    at = dict(student.named_modules())
    for name, layer in _softmax_layers(teacher).items():
        other = at.get(name)
        if not isinstance(other, HedgehogAttention):
            held = "nothing" if other is None else type(other).__name__
            raise ValueError(f"the student has {held} at {name!r}; make it with convert(teacher)")
        found[name] = other, layer
    return found


def _calls(
    teacher: nn.Module, batch: Any, run: Callable[[nn.Module, Any], Any] | None
) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The teacher runs in eval mode, without gradients -> name and arguments of every call of a softmax layer."""
    found: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], more: dict[str, Any]) -> None:
            taken = {k: v for k, v in more.items() if k in ("x", "context", "key_padding_mask")}
            found.append((name, args, taken))

        return hook

    hooks = [m.register_forward_pre_hook(note(n), with_kwargs=True) for n, m in _softmax_layers(teacher).items()]
    try:
        with torch.no_grad(), _in_eval_mode(teacher):
            teacher(batch) if run is None else run(teacher, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError(f"none of the softmax layers of {type(teacher).__name__} was called with this batch")
    return found


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    before = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, training in before.items():
            m.training = training
