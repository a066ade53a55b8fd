"""The data sets of labelled sequences. Imports neither torch nor numpy."""

from __future__ import annotations

from attn_shared.app import DataCard, DataFile

FILE_FORMATS = (
    "To classify sequences: a CSV or TSV file (gzip too) with a column of sequences and one of labels, or with "
    "coordinates (chrom, start, end, strand; counted from 0, end excluded) and --data_args.fasta; a BED or GTF/GFF3 "
    "file with --data_args.fasta; a folder with one FASTA file a class; a folder with train, dev and test as CSV files "
    "(GUE) or as folders of one FASTA file, or one table of coordinates (Genomic Benchmarks), a class."
)
FILE_SUFFIXES = (
    *(
        f"{suffix}{packed}"
        for suffix in (".csv", ".tsv", ".txt", ".bed", ".gtf", ".gff", ".gff3")
        for packed in ("", ".gz")
    ),
)

_GUE_FILES = {
    "mouse/0/train": ("d388cffcd23017a1ff598c42f07e3313f892026f5b838367393e12f63c8d5359", 195344),
    "mouse/0/dev": ("820b2739bae5d6ab32a133a6fe605932178c40b16777d53bb010750cf5ad9da1", 25334),
    "mouse/0/test": ("84dbbbd741adf5b6091512399f0ebe29c49a0ea3c670ec7eb8cdf01fe33efe38", 25257),
    "mouse/2/train": ("55e21757c0e2819defa5ba34a4911c371f629345aef13d384f4c6ee6c061fa55", 70581),
    "mouse/2/dev": ("00d2b72a40484812d2bb8d6f34e2258d0633978721479936f4683fb4876f1aa6", 9350),
    "mouse/2/test": ("461bda720a302b251ffaa2a4949a1e80ad2cc3fc54aa7e21bbb8d8b55441b833", 9256),
    "mouse/3/train": ("01e5e70a95b433fc83fde381862d1418273aec289abcf4b8e7d7b6a979a2d384", 57467),
    "mouse/3/dev": ("3ad8e4df8e4a191067c5bd4fe0a93bdd1de0396ae429434f5a9c809fd3fd42c2", 7740),
    "mouse/3/test": ("bebd91419660d3a66c005bd05756d42df4080a8c805f71069f331a560392141f", 7710),
    "mouse/4/train": ("266cb824d4dd1c1d836c5ce917a55dd11a060239635761c42f6566ca08cf1a41", 450897),
    "mouse/4/dev": ("a7d9183c36f857a8fb5752d79468ad3102393e010185a4648fd08a69cec38c95", 57292),
    "mouse/4/test": ("ca6397eb79006cea1cabd06ef8c7453cc21bafb1a76928e6ed72e26229a74f1a", 57416),
    "prom/prom_300_tata/train": ("ed6167422c9b56c707889464de85771364bdcfa7eb808562f39f44079cd1f041", 421608),
    "prom/prom_300_tata/dev": ("68218d4f8232059301210f9862276dfcf73b5f85bf70f0aa348761892057389f", 53749),
    "prom/prom_300_tata/test": ("4796068f6b582c80053771e39d040a123a0036045a711740fad0ff3924defbaa", 53542),
    "prom/prom_core_all/train": ("a995ebd75e2cef2529a32cdb8f2dcad0803e2c9658c8925f52de33dbcb729692", 1001620),
    "prom/prom_core_all/dev": ("6cc037931626064bdf0b92f1a8ead10588f454be01c78fac7745130df61ea341", 126350),
    "prom/prom_core_all/test": ("a4393b17220ef78b2a40f7abd7a9d0b56443e7dc752b7ba00322ea784611e348", 125969),
    "prom/prom_core_notata/train": ("3fd79ec2b6359ba5a676edbefe8f34defc7e8961d97ff5801ee170209223b4bf", 897708),
    "prom/prom_core_notata/dev": ("5e0ac395506b78946d2cacfd61a3376c0f42fd867a77d94bc8a372cf0e832a93", 113238),
    "prom/prom_core_notata/test": ("e60a721732a431518c599921592e408dceb775a38626422da1df97e2ae134809", 113261),
    "prom/prom_core_tata/train": ("9b387ed5c3fd82ff08f80eb64a5af113a1dcf081b57ceb61f6a92cc47e530530", 102758),
    "prom/prom_core_tata/dev": ("362102321fd2984fb168d095ec862c83f6e18889f0d2c645976f7d1159437a40", 13646),
    "prom/prom_core_tata/test": ("067248fa97a634bb8e67b53af78f4d54bfd5ce60c3375d12b8c98b0918c20b84", 13592),
    "tf/0/train": ("d3408c62eb3fbed81775eddb1b826304dbf52274db3d3ce64415fbcb4594243e", 938464),
    "tf/0/dev": ("b8fa2ec32cc8702336bd17d91c341fc288bc1ef47a35603649e1194b01d8317b", 29878),
    "tf/0/test": ("28eca4563e0688aad63a960f1ccb3a75ebb71e2d9690053e462fb344294f00b1", 29377),
    "tf/1/train": ("6cef419b57d7f7e96bcbaa0651d96359ae3066d63f9c789e611b56821d2aa2b1", 891898),
    "tf/1/dev": ("db4475d22c8f752eae71a1bbebab2d87a5643c51c7f832a31a2cc2b6fd1e60e7", 30001),
    "tf/1/test": ("eeaa7220448442517b4dbe77cde10eee5ab6a5f382523fb70a22d53aa0eed66d", 29545),
    "tf/2/train": ("014120994cd4f4d53fae2bf8d63e8d521e5e6f434902683dfa8ccafbf3f50349", 548868),
    "tf/2/dev": ("1d9a81d4692a033f5495ba9b90b3c91a725fbbcf73666b9d3935d047c908ed58", 29852),
    "tf/2/test": ("9c8459139c7d3391d1391659ceb6f55cb28ef6aea34236e08bc6eb9cd25caf59", 29512),
    "tf/3/train": ("65b8567dd7cefc5c63c17ec9319ff8349e9c51d80cec29578f1f815f9910e7f0", 808205),
    "tf/3/dev": ("1c99e201e43d7ddc0c4ee795b144445f614d117eb9e6009e7a3e00d798ae5dd8", 30598),
    "tf/3/test": ("ae3a2d06fca01db5ab3f02d35e4ecf03e19a3ab2157671362eca37f0fcb13307", 30243),
    "tf/4/train": ("416b250397ffa8bfe423a98d25a95c50fed74cf946f8c18d3313e301d1c9681f", 551605),
    "tf/4/dev": ("f392decdf823142a660bb9c00aa1eb02bc894ec581b451f9eee6e608b11dc392", 30171),
    "tf/4/test": ("88a7a9cad4bdfd0eac981066b3163421139845af7b1a7a1cefbdc02b8efa7b50", 29682),
}
"""SHA-256 and bytes of every part of every task of GUE."""

_GUE_TASKS = (
    ("gue_mouse_0", "mouse/0", "mouse transcription factor binding, task 0", 101, "6,478 / 810 / 810"),
    ("gue_mouse_2", "mouse/2", "mouse transcription factor binding, task 2", 101, "2,620 / 328 / 328"),
    ("gue_mouse_3", "mouse/3", "mouse transcription factor binding, task 3", 101, "1,904 / 239 / 239"),
    ("gue_mouse_4", "mouse/4", "mouse transcription factor binding, task 4", 101, "15,064 / 1,883 / 1,883"),
    ("gue_tf_0", "tf/0", "human transcription factor binding, task 0", 101, "32,378 / 1,000 / 1,000"),
    ("gue_tf_1", "tf/1", "human transcription factor binding, task 1", 101, "30,672 / 1,000 / 1,000"),
    ("gue_tf_2", "tf/2", "human transcription factor binding, task 2", 101, "19,000 / 1,000 / 1,000"),
    ("gue_tf_3", "tf/3", "human transcription factor binding, task 3", 101, "27,294 / 1,000 / 1,000"),
    ("gue_tf_4", "tf/4", "human transcription factor binding, task 4", 101, "19,000 / 1,000 / 1,000"),
    ("gue_prom_core_all", "prom/prom_core_all", "human core promoters", 70, "47,356 / 5,920 / 5,920"),
    (
        "gue_prom_core_notata",
        "prom/prom_core_notata",
        "human core promoters without a TATA box",
        70,
        "42,452 / 5,307 / 5,307",
    ),
    ("gue_prom_core_tata", "prom/prom_core_tata", "human core promoters with a TATA box", 70, "4,904 / 613 / 613"),
    ("gue_prom_300_tata", "prom/prom_300_tata", "human promoters with a TATA box", 300, "4,904 / 613 / 613"),
)
GUE = {name: path for name, path, *_ in _GUE_TASKS}
"""Data set -> its folder."""
GUE_PARTS = ("train", "dev", "test")
_GUE_FACTS = {
    "metric": "MCC on test, the model picked on dev (GUE's protocol); tables in the literature show MCC x 100",
    "repeats": "test sequences that training has, too, are left in, as in the protocol, and are counted in the report",
}
_ALL_FACT = {
    "trap": "gue_prom_core_all is built from the tata and notata sets: do not train on one and test on another"
}


def _gue(name: str, path: str, title: str, length: int, counts: str) -> DataCard:
    return DataCard(
        name=name,
        title=f"GUE: {title}, {length} bases",
        task="classify sequences",
        licence="repository Apache-2.0; none stated for the data files separately",
        source=f"github.com/wds-seu/DeepGene, data/GUE/{path}, gzipped",
        size=f"{counts} sequences of {length} bases",
        split="given: train, dev, test",
        citation="Z. Zhou et al., DNABERT-2: Efficient Foundation Model and Benchmark for Multi-Species Genomes, ICLR "
        "2024; from ENCODE ChIP-seq and EPDnew",
        subdir="genomics",
        files=tuple(
            DataFile(
                path=f"gue/{path}/{part}.csv.gz",
                sha256=_GUE_FILES[f"{path}/{part}"][0],
                bytes=_GUE_FILES[f"{path}/{part}"][1],
            )
            for part in GUE_PARTS
        ),
        manual=f"take train.csv, dev.csv and test.csv of data/GUE/{path} from github.com/wds-seu/DeepGene and compress "
        "each with gzip",
        facts=_GUE_FACTS | (_ALL_FACT if "core" in name else {}),
        kind="sequences",
    )


def _benchmark(name: str, title: str, file: str, checksum: str, size: int, count: str, origin: str) -> DataCard:
    return DataCard(
        name=name,
        title=f"Genomic Benchmarks, test part only: {title}",
        task="classify sequences",
        licence="source repository MIT, original collection Apache-2.0; none stated for the sequences separately",
        source="github.com/allison-eunse/ai4h-inspired-fm-benchmark-hub, toy_data/genomics/dna_sequences",
        size=count,
        split="all of it is test: for evaluating a model that was trained elsewhere, not for training",
        citation=f"K. Gresova et al., Genomic benchmarks, BMC Genomic Data 2023; {origin}",
        subdir="genomics",
        files=(DataFile(path=f"genomic_benchmarks_test/{file}", sha256=checksum, bytes=size),),
        manual="take the test.tsv of this set from github.com/allison-eunse/ai4h-inspired-fm-benchmark-hub, name its "
        "column seq `sequence`, write it as CSV and compress it with gzip",
        facts={"training": "the official coordinates with a genome give the training part: see the files of your own"},
        kind="sequences",
    )


YEAST_GTF = DataFile(
    path="genomes/Saccharomyces_cerevisiae.R64-1-1.96.gtf.gz",
    sha256="03d0922fc974b00681c7ac30f5cc93794578ac193487a3e68b63270e378ba0ee",
    bytes=479580,
)
YEAST_FASTA = DataFile(
    path="genomes/Saccharomyces_cerevisiae.R64-1-1.dna.toplevel.fa.gz",
    sha256="06ce55bae25c4efdabb3318dcd8d77cc226a52b9d722463a610c2260f31387b3",
    bytes=3782017,
)
YEAST_MANUAL = "take the genome and its GTF file from github.com/rpolicastro/yeast_data, genome/"

DATASETS: dict[str, DataCard] = {
    card.name: card
    for card in (
        DataCard(
            name="synthetic",
            title="Synthetic grammar of motifs: two motifs, and what counts is order, spacing and strand",
            task="classify sequences",
            licence="made by this application",
            source="generated: both classes hold the same motifs as often, so that counts of k-mers hardly tell them",
            size="4,000 sequences of 120 bases",
            split="70 / 10 / 20 %, drawn",
            citation="none",
            embedded=True,
            synthetic=True,
            facts={
                "class 1": "the motifs stand in the right order, 8 to 12 bases apart, on the same strand (either)",
                "class 0": "the same motifs in the wrong order, at another distance, or on different strands",
            },
            kind="sequences",
        ),
        *(_gue(*row) for row in _GUE_TASKS),
        _benchmark(
            "nontata_promoters",
            "human promoters without a TATA box",
            "human_nontata_promoters_test.csv.gz",
            "6f377ab89308c1b359a52f0563a4caab83fe0b74832eef56fb4f3c3804bef474",
            626756,
            "9,034 sequences of 251 bases",
            "from EPDnew",
        ),
        _benchmark(
            "enhancers_cohn",
            "human enhancers",
            "human_enhancers_cohn_test.csv.gz",
            "def7662b890ca0338bfb72976240b25d1298f72c237ea7a3be5776f6b43c2070",
            970431,
            "6,948 sequences of 500 bases",
            "from D. Cohn et al. 2018",
        ),
        DataCard(
            name="yeast_coding",
            title="Yeast: pieces inside coding sequences against pieces that touch none",
            task="classify sequences",
            licence="none stated in the repository (Ensembl data carry no restriction)",
            source="github.com/rpolicastro/yeast_data, genome/: genome and annotation of Ensembl release 96",
            size="29,118 sequences of 200 bases, cut from 12 million",
            split="by chromosome: XVI for test, V for validation, the mitochondrion left out",
            citation="Saccharomyces Genome Database; Ensembl",
            subdir="genomics",
            files=(YEAST_FASTA, YEAST_GTF),
            manual=YEAST_MANUAL,
            facts={
                "sequences": "pieces of 200 bases that do not overlap, as they stand in the genome: genes of both "
                "strands are mixed; of each chromosome as many of either class",
                "class coding": "every base in a CDS of the annotation, on either strand",
                "class other": "no base in a CDS: between genes, introns, RNA genes",
            },
            kind="sequences",
        ),
    )
}
