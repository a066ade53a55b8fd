"""The command `genomics mutagenesis`. Imports neither torch nor numpy, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attn_genomics.commands.arguments import STRANDS, existing_file, one_of, run_folder, whole
from attn_shared import options
from attn_shared.errors import UserError

_USAGE = """usage: genomics mutagenesis RUN SEQUENCE | FILE.fa | --bed FILE --fasta GENOME --output DIR [options]

What every possible change of one base does, by a trained model: the score of the changed sequence minus that of the
sequence, each base with each of the three others. RUN is a run folder or a checkpoint folder. Scores are those of
`score-variants`: bits of likelihood of a language model, log-odds of a class of a classifier. Writes mutagenesis.tsv, a
row a change, and a picture a sequence: a heat map under the sequence, whose letters are as high as changes matter.

  --output DIR         folder for the table and the pictures
  --bed FILE           places of a genome instead of sequences; their strand counts. Bases around them are read, too
  --fasta GENOME       the genome that they are of
  --name NAME          one record of FILE.fa, or one place of the BED file by its name
  --context N          bases that are read around a change; longer sequences are read in part (default: the whole of a
                       sequence up to the training window, at most 512 for language models)
  --strand KIND        forward, reverse, or both = their mean (default: both; forward for classifiers that were not
                       trained with rc=average)
  --of_class NAME      class of a classifier (default: the last)
  --limit N            bases of a sequence at most (default: 5000)"""


def main(argv: Sequence[str]) -> int:
    """`genomics mutagenesis`; the exit status."""
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(_USAGE)
        return 0 if argv else 2
    parsed = options.split(argv)
    known = ["output", "bed", "fasta", "name", "context", "strand", "of_class", "limit"]
    options.check_options(parsed, known)
    bed, fasta, output = (parsed.last(name) for name in ("bed", "fasta", "output"))
    if not parsed.words or len(parsed.words) != (1 if bed else 2):
        raise UserError("mutagenesis takes a run and a sequence or FASTA file, or a run with --bed FILE --fasta GENOME")
    if output is None:
        raise UserError("mutagenesis needs --output DIR, the folder for the table and the pictures")
    if (bed is None) != (fasta is None):
        raise UserError("--bed FILE and --fasta GENOME go together")
    places = (existing_file(bed), existing_file(fasta)) if bed is not None and fasta is not None else None
    context = whole(parsed.last("context"), "context", least=2)
    limit = whole(parsed.last("limit"), "limit", least=1) or 5000
    strand = one_of(parsed.last("strand"), "strand", STRANDS)
    run = run_folder(parsed.words[0])

    from attn_genomics.commands import mutations
    from attn_genomics.commands.scoring import load_scorer

    sequences = mutations.of_bed(*places) if places is not None else mutations.of_text(parsed.words[1])
    chosen = mutations.chosen(sequences, parsed.last("name"), limit)
    scorer = load_scorer(run, context=context, strand=strand, of_class=parsed.last("of_class"))  # type: ignore[arg-type]
    for path in mutations.write(scorer, chosen, Path(output).expanduser(), context=scorer.context):
        print(path)
    return 0
