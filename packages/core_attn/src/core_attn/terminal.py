"""What every command does with its terminal."""

from __future__ import annotations

import io
import sys


def print_anything() -> None:
    """Let stdout and stderr take any text: a terminal that lacks a character (an ASCII locale) shows "?" for it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
