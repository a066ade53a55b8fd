"""The options of modelling the language of genomes. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class GenomeDataConfig:
    """How a genome is cut into windows and split.

    Attributes:
        window: bases of a training window.
        context: bases before the first that counts in a window of validation or test; 0 = half a window. Where a record
            begins, every base counts. Windows overlap so that every base counts once.
        regions: BED file of the places to train on; None = everywhere. Validation and test are everywhere.
        split: "chromosome" = whole records; "tail" = the end of every record; "auto" = by record where there are three
            or more.
        chromosomes_val: records for validation; empty = drawn, until they are `val` of the genome.
        chromosomes_test: records for test; empty = drawn.
        val: share for validation.
        test: share for test.
        epoch_bases: bases of an epoch; 0 = as many as the training part has. Windows begin anywhere.
        eval_bases: of validation at most so many bases are scored after an epoch, the first ones; 0 = all. All of test
            is.
        min_record: shorter records are left out.
        shuffle: seed of what is drawn.
    """

    window: int = 1024
    context: int = 0
    regions: str | None = None
    split: Literal["auto", "chromosome", "tail"] = "auto"
    chromosomes_val: tuple[str, ...] = ()
    chromosomes_test: tuple[str, ...] = ()
    val: float = 0.05
    test: float = 0.1
    epoch_bases: int = 0
    eval_bases: int = 200_000
    min_record: int = 100
    shuffle: int = 0


@dataclass(kw_only=True)
class GenomeTaskConfig:
    """How the language of a genome is learned.

    Attributes:
        objective: "next" = each base from those before it; "masked" = hidden bases from those around; "auto" = what the
            model can do, next where it can do both.
        mask: share of the bases that are to be told, for "masked": of these 80 % are hidden, 10 % replaced, 10 % left.
        rc: "none"; "augment" = each training window is turned with probability 1/2; "average" = that, and in
            evaluation the mean of both strands' distributions ("masked"; for "next" a strand at a time, and the mean of
            their bits); "equivariant" = both strands go through the model, in training too ("masked" only).
        start: a run or official weights of this model to start from; None = random.
        dropout: of what the head reads.
    """

    objective: Literal["auto", "next", "masked"] = "auto"
    mask: float = 0.15
    rc: Literal["none", "augment", "average", "equivariant"] = "none"
    start: str | None = None
    dropout: float = 0.0


@dataclass(kw_only=True)
class GenomePredictOptions:
    """What is predicted of FASTA and BED files: how predictable they are.

    Attributes:
        fasta: genome that coordinates of a BED file are of.
        format: "tsv" = bits a base of each record or place; "bedgraph" = of every `bin` bases along the records.
        bin: bases of a line of "bedgraph".
        block: bases that go through the model at once; its state is carried on, where it has one, else windows overlap
            by half.
    """

    fasta: str | None = None
    format: Literal["tsv", "bedgraph"] = "tsv"
    bin: int = 100
    block: int = 8192
