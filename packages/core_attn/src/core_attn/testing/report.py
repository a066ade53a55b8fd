"""What `check_mechanism` found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """How one check ended."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_CLAIMED = "not claimed"


@dataclass(frozen=True)
class CheckResult:
    """One named check.

    Attributes:
        name: such as "causal"; what `only=` and `skip=` take.
        outcome: passed, failed, or not claimed: the mechanism's facts do not promise this.
        detail: what was measured, what went wrong, or why the check does not apply.
        seconds: wall time it took.
    """

    name: str
    outcome: Outcome
    detail: str
    seconds: float


class CheckFailedError(AssertionError):
    """A mechanism broke its contract; `report` holds every result."""

    def __init__(self, report: CheckReport) -> None:
        super().__init__(str(report))
        self.report = report


@dataclass(frozen=True)
class CheckReport:
    """All results of one mechanism, in the order the checks ran."""

    mechanism: str
    results: tuple[CheckResult, ...]

    @property
    def passed(self) -> bool:
        """No check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        return tuple(r for r in self.results if r.outcome is Outcome.FAILED)

    def __getitem__(self, name: str) -> CheckResult:
        return next(r for r in self.results if r.name == name)

    def __iter__(self) -> Iterator[CheckResult]:
        return iter(self.results)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return {"mechanism": self.mechanism, "passed": self.passed, "results": [asdict(r) for r in self.results]}

    def __str__(self) -> str:
        width = max((len(r.name) for r in self.results), default=0)
        lines = [f"  {r.outcome:<11}  {r.name:<{width}}  {r.detail}" for r in self.results]
        counts = ", ".join(f"{sum(r.outcome is o for r in self.results)} {o}" for o in Outcome)
        return "\n".join([f"{self.mechanism}: {counts}", *lines])
