"""Speed, memory and growth of mechanisms beside softmax attention, measured in one run on one machine."""

from core_attn.bench.mechanisms import Row, Rows, heading, measure, save, table

__all__ = ["Row", "Rows", "heading", "measure", "save", "table"]
