"""The HTML of reports and comparisons: one file, nothing loaded from anywhere, readable in any light and on paper."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from attn_shared import plotting

if TYPE_CHECKING:
    from attn_shared.task import Sound

LARGEST_SVG = 400_000
"""Characters above which a figure is embedded as a PNG: drawings of many thousand marks make pages slow."""
NONE = "\N{EN DASH}"
"""Stands where there is no figure."""

_CSS = """
:root{color-scheme:light dark;--paper:#fbfcfd;--card:#fff;--ink:#1b2733;--soft:#5a6672;--line:#dde3e9;
--accent:#0072b2;--mark:#e6f2fa;--code:#f1f4f7;--good:#00785a;--bad:#b03a2e}
@media(prefers-color-scheme:dark){:root{--paper:#12171c;--card:#1a2128;--ink:#e6ebf0;--soft:#9ba8b4;--line:#2d3740;
--accent:#56b4e9;--mark:#17303f;--code:#222b33;--good:#4cc9a0;--bad:#f0877b}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:64rem;margin:0 auto;padding:0 1.25rem 4rem}
main.broad{max-width:88rem}
header{border-top:6px solid var(--accent);padding:2.2rem 0 .4rem}
header .over{color:var(--accent);font-weight:600;font-size:.85rem;letter-spacing:.06em;margin:0;
text-transform:uppercase}
h1{font-size:clamp(1.6rem,5vw,2.4rem);line-height:1.15;margin:.25rem 0 .4rem;letter-spacing:-.015em}
h2{font-size:1.25rem;margin:2.8rem 0 .6rem;letter-spacing:-.01em}
p{margin:.4rem 0 .8rem}.lead{font-size:1.08rem}.soft{color:var(--soft)}.small{font-size:.875rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.75rem,1fr));gap:.75rem;margin:1.4rem 0 .6rem;
padding:0}
.cards div{background:var(--card);border:1px solid var(--line);border-radius:.7rem;padding:.8rem 1rem}
.cards dt{color:var(--soft);font-size:.8rem}
.cards dd{margin:0;white-space:nowrap;font-size:1.3rem;font-weight:650;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.cards .first{border-color:var(--accent);background:var(--mark)}
.cards small{display:block;white-space:normal;font-size:.78rem;font-weight:400;color:var(--soft);letter-spacing:0}
.wide{overflow-x:auto;border:1px solid var(--line);border-radius:.7rem;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.45rem .8rem;text-align:left;white-space:nowrap;border-top:1px solid var(--line)}
.broad table{font-size:.84rem}.broad th,.broad td{padding:.4rem .55rem}
thead th{border-top:0;color:var(--soft);font-weight:600;font-size:.82rem}
.n{text-align:right}td.long{white-space:normal;min-width:14rem}
tr.mark td{background:var(--mark);font-weight:650}tr.mark td:first-child{box-shadow:inset 4px 0 var(--accent)}
tr.fail td{color:var(--bad)}
.best{color:var(--good);font-weight:650}
.tag{font-size:.72rem;font-weight:600;border:1px solid var(--line);border-radius:1rem;padding:.05rem .5rem;
color:var(--soft);margin-left:.5rem}
tr.mark .tag{border-color:var(--accent);color:var(--accent)}
figure{margin:1rem 0;background:var(--card);border:1px solid var(--line);border-radius:.7rem;padding:.9rem}
figure svg,figure img{display:block;width:100%;height:auto;max-width:52rem;margin:0 auto}
figure svg text{fill:currentColor}
figure img{background:#fff;border-radius:.3rem}
.sounds{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:.5rem 1rem;margin:.8rem 0}
.sounds span{display:block;color:var(--soft);font-size:.82rem}.sounds audio{width:100%;height:2.2rem}
figcaption{color:var(--soft);font-size:.875rem;margin-top:.6rem;overflow-wrap:anywhere}
pre{background:var(--code);border-radius:.6rem;padding:.8rem 1rem;overflow-x:auto;margin:.5rem 0;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
details{border:1px solid var(--line);border-radius:.7rem;background:var(--card);padding:.6rem 1rem;margin:.8rem 0}
summary{cursor:pointer;font-weight:600}
dl.facts{display:grid;grid-template-columns:minmax(7rem,max-content) 1fr;gap:.25rem 1.2rem;margin:.6rem 0;
font-size:.92rem}
dl.facts dt{color:var(--soft)}dl.facts dd{margin:0;overflow-wrap:anywhere}
footer{margin-top:3rem;border-top:1px solid var(--line);padding-top:.8rem;color:var(--soft);font-size:.85rem}
@media(max-width:34rem){main{padding:0 .8rem 3rem}figure{padding:.4rem}dl.facts{grid-template-columns:1fr;gap:0}
dl.facts dd{margin-bottom:.5rem}}
@media print{:root{--paper:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#bbb;--accent:#0072b2;--mark:#eef5fa;
--code:#f4f4f4;--good:#00785a;--bad:#b03a2e}body{font-size:10.5pt}main{max-width:none;padding:0}
figure,.cards,tr{break-inside:avoid}h2{break-after:avoid}.wide,pre{overflow:visible}pre{white-space:pre-wrap}
th,td{padding:.25rem .4rem;white-space:normal}table{font-size:8.5pt}}
"""


class Markup(str):
    """Text that is HTML already and is not escaped again."""


def escape(value: Any) -> str:
    """`value` as HTML; everything but `Markup` is escaped."""
    return value if isinstance(value, Markup) else html.escape(str(value))


def page(title: str, body: str, *, wide: bool = False) -> str:
    """A whole document; `wide` for tables of many columns."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        # Says to the browser what we promise: nothing is loaded and nothing runs.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; media-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f"<main{' class=broad' if wide else ''}>\n{body}\n</main>\n</body>\n</html>\n"
    )


def header(over: str, title: str, under: str) -> str:
    return (
        f'<header>\n<p class="over">{escape(over)}</p>\n<h1>{escape(title)}</h1>\n'
        f'<p class="soft">{escape(under)}</p>\n</header>'
    )


def section(title: str, *parts: str) -> str:
    """A heading and what is under it; nothing at all where the parts are empty."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A key figure: what, how much, and a few words under it."""

    name: str
    value: str
    note: str = ""


def cards(figures: Iterable[Figures]) -> str:
    """The key figures, the first of them set off."""
    items = [
        f"<div{' class=first' if i == 0 else ''}><dt>{escape(f.name)}</dt><dd>{escape(f.value)}"
        f"{f'<small>{escape(f.note)}</small>' if f.note else ''}</dd></div>"
        for i, f in enumerate(figures)
    ]
    return f'<dl class="cards">{"".join(items)}</dl>' if items else ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table: cells, and "mark" or "fail" to set it off."""

    cells: Sequence[Any]
    kind: str = ""


def table(head: Sequence[str], rows: Sequence[Row], *, text_columns: Collection[int] = (0,)) -> str:
    """A table that scrolls sideways on narrow screens; all but `text_columns` hold numbers."""
    if not rows:
        return ""

    def line(cells: Sequence[Any], tag: str) -> str:
        out = []
        for i, cell in enumerate(cells):
            classes = [] if i in text_columns else ["n"]
            if i in text_columns and tag == "td" and len(str(cell)) > 60 and not isinstance(cell, Markup):
                classes.append("long")
            style = f' class="{" ".join(classes)}"' if classes else ""
            out.append(f"<{tag}{style}>{escape(cell)}</{tag}>")
        return "".join(out)

    body = "".join(f"<tr{f' class={row.kind}' if row.kind else ''}>{line(row.cells, 'td')}</tr>\n" for row in rows)
    top = f"<thead><tr>{line(head, 'th')}</tr></thead>"
    return f'<div class="wide"><table>\n{top}\n<tbody>\n{body}</tbody></table></div>'


def facts(pairs: Mapping[str, Any]) -> str:
    """Names and values, one below the other."""
    rows = [f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs.items() if v not in (None, "", [], {})]
    return f'<dl class="facts">{"".join(rows)}</dl>' if rows else ""


def picture(fig: Figure, caption: str, name: str, under: str = "") -> str:
    """A figure with its caption, drawn inline; `under` is HTML that stands between them."""
    source = plotting.svg(fig, name)
    if len(source) > LARGEST_SVG:
        data = base64.b64encode(plotting.png(fig)).decode("ascii")
        source = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    else:
        source = source.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    return f"<figure>\n{source}\n{under}<figcaption>{escape(caption)}</figcaption>\n</figure>"


def players(sounds: Iterable[Sound]) -> str:
    """A player for each recording, which is part of the page."""
    items = [
        f"<div><span>{escape(sound.name)}</span>"
        f'<audio controls preload="metadata" aria-label="{escape(sound.name)}" '
        f'src="data:{escape(sound.kind)};base64,{base64.b64encode(sound.data).decode("ascii")}"></audio></div>\n'
        for sound in sounds
    ]
    return f'<div class="sounds">{"".join(items)}</div>\n' if items else ""


def code(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>"


def fold(title: str, *parts: str) -> str:
    """Parts behind a heading that opens when clicked."""
    body = "\n".join(part for part in parts if part)
    return f"<details>\n<summary>{escape(title)}</summary>\n{body}\n</details>" if body else ""


# -- numbers for people -----------------------------------------------------------------------------------------------


def number(value: Any, spec: str = "") -> str:
    """A figure of a table: `spec` as in `format`, a dash where there is none."""
    if value is None:
        return NONE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if spec:
        return format(value, spec)
    if isinstance(value, int):
        return f"{value:,}"
    if 0.01 <= abs(value) < 100:
        return f"{value:.3f}"
    return f"{value:,.0f}" if 100 <= abs(value) < 1e7 else f"{value:.3g}"


def big(value: float | None) -> str:
    """Large counts in three digits: 1234567 -> '1.23 M'."""
    if value is None:
        return NONE
    for limit, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def duration(seconds: float | None) -> str:
    """Times: '0.4 s', '38 s', '2 min 05 s', '1 h 02 min'."""
    if seconds is None:
        return NONE
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
