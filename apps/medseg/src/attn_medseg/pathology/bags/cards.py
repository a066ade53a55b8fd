"""The data sets of bags. Imports neither torch nor numpy."""

from __future__ import annotations

from pathlib import Path

from attn_shared.app import DataCard, listed_files

TABLES = (".csv", ".tsv", ".mat")
FEATURES = (".npy", ".npz", ".h5", ".hdf5", ".pt")
FILE_SUFFIXES = (*TABLES, *FEATURES)
FILE_FORMATS = (
    "Bags: a CSV or TSV with the columns bag, label, features… and a line for each instance (also patient, instance); "
    "or a folder with a CSV of slide_id, label (and case_id) and a feature file a slide, anywhere below it: .npy, "
    ".npz, .h5 or .pt, as CLAM writes them; or a .mat of the classic sets."
)

_CHECKSUMS = Path(__file__).with_name("checksums.txt")
_CLASSIC = {
    "musk1": (
        "MUSK1: molecules that smell of musk, bags of conformations",
        "92 molecules, 476 conformations, 166 features",
    ),
    "elephant": ("Elephant: pictures, bags of segments", "200 pictures, 1,391 segments, 230 features"),
    "fox": ("Fox: pictures, bags of segments", "200 pictures, 1,320 segments, 230 features"),
    "tiger": ("Tiger: pictures, bags of segments", "200 pictures, 1,220 segments, 230 features"),
}


def _classic(name: str) -> DataCard:
    title, size = _CLASSIC[name]
    return DataCard(
        name=name,
        title=title,
        task="tell positive from negative bags",
        licence="none stated",
        source="github.com/mattzav/MIL_SphericalSeparation, Dataset, unmodified",
        size=size,
        split="20 % of the bags drawn for test, 15 % of the rest for validation; the field's protocol is ten folds: "
        "`medseg crossval --data " + name + "`",
        citation="T. G. Dietterich et al., Artificial Intelligence 1997 (MUSK); S. Andrews et al., NIPS 2002",
        subdir="medseg/mil",
        files=listed_files(_CHECKSUMS, f"{name}.mat"),
        manual=f"take {name}.mat of Dataset in github.com/mattzav/MIL_SphericalSeparation to $ATTN_DATA/medseg/mil",
        facts={"note": "the file's features were standardised over all bags by those who made it"},
        kind="bags",
    )


DATASETS: dict[str, DataCard] = {
    card.name: card
    for card in (
        DataCard(
            name="synthetic_bags",
            title="Synthetic bags: positive where one instance carries two marks, negative where two share them",
            task="tell positive from negative bags",
            licence="made by this application",
            source="generated",
            size="300 bags of 15 to 40 instances of 16 features",
            split="180 train, 40 validation, 80 test",
            citation="none",
            embedded=True,
            synthetic=True,
            facts={"trap": "the mean and the maximum of a bag's instances are the same in both classes"},
            kind="bags",
        ),
        *map(_classic, _CLASSIC),
    )
}
