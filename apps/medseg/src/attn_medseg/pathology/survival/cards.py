"""The data sets of survival. Imports neither torch nor numpy."""

from __future__ import annotations

from attn_shared.app import DataCard

FILE_SUFFIXES = (".csv", ".tsv")
FILE_FORMATS = (
    "Survival: a CSV of case_id, slide_id, survival_months, censorship (1 = censored; or event, 1 = it came) and "
    "columns of genes (ending in _rnaseq, _mut, _cnv), as MCAT and MOTCat publish them, with signatures.csv and "
    "feature files of the slides beside it or in --data_args.features; a patient may have several lines, one for each "
    "slide."
)
DATASETS: dict[str, DataCard] = {
    card.name: card
    for card in (
        DataCard(
            name="synthetic_survival",
            title="Synthetic survival: what a slide means turns round with a group of genes",
            task="rank patients by when the event comes",
            licence="made by this application",
            source="generated",
            size="720 patients with 36 genes in 6 groups and 20 to 50 patches of 24 features; about 35 % censored",
            split="480 train, 80 validation, 160 test",
            citation="none",
            embedded=True,
            synthetic=True,
            facts={"trap": "neither genes nor slides alone tell the larger part of the risk: their product does"},
            kind="survival",
        ),
    )
}
