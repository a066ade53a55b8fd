"""Reading of CSV and Parquet, which every application shares."""

from __future__ import annotations

from attn_shared.csvtext import DELIMITERS, MISSING, Cells, read_cells, read_text, scan, sniff_delimiter

__all__ = ["DELIMITERS", "MISSING", "Cells", "read_cells", "read_text", "scan", "sniff_delimiter"]
