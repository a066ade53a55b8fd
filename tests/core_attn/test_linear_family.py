"""What every mechanism with a state of constant size owes, and what the linear and recurrent family refuses.

One sequence read at once, in pieces and token by token is the same, outputs and gradients; the state does not grow;
long sequences train in float32 and bfloat16; whatever does not fit is refused in one sentence of our own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import core_attn
from core_attn import ops, registry
from core_attn.bench.suites import LINEAR
from core_attn.contract import Pattern
from core_attn.testing.harness import state_bytes

CONSTANT = [info.name for info in core_attn.list(pattern="causal_self", decodes=True, constant_state=True)]
FAMILY = sorted({*CONSTANT, *(name for name in LINEAR if name in registry.names())})
CHUNKS = (1, 5, 64, 2, 30, 29)  # shorter and longer than a chunk of most, none a multiple of another
PACKAGE = str(Path(core_attn.__file__).parent)


def build(name, *, causal=None, dim=32, heads=2):
    torch.manual_seed(0)
    if causal is None:
        causal = Pattern.CAUSAL_SELF in registry.get(name).info.patterns
    mixer = core_attn.build(name, dim=dim, heads=heads, causal=causal).eval()
    with torch.no_grad():  # what starts at zero or one would hide whatever it multiplies
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer


def pieces(length, sizes):
    """`sizes`, over and over, until they make up `length`."""
    found, i = [], 0
    while length:
        found.append(min(sizes[i % len(sizes)], length))
        length -= found[-1]
        i += 1
    return found


def decoded(mixer, x, sizes):
    state = mixer.init_state(x.shape[0])
    outs = []
    for piece in x.split(sizes, dim=1):
        out, state = mixer.step(piece, state)
        outs.append(out)
    return torch.cat(outs, dim=1)


def close(got, right, what):
    error = ((got - right).abs().max() / right.abs().max()).item()
    assert error <= 1e-5, f"{what}: {error:.1e}"


@pytest.mark.parametrize("name", CONSTANT)
@pytest.mark.parametrize("length", [1, 2, 67, 131])
def test_chunks_are_steps_are_parallel(name, length):
    """Outputs at 1, 2, a prime and past a chunk (131 tokens)."""
    mixer = build(name)
    x = torch.randn(2, length, 32)
    with torch.no_grad():
        right = mixer(x)
        close(decoded(mixer, x, [1] * length), right, "token by token")
        close(decoded(mixer, x, pieces(length, CHUNKS)), right, "in pieces")
        close(decoded(mixer, x, [length]), right, "at once")


@pytest.mark.parametrize("name", CONSTANT)
def test_gradients_of_chunks_are_those_of_steps(name):
    """Of the tokens and of all weights together, at a prime length past a chunk."""
    mixer = build(name)
    length = 67
    x = torch.randn(2, length, 32, requires_grad=True)
    weight = torch.randn(2, length, 32)
    parameters = [p for p in mixer.parameters() if p.requires_grad]

    def gradients(out):
        found = torch.autograd.grad((out * weight).sum(), [x, *parameters], allow_unused=True)
        return found[0], torch.cat(
            [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found[1:])]
        )

    right = gradients(mixer(x))
    assert right[0].abs().max() > 1e-4
    for what, sizes in {"token by token": [1] * length, "in pieces": pieces(length, CHUNKS)}.items():
        for got, expected, of in zip(gradients(decoded(mixer, x, sizes)), right, ("tokens", "weights")):
            close(got, expected, f"gradients of the {of}, {what}")


@pytest.mark.parametrize("name", CONSTANT)
def test_the_state_does_not_grow(name):
    """Its bytes are the same after 1,500, 1,501, 1,540 and 3,000 tokens, with nothing else held alive."""
    mixer = build(name)
    with torch.no_grad():
        state = mixer.init_state(1)
        held = []
        for count in (1500, 1, *[1] * 38, 1460):
            _, state = mixer.step(torch.randn(1, count, 32), state)
            held.append(state_bytes(state))
    assert len(set(held)) == 1
    assert held[0] < 1_000_000


@pytest.mark.parametrize("name", CONSTANT)
def test_the_state_does_not_keep_a_prompt_alive(name):
    """What its tensors are views of is not larger than the state of as many tokens read one by one."""
    mixer = build(name)
    with torch.no_grad():
        _, state = mixer.step(torch.randn(1, 4000, 32), mixer.init_state(1))
        assert storage_bytes(state) <= 2 * state_bytes(state)


def storage_bytes(value, seen=None):
    seen = {} if seen is None else seen

    def walk(x):
        if isinstance(x, torch.Tensor):
            seen[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            [walk(y) for y in x.values()]
        elif isinstance(x, list | tuple):
            [walk(y) for y in x]
        else:
            [walk(y) for y in getattr(x, "__dict__", {}).values()]

    walk(value)
    return sum(seen.values())


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_long_sequences_train(name, dtype):
    """4,096 tokens, small ones and ones that saturate every gate: outputs and all gradients are finite."""
    mixer = build(name).to(dtype).train()
    for size in (1.0, 30.0):
        x = (size * torch.randn(1, 4096, 32)).to(dtype).requires_grad_()
        out = mixer(x)
        assert out.dtype is dtype
        assert out.isfinite().all(), f"outputs of tokens of size {size}"
        mixer.zero_grad()
        out.float().square().mean().backward()
        assert x.grad.isfinite().all(), f"gradient of tokens of size {size}"
        assert x.grad.any()
        for parameter, p in mixer.named_parameters():
            assert p.grad is None or p.grad.isfinite().all(), f"gradient of {parameter}, tokens of size {size}"


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(call, *says):
    """`call` raises a ValueError of core_attn's own in one line that says all of `says`."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert message.strip() == message != ""
    assert "\n" not in message
    assert len(message) < 400
    assert str(caught.traceback[-1].path).startswith(PACKAGE), f"torch's own words: {message}"
    for word in says:
        assert word in message, message


@pytest.mark.parametrize("name", FAMILY)
def test_mechanisms_refuse_in_one_sentence(name):
    mixer = build(name)
    info = mixer.info
    x = torch.randn(2, 9, 32)
    refused(lambda: mixer(torch.randn(2, 9, 31)), "(2, 9, 31)", "32")
    refused(lambda: mixer(torch.randn(9, 32)), "(9, 32)")
    refused(lambda: mixer(x, generator=torch.Generator()), name, "generator")
    refused(lambda: mixer(x, grid=(2, 2, 2, 2)), name, "grid")
    refused(lambda: mixer(x, context=torch.randn(2, 9, 31)), "context")
    if info.padding:
        refused(lambda: mixer(x, key_padding_mask=torch.ones(2, 8, dtype=torch.bool)), "key_padding_mask", "(2, 9)")
        refused(lambda: mixer(x, key_padding_mask=torch.ones(2, 9)), "key_padding_mask", "float32")
    else:
        refused(lambda: mixer(x, key_padding_mask=torch.ones(2, 9, dtype=torch.bool)), "key_padding_mask")
    if hasattr(mixer, "heads"):
        refused(lambda: core_attn.build(name, dim=32, heads=5, causal=mixer.causal), "heads", "32", "5")
        refused(lambda: core_attn.build(name, dim=32, heads=0, causal=mixer.causal), "heads", "0")
    refused(lambda: core_attn.build(name, dim=0, causal=mixer.causal), "dim")
    if info.decodes:
        refused(lambda: mixer.step(torch.randn(2, 1, 31), mixer.init_state(2)), "31")
        if Pattern.NONCAUSAL_SELF in info.patterns:
            refused(lambda: build(name, causal=False).init_state(2), "causal")
    else:
        refused(lambda: mixer.init_state(2), name, "token by token")
        refused(lambda: mixer.step(x, None), name, "token by token")


@pytest.mark.parametrize(
    ("name", "causal", "cross"),
    [
        (name, causal, cross)
        for name in FAMILY
        for causal in (False, True)
        for cross in (False, True)
        if Pattern.of(causal=causal, cross=cross) not in registry.get(name).info.patterns
    ],
)
def test_patterns_that_it_cannot_compute_are_refused(name, causal, cross):
    """When it is built or when it is called; causal asked of a noncausal-only mechanism among them."""

    def call():
        more = {"context": torch.randn(1, 7, 32)} if cross else {}
        build(name, causal=causal)(torch.randn(1, 7, 32), **more)

    refused(call, name, "cannot compute")


def tokens(*shape):
    return torch.randn(shape)


def common(b=2, h=2, n=7, d=4, dv=6):
    return {"q": tokens(b, h, n, d), "k": tokens(b, h, n, d), "v": tokens(b, h, n, dv)}


# name -> (right inputs, the inputs that are wrong one at a time and what the sentence must say).
SHAPES = {
    "q": [(tokens(2, 7, 4), "(2, 7, 4)"), (tokens(2, 2, 7, 5), "5"), (tokens(3, 2, 7, 4), "3")],
    "k": [(tokens(2, 2, 6, 4), "6"), (tokens(2, 3, 7, 4), "3"), (tokens(2, 2, 7, 4).double(), "float64")],
    "v": [(tokens(2, 3, 7, 6), "3"), (tokens(2, 2, 8, 6), "8"), (tokens(7, 6), "(7, 6)")],
}
STATE = {"initial_state": [(tokens(2, 2, 6, 4), "(2, 2, 6, 4)"), (tokens(2, 4, 6), "(2, 4, 6)")]}
BACKEND = {"backend": [("fastest", "fastest")]}
OPERATORS = {
    "gated_linear_attention": (
        {**common(), "log_gate": -torch.rand(2, 2, 7, 4)},
        {
            **SHAPES,
            **STATE,
            **BACKEND,
            "log_gate": [
                (-torch.rand(2, 2, 7), "(2, 2, 7)"),
                (torch.full((2, 2, 7, 4), 0.1), "at most 0"),
                (torch.zeros(2, 2, 7, 4, dtype=torch.int64), "int64"),
            ],
        },
    ),
    "scalar_decay_attention": (
        {**common(), "log_decay": -torch.rand(2, 2, 7)},
        {
            **SHAPES,
            **STATE,
            **BACKEND,
            "log_decay": [
                (-torch.rand(2, 7), "(2, 7)"),
                (-torch.rand(3), "(3,)"),
                (torch.full((2,), 0.5), "at most 0"),
                (torch.zeros(2, dtype=torch.int64), "int64"),
            ],
        },
    ),
    "delta_rule": (
        {**common(), "beta": torch.rand(2, 2, 7), "log_decay": -torch.rand(2, 2, 7)},
        {
            **SHAPES,
            **STATE,
            **BACKEND,
            "beta": [(torch.rand(2, 7), "(2, 7)"), (torch.ones(2, 2, 7, dtype=torch.bool), "bool")],
            "log_decay": [(-torch.rand(2), "(2,)"), (torch.full((2, 2, 7), 2.0), "at most 0")],
        },
    ),
    "titans_memory": (
        {
            **common(),
            "rate": torch.rand(2, 2, 7),
            "log_momentum": -torch.rand(2, 2, 7),
            "log_decay": -torch.rand(2, 2, 7),
        },
        {
            **SHAPES,
            **BACKEND,
            "rate": [
                (torch.rand(2, 7), "(2, 7)"),
                (-torch.ones(2, 2, 7), "at least 0"),
                (torch.ones(2, 2, 7, dtype=torch.int64), "int64"),
            ],
            "log_momentum": [(torch.rand(2, 2), "(2, 2)"), (torch.full((2, 2, 7), 2.0), "at most 0")],
            "log_decay": [(torch.rand(7), "(7,)"), (torch.full((2, 2, 7), 0.1), "at most 0")],
            "chunk": [(0, "at least 1")],
        },
    ),
    "kernel_attention": (
        {
            "q_features": torch.rand(2, 2, 7, 4),
            "k_features": torch.rand(2, 2, 7, 4),
            "v": tokens(2, 2, 7, 6),
            "causal": True,
        },
        {
            "q_features": SHAPES["q"],
            "k_features": [*SHAPES["k"][1:], (tokens(2, 2, 7, 3), "3")],
            "v": SHAPES["v"],
            "initial_state": [(tokens(2, 2, 4, 6), "(2, 2, 4, 6)")],
            **BACKEND,
        },
    ),
    "flow_attention": ({**common(), "causal": True}, {**SHAPES, **BACKEND}),
    "rat_attention": (
        {**common(dv=4), "log_gate": -torch.rand(2, 2, 7, 4)},
        {
            "q": SHAPES["q"],
            "k": SHAPES["k"],
            "v": SHAPES["v"],
            **BACKEND,
            "log_gate": [(-torch.rand(2, 2, 7), "(2, 2, 7)"), (torch.full((2, 2, 7, 4), 0.1), "at most 0")],
            "chunk_size": [(0, "chunk_size")],
            "initial_state": [(tokens(2, 2, 4), "RatState")],
        },
    ),
    "fft_conv": (
        {"x": tokens(2, 4, 7), "kernel": tokens(4, 7)},
        {
            "x": [(tokens(2, 7), "(2, 7)"), (tokens(2, 3, 7), "(2, 3, 7)")],
            "kernel": [(tokens(3, 7), "(3, 7)"), (tokens(4, 0), "(4, 0)")],
            "skip": [(tokens(3), "(3,)")],
            "reverse_kernel": [(tokens(4, 6), "(4, 6)")],
            **BACKEND,
        },
    ),
}
WRONG = [
    pytest.param(name, argument, value, says, id=f"{name}-{argument}-{i}")
    for name, (_, wrong) in OPERATORS.items()
    for argument, values in wrong.items()
    for i, (value, says) in enumerate(values)
]


@pytest.mark.parametrize(("name", "argument", "value", "says"), WRONG)
def test_operators_refuse_in_one_sentence(name, argument, value, says):
    right = dict(OPERATORS[name][0])
    getattr(ops, name)(**right)
    refused(lambda: getattr(ops, name)(**{**right, argument: value}), says)
