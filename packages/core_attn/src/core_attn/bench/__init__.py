"""Speed and memory, measured in one run on one machine: mechanisms beside softmax attention, and suites of operators
beside what people use instead."""

from core_attn.bench.mechanisms import Row, Rows, heading, measure, save, table
from core_attn.bench.suites import SuiteRow, SuiteRows, measure_suite, save_suite, suite_heading, suite_table

__all__ = [
    "Row",
    "Rows",
    "SuiteRow",
    "SuiteRows",
    "heading",
    "measure",
    "measure_suite",
    "save",
    "save_suite",
    "suite_heading",
    "suite_table",
    "table",
]
