"""The options of classifying sequences. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TURNED = ("augment", "average")
"""Forms of `rc` that train on the other strand of half of the sequences."""


@dataclass(kw_only=True)
class SequencesDataConfig:
    """How labelled sequences are read and split.

    Attributes:
        sequence_column: column of sequences in a table; None = found by its name (sequence, seq, dna, …).
        label_column: column of labels, numbers or names; None = found (label, class, target, y).
        split_column: column that says train, dev (or val) and test; None = found where there is one.
        delimiter: "," ";" "tab" or "|"; None = found.
        fasta: genome that the coordinates of a BED or GTF file, or of a table, are of.
        feature: of a GTF file: the kind of feature that is class 1, such as CDS; places of the same genome outside
            every such feature are class 0.
        length: bases of a sequence: longer ones are cut around their middle, coordinates are widened or cut around
            theirs; 0 = as they are.
        split: "random" = drawn; "chromosome" = whole chromosomes (tables and files with coordinates); "given" = the
            data set's own parts; "auto" = given where there are any, else by chromosome where there are any, else
            drawn.
        val: share of the training part held out for validation where there is none.
        test: share held out for test where there is none; 1 = everything, such as to evaluate a file.
        chromosomes_val: chromosomes for validation, such as "XIV"; empty = drawn.
        chromosomes_test: chromosomes for test; empty = drawn.
        max_train: training sequences at most, drawn, for learning curves; 0 = all.
        shift: training sequences are moved by up to so many bases either way, otherwise in each epoch; what comes in at
            the other end is N. For whatever does not depend on its exact place.
        mutate: share of the bases of training sequences that are drawn anew, others in each epoch.
        shuffle: seed of what is drawn.
    """

    sequence_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    delimiter: str | None = None
    fasta: str | None = None
    feature: str = "CDS"
    length: int = 0
    split: Literal["auto", "random", "chromosome", "given"] = "auto"
    val: float = 0.1
    test: float = 0.1
    chromosomes_val: tuple[str, ...] = ()
    chromosomes_test: tuple[str, ...] = ()
    max_train: int = 0
    shift: int = 0
    mutate: float = 0.0
    shuffle: int = 0


@dataclass(kw_only=True)
class SequencesTaskConfig:
    """How sequences are classified.

    Attributes:
        pool: how what the model says of every base becomes one vector: "mean", "max", "last" (a causal model's last
            base), "attention" (a weighted mean whose weights are learned), "positional" (the sequence in `bins` equal
            parts, each with weights of its own: for promoters and whatever else has its place and its strand).
        bins: parts of "positional".
        hidden: width of a layer between that vector and the classes; 0 = none.
        dropout: before each of the head's layers.
        rc: the other strand: "none"; "augment" = each training sequence is turned with probability 1/2; "average" =
            that, and probabilities are the mean of both strands'; "equivariant" = both strands go through the model,
            in training too, and what it says of them is summed place by place: the answer is the same for both strands.
        start: a run of `genomics pretrain` or official weights of this model to start from; None = random.
        freeze: train the head only.
        smoothing: of labels.
        class_weights: classes count the same however rare they are.
        bootstrap: resamples for 95 % intervals; 0 = none.
    """

    pool: Literal["mean", "max", "last", "attention", "positional"] = "mean"
    bins: int = 16
    hidden: int = 0
    dropout: float = 0.1
    rc: Literal["none", "augment", "average", "equivariant"] = "none"
    start: str | None = None
    freeze: bool = False
    smoothing: float = 0.0
    class_weights: bool = False
    bootstrap: int = 1000


@dataclass(kw_only=True)
class SequencesPredictOptions:
    """What is predicted of FASTA, tables and BED files.

    Attributes:
        fasta: genome that coordinates of a BED file are of.
        format: "tsv" = a row a sequence or window; "bed" = windows whose class is not the first; "bedgraph" = the
            probability of one class along the sequences.
        of_class: class of "bedgraph", by name; None = the last one.
        stride: sequences longer than those of training are read in windows of that length, which begin so many bases
            apart; 0 = half a window.
        whole: longer sequences are read whole instead.
    """

    fasta: str | None = None
    format: Literal["tsv", "bed", "bedgraph"] = "tsv"
    of_class: str | None = None
    stride: int = 0
    whole: bool = False
