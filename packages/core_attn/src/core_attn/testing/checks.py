"""check_mechanism: every fact a mechanism declares, and what every mechanism owes, measured.

Each check is a function of a `Subject`. It returns what it measured, in words; it raises `Broken` where the contract is
broken and `NotClaimed` where the mechanism does not promise the thing. Any other exception is a failure too.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from core_attn import api, dispatch, einsums
from core_attn.contract import Growth, Pattern, TokenMixer
from core_attn.dispatch import BackendError
from core_attn.maps import capture, edit
from core_attn.naming import unknown
from core_attn.testing import growth
from core_attn.testing.harness import (
    TOLERANCE,
    Broken,
    NotClaimed,
    dense,
    error_of,
    keys_of,
    layouts,
    median_error_of,
    name_of,
    padding_masks,
    pairs,
    seeded,
    shape_of,
    state_bytes,
    tensor_names,
    with_grad,
    with_gradients,
)
from core_attn.testing.report import CheckFailedError, CheckReport, CheckResult, Outcome
from core_attn.testing.subject import Subject, is_causal, is_cross, run

LENGTHS = (1, 2, 3, 31, 63, 65, 129)
BACKEND_LENGTHS = (65, 7, 1)
# The longer ones where an L x L matrix is not declared: blocked forms show their order only well past one block.
GROWTH_LENGTHS = {True: (256, 512, 1024, 2048), False: (512, 1024, 2048, 4096)}
# How far the measured exponent may lie from the claimed order's: above it the claim is false; far below, too modest.
GROWTH_ABOVE, GROWTH_BELOW = 0.15, 0.4
COST_LENGTHS = (512, 1000)
# Measured over formula: causal kernels that compute the whole square do twice the pairs that are read, and blocks at a
# window's edges some more; less than the formula says would be a formula of something else.
COST_LEAST, COST_MOST = 0.95, 2.5
# Kernels whose inside cannot be counted; what is counted is the form in PyTorch that does the same work.
UNCOUNTED = ("cpu", "triton", "flash_attn", "flex")


def check_mechanism(
    target: str | type[TokenMixer] | Callable[..., TokenMixer],
    *,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
    raise_on_failure: bool = True,
    seed: int = 0,
    grid_rank: int | None = None,
    **options: Any,
) -> CheckReport:
    """Test a token mixer against the contract, as far as its `MechanismInfo` claims it.

    Runs on the CPU in a few seconds. Costs are counted (operations, bytes alive), never timed, so the outcome is the
    same on every run and every machine.

    Args:
        target: a registered name, `path/to/file.py:ClassName`, a class with `@core_attn.register(...)`, or a function
            that makes an instance: it is given those of dim, heads and causal which it takes by name.
        only, skip: names of checks to run or to leave out; `core_attn.testing.CHECKS` names them all.
        raise_on_failure: raise `CheckFailedError`, which holds the report, when a check fails.
        seed: of weights and inputs.
        grid_rank: rank of the grids of its inputs. By default every rank that it declares is tested by the checks
            where the grid matters (`GRID_CHECKS`), and the smallest by the others.
        options: options of the mechanism; dim (default 16) and heads (2) may be set too.

    Returns:
        CheckReport: one result a check (passed, failed, not claimed) with what was measured; print it.

    Raises:
        CheckFailedError: a check failed and `raise_on_failure` is set. It is an AssertionError.
        UnknownNameError: no such mechanism or check.
        ValueError: the target is no token mixer, or declares no facts.

    Example:
        >>> print(check_mechanism("softmax", only=["causal", "padding"]))
        softmax: 2 passed, 0 failed, 0 not claimed
          passed       causal   ...
    """
    for name in [*(only or ()), *skip]:
        if name not in CHECKS:
            raise unknown("check", name, CHECKS)
    subject = Subject(target, options, seed, grid_rank)
    subjects = [subject]
    if grid_rank is None:
        subjects += [Subject(target, options, seed, rank) for rank in sorted(subject.info.grid_ranks)[1:]]
    results = []
    for name, check in CHECKS.items():
        if (only is not None and name not in only) or name in skip:
            continue
        start = time.perf_counter()
        # Whatever random state the checks use, the caller's own is left as it was.
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            outcome, detail = _for_every_rank(check, subjects if name in GRID_CHECKS else [subject], seed)
        results.append(CheckResult(name, outcome, detail, time.perf_counter() - start))
    report = CheckReport(subject.info.name, tuple(results))
    if raise_on_failure and not report.passed:
        raise CheckFailedError(report)
    return report


def _for_every_rank(check: Callable[[Subject], str], subjects: Sequence[Subject], seed: int) -> tuple[Outcome, str]:
    """One outcome for all ranks of grids: the first failure, or what each rank gave."""
    details: dict[int, str] = {}
    for subject in subjects:
        torch.manual_seed(seed)
        outcome, detail = _outcome(check, subject)
        if len(subjects) > 1 and outcome is Outcome.FAILED:
            detail = f"grid of rank {subject.grid_rank}: {detail}"
        if outcome is not Outcome.PASSED:
            return outcome, detail
        details[subject.grid_rank] = detail
    if len(set(details.values())) == 1:
        return Outcome.PASSED, next(iter(details.values()))
    return Outcome.PASSED, "; ".join(f"rank {rank}: {detail}" for rank, detail in details.items())


def _outcome(check: Callable[[Subject], str], subject: Subject) -> tuple[Outcome, str]:
    try:
        return Outcome.PASSED, check(subject)
    except NotClaimed as reason:
        return Outcome.NOT_CLAIMED, str(reason)
    except Broken as broken:
        return Outcome.FAILED, str(broken)
    except Exception as error:  # a mechanism that raises is a mechanism that fails: say where
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}" if trace else "?"
        return Outcome.FAILED, f"{type(error).__name__} at {where}: {(str(error).strip() or '?').splitlines()[0]}"


# --- what every mechanism owes --------------------------------------------------------------------------------------


def check_facts(s: Subject) -> str:
    """The declared facts do not contradict each other."""
    info = s.info
    if not re.fullmatch(r"[a-z][a-z0-9_]*", info.name):
        raise Broken(f"the name {info.name!r} is not lower case with underscores")
    if not info.patterns:
        raise Broken("no pattern is declared")
    if info.decodes and Pattern.CAUSAL_SELF not in info.patterns:
        raise Broken("decodes is declared without the pattern causal_self")
    if info.constant_state and not info.decodes:
        raise Broken("constant_state is declared without decodes")
    if not info.title or not 1900 <= info.year <= 2100:
        raise Broken(f"title {info.title!r} and year {info.year} do not name a paper")
    return ", ".join(sorted(info.patterns))


def check_shape(s: Subject) -> str:
    """(B, L, C) of x's dtype and device comes out, finite, in float64, float32 and bfloat16."""
    for pattern in s.patterns:
        for dtype in TOLERANCE:
            call = s.inputs(pattern, max(7, s.info.min_length), dtype=dtype)
            out = run(s.make(pattern, dtype), call)
            if out.shape != call["x"].shape:
                raise Broken(f"{pattern}: x of shape {shape_of(call['x'])} gives {shape_of(out)}")
            if out.dtype != dtype:
                raise Broken(f"{pattern}: x of {name_of(dtype)} gives {name_of(out.dtype)}")
            if not out.isfinite().all():
                raise Broken(f"{pattern}: not finite in {name_of(dtype)}")
    return "float64, float32, bfloat16"


def check_lengths(s: Subject) -> str:
    """Lengths that divide nothing work, outputs and gradients finite, more queries than keys included."""
    lengths = s.lengths(*LENGTHS)
    for pattern in s.patterns:
        mixer = s.make(pattern)
        for length in lengths:
            contexts = [length, length + 5, max(length - 2, s.info.min_length)] if is_cross(pattern) else [None]
            for context in contexts:
                call = with_grad(s.inputs(pattern, length, context=context))
                where = f"{pattern}, L={length}" + (f", M={context}" if context else "")
                out = run(mixer, call)
                if out.shape != call["x"].shape:
                    raise Broken(f"{where}: gives {shape_of(out)}")
                (gradient,) = torch.autograd.grad(out.square().sum(), call["x"])
                if not out.isfinite().all() or not gradient.isfinite().all():
                    raise Broken(f"{where}: output or gradient is not finite")
    return f"L = {', '.join(map(str, lengths))}"


def check_empty_batch(s: Subject) -> str:
    """A batch of no samples gives no outputs, and gradients."""
    length = max(5, s.info.min_length)
    for pattern in s.patterns:
        call = with_grad(s.inputs(pattern, length, batch=0))
        mixer = s.make(pattern)
        out = run(mixer, call)
        if out.shape != (0, length, s.dim):
            raise Broken(f"{pattern}: x of shape {shape_of(call['x'])} gives {shape_of(out)}")
        out.sum().backward()
        if s.info.padding:
            run(mixer, call, key_padding_mask=torch.ones(0, keys_of(call).shape[1], dtype=torch.bool))
    return "B = 0"


def check_precision(s: Subject) -> str:
    """float32 and bfloat16 agree with float64 for the same weights and inputs."""
    worst = {torch.float32: 0.0, torch.bfloat16: 0.0}
    for pattern in s.patterns:
        length = max(33, s.info.min_length)
        for dtype in worst:
            # Weights and inputs are rounded first, so that only the arithmetic in between differs.
            low = s.make(pattern, dtype)
            high = s.make(pattern)
            high.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in low.state_dict().items()})
            call = s.inputs(pattern, length, dtype=dtype)
            exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in call.items()}
            got, right = run(low, call).double(), run(high, exact)
            error = median_error_of(got, right) if s.info.selects and dtype is torch.bfloat16 else error_of(got, right)
            worst[dtype] = max(worst[dtype], error)
            if not error <= TOLERANCE[dtype]:
                raise Broken(f"{pattern}: {name_of(dtype)} is off by {error:.1e}, allowed {TOLERANCE[dtype]:.0e}")
    return ", ".join(f"{name_of(d)} {e:.0e}" for d, e in worst.items())


def check_autocast(s: Subject) -> str:
    """Weights in float32 under torch.autocast to bfloat16: outputs and gradients near those of float64.

    Where bfloat16 throughout is further off than its tolerance (a norm of nearly nothing magnifies any rounding),
    autocast may be as far off as that, and half as much more.
    """
    worst = [0.0, 0.0]
    low = torch.bfloat16
    for pattern in s.patterns:
        length = max(33, s.info.min_length)
        right = with_gradients(s.make(pattern), with_grad(s.inputs(pattern, length)), {})
        mixer, call = s.make(pattern, torch.float32), with_grad(s.inputs(pattern, length, dtype=torch.float32))
        got = with_gradients(mixer, call, {}, autocast=low)
        if any(g.dtype is not torch.float32 for g in got[1:]):
            raise Broken(f"{pattern}: gradients of float32 inputs and weights are not float32")
        rounded: list[Tensor] = []
        for at, (what, (a, b)) in enumerate(zip(("output", "gradient"), pairs(got, right))):
            error, allowed = error_of(a, b), TOLERANCE[low]
            if s.info.selects and at == 0:
                error = median_error_of(a, b)
            elif s.info.selects and a.isfinite().all():
                continue
            if error > allowed and error != float("inf"):
                call = with_grad(s.inputs(pattern, length, dtype=low))
                rounded = rounded or with_gradients(s.make(pattern, low), call, {})
                allowed = max(allowed, 1.5 * error_of(*list(pairs(rounded, right))[at]))
            if not error <= allowed:
                raise Broken(f"{pattern}: the {what} under autocast is off by {error:.1e}, allowed {allowed:.0e}")
            worst[at] = max(worst[at], error)
    return f"output {worst[0]:.0e}, gradients {worst[1]:.0e}" if worst[1] else f"output {worst[0]:.0e}"


def check_backends(s: Subject) -> str:
    """Every backend gives the reference's outputs and gradients, or refuses with a reason."""
    operator = api.operator_of(s.info)
    if operator is None or not s.takes("backend"):
        raise NotClaimed("the mechanism has a single form (no operator, or no option `backend`)")
    names = [b.name for b in operator.backends]
    if "reference" not in names:
        raise Broken(f"operator {operator.name} has no backend called reference")
    others = [n for n in names if n != "reference"]
    longest = max(s.lengths(*BACKEND_LENGTHS))
    ran: dict[str, set[str]] = {n: set() for n in others}
    for pattern, length, dtype, training, padded in _backend_cases(s):
        call = with_grad(s.inputs(pattern, length, dtype=dtype))
        more = {"key_padding_mask": padding_masks(keys_of(call))} if padded else {}
        right = with_gradients(s.make(pattern, dtype, backend="reference").train(training), call, more)
        for name in others:
            easy = training or dtype is not torch.float32 or length != longest or padded != s.info.padding
            if "outputs" in ran[name] and easy:
                continue  # a kernel without backward compiles anew, for seconds, at each kind of call
            model = s.make(pattern, dtype, backend=name).train(training)
            try:
                got = with_gradients(model, call, more)
                ran[name].add("all")
            except BackendError:
                if dtype is not torch.float32:
                    continue
                try:
                    with torch.no_grad():
                        got = [seeded(model, call, more)]
                    ran[name].add("outputs")
                except BackendError:
                    continue
            for what, (a, b) in zip(("output", "gradient"), pairs(got, right)):
                if (error := error_of(a, b)) > TOLERANCE[dtype]:
                    raise Broken(
                        f"{name}, {pattern}, L={length}, {name_of(dtype)}, {'train' if training else 'eval'}"
                        f"{', padded' if padded else ''}: {what} is off the reference by {error:.1e}, "
                        f"allowed {TOLERANCE[dtype]:.0e}"
                    )
    able = [n if "all" in how else f"{n} (outputs)" for n, how in ran.items() if how]
    unable = [n for n, how in ran.items() if not how]
    return f"{', '.join(able) or 'none'} = reference" + (f"; cannot run here: {', '.join(unable)}" if unable else "")


def _backend_cases(s: Subject) -> Iterator[tuple[Pattern, int, torch.dtype, bool, bool]]:
    """(pattern, length, dtype, training, padded); attention dropout differs between backends, so it is not compared."""
    for pattern in s.patterns:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for padded in (False, True) if s.info.padding else (False,):
                for training in (False,) if s.options.get("dropout") else (False, True):
                    for length in s.lengths(*BACKEND_LENGTHS):
                        yield pattern, length, dtype, training, padded


def check_gradients(s: Subject) -> str:
    """Gradients with respect to inputs and parameters equal finite differences in float64."""
    count = 0
    for pattern in s.patterns:
        mixer, call, leaves, function = _functional(s, pattern)
        count += sum(t.numel() for t in leaves)
        if not torch.autograd.gradcheck(function, leaves, fast_mode=False, raise_exception=False):
            numerical = _first_wrong(function, leaves, [*tensor_names(call), *dict(mixer.named_parameters())])
            raise Broken(f"{pattern}: the gradient of {numerical} is not that of finite differences")
    return f"{count} derivatives by finite differences"


def check_double_backward(s: Subject) -> str:
    """Gradients of gradients equal finite differences in float64."""
    if not s.info.double_backward:
        raise NotClaimed("double_backward is not declared")
    for pattern in s.patterns:
        _, call, leaves, function = _functional(s, pattern)
        inputs = leaves[: len(tensor_names(call))]
        fixed = leaves[len(inputs) :]
        if not torch.autograd.gradgradcheck(
            lambda *x, fixed=fixed, function=function: function(*x, *fixed), inputs, raise_exception=False
        ):
            raise Broken(f"{pattern}: gradients of gradients are not those of finite differences")
    return "by finite differences"


def check_batch(s: Subject) -> str:
    """A sample's output does not depend on what else is in its batch."""
    for pattern in s.patterns:
        mixer = s.make(pattern)
        for length in s.lengths(9, 66):
            three = s.inputs(pattern, length, batch=3)
            alone = {k: v[1:2] if isinstance(v, Tensor) else v for k, v in three.items()}
            other = {
                k: torch.cat([3 * v[2:], v[1:2], -v[:1]]) if isinstance(v, Tensor) else v for k, v in three.items()
            }
            together = run(mixer, three)[1:2]
            for what, got in (("alone", run(mixer, alone)), ("among others", run(mixer, other)[1:2])):
                if (error := error_of(got, together)) > TOLERANCE[torch.float64]:
                    raise Broken(f"{pattern}, L={length}, eval: a sample {what} gives another output, by {error:.1e}")
            if not s.info.batch_dependent_training:
                trained = s.make(pattern).train()
                a, b = seeded(trained, three, {})[1:2], seeded(trained, other, {})[1:2]
                if (error := error_of(b, a)) > TOLERANCE[torch.float64]:
                    raise Broken(f"{pattern}, L={length}, train: the rest of the batch changes a sample by {error:.1e}")
    return "eval only; training depends on the batch" if s.info.batch_dependent_training else "eval and train"


def check_strides(s: Subject) -> str:
    """Non-contiguous inputs give the same as contiguous ones, and no input is written to."""
    for pattern in s.patterns:
        mixer = s.make(pattern)
        call = s.inputs(pattern, max(17, s.info.min_length), batch=3)
        for name, view in layouts().items():
            strided = {k: view(v) if isinstance(v, Tensor) else v for k, v in call.items()}
            plain = {k: dense(v) if isinstance(v, Tensor) else v for k, v in strided.items()}
            got = run(mixer, strided)
            for key in tensor_names(plain):
                if not torch.equal(strided[key], plain[key]):
                    raise Broken(f"{pattern}: forward writes into its input {key}")
            if (error := error_of(got, run(mixer, plain))) > TOLERANCE[torch.float64]:
                raise Broken(f"{pattern}: {name} input changes the output by {error:.1e}")
    return ", ".join(layouts())


def check_determinism(s: Subject) -> str:
    """Evaluation gives the same bits each time and leaves the global random state alone."""
    for pattern in s.patterns:
        call = s.inputs(pattern, max(65, s.info.min_length))
        mixer = s.make(pattern)
        torch.manual_seed(1)
        first = run(mixer, call)
        torch.manual_seed(2)
        before = torch.get_rng_state()
        again = run(mixer, call)
        if not torch.equal(first, again):
            raise Broken(f"{pattern}: two evaluations of the same input differ by {error_of(again, first):.1e}")
        if not torch.equal(before, torch.get_rng_state()):
            raise Broken(f"{pattern}: evaluation draws from the global random state")
        trained = mixer.train()
        if not torch.equal(seeded(trained, call, {}), seeded(trained, call, {})):
            raise Broken(f"{pattern}: training forwards of one seed differ")
        if s.info.stochastic:
            for mode in (False, True):
                mixer.train(mode)
                one, two = (run(mixer, call, generator=torch.Generator().manual_seed(5)) for _ in range(2))
                if not torch.equal(one, two):
                    raise Broken(f"{pattern}: generators of one seed give two outputs")
    return "generators of one seed agree" if s.info.stochastic else "same bits"


def check_state_dict(s: Subject) -> str:
    """Saved weights loaded into a fresh instance give the same bits."""
    for pattern in s.patterns:
        mixer, fresh = s.make(pattern), s.make(pattern, seed=s.seed + 100)
        file = io.BytesIO()
        torch.save(mixer.state_dict(), file)
        file.seek(0)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        call = s.inputs(pattern, max(9, s.info.min_length))
        if not torch.equal(run(mixer, call), run(fresh, call)):
            raise Broken(f"{pattern}: after loading the saved weights the output differs")
    return f"{len(mixer.state_dict())} tensors"


def check_inputs(s: Subject) -> str:
    """What forward cannot take is a ValueError of one sentence."""
    bad: list[tuple[str, Callable[[], Any]]] = []
    length = max(6, s.info.min_length)
    for pattern in s.patterns:
        mixer = s.make(pattern)
        call = s.inputs(pattern, length)
        keys = keys_of(call)

        def at(
            what: str, mixer: TokenMixer = mixer, call: dict[str, Any] = call, p: str = pattern, **more: Any
        ) -> None:
            bad.append((f"{p}: {what}", lambda: run(mixer, call, **more)))

        at("x without batch", x=call["x"][0])
        at("x of another width", x=torch.randn(2, length, s.dim + 1, dtype=torch.float64))
        at("grid that holds another number of tokens", grid=(length + 1,))
        at("grid of rank 9", grid=(length, *[1] * 8))
        real = torch.ones(keys.shape[:2], dtype=torch.bool)
        if s.info.padding:
            at("key_padding_mask of another shape", key_padding_mask=real[:, :-1])
            at("key_padding_mask of floats", key_padding_mask=real.double())
        else:
            at("key_padding_mask, not declared", key_padding_mask=real)
        if not s.info.stochastic:
            at("generator, not declared", generator=torch.Generator())
        if is_cross(pattern):
            at("context of another batch", context=torch.randn(3, length, s.dim, dtype=torch.float64))
            at("context of another width", context=torch.randn(2, length, s.dim + 1, dtype=torch.float64))
        if Pattern.of(causal=mixer.causal, cross=not is_cross(pattern)) not in s.info.patterns:
            other = {"context": None} if is_cross(pattern) else {"context": call["x"]}
            at("pattern that is not declared", **other)
        if not s.info.decodes:
            bad.append((f"{pattern}: init_state, not declared", partial(mixer.init_state, 2)))
    if s.takes("dim"):
        bad.append(("dim of 0", partial(s.make, s.patterns[0], dim=0)))
    for what, attempt in bad:
        try:
            attempt()
        except ValueError as error:
            if "\n" in str(error) or not 10 <= len(str(error)) <= 400:
                raise Broken(f"{what}: the error is no sentence: {str(error)[:200]!r}") from error
        except Exception as error:
            raise Broken(f"{what}: {type(error).__name__} instead of ValueError") from error
        else:
            raise Broken(f"{what}: accepted without an error")
    return f"{len(bad)} refused"


# --- what a mechanism may claim -------------------------------------------------------------------------------------


def check_causal(s: Subject) -> str:
    """Changing the future changes no output before it, and no gradient flows back from it."""
    patterns = [p for p in s.patterns if is_causal(p)]
    if not patterns:
        raise NotClaimed("no causal pattern is declared")
    worst = 0.0
    for pattern in patterns:
        for length in s.lengths(9, 66):
            for training in (False, True):
                mixer = s.make(pattern).train(training)
                call = with_grad(s.inputs(pattern, length))
                read = "context" if is_cross(pattern) else "x"
                ahead = call[read].shape[1] - length  # key j may be read by query i where j <= i + ahead
                out = seeded(mixer, call, {})
                for cut in sorted({1, length // 2, length - 1}):
                    future = call[read].detach().clone()
                    future[:, cut + ahead :] = 10 * s.inputs(pattern, length, seed=7)[read][:, cut + ahead :]
                    changed = seeded(mixer, {**call, read: future}, {})[:, :cut]
                    leak = error_of(changed, out[:, :cut])
                    (gradient,) = torch.autograd.grad(out[:, :cut].square().sum(), call[read], retain_graph=True)
                    back = gradient[:, cut + ahead :].abs().max().item() / (gradient.abs().max().item() or 1.0)
                    worst = max(worst, leak, back)
                    where = f"{pattern}, L={length}, {'train' if training else 'eval'}"
                    if leak > TOLERANCE[torch.float64]:
                        raise Broken(f"{where}: tokens from {cut} on change outputs before them by {leak:.1e}")
                    if back > TOLERANCE[torch.float64]:
                        raise Broken(f"{where}: outputs before {cut} have gradients {back:.1e} from tokens after them")
    return f"leak {worst:.0e}"


def check_padding(s: Subject) -> str:
    """Padding is as if it were not there: its values never matter, NaN included, and neither does its being there."""
    if not s.info.padding:
        raise NotClaimed("padding is not declared")
    for pattern in s.patterns:
        mixer = s.make(pattern)
        call = s.inputs(pattern, max(11, s.info.min_length + 4), batch=3)
        read = "context" if is_cross(pattern) else "x"
        full = torch.ones(keys_of(call).shape[:2], dtype=torch.bool)
        if (error := error_of(run(mixer, call, key_padding_mask=full), run(mixer, call))) > TOLERANCE[torch.float64]:
            raise Broken(f"{pattern}: a mask that is True everywhere changes the output by {error:.1e}")
        mask = padding_masks(keys_of(call))
        more = {"key_padding_mask": mask}
        right = with_gradients(mixer, with_grad(call), more)
        for name, value in (("random values", None), ("1e6", 1e6), ("inf", float("inf")), ("NaN", float("nan"))):
            under = torch.randn_like(call[read]) if value is None else torch.full_like(call[read], value)
            dirty = with_grad({**call, read: torch.where(mask[..., None], call[read], under)})
            got = with_gradients(mixer, dirty, more)
            for what, (a, b) in zip(("the output", "a gradient"), pairs(got, right)):
                if (error := error_of(a, b)) > TOLERANCE[torch.float64]:
                    raise Broken(f"{pattern}: {name} under the mask changes {what} by {error:.1e}")
            gradient = got[1 + tensor_names(call).index(read)]
            if gradient.masked_select(~mask[..., None]).count_nonzero():
                raise Broken(f"{pattern}: {name} under the mask has a gradient")
        # Padding in front of a context, whose end is aligned with the last query, and behind a sequence itself, so that
        # taking it away moves no token.
        length, gone = keys_of(call).shape[1], 4
        kept = slice(gone, None) if is_cross(pattern) else slice(0, length - gone)
        some = torch.zeros_like(mask)
        some[:, kept] = True
        call.pop("grid", None)  # a grid has no end from which tokens could be taken away
        padded = run(mixer, call, key_padding_mask=some)
        short = {**call, read: call[read][:, kept]}
        if (error := error_of(padded[:, : short["x"].shape[1]], run(mixer, short))) > TOLERANCE[torch.float64]:
            raise Broken(f"{pattern}: {gone} padding tokens change the outputs of the real ones by {error:.1e}")
        none = mask.clone()
        none[0] = False
        got = with_gradients(mixer, with_grad(call), {"key_padding_mask": none})
        if not all(t.isfinite().all() for t in got):
            raise Broken(f"{pattern}: a sample without any real token gives outputs or gradients that are not finite")
    return "random values, 1e6, inf and NaN under the mask; with padding = without; a sample that is all padding"


def check_decoding(s: Subject) -> str:
    """Token by token and in chunks gives what the parallel form gives; a constant state stays constant."""
    if not s.info.decodes:
        raise NotClaimed("decodes is not declared")
    pattern = Pattern.CAUSAL_SELF
    length = 41
    mixer = s.make(pattern)
    call = s.inputs(pattern, length)
    right = run(mixer, call)
    sizes: dict[str, list[int]] = {
        "token by token": [1] * length,
        "in chunks": [1, 5, 2, 17, 16],
        "prompt, then tokens": [37, 1, 1, 1, 1],
        "at once": [length],
    }
    held = []
    for name, chunks in sizes.items():
        assert sum(chunks) == length
        with torch.no_grad():
            state = mixer.init_state(2, dtype=torch.float64)
            outs, grown = [], []
            for piece in call["x"].split(chunks, dim=1):
                out, state = mixer.step(piece, state)
                outs.append(out)
                grown.append(state_bytes(state))
        if (error := error_of(torch.cat(outs, dim=1), right)) > TOLERANCE[torch.float64]:
            raise Broken(f"{name}: decoding differs from the parallel form by {error:.1e}")
        if name == "token by token":
            held = grown
    if s.info.constant_state and len(set(held[len(held) // 2 :])) > 1:
        raise Broken(
            f"the state grows from {held[len(held) // 2]} to {held[-1]} bytes though constant_state is declared"
        )
    return f"{', '.join(sizes)}; state of {held[-1]} bytes after {length} tokens"


def check_maps(s: Subject) -> str:
    """Reading maps changes no bit; the maps times v are the output; they respect causality and padding."""
    if not s.info.maps:
        raise NotClaimed("maps are not declared")
    scores = False
    for pattern in s.patterns:
        mixer = s.make(pattern)
        call = s.inputs(pattern, max(13, s.info.min_length))
        queries, keys = call["x"].shape[1], keys_of(call).shape[1]
        for mask in [None, padding_masks(keys_of(call))] if s.info.padding else [None]:
            more = {} if mask is None else {"key_padding_mask": mask}
            for training in (False, True):
                mixer.train(training)
                plain = seeded(mixer, call, more)
                with capture(mixer) as maps:
                    read = seeded(mixer, call, more)
                if not torch.equal(plain, read):
                    raise Broken(f"{pattern}: reading the map changes the output by {error_of(read, plain):.1e}")
                weights = maps[""]
                if weights.dim() != 4 or weights.shape[0] != 2 or weights.shape[2:] != (queries, keys):
                    raise Broken(f"{pattern}: the map has shape {shape_of(weights)}, not (2, H, {queries}, {keys})")
                with edit(mixer, lambda name, a: a):
                    through = seeded(mixer, call, more)
                if not training and (error := error_of(through, plain)) > TOLERANCE[torch.float64]:
                    raise Broken(f"{pattern}: map @ v differs from the output by {error:.1e}")
            if is_causal(pattern):
                future = torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)
                if (leak := weights[..., future].abs().max().item()) > TOLERANCE[torch.float64]:
                    raise Broken(f"{pattern}: the map gives the future a weight of {leak:.1e}")
            if mask is not None and weights.masked_select(~mask[:, None, None]).count_nonzero():
                raise Broken(f"{pattern}: the map gives padding a weight")
            mixer.eval()
            plain = run(mixer, call, **more)
            try:
                with edit(mixer, lambda name, a: a, stage="scores"):
                    through = run(mixer, call, **more)
            except ValueError:  # no scores: edit says so
                continue
            scores = True
            if (error := error_of(through, plain)) > TOLERANCE[torch.float64]:
                raise Broken(f"{pattern}: softmax(scores) @ v differs from the output by {error:.1e}")
    return "weights and scores" if scores else "weights"


def check_compile(s: Subject) -> str:
    """torch.compile in one graph gives the same outputs and gradients."""
    if not s.info.compiles:
        raise NotClaimed("compiles is not declared")
    pattern = s.patterns[0]
    call = with_grad(s.inputs(pattern, max(9, s.info.min_length)))
    cases: list[dict[str, Any]] = [{}]
    if s.info.padding:
        cases.append({"key_padding_mask": padding_masks(keys_of(call))})
    for more in cases:
        mixer = s.make(pattern)
        right = with_gradients(mixer, call, more)
        torch.compiler.reset()
        # The graph and its gradient are what is tested here; which compiler then makes code of it is not.
        compiled: Any = torch.compile(mixer, backend="aot_eager", fullgraph=True, dynamic=False)
        for a, b in pairs(with_gradients(compiled, call, more), right):
            if (error := error_of(a, b)) > TOLERANCE[torch.float64]:
                raise Broken(f"{pattern}: the compiled form differs by {error:.1e}")
    torch.compiler.reset()
    return f"{pattern}, one graph" + (", with and without padding" if s.info.padding else "")


def check_export(s: Subject) -> str:
    """torch.export gives a program with the same output."""
    if not s.info.compiles:
        raise NotClaimed("compiles is not declared")
    pattern = s.patterns[0]
    mixer = s.make(pattern)
    call = s.inputs(pattern, max(9, s.info.min_length))
    x = call.pop("x")
    with torch.no_grad():
        program = torch.export.export(mixer, (x,), call, strict=False)
        other = s.inputs(pattern, x.shape[1], seed=9)
        got = program.module()(other.pop("x"), **other)
        right = run(mixer, s.inputs(pattern, x.shape[1], seed=9))
    if (error := error_of(got, right)) > TOLERANCE[torch.float64]:
        raise Broken(f"{pattern}: the exported program differs by {error:.1e}")
    return str(pattern)


def check_growth_time(s: Subject) -> str:
    """The work of forward and backward grows with L as claimed."""
    return _growth(s, "time", s.info.time, s.info.time, lambda c: c.work)


def check_growth_memory(s: Subject) -> str:
    """The peak of bytes alive in forward and backward grows with L as claimed."""
    # Inputs' gradients and the output alone are linear, whatever the mechanism adds.
    most = Growth.LINEAR if s.info.memory is Growth.CONSTANT else s.info.memory
    return _growth(s, "memory", s.info.memory, most, lambda c: c.peak_bytes)


def check_cost(s: Subject) -> str:
    """The formulas of the cascade give the FLOPs that forward is counted to take, and the bytes it cannot avoid."""
    cascade = s.info.cascade
    if cascade is None:
        raise NotClaimed("no cascade is declared")
    cascade.meaning()
    if cascade.passes < 1 or not cascade.einsums:
        raise Broken("a cascade has einsums and at least one pass over the keys")
    shown = []
    for pattern in s.patterns:
        mixer = s.make(pattern, torch.float32)
        ratios = []
        for length in s.lengths(*COST_LENGTHS):
            context = 2 * length if is_cross(pattern) else None
            call = s.inputs(pattern, length, context=context, dtype=torch.float32)
            with torch.no_grad(), dispatch.without(*UNCOUNTED):
                counted = growth.count(partial(run, mixer, call))
            sizes = mixer.sizes(batch=2, length=length, context=context, grid=call.get("grid"))
            formula = einsums.evaluate(cascade.flops, sizes)
            where = f"{pattern}, L={length}" + (f", M={context}" if context else "")
            if formula < 0:
                raise Broken(f"{where}: {cascade.flops} gives {formula:.3g} FLOPs")
            # A mechanism without any matrix product has none to count either.
            ratio = counted.flops / formula if formula else 1.0 + counted.flops
            if not COST_LEAST <= ratio <= COST_MOST:
                raise Broken(
                    f"{where}: {counted.flops:.4g} FLOPs are counted, {cascade.flops} gives {formula:.4g}: "
                    f"{ratio:.2f} times, allowed {COST_LEAST} to {COST_MOST}"
                )
            ratios.append(f"{ratio:.2f}")
            # Inputs, output and weights, each once: what any implementation moves.
            held = [*mixer.parameters(), call["x"], call["x"], *([call["context"]] if context else [])]
            least = sum(t.numel() * t.element_size() for t in held)
            moved = einsums.evaluate(cascade.bytes, sizes)
            if not 0.5 * least <= moved <= 2 * least:
                raise Broken(
                    f"{where}: inputs, output and weights hold {least} bytes, {cascade.bytes} gives {moved:.4g}"
                )
        shown.append(f"{pattern} {', '.join(ratios)}")
    return f"counted / formula: {'; '.join(shown)}"


CHECKS: dict[str, Callable[[Subject], str]] = {
    "facts": check_facts,
    "shape": check_shape,
    "lengths": check_lengths,
    "empty_batch": check_empty_batch,
    "inputs": check_inputs,
    "strides": check_strides,
    "determinism": check_determinism,
    "batch": check_batch,
    "causal": check_causal,
    "padding": check_padding,
    "precision": check_precision,
    "autocast": check_autocast,
    "backends": check_backends,
    "gradients": check_gradients,
    "double_backward": check_double_backward,
    "maps": check_maps,
    "decoding": check_decoding,
    "state_dict": check_state_dict,
    "compile": check_compile,
    "export": check_export,
    "growth_time": check_growth_time,
    "growth_memory": check_growth_memory,
    "cost": check_cost,
}
# Where the rank of the grid can change the outcome.
GRID_CHECKS = frozenset(
    {"shape", "lengths", "strides", "batch", "causal", "padding", "precision", "backends", "gradients", "maps", "cost"}
)


# --- helpers --------------------------------------------------------------------------------------------------------


def _growth(s: Subject, what: str, claimed: Growth, most: Growth, figure: Callable[[growth.Count], float]) -> str:
    shown = []
    lengths = _growth_lengths(s)
    for pattern in s.patterns:
        counts = _counted(s, pattern)
        measured = growth.exponent([figure(c) for c in counts])
        at_most = max(measured, growth.rising_exponent([figure(c) for c in counts]))
        expected = growth.expected_exponent(most, lengths[-1])
        figures = ", ".join(f"{figure(c):.3g}" for c in counts)
        told = f"L^{measured:.2f} between L = {lengths[-2]} and {lengths[-1]} ({figures})"
        if measured > expected + GROWTH_ABOVE:
            raise Broken(f"{pattern}: {what} is claimed to grow as {claimed} but grows as {told}")
        if at_most < expected - GROWTH_BELOW:
            raise Broken(f"{pattern}: {what} is claimed to grow as {claimed} but grows only as {told}; claim that")
        shown.append(f"{measured:.2f}")
    return f"claimed {claimed}; exponent {', '.join(shown)}"


def _growth_lengths(s: Subject) -> tuple[int, ...]:
    return GROWTH_LENGTHS[s.info.memory is Growth.QUADRATIC]


def _counted(s: Subject, pattern: Pattern) -> list[growth.Count]:
    """Counts at the growth lengths, kept on the subject: time and memory come from the same runs."""
    kept: dict[Pattern, list[growth.Count]] = s.__dict__.setdefault("_counts", {})
    if pattern not in kept:
        # Narrow, so that what grows with L is not hidden behind the projections' constant cost a token.
        mixer = s.make(pattern, torch.float32, **_small(s, 8)).train()
        kept[pattern] = []
        for length in _growth_lengths(s):
            call = s.inputs(pattern, length, batch=1, context=length, dim=mixer.dim, dtype=torch.float32)
            torch.manual_seed(0)
            with dispatch.without(*UNCOUNTED):
                kept[pattern].append(growth.count(partial(_train_step, mixer, with_grad(call))))
    return kept[pattern]


def _train_step(mixer: TokenMixer, call: dict[str, Any]) -> None:
    run(mixer, call).sum().backward()


def _small(s: Subject, dim: int) -> dict[str, Any]:
    """The option for a narrow instance, unless the caller has chosen a width."""
    return {"dim": dim} if s.takes("dim") and "dim" not in s.options_given else {}


def _functional(
    s: Subject, pattern: Pattern
) -> tuple[TokenMixer, dict[str, Any], tuple[Tensor, ...], Callable[..., Any]]:
    """A tiny instance as a function of its inputs and parameters, for finite differences."""
    mixer = s.make(pattern, **_small(s, 4))
    call = with_grad(s.inputs(pattern, max(5, s.info.min_length), batch=2, dim=mixer.dim))
    names = tensor_names(call)
    parameters = dict(mixer.named_parameters())
    leaves = (*[call[k] for k in names], *[p.detach().clone().requires_grad_() for p in parameters.values()])

    def function(*tensors: Tensor) -> Tensor:
        inputs = dict(zip(names, tensors))
        weights = dict(zip(parameters, tensors[len(names) :]))
        arguments = {**call, **inputs}
        out: Tensor = functional_call(mixer, weights, (arguments.pop("x"),), arguments)
        return out

    return mixer, call, leaves, function


def _first_wrong(function: Callable[..., Any], leaves: tuple[Tensor, ...], names: Sequence[str]) -> str:
    for i, name in enumerate(names):
        one = tuple(t if j == i else t.detach() for j, t in enumerate(leaves))
        if not torch.autograd.gradcheck(function, one, raise_exception=False):
            return name
    return "several inputs together"
