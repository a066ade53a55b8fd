"""One look for every figure: readable in light and dark, on screen and paper, and with any colour vision.

Figures are made without pyplot's global state, so that nothing leaks and no window is ever opened.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any, Final

import matplotlib
import matplotlib.rcsetup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

INK: Final = "#1b2733"
"""Text, axes and the truth: near black; becomes the page's own text colour in a report."""
MUTED: Final = "#7d8792"
"""Baselines and grids: readable on white and on black."""
COLOURS: Final = ("#0072b2", "#e0701a", "#009e73", "#b5569a", "#3fa0d8", "#b3902b", "#d1443c")
"""Okabe and Ito's colours, which people with any colour vision tell apart, darkened where white swallowed them."""
SEQUENTIAL: Final = "viridis"
"""Colour map for amounts: even steps, and ordered in grey too."""

STYLE: Final[Mapping[str, Any]] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.rcsetup.cycler(color=list(COLOURS)),
    "grid.color": MUTED,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
}


def figure(width: float = 8.0, height: float = 3.2, **options: Any) -> Figure:
    """An empty figure, sizes in inches. Draw inside `with style():`, where its axes get the house style too."""
    with style():
        made = Figure(figsize=(width, height), **options)
    FigureCanvasAgg(made)
    return made


def style() -> Any:
    """Context in which axes are made in the house style: `with style(): ax = figure(8, 3).subplots()`."""
    return matplotlib.rc_context(STYLE)  # type: ignore[arg-type]


def png(fig: Figure, dpi: int = 150) -> bytes:
    """The figure on white, as a PNG file."""
    out = io.BytesIO()
    with style():
        fig.savefig(out, format="png", dpi=dpi, facecolor="white")
    return out.getvalue()


def svg(fig: Figure, prefix: str) -> str:
    """The figure as an inline <svg> that takes the page's text colour and has no background of its own.

    Args:
        prefix: makes its ids unique in a page that holds several.
    """
    legends = [legend.get_frame() for ax in fig.axes if (legend := ax.get_legend()) is not None]
    faces = [(patch, patch.get_facecolor()) for patch in (fig.patch, *(ax.patch for ax in fig.axes), *legends)]
    try:
        for patch, _ in faces:
            patch.set_facecolor("none")
        out = io.StringIO()
        with style():
            fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    finally:
        for patch, colour in faces:
            patch.set_facecolor(colour)
    source = out.getvalue()
    source = source[source.index("<svg") :]
    source = re.sub(r"<metadata>.*?</metadata>", "", source, flags=re.S)
    source = re.sub(r'\bid="', f'id="{prefix}-', source)
    source = re.sub(r"url\(#", f"url(#{prefix}-", source)
    source = re.sub(r'href="#', f'href="#{prefix}-', source)
    source = re.sub(r"font:([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font:\1system-ui, sans-serif", source)
    return re.sub(r"\b(fill|stroke): (#[0-9a-f]{6})", _page_ink, source)


def _page_ink(match: re.Match[str]) -> str:
    """Near-black strokes and letters, whoever chose them, in the page's own colour."""
    return f"{match[1]}: currentColor" if _is_dark(match[2]) else match[0]


def _is_dark(colour: Any) -> bool:
    red, green, blue, _ = to_rgba(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.25 and max(red, green, blue) - min(red, green, blue) < 0.15
