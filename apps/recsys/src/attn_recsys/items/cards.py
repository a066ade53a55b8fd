"""The data sets of interactions. Imports neither torch nor numpy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from attn_shared.app import DataCard, DataFile

ROLES: Mapping[str, Sequence[str]] = {
    "user": ("user", "user_id", "userid", "uid", "customer", "customer_id", "customerid", "reviewerid"),
    "item": ("item", "item_id", "itemid", "iid", "product", "product_id", "movie_id", "movieid", "artist_id", "asin"),
    "time": ("time", "timestamp", "date", "datetime", "event_time", "unixreviewtime"),
    "rating": ("rating", "score", "stars", "overall"),
    "label": ("label", "click", "clicked", "is_click"),
    "head": ("head", "head_id", "h", "subject"),
    "relation": ("relation", "relation_id", "r", "predicate"),
    "tail": ("tail", "tail_id", "t", "object"),
    "entity": ("entity", "entity_id", "freebase_id"),
}
"""Names, in lower case, by which columns are known."""
_RECBOLE = (":token", ":token_seq", ":float", ":float_seq")


def plain(name: str) -> str:
    """A column's name without RecBole's type, in lower case."""
    for end in _RECBOLE:
        name = name.removesuffix(end)
    return name.strip().lower()


def header(path: Path) -> list[str]:
    """Names on the first line of a text file, whatever separates them; empty where it is none or not there."""
    try:
        with path.open("rb") as file:
            line = file.readline(1 << 16)
    except OSError:
        return []
    if b"\0" in line or line.startswith((b"PAR1", b"PK")):
        return []
    text = line.decode("utf-8-sig", "replace")
    return [word.strip().strip('"').strip() for word in re.split(r"[,;\t|]", text)]


def roles(path: Path) -> set[str]:
    """Roles of the columns of a text file, as far as their names tell."""
    names = {plain(name) for name in header(path)}
    return {role for role, known in ROLES.items() if names & set(known)}


FILE_FORMATS = (
    "To rank items: a CSV, TSV or Parquet file of interactions with a user and an item in each row (text or numbers) "
    "and, where there are any, a time and a rating; --data_args.graph names a file of triples (head, relation, tail), "
    "--data_args.links one of items and their entities where names differ; items named only there can be recommended, "
    "too. A folder in KGAT's format (train.txt, test.txt, kg_final.txt) or with RecBole's atomic files (.inter, .kg, "
    ".link) is read as it is."
)
FILE_SUFFIXES = (".csv", ".tsv", ".txt", ".parquet", ".pq", ".inter")

# Amazon Beauty serves both kinds of task.
BEAUTY_FILES = (
    DataFile(
        path="amazon_beauty/Beauty.txt",
        sha256="226cce9c3105299ca0db9615d7d3fb32b3175e90da43100ae352599f0f0107b8",
        bytes=1090094,
    ),
    DataFile(
        path="amazon_beauty/Beauty_item2attributes.json",
        sha256="129e40f67486f6877eff0f5318cfa8530ee8ac23d8b0d1de04e1bb7a2ba0b2d4",
        bytes=305674,
    ),
)
BEAUTY_MANUAL = "take Beauty.txt and Beauty_item2attributes.json from data of github.com/RUCAIBox/CIKM2020-S3Rec"

DATASETS: dict[str, DataCard] = {
    card.name: card
    for card in (
        DataCard(
            name="synthetic",
            title="Synthetic interactions with planted tastes and a knowledge graph that matters",
            task="rank items for users",
            licence="made by this application",
            source="generated: users like schools, makers belong to schools, items have makers",
            size="400 users, 310 items (10 of them in the graph only), about 4,000 interactions, 1,050 triples",
            split="70 / 10 / 20 % of each user's interactions, drawn",
            citation="none",
            embedded=True,
            synthetic=True,
        ),
        DataCard(
            name="lastfm_hetrec",
            title="Last.FM (HetRec 2011) with a knowledge graph",
            task="rank artists for listeners",
            licence="none stated in the repository; HetRec 2011 is offered for non-commercial research",
            source="github.com/CCIIPLab/MCCLK, data/music, as CSV",
            size="1,872 users, 3,846 items, 21,173 interactions, 15,518 triples, 0.7 MB",
            split="70 / 10 / 20 % of each user's interactions, drawn",
            citation="I. Cantador, P. Brusilovsky, T. Kuflik, HetRec 2011; graph after H. Wang et al., RippleNet and "
            "KGCN, from Microsoft Satori",
            subdir="recsys",
            files=(
                DataFile(
                    path="lastfm_hetrec/interactions.csv.gz",
                    sha256="de7fec70d785660c66665d38bba63fbb4e2534edb2ddb6eb71718fdbef5c8412",
                    bytes=135095,
                ),
                DataFile(
                    path="lastfm_hetrec/kg.csv.gz",
                    sha256="ecaa3a390cbf10820453c563a302c9d55fdc39e3b0bb361e3824cb7840ecbd38",
                    bytes=72386,
                ),
                DataFile(
                    path="lastfm_hetrec/relations.csv.gz",
                    sha256="b8caffc78498ac95ce8a4a235b31568e9a7ce67f6f8d9e4d8329013b4ede733f",
                    bytes=693,
                ),
            ),
            manual="take ratings_final.txt (user, item, label), kg_final.txt (head, relation, tail) and the relations' "
            "names of kg.txt from data/music of github.com/CCIIPLab/MCCLK and write them as gzipped CSV with headers "
            "user,item,label; head,relation,tail; relation,name",
            facts={"trap": "half of the published rows are sampled negatives (label 0); they are left out here"},
        ),
        DataCard(
            name="ml100k_kg",
            title="MovieLens-100K with a Freebase graph",
            task="rank films for users",
            licence="GroupLens: research use with acknowledgement, not commercial, no redistribution",
            source="github.com/RUCAIBox/RecBole, recbole/dataset_example/ml-100k; graph from KB4Rec",
            size="943 users, 1,682 items, 100,000 ratings, 91,631 triples, 2.8 MB",
            split="70 / 10 / 20 % of each user's interactions, drawn; tables usually take 80 / 10 / 10",
            citation="F. M. Harper, J. Konstan, The MovieLens Datasets, TiiS 2015; W. X. Zhao et al., KB4Rec, 2019",
            subdir="recsys",
            files=(
                DataFile(
                    path="ml100k_kg/ml-100k.inter",
                    sha256="4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
                    bytes=1979230,
                ),
                DataFile(
                    path="ml100k_kg/ml-100k.kg.gz",
                    sha256="86cbbd69f7473607c8838cd8ad8ab643c0d8ca103b5ec60fa10de67e398a2efd",
                    bytes=783143,
                ),
                DataFile(
                    path="ml100k_kg/ml-100k.link",
                    sha256="524dca2c3d62619688ab99b3ec53ea2acb9b64d38eafec3e02bdd0dc6bb7d948",
                    bytes=21507,
                ),
            ),
            manual="take ml-100k.inter, ml-100k.link and ml-100k.kg (gzipped) from recbole/dataset_example/ml-100k of "
            "github.com/RUCAIBox/RecBole",
            facts={"ratings": "every rating counts as liked; --data_args.min_rating 4 keeps the good ones"},
        ),
        DataCard(
            name="amazon_beauty_items",
            title="Amazon Beauty, products with attributes as their graph",
            task="rank products for reviewers",
            licence="none stated",
            source="github.com/RUCAIBox/CIKM2020-S3Rec, data",
            size="22,363 users, 12,101 items, 198,502 interactions, 637 attributes, 1.4 MB",
            split="--data_args.split leave_one_out is customary: the last product is test, the one before validation",
            citation="J. McAuley et al., Amazon product data, 2014; K. Zhou et al., S3-Rec, CIKM 2020",
            subdir="recsys",
            files=BEAUTY_FILES,
            manual=BEAUTY_MANUAL,
        ),
    )
}
