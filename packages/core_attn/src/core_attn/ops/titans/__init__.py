"""The linear memory of Titans: a state that learns, token by token, to give the values of its keys.

"Titans: Learning to Memorize at Test Time" (S127), section 3.1, eq. 9, 10 and 12 to 14 for a matrix-valued memory, and
section 3.2 for gradients in chunks.

Shapes: B batch, H heads, L tokens, D channels of a key, Dv channels of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.dispatch import Backend, Operator, Request
from core_attn.ops.arguments import check_qkv, default_scale, prepare_qkv
from core_attn.ops.titans import chunked, recurrent, reference
from core_attn.ops.titans.reference import TitansState

__all__ = ["OPERATOR", "TitansState", "titans_memory", "titans_step"]

# Up to how many tokens a loop over them is faster than cutting them into pieces.
FEW = 4


def _is_few(request: Request) -> str | None:
    few = request.query[2] <= FEW and not request.requires_grad
    return f"for up to {FEW} tokens without gradients the recurrence itself is faster" if few else None


def _is_many(request: Request) -> str | None:
    return None if request.query[2] <= FEW else "one step a token is slower than pieces of many tokens"


OPERATOR = Operator(
    "titans_memory",
    [
        Backend("torch", chunked.run, pass_over=_is_few),
        Backend("recurrent", recurrent.run, pass_over=_is_many),
        Backend("reference", reference.run),
    ],
)


def titans_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rate: Tensor,
    log_momentum: Tensor | None = None,
    log_decay: Tensor | None = None,
    chunk: int = 1,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    initial_state: TitansState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, TitansState]:
    """A memory M that takes a step of gradient descent with momentum and forgetting at every token: linear in L.

    S_t = η_t S_{t-1} - θ_t ∇|M_rᵀ k_t - v_t|², M_t = (1 - α_t) M_{t-1} + S_t and o_t = scale · M_tᵀ q_t, where r is the
    last token before the chunk of gradients that t belongs to: t - 1 for chunks of one token, the recurrence itself.
    Longer chunks are the paper's parallel form: all their tokens take the gradient at the memory the chunk began with.

    The gradient is that of eq. 12, 2 (M_rᵀ k_t - v_t): with keys of norm 1, no momentum and no forgetting θ = 1/2
    replaces the value that was stored under the key, as the delta rule does with β = 1. Steps that are too long for
    keys, momentum and chunk make the memory grow without bound, as the definition does. Gates are given as logarithms;
    any strength of them is computed exactly. Sums and states are float32 for 16-bit inputs, float64 for float64.

    Args:
        q: (B, H, L, D), floating point.
        k: (B, H, L, D), normalised to norm 1 by the caller where the paper does.
        v: (B, H, L, Dv).
        rate: (B, H, L) steps θ, at least 0; any floating dtype.
        log_momentum: (B, H, L) logarithms of η, at most 0; no momentum (η = 0) by default.
        log_decay: (B, H, L) logarithms of 1 - α, at most 0; no forgetting (α = 0) by default.
        chunk: tokens of a chunk of gradients, counted from the first token, padding included; at least 1.
        key_padding_mask: (B, L) bool, True = real token. Tokens under False leave memory and momentum as they are.
        scale: factor of the outputs; 1/√D by default.
        initial_state: `TitansState` before the first token; memory and momentum of zeros by default.
        return_state: also return the state behind the last token.
        backend: "auto", "torch" (in pieces), "recurrent" (a loop over tokens, fast for few) or "reference".

    Steps below 0 and logarithms above 0 are refused on the CPU; on other devices and in compiled graphs, where looking
    would make the program wait, they are not looked for.

    Returns:
        (B, H, L, Dv), dtype of q (under autocast, of autocast); with `return_state` a pair of that and a `TitansState`
        in float32 (float64 for float64).

    Raises:
        ValueError: shapes or dtypes that do not fit; a value out of its range.
        BackendError: the backend asked for cannot run for these inputs, and why.
        UnknownNameError: no such backend.
    """
    check_qkv(q, k, v, key_padding_mask)
    if q.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"titans_memory takes as many heads and tokens in k as in q, got {tuple(k.shape[1:3])} and "
            f"{tuple(q.shape[1:3])} (H, L); repeat shared heads with repeat_interleave"
        )
    for name, x in (("rate", rate), ("log_momentum", log_momentum), ("log_decay", log_decay)):
        if x is not None and (x.shape != k.shape[:3] or not x.is_floating_point()):
            raise ValueError(
                f"{name} must be floating point of shape (B, H, L) = {tuple(k.shape[:3])}, "
                f"got {tuple(x.shape)} of {x.dtype}"
            )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    if initial_state is not None:
        _check_state(initial_state, (*k.shape[:2], k.shape[3], v.shape[3]), chunk)
    q, k, v = prepare_qkv(q, k, v, key_padding_mask)
    if key_padding_mask is not None:
        gone = ~key_padding_mask[:, None]
        if log_momentum is None:
            log_momentum = torch.full_like(rate, -torch.inf)
        log_decay = None if log_decay is None else log_decay.masked_fill(gone, 0.0)
        rate, log_momentum = rate.masked_fill(gone, 0.0), log_momentum.masked_fill(gone, 0.0)
    _check_domain(rate, log_momentum, log_decay)
    out, state = OPERATOR(
        q,
        k,
        v,
        rate=rate,
        log_momentum=log_momentum,
        log_decay=log_decay,
        chunk=chunk,
        key_padding_mask=key_padding_mask,
        scale=default_scale(q, scale),
        initial_state=initial_state,
        return_state=return_state,
        backend=backend,
    )
    return (out, state) if return_state else out


def titans_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rate: Tensor,
    state: TitansState | None,
    log_momentum: Tensor | None = None,
    log_decay: Tensor | None = None,
    chunk: int = 1,
    scale: float | None = None,
) -> tuple[Tensor, TitansState]:
    """One or more further tokens of a sequence: outputs (B, H, T, Dv), and the state behind them.

    Args:
        q, k, v, rate, log_momentum, log_decay, chunk, scale: see `titans_memory`, with T further tokens in place of L.
        state: the state so far, None at the start. It is not changed.

    Raises:
        ValueError: see `titans_memory`.
    """
    found = titans_memory(
        q,
        k,
        v,
        rate=rate,
        log_momentum=log_momentum,
        log_decay=log_decay,
        chunk=chunk,
        scale=scale,
        initial_state=state,
        return_state=True,
    )
    assert isinstance(found, tuple)
    return found


def _check_state(state: TitansState, shape: tuple[int, ...], chunk: int) -> None:
    for name, x in zip(("memory", "surprise", "anchor"), state[:3], strict=True):
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"initial_state.{name} must have shape (B, H, D, Dv) = {shape}, got {tuple(x.shape)}")
    if not 0 <= state.seen < chunk or (state.seen > 0 and state.anchor is None):
        raise ValueError(
            f"initial_state has seen {state.seen} tokens of a chunk and {'no' if state.anchor is None else 'an'} "
            f"anchor, which does not fit chunks of {chunk}; go on with the chunk that the state was made with"
        )


def _check_domain(rate: Tensor, log_momentum: Tensor | None, log_decay: Tensor | None) -> None:
    if rate.device.type != "cpu" or torch.compiler.is_compiling() or not rate.numel():
        return
    least = float(rate.detach().amin())
    if least < 0:
        raise ValueError(f"rate must be at least 0 (steps against the gradient), got values down to {least:.3g}")
    for name, x in (("log_momentum", log_momentum), ("log_decay", log_decay)):
        highest = 0.0 if x is None else float(x.detach().amax())
        if highest > 0:
            raise ValueError(
                f"{name} must be at most 0 (the logarithm of a factor in (0, 1]), got values up to {highest:.3g}"
            )
