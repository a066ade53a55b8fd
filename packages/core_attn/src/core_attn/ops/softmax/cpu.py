"""Softmax attention by a C++ kernel of our own (cpu.cpp), for float32 and bfloat16 on CPUs with AVX-512.

Optional, and never part of a wheel: the kernel is compiled on this machine, in a few seconds, by the first call that
names it (`backend="cpu"`) or by `build()`, and kept in torch's cache of extensions (`TORCH_EXTENSIONS_DIR`, by default
~/.cache/torch_extensions) under a hash of source, torch version and compiler flags. "auto" never compiles anything:
it takes the kernel once it has been built. Shapes as in `core_attn.ops.softmax`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core_attn.dispatch import BackendError, Request

_SOURCE = Path(__file__).with_suffix(".cpp")
_INSTRUCTIONS = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
_FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-mfma", *(f"-m{name}" for name in _INSTRUCTIONS))
_EXPORTS = (  # of libtorch: brgemm for float32 and bfloat16, and could_pack, which says whether it has a tile unit
    "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb",
    "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb",
    "_ZN2at6native7cpublas10could_packEN3c1010ScalarTypeE",
)
_OPTIONS = "Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, int? left, int? right, float scale"


# Where it can run


def why_not(request: Request) -> str | None:
    if request.device != "cpu":
        return f"it runs on the CPU, these tensors are on {request.device}"
    if request.dtype not in (torch.float32, torch.bfloat16):
        return f"it has float32 and bfloat16, not {str(request.dtype).removeprefix('torch.')}"
    given = [n for n in ("mask", "bias", "dropout") if getattr(request, n)]
    if given:
        return f"it has no {' and no '.join(given)}"
    if 0 in request.query or 0 in request.key or 0 in request.value:
        return "it takes no empty tensors"
    if request.dtype is torch.bfloat16 and "avx512_bf16" not in _cpu_flags():
        return "in bfloat16 it needs a CPU with the instructions AVX512_BF16"
    if request.dtype is torch.bfloat16 and not torch.backends.mkldnn.enabled:
        return "in bfloat16 it needs oneDNN, which is turned off (torch.backends.mkldnn.enabled)"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if request.dtype is torch.bfloat16 and not any(name in limit for name in ("ALL", "DEFAULT", "BF16", "FP16", "AMX")):
        return f"in bfloat16 it needs instructions that ONEDNN_MAX_CPU_ISA={limit} keeps oneDNN from using"
    return unavailable()


def pass_over(request: Request) -> str | None:
    if not _library().is_file():
        return "its kernel has not been compiled on this machine yet; naming it once does that, in a few seconds"
    if request.compiling:
        return "a compiled or exported graph would need the kernel wherever it runs"
    batch, heads, queries, _ = request.query
    read = request.key[2]
    if request.window is not None and None not in request.window:
        read = min(read, sum(side or 0 for side in request.window) + 1)
    if queries < 128:
        return "it works on tiles of queries, which so few leave almost empty"
    if batch * heads * queries * read < 2**18:
        return "so small a call is over before it has rearranged queries, keys and values"
    return None


def unavailable() -> str | None:
    """Why the kernel cannot run on this machine, whatever the call; None where it can or could once built."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"it needs Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    lacking = [name for name in _INSTRUCTIONS if name not in _cpu_flags()]
    if lacking:
        return f"it needs a CPU with AVX-512, this one lacks {', '.join(lacking)}"
    if not _exported():
        return f"libtorch {torch.__version__} does not export the small-tile matmul (brgemm) it is made of"
    if _library().is_file():
        loaded = _load(_library())
        return loaded if isinstance(loaded, str) else None
    if shutil.which(_compiler()) is None:
        return f"its kernel is compiled on first use, and the C++ compiler {_compiler()} is not installed"
    if not (_torch() / "include" / "ATen" / "native" / "CPUBlas.h").is_file():
        return "its kernel is compiled on first use, and torch's headers are not installed"
    return _failures.get(_library())


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """Instruction sets of this CPU, in Linux's names."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), ()))


@functools.cache
def _exported() -> bool:
    try:
        library = ctypes.CDLL(str(_torch() / "lib" / "libtorch_cpu.so"))
    except OSError:
        return False
    return all(hasattr(library, name) for name in _EXPORTS)


# Building and loading

_failures: dict[Path, str] = {}


def build() -> Path:
    """Compile the kernel unless that has been done, and return the library's path.

    Raises:
        BackendError: it cannot be compiled or loaded here, and why.
    """
    library = _library()
    _kernel(library)
    return library


@functools.cache
def _kernel(library: Path) -> ctypes.CDLL:
    reason = unavailable()
    if reason is None and not library.is_file():
        reason = _compile(library)
    loaded = _load(library) if reason is None else reason
    if isinstance(loaded, str):
        raise BackendError(f"the CPU kernel of softmax_attention cannot be built here: {loaded}")
    return loaded


def _torch() -> Path:
    return Path(torch.__file__).parent


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _flags() -> tuple[str, ...]:
    half = "avx512_bf16" in _cpu_flags()
    tiles = half and {"amx_tile", "amx_bf16"} <= _cpu_flags()
    return (*_FLAGS, *["-mavx512bf16"] * half, *["-mamx-tile", "-mamx-bf16"] * tiles)


@functools.cache
def _key(flags: tuple[str, ...]) -> str:
    content = [_SOURCE.read_text(encoding="utf-8"), torch.__version__, *flags]
    return hashlib.sha256("\0".join(content).encode()).hexdigest()[:16]


def _library() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(root) if root else Path.home() / ".cache" / "torch_extensions"
    return folder / "core_attn_softmax_cpu" / f"{_key(_flags())}.so"


def _compile(library: Path) -> str | None:
    """Why compiling failed, or None. Several processes may do it at once: the last one's file stays."""
    lib = _torch() / "lib"
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            done = subprocess.run(
                [
                    *(_compiler(), *_flags(), f"-I{_torch() / 'include'}", str(_SOURCE), "-o", str(made)),
                    *(f"-L{lib}", "-ltorch_cpu", "-lc10"),
                ],
                capture_output=True,
                encoding="utf-8",
            )
            if done.returncode == 0:
                made.replace(library)
                return None
    except OSError as error:
        return _failures.setdefault(library, f"its kernel cannot be compiled ({error})")
    lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
    first = next((line for line in lines if "error" in line), lines[-1])
    return _failures.setdefault(library, f"{_compiler()} cannot compile its kernel ({first.strip()})")


@functools.cache
def _load(library: Path) -> ctypes.CDLL | str:
    """The library, or why it cannot be loaded."""
    try:
        found = ctypes.CDLL(str(library))
        for function in (found.core_attn_forward, found.core_attn_backward):
            function.restype = ctypes.c_char_p
            function.argtypes = [ctypes.POINTER(_Call)]
    except (OSError, AttributeError) as error:
        return f"its compiled kernel cannot be loaded ({error}); delete {library} to have it compiled anew"
    _count_operations()
    return found


# Calling


class _Tensor4(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row"))]


class _Call(ctypes.Structure):
    """The structure of the same name in cpu.cpp."""

    _fields_ = [
        *((name, _Tensor4) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("lse", "keep")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "groups", "queries", "keys", "width", "value_width")),
        *((name, ctypes.c_int64) for name in ("left", "right")),
        ("scale", ctypes.c_float),
        ("bfloat16", ctypes.c_int32),
    ]


def _call(
    function: str,
    tensors: dict[str, Tensor],
    lse: Tensor,
    keep: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
) -> None:
    kernel = _kernel(_library())
    call = _Call()
    for name, x in tensors.items():
        setattr(call, name, _Tensor4(x.data_ptr(), *x.stride()[:3]))
    q, k = tensors["q"], tensors["k"]
    call.lse, call.keep = lse.data_ptr(), None if keep is None else keep.data_ptr()
    call.batch, call.heads, call.queries, call.width = q.shape
    call.groups, call.keys, call.value_width = k.shape[1], k.shape[2], tensors["v"].shape[3]
    whole = call.queries + call.keys
    call.left = whole if left is None else min(left, whole)
    call.right = whole if right is None else min(right, whole)
    call.scale, call.bfloat16 = scale, q.dtype is torch.bfloat16
    error = getattr(kernel, function)(ctypes.byref(call))
    if error is not None:
        raise RuntimeError(f"the CPU kernel of softmax_attention failed: {error.decode()}")


def _rows(x: Tensor) -> Tensor:
    """With channels side by side, as the kernel reads them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, left: int | None, right: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = _rows(q), _rows(k), _rows(v)
    out, lse = q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)
    keep = None if keep is None else keep.contiguous()
    _call("core_attn_forward", {"q": q, "k": k, "v": v, "out": out}, lse, keep, left, right, scale)
    return out, lse


def _backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    given = {"q": _rows(q), "k": _rows(k), "v": _rows(v), "out": _rows(out), "dout": _rows(dout)}
    keep = None if keep is None else keep.contiguous()
    results = {"dq": dq, "dk": dk, "dv": dv}
    _call("core_attn_backward", given | results, lse.contiguous(), keep, left, right, scale)
    return dq, dk, dv


_op = torch.library.custom_op(
    "core_attn::softmax_cpu",
    _forward,
    mutates_args=(),
    schema=f"({_OPTIONS}) -> (Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "core_attn::softmax_cpu_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward_op.register_fake
def _(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, keep, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, keep, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, keep, out, lse = ctx.saved_tensors
    return *_backward_op(dout, out, lse, q, k, v, keep, *ctx.numbers), None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "the CPU kernel of softmax attention has no second derivative; use backend='reference' for gradients of "
        "gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def _pairs(queries: int, keys: int, left: int | None, right: int | None) -> int:
    """How many pairs of query and key a window holds."""
    offset = keys - queries
    return sum(
        max(
            0,
            min(keys, keys if right is None else i + offset + right + 1)
            - max(0, 0 if left is None else i + offset - left),
        )
        for i in range(queries)
    )


def _flops(q: Any, k: Any, v: Any, keep: Any, left: int | None, right: int | None, *rest: Any, **named: Any) -> int:
    """Multiplications and additions of its matmuls; arguments are shapes."""
    return int(2 * q[0] * q[1] * _pairs(q[2], k[2], left, right) * (q[3] + v[3]))


def _backward_flops(
    dout: Any,
    out: Any,
    lse: Any,
    q: Any,
    k: Any,
    v: Any,
    keep: Any,
    left: int | None,
    right: int | None,
    *rest: Any,
    **named: Any,
) -> int:
    return int(2 * q[0] * q[1] * _pairs(q[2], k[2], left, right) * (3 * q[3] + 2 * v[3]))


def _count_operations() -> None:
    """Make torch's FlopCounterMode, where it is made after this, count what the kernel does."""
    flop_counter = importlib.import_module("torch.utils.flop_counter")  # costs time: only where the kernel is
    for operator, formula in (("softmax_cpu", _flops), ("softmax_cpu_backward", _backward_flops)):
        packet = getattr(torch.ops.core_attn, operator)
        if packet not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(packet)(formula)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    key_padding_mask: Tensor | None,
    window: tuple[int | None, int | None] | None,
    scale: float,
    **absent: Any,
) -> Tensor:
    """softmax(q kᵀ · scale) v, arguments as `core_attn.ops.softmax_attention` hands them on.

    Memory O(L·D + M·D) and the gradient's the same; time O(L·M), with a window of w keys O(L·w).
    """
    left, right = window or (None, None)
    out: Tensor = _op(q, k, v, key_padding_mask, left, 0 if causal else right, scale)[0]
    return out
