"""The command `genomics generate`. Imports neither torch nor numpy, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attn_genomics.commands.arguments import run_folder, whole
from attn_shared import options
from attn_shared.errors import UserError

_USAGE = """usage: genomics generate RUN --output FILE.fa [options]

Draw sequences from a language model that was trained by the next base (objective next), base after base. RUN is a run
of `genomics pretrain`, or a checkpoint folder. Models that carry a state need the same time for every base, however
long the sequence; others read their last bases again for each.

  --output FILE        FASTA to write, bgzip where the name ends in .gz
  --length N           bases to draw for each sequence (default: 1000)
  --count N            sequences, for each prompt (default: 1)
  --temperature X      above 1 = more even, below 1 = more of what is likely; 0 = always the likeliest (default: 1)
  --top_k N            draw from the N likeliest bases only, 1 to 4 (default: 4)
  --prompt TEXT        letters, or a FASTA file, that each sequence begins with; they are part of what is written.
                       Without one, the first base is drawn evenly
  --seed N             of the draws; a sequence follows from it and from its number (default: 0)"""


def main(argv: Sequence[str]) -> int:
    """`genomics generate`; the exit status."""
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(_USAGE)
        return 0 if argv else 2
    parsed = options.split(argv)
    options.check_options(parsed, ["output", "length", "count", "temperature", "top_k", "prompt", "seed"])
    if len(parsed.words) != 1:
        raise UserError("generate takes one run: genomics generate RUN --output FILE.fa")
    output = parsed.last("output")
    if output is None:
        raise UserError("generate needs --output FILE.fa, the file to write")
    length = whole(parsed.last("length"), "length", least=1) or 1000
    count = whole(parsed.last("count"), "count", least=1) or 1
    top_k = whole(parsed.last("top_k"), "top_k", least=1) or 4
    if top_k > 4:
        raise UserError(f"--top_k takes 1 to 4, as there are four bases, got {top_k}")
    seed = whole(parsed.last("seed"), "seed", least=0) or 0
    text = parsed.last("temperature") or "1"
    try:
        temperature = float(text)
    except ValueError:
        temperature = -1.0
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature takes a number from 0 on, got {text}")
    run = run_folder(parsed.words[0])

    from attn_genomics.commands import sampling

    sampling.generate(
        run,
        Path(output).expanduser(),
        length=length,
        count=count,
        temperature=temperature,
        top_k=top_k,
        prompt=parsed.last("prompt"),
        seed=seed,
    )
    print(output)
    return 0
