"""The data sets of genomes. Imports neither torch nor numpy."""

from __future__ import annotations

from attn_genomics.sequences.cards import YEAST_FASTA, YEAST_MANUAL
from attn_shared.app import DataCard, DataFile

FILE_FORMATS = (
    "To model the language of a genome: a FASTA file (plain, gzip or bgzip; lower case counts as upper case, letters "
    "other than ACGT as N)."
)
FILE_SUFFIXES = (
    *(f"{suffix}{packed}" for suffix in (".fa", ".fasta", ".fna", ".fas", ".ffn") for packed in ("", ".gz", ".bgz")),
)
HELD_OUT = {"yeast": (("V",), ("XVI",)), "synthetic_genome": (("four",), ("three",))}
"""Records for validation and test unless the options name others."""


def _phage(name: str, title: str, size: str, citation: str, source: str, licence: str, file: DataFile) -> DataCard:
    return DataCard(
        name=name,
        title=title,
        task="model the language of genomes",
        licence=licence,
        source=source,
        size=size,
        split="the last 10 % for test, 5 % before them for validation",
        citation=citation,
        subdir="genomics",
        files=(file,),
        manual=f"take it from {source}",
        kind="genome",
    )


DATASETS: dict[str, DataCard] = {
    card.name: card
    for card in (
        DataCard(
            name="synthetic_genome",
            title="Synthetic genome: genes with a codon usage on both strands, promoters, repeats, gaps",
            task="model the language of genomes",
            licence="made by this application",
            source="generated",
            size="4 records, 300,000 bases",
            split="by record: three for test, four for validation",
            citation="none",
            embedded=True,
            synthetic=True,
            facts={
                "genes": "a start codon, codons drawn by a skewed usage, a stop codon; on either strand",
                "promoters": "two boxes a fixed distance before most genes",
                "repeats": "copies of a few families of elements, each with 5 % of its bases changed, on either strand",
                "N": "runs of unknown bases, which are never scored",
            },
            kind="genome",
        ),
        DataCard(
            name="ecoli",
            title="Escherichia coli K-12",
            task="model the language of genomes",
            licence="none stated in the repository; a public GenBank record",
            source="github.com/mschatz/anicompare, data/ecoli.fa.gz",
            size="1 record, 4,639,675 bases",
            split="the last 10 % for test, 5 % before them for validation",
            citation="F. R. Blattner et al., The complete genome sequence of Escherichia coli K-12, Science 1997",
            subdir="genomics",
            files=(
                DataFile(
                    path="genomes/ecoli.fa.gz",
                    sha256="b3bb50be0cd03bb14a2a42975b67b806253ae7a5205959f42b90af071fe4cd28",
                    bytes=1432602,
                ),
            ),
            manual="take data/ecoli.fa.gz from github.com/mschatz/anicompare",
            kind="genome",
        ),
        DataCard(
            name="yeast",
            title="Saccharomyces cerevisiae S288C, R64-1-1",
            task="model the language of genomes",
            licence="none stated in the repository (Ensembl data carry no restriction)",
            source="github.com/rpolicastro/yeast_data, genome/",
            size="17 records, 12,157,105 bases",
            split="by chromosome: XVI for test, V for validation",
            citation="Saccharomyces Genome Database; Ensembl release 96",
            subdir="genomics",
            files=(YEAST_FASTA,),
            manual=YEAST_MANUAL,
            kind="genome",
        ),
        _phage(
            "lambda",
            "Phage lambda",
            "1 record, 48,502 bases",
            "F. Sanger et al., Nucleotide sequence of bacteriophage lambda DNA, 1982",
            "github.com/BenLangmead/bowtie2, example/reference/lambda_virus.fa",
            "repository software GPL-3.0; none stated for the sequence, a public RefSeq record",
            DataFile(
                path="genomes/lambda_virus.fa",
                sha256="0a04f81952deb68c204e8ae67e0573cb97d348f18ab1b527630d57c294028cf5",
                bytes=49270,
            ),
        ),
        _phage(
            "phix174",
            "Phage phiX174",
            "1 record, 5,386 bases",
            "F. Sanger et al., Nucleotide sequence of bacteriophage phiX174 DNA, 1977",
            "github.com/ArcInstitute/evo2, phage_gen/data/NC_001422_1.fna, renamed phix174_NC_001422.1.fna",
            "repository Apache-2.0; a public RefSeq record",
            DataFile(
                path="genomes/phix174_NC_001422.1.fna",
                sha256="237750c9c59ee335b41a51d52806aae7250515a6d460899f4fb6630033789400",
                bytes=5532,
            ),
        ),
    )
}
