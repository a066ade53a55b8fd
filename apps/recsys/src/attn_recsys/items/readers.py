"""Interactions and knowledge graphs from files: CSV, TSV, Parquet, RecBole's atomic files, KGAT's published format."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from attn_recsys.items.cards import ROLES, header, plain
from attn_recsys.items.corpus import Corpus, Interactions, KnowledgeGraph
from attn_recsys.items.graph import build_graph, distinct
from attn_recsys.items.options import ItemsDataConfig
from attn_shared.csvtext import MISSING, Cells, read_cells
from attn_shared.errors import UserError

_NAMES = {name for role in ("user", "item", "time", "head", "relation", "tail", "entity") for name in ROLES[role]}
_MOST_COLUMNS = 10_000


# -- tables -----------------------------------------------------------------------------------------------------------


def load_path(path: Path, args: ItemsDataConfig) -> Corpus:
    """Interactions (and a graph) of a file or a folder of the user's own.

    Raises:
        UserError: what cannot be read, in one sentence with file and line.
    """
    if path.is_dir():
        inter = sorted(path.glob("*.inter"))
        if inter:
            return _recbole(inter, args, path.name)
        if (path / "train.txt").is_file():
            return read_kgat(path, args)
        raise UserError(
            f"{path} holds neither train.txt and test.txt (KGAT's format) nor a file .inter (RecBole's); "
            "for a table name the file itself"
        )
    if path.suffix.lower() == ".inter":
        return _recbole([path], args, path.stem)
    return _corpus(read_table(path, args), args, path.name)


def read_table(path: Path, args: ItemsDataConfig) -> pd.DataFrame:
    """Columns user, item and, where there are any, time, rating, label; `attrs["notes"]` says what was found."""
    named = {name for name in (args.user_column, args.item_column, args.time_column) if name}
    text = _text_columns(path, named)
    cells = read_cells(path, delimiter=args.delimiter, text_columns=text, only=None, max_columns=_MOST_COLUMNS)
    found: dict[str, pd.Series] = {}
    for role, given, names in (("user", args.user_column, ROLES["user"]), ("item", args.item_column, ROLES["item"])):
        column = find_column(cells, given, names, role, needed=True)
        assert column is not None
        found[role] = read_names(cells.frame[column])
    column = find_column(cells, args.time_column, ROLES["time"], "time")
    if column is not None:
        found["time"] = read_times(cells, column)
    column = find_column(cells, args.rating_column, ROLES["rating"], "rating")
    if column is not None:
        found["rating"] = read_numbers(cells, column)
    column = find_column(cells, None, ROLES["label"], "label")
    if column is not None:
        found["label"] = read_numbers(cells, column)
    frame = pd.DataFrame(found)
    frame.attrs["notes"] = [f"{path.name}: {note}" for note in cells.notes]
    return frame


def read_triples(path: Path, delimiter: str | None = None) -> pd.DataFrame:
    """Columns head, relation, tail of a CSV, TSV, Parquet or RecBole file."""
    return _named(
        path, delimiter, {"head": ROLES["head"], "relation": ROLES["relation"], "tail": ROLES["tail"]}, "triples"
    )


def read_links(path: Path, delimiter: str | None = None) -> dict[str, str]:
    """Item -> entity."""
    frame = _named(path, delimiter, {"item": ROLES["item"], "entity": ROLES["entity"]}, "links")
    return dict(zip(frame["item"], frame["entity"]))


def _named(path: Path, delimiter: str | None, roles: Mapping[str, Sequence[str]], what: str) -> pd.DataFrame:
    text = _text_columns(path, set())
    cells = read_cells(path, delimiter=delimiter, text_columns=text, only=None, max_columns=_MOST_COLUMNS)
    found = {role: read_names(cells.frame[_needed(cells, names, role)]) for role, names in roles.items()}
    frame = pd.DataFrame(found)
    bad = frame.isna().any(axis=1).to_numpy()
    if bad.any():
        raise UserError(f"{cells.where(int(bad.argmax()))}: an empty cell; {what} need a name in every column")
    return frame


def _text_columns(path: Path, named: set[str]) -> set[str]:
    """Columns to be left as text, "007" being no number: `named`, and those known to hold names."""
    return named | {word for word in header(path) if plain(word) in _NAMES}


def _needed(cells: Cells, names: Sequence[str], role: str) -> str:
    column = find_column(cells, None, names, role)
    if column is None:
        raise UserError(
            f"{cells.source} has no column {role!r}; its first line must name the columns: it reads "
            f"{list_columns(cells)}"
        )
    return column


def list_columns(cells: Cells) -> str:
    """The columns' names, for messages."""
    names = list(cells.frame.columns)
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "")


def find_column(
    cells: Cells, given: str | None, names: Sequence[str], role: str, *, needed: bool = False
) -> str | None:
    columns = list(cells.frame.columns)
    if given is not None:
        if given in columns:
            return given
        raise UserError(f"{cells.source} has no column {given!r}; its columns are {list_columns(cells)}")
    for name in names:
        for column in columns:
            if plain(column) == name:
                return column
    if needed:
        raise UserError(
            f"{cells.source} has no column that is known to hold the {role}s; name it with "
            f"--data_args.{role}_column, one of {list_columns(cells)}"
        )
    return None


def read_names(column: pd.Series) -> pd.Series:
    """Names as text; whole numbers without decimals; missing ones stay so."""
    if pd.api.types.is_float_dtype(column) and (column.dropna() % 1 == 0).all():
        column = column.astype("Int64")
    text = column.astype("object").where(column.notna(), None)
    made = [None if cell is None or str(cell).strip() == "" else str(cell).strip() for cell in text]
    return pd.Series(made, dtype="object")


def read_numbers(cells: Cells, column: str) -> pd.Series:
    """A column of numbers, missing ones NaN."""
    values = cells.numbers(cells.frame[column]).astype(float).reset_index(drop=True)
    bad = values.isna() & cells.frame[column].notna().reset_index(drop=True)
    if bad.any():
        row = int(bad.to_numpy().argmax())
        raise UserError(f"{cells.where(row)}: {cells.frame[column].iloc[row]!r} in column {column!r} is no number")
    return values


def read_times(cells: Cells, column: str) -> pd.Series:
    """A column of times in seconds, or in the numbers that stand there; none missing."""
    raw = cells.frame[column].reset_index(drop=True)
    if pd.api.types.is_datetime64_any_dtype(raw):
        found = raw
    else:
        text = raw.where(~raw.isin(MISSING)) if raw.dtype == object or pd.api.types.is_string_dtype(raw) else raw
        values = cells.numbers(text) if not pd.api.types.is_numeric_dtype(text) else text.astype(float)
        if not (values.isna() & text.notna()).any():
            return _no_gaps(cells, column, values.astype(float))
        found = pd.to_datetime(text, errors="coerce", utc=True, format="ISO8601")
        bad = found.isna() & text.notna()
        if bad.any():
            row = int(bad.to_numpy().argmax())
            raise UserError(
                f"{cells.where(row)}: {raw.iloc[row]!r} in column {column!r} is no time; write numbers or dates as "
                "2024-01-31 or 2024-01-31 12:00:00"
            )
    seconds = (pd.to_datetime(found, utc=True) - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
    return _no_gaps(cells, column, seconds.astype(float))


def _no_gaps(cells: Cells, column: str, values: pd.Series) -> pd.Series:
    bad = ~np.isfinite(values.to_numpy(float))
    if bad.any():
        raise UserError(f"{cells.where(int(bad.argmax()))}: no time in column {column!r}, though other rows have one")
    return values


# -- the corpus -------------------------------------------------------------------------------------------------------


def _corpus(
    frame: pd.DataFrame,
    args: ItemsDataConfig,
    name: str,
    *,
    triples: pd.DataFrame | None = None,
    links: Mapping[str, str] | None = None,
) -> Corpus:
    """Interactions and graph from tables of names; the user's own --data_args.graph and links come first."""
    notes: list[str] = list(frame.attrs.get("notes", []))
    if args.graph is not None:
        triples = read_triples(_file(args.graph, "graph"))
        links = None
    if args.links is not None:
        links = read_links(_file(args.links, "links"))
        if triples is None:
            raise UserError("--data_args.links says how items are called in a graph, but there is no --data_args.graph")
    interactions = clean(frame, args, notes, more=list(links) if links is not None else [])
    graph = None
    if triples is not None:
        graph, found = build_graph(
            interactions.items, list(triples["head"]), list(triples["relation"]), list(triples["tail"]), links
        )
        notes += found
    return Corpus(name=name, interactions=interactions, graph=graph, notes=notes)


def _file(path: str, option: str) -> Path:
    found = Path(path).expanduser()
    if not found.is_file():
        raise UserError(f"there is no file {path}, which --data_args.{option} names")
    return found


def clean(frame: pd.DataFrame, args: ItemsDataConfig, notes: list[str], more: Iterable[str] = ()) -> Interactions:
    """Numbered interactions, each pair once.

    Rows without a name, with label 0 or a low rating are left out, then repeated pairs (the first one stays), then
    users and items with too few. What happened is appended to `notes`.

    Args:
        frame: columns user, item and perhaps time, rating, label, part.
        more: further items that nobody had, such as those of a graph's links.
    """
    known = frame["user"].notna() & frame["item"].notna()
    if not known.all():
        notes.append(f"{int((~known).sum()):,} rows without user or item left out")
        frame = frame[known]
    if "label" in frame:
        kept = frame["label"] > 0
        if not kept.all():
            notes.append(f"{int((~kept).sum()):,} rows with label 0 left out: they are no interactions")
            frame = frame[kept]
    if args.min_rating is not None:
        if "rating" not in frame:
            raise UserError("--data_args.min_rating needs ratings: name their column with --data_args.rating_column")
        kept = frame["rating"] >= args.min_rating
        if not kept.all():
            notes.append(f"{int((~kept).sum()):,} rows rated below {args.min_rating:g} left out")
            frame = frame[kept]
    if not len(frame):
        raise UserError("no interaction is left after cleaning")
    everything = set(frame["item"])
    if "part" in frame:
        frame = frame.sort_values("part", kind="stable")
    elif "time" in frame:
        frame = frame.sort_values("time", kind="stable")
    again = frame.duplicated(["user", "item"])
    if again.any():
        moved = ""
        if "part" in frame:
            first = frame.loc[~again].set_index(["user", "item"])["part"]
            pairs = pd.MultiIndex.from_frame(frame.loc[again, ["user", "item"]])
            crossed = int((frame.loc[again, "part"].to_numpy() != first.loc[pairs].to_numpy()).sum())
            if crossed:
                moved = (
                    f"; {crossed:,} of them stand in the training files and in the test files, and count as training"
                )
        notes.append(f"{int(again.sum()):,} repeated pairs of user and item count once{moved}")
        frame = frame[~again]
    before = frame["user"].nunique(), frame["item"].nunique(), len(frame)
    while args.min_user > 1 or args.min_item > 1:
        keep = (frame.groupby("user")["item"].transform("size") >= args.min_user) & (
            frame.groupby("item")["user"].transform("size") >= args.min_item
        )
        if keep.all():
            break
        frame = frame[keep]
    if not len(frame):
        raise UserError(
            f"no interaction is left where users have {args.min_user} and items {args.min_item} at least; lower "
            "--data_args.min_user or --data_args.min_item"
        )
    after = frame["user"].nunique(), frame["item"].nunique(), len(frame)
    if after != before:
        notes.append(
            f"{before[0] - after[0]:,} users, {before[1] - after[1]:,} items and {before[2] - after[2]:,} interactions "
            "left out for being too few"
        )
    users = _sorted(set(frame["user"]))
    cold = {name for name in more if name not in everything}
    if cold:
        notes.append(f"items known from the graph's links only, as nobody had them: {len(cold):,}")
    items = _sorted(set(frame["item"])) + _sorted(cold)
    user_of, item_of = ({name: i for i, name in enumerate(names)} for names in (users, items))
    return Interactions(
        users=users,
        items=items,
        user=frame["user"].map(user_of).to_numpy(np.int64),
        item=frame["item"].map(item_of).to_numpy(np.int64),
        time=frame["time"].to_numpy(float) if "time" in frame else None,
        rating=frame["rating"].to_numpy(float) if "rating" in frame else None,
        part=frame["part"].to_numpy(np.int8) if "part" in frame else None,
    )


def _sorted(names: Iterable[str]) -> list[str]:
    """By number where all are whole numbers, else by letter."""
    names = list(names)
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


# -- RecBole's atomic files -------------------------------------------------------------------------------------------


def _recbole(inter: Sequence[Path], args: ItemsDataConfig, name: str) -> Corpus:
    if len(inter) > 1:
        raise UserError(f"{inter[0].parent} holds {len(inter)} files .inter; name one of them")
    file = inter[0]
    return read_recbole(file, file.with_suffix(".kg"), file.with_suffix(".link"), args, name)


def read_recbole(inter: Path, kg: Path, link: Path, args: ItemsDataConfig, name: str) -> Corpus:
    """NAME.inter with, where they are there, NAME.kg (or NAME.kg.gz) and NAME.link."""
    triples = links = None
    packed = kg.with_name(f"{kg.name}.gz")
    if kg.is_file():
        triples = read_triples(kg, "tab")
    elif packed.is_file():
        with gzip.open(packed, "rt", encoding="utf-8") as file:
            frame = pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False)
        frame.columns = [plain(column) for column in frame.columns]
        triples = pd.DataFrame({"head": frame["head_id"], "relation": frame["relation_id"], "tail": frame["tail_id"]})
    if link.is_file() and triples is not None:
        links = read_links(link, "tab")
    return _corpus(read_table(inter, args), args, name, triples=triples, links=links)


# -- KGAT's published format ------------------------------------------------------------------------------------------


def read_kgat(folder: Path, args: ItemsDataConfig) -> Corpus:
    """train.txt and test.txt (a line: user item item …), kg_final.txt (head relation tail), lists of names.

    Numbers are entities: an item's number is its entity's. valid.txt, the graph and the lists may be missing.
    """
    notes: list[str] = []
    rows: list[np.ndarray] = []
    for part, name in ((0, "train.txt"), (1, "valid.txt"), (2, "test.txt")):
        file = folder / name
        if file.is_file():
            pairs = _user_lines(file)
            rows.append(np.column_stack([pairs, np.full(len(pairs), part)]))
        elif part != 1:
            raise UserError(f"{folder} holds no {name}, which KGAT's format needs")
    data = np.concatenate(rows)
    if not len(data):
        raise UserError(f"{folder} holds no interactions")
    pairs = distinct(data[:, :2])
    again = len(data) - len(pairs)
    if again:
        _, first = np.unique(data[:, :2], axis=0, return_index=True)
        crossed = len(data) - len(distinct(data)) < again
        notes.append(
            f"{again:,} repeated pairs of user and item count once"
            + ("; those in the training file and in another count as training" if crossed else "")
        )
        data = data[np.sort(first)]
    names = {kind: _list_file(folder / f"{kind}_list.txt") for kind in ("user", "item", "entity", "relation")}
    users = max(int(data[:, 0].max()), *names["user"], -1) + 1
    items = max(int(data[:, 1].max()), *names["item"], -1) + 1
    graph = None
    if (folder / "kg_final.txt").is_file():
        triples = _integers(folder / "kg_final.txt", 3)
        once = distinct(triples)
        if len(once) < len(triples):
            notes.append(f"{len(triples) - len(once):,} triples of the graph stood there more than once and count once")
        entities = max(int(once[:, [0, 2]].max(initial=-1)), items - 1, *names["entity"]) + 1
        relations = max(int(once[:, 1].max(initial=-1)), *names["relation"], -1) + 1
        graph = KnowledgeGraph(
            entities=_unique(
                [
                    *(names["item"].get(i) or f"item {i}" if names["item"] else str(i) for i in range(items)),
                    *(names["entity"].get(i, str(i)) for i in range(items, entities)),
                ]
            ),
            relations=[names["relation"].get(i, str(i)) for i in range(relations)],
            head=once[:, 0].copy(),
            relation=once[:, 1].copy(),
            tail=once[:, 2].copy(),
        )
    if args.graph is not None or args.links is not None:
        raise UserError("KGAT's format has its graph in kg_final.txt; --data_args.graph and links are for tables")
    if args.min_user > 1 or args.min_item > 1 or args.min_rating is not None:
        raise UserError("KGAT's format comes as it is; --data_args.min_user, min_item and min_rating are for tables")
    interactions = Interactions(
        users=_unique([names["user"].get(i, str(i)) for i in range(users)]),
        items=graph.entities[:items] if graph else _unique([names["item"].get(i, str(i)) for i in range(items)]),
        user=data[:, 0].copy(),
        item=data[:, 1].copy(),
        part=data[:, 2].astype(np.int8),
    )
    return Corpus(name=folder.name, interactions=interactions, graph=graph, notes=notes)


def _unique(names: list[str]) -> list[str]:
    """Names that stand there twice get their number."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return [name if counts[name] == 1 else f"{name} #{i}" for i, name in enumerate(names)]


def _user_lines(file: Path) -> np.ndarray:
    """(N, 2) pairs of the lines `user item item …`."""
    users: list[int] = []
    items: list[np.ndarray] = []
    for number, line in enumerate(_text(file).splitlines(), 1):
        words = line.split()
        if words:
            try:
                values = np.array(words, dtype=np.int64)
            except ValueError:
                raise UserError(f"{file.name}:{number}: whole numbers are expected: a user, then items") from None
            if (values < 0).any():
                raise UserError(f"{file.name}:{number}: numbers must be 0 or more")
            users.append(int(values[0]))
            items.append(values[1:])
    if not items:
        return np.empty((0, 2), np.int64)
    user = np.repeat(np.array(users, np.int64), [len(part) for part in items])
    return np.column_stack([user, np.concatenate(items)])


def _integers(file: Path, width: int) -> np.ndarray:
    rows = []
    for number, line in enumerate(_text(file).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != width or not all(word.isdecimal() for word in words):
            raise UserError(f"{file.name}:{number}: {width} whole numbers are expected, got {line[:60]!r}")
        rows.append(words)
    return np.array(rows, dtype=np.int64).reshape(-1, width)


def _list_file(file: Path) -> dict[int, str]:
    """Number -> name of a file with the columns org_id and remap_id; empty where it is missing."""
    if not file.is_file():
        return {}
    lines = _text(file).splitlines()
    head = lines[0].split() if lines else []
    if "org_id" not in head or "remap_id" not in head:
        raise UserError(f"{file.name}:1: the columns org_id and remap_id are expected")
    name, number = head.index("org_id"), head.index("remap_id")
    found = {}
    for line, text in enumerate(lines[1:], 2):
        words = text.split()
        if words:
            if len(words) <= max(name, number) or not words[number].isdecimal():
                raise UserError(f"{file.name}:{line}: a name and a whole number are expected, got {text[:60]!r}")
            found[int(words[number])] = words[name]
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def check_file(path: Path) -> list[str]:
    """Problems of a file or folder of interactions, a sentence each; what was found is printed."""
    corpus = load_path(path, ItemsDataConfig())
    data = corpus.interactions
    print(f"{len(data.users):,} users, {len(data.items):,} items, {len(data.user):,} interactions")
    for note in corpus.notes:
        print(f"note: {note}")
    return [] if len(data.items) > 1 else [f"{path.name} holds one item only, so there is nothing to rank"]


# -- data sets --------------------------------------------------------------------------------------------------------


def read_lastfm(folder: Path, args: ItemsDataConfig) -> Corpus:
    """Last.FM of HetRec 2011 with its graph: items and entities share their numbers."""
    frame = _gz(folder / "interactions.csv.gz")
    frame["label"] = frame["label"].astype(float)
    relations = dict(_gz(folder / "relations.csv.gz").itertuples(index=False, name=None))
    triples = _gz(folder / "kg.csv.gz")
    triples["relation"] = triples["relation"].map(relations).fillna(triples["relation"])
    # Items that only the rows left out name are items all the same: they have a place in the graph.
    links = {name: name for name in pd.unique(frame["item"])}
    corpus = _corpus(frame, args, "lastfm_hetrec", triples=triples, links=links)
    return corpus


def read_ml100k(folder: Path, args: ItemsDataConfig) -> Corpus:
    """MovieLens-100K with the Freebase graph of KB4Rec."""
    return read_recbole(folder / "ml-100k.inter", folder / "ml-100k.kg", folder / "ml-100k.link", args, "ml100k_kg")


def read_beauty(folder: Path, args: ItemsDataConfig) -> Corpus:
    """Amazon Beauty as S3-Rec prepared it: the order of a line is the order in time; attributes are the graph."""
    pairs = _user_lines(folder / "Beauty.txt")
    frame = pd.DataFrame({"user": pairs[:, 0].astype(str), "item": pairs[:, 1].astype(str)})
    attributes: dict[str, list[int]] = json.loads((folder / "Beauty_item2attributes.json").read_text(encoding="utf-8"))
    head = [item for item, found in attributes.items() for _ in found]
    tail = [f"attribute {number}" for found in attributes.values() for number in found]
    triples = pd.DataFrame({"head": head, "relation": "has attribute", "tail": tail})
    return _corpus(frame, args, "amazon_beauty_items", triples=triples)


def _gz(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, dtype=str, keep_default_na=False)
