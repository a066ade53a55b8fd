"""The contract of a mechanism as a test that anyone can run on their own."""

from core_attn.testing.checks import CHECKS, check_mechanism
from core_attn.testing.report import CheckFailedError, CheckReport, CheckResult, Outcome

__all__ = ["CHECKS", "CheckFailedError", "CheckReport", "CheckResult", "Outcome", "check_mechanism"]
