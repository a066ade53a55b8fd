"""The data sets of clicks. Imports neither torch nor numpy."""

from __future__ import annotations

from pathlib import Path

from attn_recsys.items.cards import BEAUTY_FILES, BEAUTY_MANUAL, ROLES, plain
from attn_shared.app import DataCard, DataFile

FILE_FORMATS = (
    "To predict clicks: a CSV, TSV or Parquet file with an impression in each row: a column of labels (0 or 1), "
    "columns of names, of numbers, of several names a cell (--data_args.multi) and of the user's earlier items "
    "(--data_args.sequence). A table of clicks alone takes --data_args.negatives. A column `split` (train, val, test) "
    "is used by --data_args.split given."
)


def parquet_roles(path: Path) -> set[str]:
    """Roles of the columns of a Parquet file, as far as their names tell; none where it is no such file."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PAR1":
                return set()
    except OSError:
        return set()
    import pyarrow
    from pyarrow import parquet

    try:
        names = {plain(name) for name in parquet.read_schema(path).names}
    except (OSError, pyarrow.ArrowException):
        return set()
    return {role for role, known in ROLES.items() if names & set(known)}


DATASETS: dict[str, DataCard] = {
    card.name: card
    for card in (
        DataCard(
            name="synthetic_clicks",
            title="Synthetic impressions whose clicks follow from pairs of fields, each pair in its own way",
            task="predict clicks",
            licence="made by this application",
            source="generated: hidden vectors of names, turned by a matrix of each pair of fields",
            size="12,000 impressions, 300 users, 200 items, 7 fields of names, 1 of numbers",
            split="70 / 10 / 20 % of the rows, drawn",
            citation="none",
            embedded=True,
            synthetic=True,
            kind="clicks",
        ),
        DataCard(
            name="frappe",
            title="Frappe, deduplicated: apps used in context",
            task="predict clicks",
            licence="none stated in the repository; the creators offer it for research only",
            source="github.com/vitorrtonon/HeterogeneousRec, data/frappe/frappe.csv, gzipped",
            size="17,421 uses of 2,009 apps by 757 users in 8 fields of context, 0.2 MB",
            split="70 / 10 / 20 % of the rows, drawn; 2 rows drawn for each use",
            citation="L. Baltrunas, K. Church, A. Karatzoglou, N. Oliver, Frappe: Understanding the Usage and "
            "Perception of Mobile App Recommendations In-The-Wild, 2015",
            subdir="recsys",
            files=(
                DataFile(
                    path="frappe/frappe.csv.gz",
                    sha256="c727ab846c5f1e3735ebb3ad08acc99da5549b355c86beedcd07468aabf43553",
                    bytes=169480,
                ),
            ),
            manual="take data/frappe/frappe.csv from github.com/vitorrtonon/HeterogeneousRec and compress it with gzip",
            facts={
                "drawn rows": "every row is a use; the rows that were not are drawn, two for each, from apps that the "
                "user does not have so far (in training, in training and validation, at all)",
                "left out": "cnt, how often the app was used, is the outcome and no field",
                "cost": "a drawn app brings its own cost: left as it was, an app with a wrong cost would give the "
                "drawn rows away",
            },
            kind="clicks",
        ),
        DataCard(
            name="amazon_beauty",
            title="Amazon Beauty: each product of a reviewer with what he had before it",
            task="predict clicks",
            licence="none stated",
            source="github.com/RUCAIBox/CIKM2020-S3Rec, data",
            size="198,502 reviews of 12,101 products by 22,363 users, 637 attributes, 1.4 MB",
            split="each user's last product for test, the one before for validation (--data_args.split leave_one_out); "
            "a row drawn for each review",
            citation="J. McAuley et al., Amazon product data, 2014; K. Zhou et al., S3-Rec, CIKM 2020",
            subdir="recsys",
            files=BEAUTY_FILES,
            manual=BEAUTY_MANUAL,
            facts={
                "drawn rows": "every row is a review; those beside them are drawn, one for each, from products that "
                "the reviewer does not have so far (in training, in training and validation, at all)",
                "split": "rows drawn at random are refused: their past would hold what test asks for",
            },
            kind="clicks",
        ),
    )
}
