"""report.py: everything in one file, everything escaped, nothing of the task changed."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from attn_shared import page, plotting
from attn_shared.errors import UserError
from attn_shared.report import write_report
from attn_shared.runs import Run
from attn_shared.task import Sound


class Reader(HTMLParser):
    """Text, tags and addresses of a page; fails on tags that are not closed in order."""

    VOID = frozenset({"meta", "img", "br", "hr", "input", "link"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report(world: Any, **changes: Any) -> tuple[str, Reader, Run]:
    config = world.config()
    run = world.run(config, **changes)
    path = write_report(world.app, run, *world.task(config))
    assert path == run.path / "report.html"
    source = path.read_text(encoding="utf-8")
    return source, Reader(source), run


def test_self_contained_and_escaped(world: Any) -> None:
    source, read, _ = report(world)
    assert "script" not in read.tags
    assert "link" not in read.tags
    assert all(a.startswith(("#", "data:image/")) for a in read.addresses)
    assert "@import" not in source
    assert not re.search(r"url\((?!#)", source)
    assert len(read.ids) == len(set(read.ids)), "ids of several figures collide"
    for text in ("Truth & model <b>", "Table 1 & <2>", "model <script>", "<odd>"):
        assert text in read.text, text


def test_holds_what_was_measured(world: Any) -> None:
    _, read, run = report(world)
    for text in (
        "mix on sums",
        "Mixing Tokens",
        "All 60 test sequences",
        "1.250",  # the test score
        "150% worse than the best baseline (linear, 0.500)",
        "25% worse than the best published figure (Paper, 1.000)",
        "1.23 M",  # parameters
        "1 min 05 s",
        "14 steps in 2 epochs",
        "the weights are those of epoch 2",  # epochs are counted from 0 in files, from 1 in words
        "best: 1.429",  # of validation, from metrics.csv
        "SYNTHETIC",
        "train 200, val 40, test 60",
        "sums train --config",
        "sums eval",
        "INPUT.csv",
        "max_epochs: 2",
        "2.13.0",
    ):
        assert text in read.text, text
    assert {p.name for p in run.plots.iterdir()} == {"fit_first.png", "training.png", "attention.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in run.plots.iterdir())


def test_rows_stand_in_order_with_the_run_marked(world: Any) -> None:
    source, _, _ = report(world)
    table = source[source.index("<h2>Results") :]
    table = table[: table.index("</table>")]
    names = re.findall(r'<td>(\w+)<span class="tag">([\w ]+)</span>', table)
    assert names == [("linear", "baseline"), ("Paper", "published"), ("mix", "this run"), ("zero", "baseline")]
    marked = re.findall(r"<tr class=mark><td>(\w+)", table)
    assert marked == ["mix"]
    assert re.findall(r'class="best">([^<]+)', table) == ["0.500"]


def test_order_follows_maximize(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.SumTask, "maximize", True)
    source, read, _ = report(world)
    names = re.findall(r'<td>(\w+)<span class="tag">', source)
    assert names[0] == "zero"
    assert "25% better than the best published figure" in read.text


def test_attention_is_drawn(world: Any) -> None:
    source, read, _ = report(world)
    assert "What the model attends to" in read.text
    assert "layers.0" in source
    assert "layers.1" in source


def test_without_attention_baselines_or_curves(world: Any) -> None:
    config = world.config(model="zero")
    run = Run.create(config)
    run.write_results(world.results(config, baselines=[], published=[], cost={}, best={}, steps=0))
    read = Reader(write_report(world.app, run, *world.task(config)).read_text(encoding="utf-8"))
    assert "What the model attends to" not in read.text
    assert "Training" not in re.findall(r"Training|Results", read.text)
    assert "1.250" in read.text


def test_figures_that_are_no_numbers(world: Any) -> None:
    _, read, _ = report(world, splits={"val": {}, "test": {"mse": math.nan, "mae": math.inf}})
    assert "not a number" in read.text
    assert "infinite" in read.text


def test_task_is_left_as_it_was(world: Any) -> None:
    config = world.config()
    run = world.run(config)
    task, bundle = world.task(config)
    task.train()
    task.net.norm.eval()
    before = {k: v.clone() for k, v in task.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    write_report(world.app, run, task, bundle)
    assert torch.equal(torch.rand(1), expected)
    assert task.training
    assert task.net.dropout.training
    assert not task.net.norm.training
    assert all(torch.equal(v, before[k]) for k, v in task.state_dict().items())


def test_unfinished_run(world: Any) -> None:
    config = world.config()
    with pytest.raises(UserError, match="has not finished"):
        write_report(world.app, Run.create(config), *world.task(config))


def test_figures_take_the_colour_of_the_page() -> None:
    fig = plotting.figure(3, 2)
    with plotting.style():
        axes = fig.subplots()
        axes.plot([0, 1], [0, 1], color="black", label="a")
        axes.plot([0, 1], [1, 0], color=plotting.COLOURS[0], label="b")
        axes.legend(frameon=True)
        axes.set_title("Title")
    face = axes.patch.get_facecolor()
    source = plotting.svg(fig, "p7")
    assert "currentColor" in source
    assert "#000000" not in source
    assert plotting.INK not in source
    assert "#ffffff" not in source
    assert plotting.COLOURS[0] in source
    assert all(i.startswith("p7-") for i in re.findall(r'\bid="([^"]+)', source))
    assert axes.patch.get_facecolor() == face, "the figure itself is unchanged"


def test_heavy_figures_become_pictures() -> None:
    fig = plotting.figure(3, 2)
    points = torch.rand(2, 20_000).numpy()
    fig.subplots().scatter(points[0], points[1], s=1)
    assert 'src="data:image/png;base64,' in page.picture(fig, "many", "x")


def test_recordings_are_part_of_the_page() -> None:
    sounds = [Sound(name="true <1>", data=b"fLaC\x00", kind="audio/flac"), Sound(name="own", data=b"x")]
    html = page.players(sounds)
    assert html.count("<audio controls") == 2
    assert "true &lt;1&gt;" in html
    assert f'src="data:audio/flac;base64,{base64.b64encode(sounds[0].data).decode()}"' in html
    assert page.players([]) == ""
    assert "media-src data:;" in page.page("a", html)
    fig = plotting.figure(3, 2)
    assert page.picture(fig, "heard", "y", html).index("<audio") < page.picture(fig, "heard", "y", html).index("heard<")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, page.NONE),
        (3, "3"),
        (12345, "12,345"),
        (0.5, "0.500"),
        (1234.5, "1,234"),
        (1e-5, "1e-05"),
        (1e9, "1e+09"),
    ],
)
def test_numbers(value: Any, text: str) -> None:
    assert page.number(value) == text


def test_durations_and_counts() -> None:
    assert [page.duration(s) for s in (0.42, 38, 59.7, 125, 3725)] == [
        "0.4 s",
        "38 s",
        "1 min 00 s",
        "2 min 05 s",
        "1 h 02 min",
    ]
    assert [page.big(n) for n in (12, 1234, 1_234_567, 2.5e9)] == ["12", "1.23 k", "1.23 M", "2.5 G"]
