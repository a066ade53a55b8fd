"""Trained models with softmax attention made linear: Hedgehog with and without distillation of the attention weights.

    python benchmarks/distillation.py [--task recall,text] [--seeds 3] [--save docs/benchmarks/distillation.md]

A small transformer learns a task with softmax attention. `core_attn.distillation.convert` puts Hedgehog in its place,
with feature maps that are the identity, and `distill` trains these, and nothing else, to give the softmax layers'
weights. Every figure is of sequences that no step has seen:

- recall: pairs of a key and a value, then the keys once more in another order; the metric is how often the model names
  the value of a key (more is better). Pairs are drawn anew for every sequence.
- text: the next character of Python's own standard library; the metric is bits a character (less is better), of modules
  that were not trained on.

KL is how far the attention weights are from those of the softmax model, in nats a query, mean over the layers. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import core_attn
from attn_shared.profiling import machine
from core_attn.distillation import attention_divergence, convert, distill

TRAINED_ON = (
    "argparse",
    "ast",
    "calendar",
    "codecs",
    "datetime",
    "decimal",
    "difflib",
    "doctest",
    "fractions",
    "ftplib",
)
HELD_OUT = ("heapq", "statistics", "textwrap", "zipfile")
BATCHES = 8  # of held-out sequences


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.mixer = core_attn.build("softmax", dim=dim, heads=heads, causal=True)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """(B, L) tokens -> (B, L, vocabulary) scores of the next one."""

    def __init__(self, vocabulary: int, length: int, *, dim: int, heads: int, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.places.weight[: tokens.shape[1]])))


@dataclass(frozen=True)
class Task:
    """A model's size, sequences to train on and to test with, and how its scores (B, L, V) are judged."""

    metric: str
    model: Callable[[], Model]
    train: Callable[[torch.Generator], Tensor]
    test: Callable[[torch.Generator], Tensor]
    targets: slice  # positions of the tokens that are to be foretold from those before
    judge: Callable[[Tensor, Tensor], float]
    steps: int
    distillation_steps: int

    def foretold(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        return model(batch[:, :-1])[:, self.targets].flatten(0, 1), batch[:, 1:][:, self.targets].flatten()


def recall(pairs: int = 8, keys: int = 16) -> Task:
    """Keys are tokens 0 … keys - 1, values the `keys` tokens behind them."""

    def draw(generator: torch.Generator, count: int = 64) -> Tensor:
        key = torch.rand(count, keys, generator=generator).argsort(-1)[:, :pairs]
        value = keys + torch.randint(keys, key.shape, generator=generator)
        order = torch.rand(count, pairs, generator=generator).argsort(-1)
        asked = [x.gather(1, order) for x in (key, value)]
        return torch.cat([torch.stack([key, value], -1), torch.stack(asked, -1)], dim=1).flatten(1)

    return Task(
        metric="accuracy",
        model=lambda: Model(2 * keys, 4 * pairs, dim=32, heads=2),
        train=draw,
        test=draw,
        targets=slice(2 * pairs, None, 2),
        judge=lambda scores, right: (scores.argmax(-1) == right).double().mean().item(),
        steps=1200,
        distillation_steps=400,
    )


def text(length: int = 128) -> Task:
    def read(names: tuple[str, ...]) -> Tensor:
        library = Path(sysconfig.get_paths()["stdlib"])
        whole = "".join((library / f"{name}.py").read_text(encoding="utf-8") for name in names)
        return torch.tensor([min(max(ord(c), 31), 127) - 31 for c in whole])  # what is no printable ASCII is 0 or 96

    trained_on, held_out = read(TRAINED_ON), read(HELD_OUT)

    def draw(corpus: Tensor, generator: torch.Generator, count: int = 32) -> Tensor:
        at = torch.randint(len(corpus) - length, (count, 1), generator=generator)
        return corpus[at + torch.arange(length + 1)]

    return Task(
        metric="bits a character",
        model=lambda: Model(97, length, dim=64, heads=4),
        train=lambda generator: draw(trained_on, generator),
        test=lambda generator: draw(held_out, generator),
        targets=slice(None),
        judge=lambda scores, right: F.cross_entropy(scores, right).item() / math.log(2),
        steps=1200,
        distillation_steps=200,
    )


TASKS: dict[str, Callable[[], Task]] = {"recall": recall, "text": text}


def train(model: nn.Module, task: Task, generator: torch.Generator, *, steps: int, lr: float = 3e-3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        loss = F.cross_entropy(*task.foretold(model, task.train(generator)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def batches(task: Task, generator: torch.Generator, count: int) -> Iterator[Tensor]:
    """What a model is given, to train on."""
    return (task.train(generator)[:, :-1] for _ in range(count))


def score(model: nn.Module, task: Task) -> float:
    generator = torch.Generator().manual_seed(10**6)
    with torch.no_grad():
        return statistics.fmean(task.judge(*task.foretold(model, task.test(generator))) for _ in range(BATCHES))


def divergence(student: nn.Module, teacher: nn.Module, task: Task) -> float:
    generator = torch.Generator().manual_seed(10**6)
    held_out = (task.test(generator)[:, :-1] for _ in range(BATCHES))
    return statistics.fmean(attention_divergence(student, teacher, held_out).values())


def measure(task: Task, seed: int) -> dict[str, tuple[float, float, float]]:
    """Name of a model -> metric, KL to the softmax model, seconds of the processor to make it from the one above it."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, tuple[float, float, float]] = {}
    teacher = task.model().eval()
    nothing = math.nan

    found["untrained"] = score(teacher, task), nothing, nothing
    start = time.process_time()
    train(teacher, task, generator, steps=task.steps)
    found["softmax"] = score(teacher, task), 0.0, time.process_time() - start

    plain = convert(teacher)
    found["Hedgehog, converted"] = score(plain, task), divergence(plain, teacher, task), nothing
    student = convert(teacher)
    start = time.process_time()
    distill(student, teacher, batches(task, generator, task.distillation_steps))
    spent = time.process_time() - start
    found["Hedgehog, converted and distilled"] = score(student, task), divergence(student, teacher, task), spent

    for name, model in (("converted, then trained", plain), ("distilled, then trained", student)):
        start = time.process_time()
        train(model, task, generator, steps=task.distillation_steps, lr=1e-3)
        found[f"Hedgehog, {name}"] = score(model, task), nothing, time.process_time() - start
    return found


def report(names: list[str], seeds: int) -> Iterator[str]:
    yield ", ".join(f"{key} {value}" for key, value in machine().items()) + "\n"
    for name in names:
        task = TASKS[name]()
        runs = [measure(task, seed) for seed in range(seeds)]
        yield f"## {name}\n"
        yield f"| model | {task.metric} | KL | steps | CPU seconds |\n|---|---|---|---|---|"
        for model in runs[0]:
            metric, apart, seconds = zip(*(run[model] for run in runs))
            steps = {"untrained": 0, "softmax": task.steps, "Hedgehog, converted": 0}.get(
                model, task.distillation_steps
            )
            columns = [
                spread(metric),
                spread(apart),
                f"{steps:,}",
                "" if math.isnan(seconds[0]) else f"{min(seconds):.1f}",
            ]
            yield f"| {model} | {' | '.join(columns)} |"
        yield ""


def spread(figures: tuple[float, ...]) -> str:
    if math.isnan(figures[0]):
        return ""
    return f"{statistics.fmean(figures):.3f}" + (f" ± {statistics.stdev(figures):.3f}" if len(figures) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save", type=Path, help="a Markdown file that the tables go to as well")
    args = parser.parse_args()
    names = args.task.split(",")
    if unknown := sorted({*names} - {*TASKS}):
        parser.error(f"no such task: {', '.join(unknown)}; there are {', '.join(TASKS)}")
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    torch.set_num_threads(1)
    lines = []
    for line in report(names, args.seeds):
        print(line, flush=True)
        lines.append(line)
    if args.save:
        given = f"python benchmarks/distillation.py --task {args.task} --seeds {args.seeds} --save {args.save}"
        args.save.write_text("\n".join([INTRODUCTION.format(command=given), *lines]).rstrip() + "\n", encoding="utf-8")


INTRODUCTION = """# Softmax attention made linear by distillation

`{command}`

A transformer of two layers learns a task with softmax attention. `core_attn.distillation.convert` puts Hedgehog in its
place with feature maps that are the identity; `distill` then trains these maps, and nothing else, to give the weights
of the softmax layers. "Then trained" is all parameters on the task, for as many steps. All figures are of sequences
that no step has seen: mean and standard deviation over the seeds, least time of the processor for the steps of that
row.

- recall: pairs of a key and a value, then the keys in another order; how often the value of a key is named. Chance is
  0.06 for a model that knows which tokens are values.
- text: the next character of Python's standard library, of modules that were not trained on.
- KL: how far the attention weights are from those of the softmax model, nats a query, mean over the layers.

One thread.
"""

if __name__ == "__main__":
    main()
