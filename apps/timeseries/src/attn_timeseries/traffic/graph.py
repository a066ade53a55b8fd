"""The graph of sensors: from a file of weights or distances to a matrix of weights."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from attn_shared.errors import UserError
from attn_timeseries.data.csvtext import read_text, sniff_delimiter
from attn_timeseries.traffic.cards import TrafficDataConfig
from core_attn.naming import UnknownNameError, unknown

_FROM = ("from", "source", "src", "i", "from_sensor")
_TO = ("to", "target", "dst", "j", "to_sensor")
_KINDS = {"weight": "weights", "w": "weights", "weights": "weights", "distance": "distances", "cost": "distances",
          "length": "distances", "dist": "distances", "distances": "distances"}  # fmt: skip
_NO_EDGE = ("", "inf", "infinity", "nan", "na", "-")
_SIGNIFICANT = 1e-12
TURNED = "distances turned into weights"
_DECIMAL_COMMA = re.compile(r"^([+-]?\d*),(\d+(?:[eE][+-]?\d+)?)$")


def read_graph(path: Path, sensors: Sequence[str], config: TrafficDataConfig) -> tuple[np.ndarray, list[str]]:
    """Weights (N, N) float64 from a CSV, row = from, column = to, zero diagonal, in the order of `sensors`; and notes.

    Raises:
        UserError: one sentence with file and, where it is one, line.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the CSV of the graph")
    if not path.exists():
        raise UserError(f"there is no graph {path}")
    notes: list[str] = []
    text = read_text(path, [])
    delimiter = sniff_delimiter(text, path.name)
    lines = [(number, row) for number, row in _rows(text, delimiter) if any(row)]
    if not lines:
        raise UserError(f"{path.name} is empty; a graph is a square matrix or a list of edges")
    lowered = [cell.lower() for cell in lines[0][1]]
    if any(name in lowered for name in _FROM) and any(name in lowered for name in _TO):
        values, kind = _from_edges(path.name, lines, lowered, sensors, notes)
    else:
        values, kind = _from_matrix(path.name, lines, sensors), "auto"
    return to_weights(values, config, path.name, kind=kind, notes=notes), notes


def to_weights(
    values: np.ndarray, config: TrafficDataConfig, source: str, *, kind: str = "auto", notes: list[str] | None = None
) -> np.ndarray:
    """Weights with zero diagonal from weights or distances, NaN = no edge; see `TrafficDataConfig.graph_sigma`."""
    if config.graph_values != "auto":
        kind = config.graph_values
    values = np.where(np.eye(len(values), dtype=bool), np.nan, values)
    known = values[~np.isnan(values)]
    if kind == "auto":
        kind = "distances" if len(known) and known.max() > 1 else "weights"
    threshold = config.graph_threshold
    if kind == "distances":
        sigma = config.graph_sigma or (float(known.std()) if len(known) else 0.0)
        if sigma <= _SIGNIFICANT * (float(known.max()) if len(known) else 1.0):
            sigma = float(known.mean()) if len(known) and known.mean() > 0 else 1.0  # all edges are equally long
        values = np.exp(-np.square(values / sigma))
        threshold = 0.1 if threshold is None else threshold
        if notes is not None:
            notes.append(f"{TURNED} with sigma {sigma:.4g}, weights below {threshold:g} dropped")
    weights = np.nan_to_num(values, nan=0.0)
    weights[weights < (threshold or 0.0)] = 0.0
    if not weights.any():
        raise UserError(
            f"{source}: no edge is left of the graph; lower --data_args.graph_threshold or, for distances, raise "
            "--data_args.graph_sigma"
        )
    return weights


def _rows(text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    if delimiter == ",":
        return rows
    return [(line, [_DECIMAL_COMMA.sub(r"\1.\2", cell) for cell in row]) for line, row in rows]


def _number(cell: str, where: str) -> float:
    """A weight or distance; NaN where the cell says that there is no edge."""
    if cell.lower() in _NO_EDGE:
        return np.nan
    try:
        value = float(cell)
    except ValueError:
        raise UserError(f"{where}: {cell!r} is not a number") from None
    if not 0 <= value < np.inf:
        raise UserError(f"{where}: the graph holds {cell}, and weights and distances are at least 0 and finite")
    return value


def _from_matrix(source: str, lines: list[tuple[int, list[str]]], sensors: Sequence[str]) -> np.ndarray:
    count = len(sensors)
    first = lines[0][1]
    named = set(first) >= set(sensors) or not all(_is_number(cell) for cell in first if cell)
    body = lines[1:] if named else lines
    names = [cell for cell in first if cell] if named else list(sensors)
    width = len(names)
    indexed = named and all(len(row) == width + 1 for _, row in body)  # a first column of names
    if len(set(names)) != len(names):
        raise UserError(f"{source}: a sensor's name stands twice in the header")
    if len(body) != width:
        what = f"{len(names)} sensors in its header" if named else f"{count} sensors in the table"
        hint = "" if named or len(body) < count else "; with a header of names, sensors may be left out of the table"
        raise UserError(f"{source}: the matrix has {len(body)} rows and there are {what}{hint}")
    matrix = np.empty((width, width))
    order = []
    for number, (line, row) in enumerate(body):
        if indexed:
            order.append(row[0])
            row = row[1:]
        if len(row) != width:
            raise UserError(f"{source}:{line}: the row has {len(row)} numbers and a graph of {width} sensors {width}")
        matrix[number] = [_number(cell, f"{source}:{line}") for cell in row]
    if indexed:
        if sorted(order) != sorted(names):
            raise UserError(f"{source}: the names of the rows are not those of the header")
        matrix = matrix[[order.index(name) for name in names]]
    place = {name: i for i, name in enumerate(names)}
    for sensor in sensors:
        if sensor not in place:
            raise UserError(f"{source}: sensor {sensor!r} of the table is not in the graph")
    keep = [place[sensor] for sensor in sensors]
    return matrix[np.ix_(keep, keep)]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _from_edges(
    source: str, lines: list[tuple[int, list[str]]], header: list[str], sensors: Sequence[str], notes: list[str]
) -> tuple[np.ndarray, str]:
    tail = next(i for i, name in enumerate(header) if name in _FROM)
    head = next(i for i, name in enumerate(header) if name in _TO)
    rest = [i for i in range(len(header)) if i not in (tail, head)]
    valued = [i for i in rest if header[i] in _KINDS] or (rest if len(rest) == 1 else [])
    if rest and len(valued) != 1:
        raise UserError(f"{source}: which column holds the weights? Call it weight or distance")
    place = {name: i for i, name in enumerate(sensors)}
    values = np.full((len(sensors), len(sensors)), np.nan)
    strangers: dict[str, int] = {}
    for line, row in lines[1:]:
        where = f"{source}:{line}"
        if len(row) != len(header):
            raise UserError(f"{where}: the row has {len(row)} cells and the header {len(header)}")
        outside = [row[i] for i in (tail, head) if row[i] not in place]
        if outside:
            strangers.setdefault(outside[0], line)
            continue
        value = _number(row[valued[0]], where) if valued else 1.0
        i, j = place[row[tail]], place[row[head]]
        if not np.isnan(values[i, j]) and values[i, j] != value:
            raise UserError(f"{where}: the edge from {row[tail]} to {row[head]} stands there again with another number")
        values[i, j] = value
    if np.isnan(values).all():
        name, line = next(iter(strangers.items()), ("", lines[0][0]))
        if not name:
            raise UserError(f"{source} holds a header but no edge")
        try:
            raise unknown("sensor", name, list(sensors))
        except UnknownNameError as error:
            raise UserError(f"{source}:{line}: no edge joins two sensors of the table: {error}") from None
    if strangers:
        notes.append(f"edges of {len(strangers)} sensors that are not in the table left out")
    return values, _KINDS.get(header[valued[0]], "auto") if valued else "weights"
