"""Sequences drawn from a language model, base after base."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attn_genomics.commands.scoring import device
from attn_genomics.commands.variants import text_file
from attn_genomics.tokens import decode, encode
from attn_shared.errors import UserError
from attn_shared.seeding import derive

_TOGETHER = 64
"""Sequences that are drawn at once."""
_BLOCK = 8192
"""Bases of a prompt that go through the model at once."""
_LINE = 60


def generate(
    run: Path,
    output: Path,
    *,
    length: int,
    count: int,
    temperature: float,
    top_k: int,
    prompt: str | None,
    seed: int,
) -> None:
    """Write `count` sequences for each prompt to the FASTA file `output`.

    Raises:
        UserError: no run of a language model trained by the next base, or a prompt that is no DNA.
    """
    from attn_genomics.cli import APP
    from attn_shared import trainer

    task, config = trainer.load_task(APP, run)
    if config.kind != "genome":
        raise UserError(f"{run} classifies sequences; generate takes a run of `genomics pretrain`")
    model: Any = task.model.to(device()).eval()
    if model.objective != "next":
        raise UserError(
            f"{run} was trained on hidden bases; generate takes a model trained by --task_args.objective next"
        )
    reads = int(task.data_state["length"])
    number, begun = 0, time.monotonic()
    with text_file(output) as file:
        for name, codes in prompts(prompt):
            for first in range(0, count, _TOGETHER):
                rows = min(_TOGETHER, count - first)
                draws = np.stack([uniforms(seed, number + row, length) for row in range(rows)])
                start = torch.from_numpy(codes.astype(np.int64)).repeat(rows, 1)
                try:
                    drawn = draw(
                        model, start, torch.from_numpy(draws), temperature=temperature, top_k=top_k, reads=reads
                    )
                except ValueError as error:
                    raise UserError(f"{run} cannot go on so long: {error}") from None
                for row in drawn.cpu().numpy().astype(np.uint8):
                    number += 1
                    words = [f"generated_{number}", *([f"prompt={name}", f"prompt_bases={len(codes)}"] if name else [])]
                    words += [f"bases={length}", f"temperature={temperature:g}", f"top_k={top_k}", f"seed={seed}"]
                    letters = decode(np.concatenate((codes, row)))
                    file.write(f">{' '.join(words)}\n")
                    file.write("".join(f"{letters[at : at + _LINE]}\n" for at in range(0, len(letters), _LINE)))
    seconds = time.monotonic() - begun
    print(f"{number} x {length:,} bases, {number * length / max(seconds, 1e-9):,.0f} bases/s", file=sys.stderr)


def uniforms(seed: int, number: int, length: int) -> np.ndarray:
    """(length,) even draws of one sequence, which depend on the seed and its number only."""
    return np.random.default_rng(derive(seed, "generate", number)).random(length)


def prompts(text: str | None) -> Iterator[tuple[str, np.ndarray]]:
    """Name and codes of each prompt: letters, the records of a FASTA file, or an empty one.

    Raises:
        UserError: neither.
    """
    if not text:
        yield "", np.empty(0, dtype=np.uint8)
    elif Path(text).expanduser().is_file():
        from attn_genomics.data.fasta import records

        yield from records(Path(text).expanduser())
    elif set(text.upper()) <= set("ACGTUN"):
        yield text if len(text) <= 20 else f"{text[:19]}…", encode(text)
    else:
        raise UserError(f"--prompt takes letters of DNA or a FASTA file, and there is no file {text}")


@torch.no_grad()
def draw(
    model: Any, prompt: Tensor, uniform: Tensor, *, temperature: float = 1.0, top_k: int = 4, reads: int = 1024
) -> Tensor:
    """What follows prompts, drawn from a language model.

    Args:
        model: `LanguageModel` with objective "next".
        prompt: (B, P) codes; P may be 0.
        uniform: (B, T) numbers in [0, 1), one a base to be drawn.
        temperature: logits are divided by it; 0 = the likeliest base.
        top_k: the likeliest bases that are drawn from.
        reads: bases that are read again for each base by a model without a state, or where a sequence becomes longer
            than its state can.

    Returns:
        (B, T) codes.
    """
    where = next(model.parameters()).device
    prompt, uniform = prompt.to(where), uniform.to(where)
    batch, total = uniform.shape
    logits = torch.zeros(batch, 4, device=where)
    drawn = torch.empty(batch, total, dtype=torch.int64, device=where)
    longest = model.backbone.longest
    carried = model.decodes and (longest is None or prompt.shape[1] + total <= longest)
    reads = min(reads, longest or reads)
    state = model.init_state(batch) if carried else None
    seen = prompt
    if carried:
        for at in range(0, prompt.shape[1], _BLOCK):
            scores, state = model.step(prompt[:, at : at + _BLOCK], state)
            logits = scores[:, -1]
    elif prompt.shape[1]:
        logits = model.scores(prompt[:, -reads:])[:, -1]
    for place in range(total):
        drawn[:, place] = choose(logits, uniform[:, place], temperature, top_k)
        if place + 1 == total:
            break
        if carried:
            scores, state = model.step(drawn[:, place : place + 1], state)
        else:
            seen = torch.cat((seen, drawn[:, place : place + 1]), dim=1)[:, -reads:]
            scores = model.scores(seen)
        logits = scores[:, -1]
    return drawn


def choose(logits: Tensor, uniform: Tensor, temperature: float, top_k: int) -> Tensor:
    """One base a row: (B, 4) logits, (B,) even draws -> (B,) codes."""
    if temperature == 0:
        return logits.argmax(dim=1)
    scaled = (logits.double() - logits.double().amax(dim=1, keepdim=True)) / temperature
    if top_k < 4:
        kept = scaled.topk(top_k, dim=1).indices
        scaled = torch.full_like(scaled, -torch.inf).scatter(1, kept, scaled.gather(1, kept))
    shares = scaled.softmax(dim=1)
    # A base of probability 0 is never drawn, even where the sum of all falls short of 1 by rounding.
    edges = shares.cumsum(dim=1) / shares.sum(dim=1, keepdim=True)
    last = torch.where(shares > 0, torch.arange(4, device=shares.device), 0).amax(dim=1)
    return torch.minimum((edges <= uniform[:, None]).sum(dim=1), last)
