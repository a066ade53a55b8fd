"""The delta rule: a state of keys times values in which a token replaces what was stored under its key.

"Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (Yang et al., NeurIPS 2024), eq. 3, and
with a decay "Gated Delta Networks: Improving Mamba2 with Delta Rule" (Yang et al., ICLR 2025), eq. 10.

Shapes: B batch, H heads, L tokens, D channels of a key, Dv channels of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.dispatch import Backend, Operator, Request
from core_attn.ops.arguments import check_qkv, default_scale, prepare_qkv
from core_attn.ops.delta import chunked, recurrent, reference

# Up to how many tokens a loop over them is faster than cutting them into chunks.
FEW = 4


def _is_few(request: Request) -> str | None:
    few = request.query[2] <= FEW and not request.requires_grad
    return f"for up to {FEW} tokens without gradients the recurrence itself is faster" if few else None


def _is_many(request: Request) -> str | None:
    return None if request.query[2] <= FEW else "one step a token is slower than chunks of tokens"


OPERATOR = Operator(
    "delta_rule",
    [
        Backend("torch", chunked.run, pass_over=_is_few),
        Backend("recurrent", recurrent.run, pass_over=_is_many),
        Backend("reference", reference.run),
    ],
)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """S_t = e^(g_t) (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ and o_t = scale · q_tᵀ S_t: causal, linear in L.

    With keys of norm 1 and β = 1 the value stored under the key is replaced; smaller β move it part of the way. Keys
    longer than √(2/β) make the state grow without bound, as the definition does. The decay is given as a logarithm; any
    strength of it is computed exactly. A token that must not touch the state has zeros for k, v, β and its log-decay.
    Sums and states are float32 for 16-bit inputs, float64 for float64.

    Args:
        q: (B, H, L, D), floating point.
        k: (B, H, L, D), normalised to norm 1 by the caller where the paper does.
        v: (B, H, L, Dv).
        beta: (B, H, L) strengths of writing, usually in [0, 1]; any floating dtype.
        log_decay: (B, H, L) logarithms g of the decay, at most 0; no decay by default. Values above 0 are refused on
            the CPU; on other devices and in compiled graphs, where looking would make the program wait, they are not
            looked for.
        scale: factor of the outputs; 1/√D by default.
        initial_state: (B, H, D, Dv) state before the first token; zeros by default.
        return_state: also return the state behind the last token.
        backend: "auto", "torch" (in chunks), "recurrent" (a loop over tokens, fast for few) or "reference".

    Returns:
        (B, H, L, Dv), dtype of q (under autocast, of autocast); with `return_state` a pair of that and the state
        (B, H, D, Dv) in float32 (float64 for float64).

    Raises:
        ValueError: shapes or dtypes that do not fit; a log-decay above 0.
        BackendError: the backend asked for cannot run for these inputs, and why.
        UnknownNameError: no such backend.
    """
    check_qkv(q, k, v)
    if q.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"delta_rule takes as many heads and tokens in k as in q, got {tuple(k.shape[1:3])} and "
            f"{tuple(q.shape[1:3])} (H, L); repeat shared heads with repeat_interleave"
        )
    for name, x in (("beta", beta), ("log_decay", log_decay)):
        if x is not None and (x.shape != k.shape[:3] or not x.is_floating_point()):
            raise ValueError(
                f"{name} must be floating point of shape (B, H, L) = {tuple(k.shape[:3])}, "
                f"got {tuple(x.shape)} of {x.dtype}"
            )
    if log_decay is not None:
        _check_domain(log_decay)
    state_shape = (*k.shape[:2], k.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(
            f"initial_state must have shape (B, H, D, Dv) = {state_shape}, got {tuple(initial_state.shape)}"
        )
    q, k, v = prepare_qkv(q, k, v)
    out, state = OPERATOR(
        q,
        k,
        v,
        beta=beta,
        log_decay=log_decay,
        scale=default_scale(q, scale),
        initial_state=initial_state,
        backend=backend,
    )
    return (out, state) if return_state else out


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    state: Tensor,
    log_decay: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One or more further tokens of a sequence: outputs (B, H, T, Dv), and the state behind them.

    Args:
        q, k, v, beta, log_decay, scale: see `delta_rule`, with T further tokens in place of L.
        state: (B, H, D, Dv) state so far; zeros at the start. It is not changed.

    Raises:
        ValueError: see `delta_rule`.
    """
    found = delta_rule(q, k, v, beta=beta, log_decay=log_decay, scale=scale, initial_state=state, return_state=True)
    assert isinstance(found, tuple)
    return found


def _check_domain(log_decay: Tensor) -> None:
    if log_decay.device.type != "cpu" or torch.compiler.is_compiling() or not log_decay.numel():
        return
    highest = float(log_decay.detach().amax())
    if highest > 0:
        raise ValueError(
            f"log_decay must be at most 0 (the logarithm of a factor in (0, 1]), got values up to {highest:.3g}"
        )
