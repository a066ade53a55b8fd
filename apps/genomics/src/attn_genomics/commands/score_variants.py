"""The command `genomics score-variants`. Imports neither torch nor numpy, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attn_genomics.commands.arguments import STRANDS, existing_file, one_of, run_folder, whole
from attn_shared import options
from attn_shared.errors import UserError

OUTPUTS = (".vcf", ".vcf.gz", ".vcf.bgz", ".tsv", ".tsv.gz")

_USAGE = """usage: genomics score-variants RUN --vcf FILE --fasta GENOME --output FILE [options]

What every alternate of a VCF file changes, by a trained model: the score of a window of the genome with the alternate
minus that of the window as the genome has it. RUN is a run folder or a checkpoint folder.

  language models      log2 of the window's likelihood, so bits: below 0 = the alternate is less expected. Models of
                       hidden bases: the pseudo-likelihood, each base given all others that are not hidden with it
  classifiers          log-odds (natural logarithm) of one class: above 0 = more of that class

Both windows begin at the same base and have the same number of bases, so that an indel is not liked or disliked for its
length: what an insertion adds leaves the window at its right end, and for a deletion more of the genome comes in there.
SNVs, MNVs, indels and <DEL> with END or SVLEN are scored, each alternate of a record by itself. Alternates that have no
bases of their own (*, other symbolic ones, breakends), records that do not fit the genome and lines that are no records
are told, one line each, and stay in the output without a score.

  --vcf FILE           variants: .vcf, also gzip or bgzip
  --fasta GENOME       the genome that they are of: FASTA, also gzip or bgzip
  --output FILE        .vcf or .vcf.gz (bgzip): all lines as they were, and the scores as an INFO field, one an
                       alternate; or .tsv or .tsv.gz: a row an alternate
  --context N          bases of a window (default: 512, or the training window where that is shorter; for classifiers
                       the length of training sequences)
  --strand KIND        forward, reverse, or both = their mean (default: both; forward for classifiers that were not
                       trained with rc=average)
  --of_class NAME      class of a classifier (default: the last)
  --field NAME         the INFO field (default: ATTN_SCORE)"""


def main(argv: Sequence[str]) -> int:
    """`genomics score-variants`; the exit status."""
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(_USAGE)
        return 0 if argv else 2
    parsed = options.split(argv)
    options.check_options(parsed, ["vcf", "fasta", "output", "context", "strand", "of_class", "field"])
    if len(parsed.words) != 1:
        raise UserError(
            "score-variants takes one run: genomics score-variants RUN --vcf FILE --fasta GENOME --output FILE"
        )
    vcf, fasta, output = (parsed.last(name) for name in ("vcf", "fasta", "output"))
    if vcf is None or fasta is None or output is None:
        raise UserError("score-variants needs --vcf FILE, --fasta GENOME and --output FILE")
    if not output.lower().endswith(OUTPUTS):
        raise UserError(f"--output takes the name of a file that ends in {', '.join(OUTPUTS)}, got {output}")
    variants_file, genome_file = existing_file(vcf), existing_file(fasta)
    context = whole(parsed.last("context"), "context", least=2)
    strand = one_of(parsed.last("strand"), "strand", STRANDS)
    field = parsed.last("field") or "ATTN_SCORE"
    if not (field[0].isalpha() or field[0] == "_") or not all(sign.isalnum() or sign in "_." for sign in field):
        raise UserError(f"--field takes letters, digits, _ and ., and begins with a letter, got {field}")
    run = run_folder(parsed.words[0])

    from attn_genomics.commands import variants
    from attn_genomics.commands.scoring import load_scorer
    from attn_genomics.data.fasta import Genome

    scorer = load_scorer(run, context=context, strand=strand, of_class=parsed.last("of_class"))  # type: ignore[arg-type]
    counts = variants.score_file(
        scorer,
        variants_file,
        Genome(genome_file),
        Path(output).expanduser(),
        context=scorer.context,
        field=field,
        source=str(run),
    )
    print(output)
    print(counts)
    return 0
