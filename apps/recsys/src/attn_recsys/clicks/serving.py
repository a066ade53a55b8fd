"""Probabilities from an exported file, with ONNX Runtime and NumPy alone: no PyTorch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attn_shared.errors import UserError

METADATA = "attn_recsys"
"""Key of the metadata entry that holds everything beside the graph, as JSON."""
SCHEMA = 1
_PADDING, _UNKNOWN, _FIRST = 0, 1, 2


class Ranker:
    """Scores candidates for a request.

    Args:
        path: a file that `recsys export` wrote.
        threads: of ONNX Runtime.

    Raises:
        UserError: no such file, or no file of ours.
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        if not Path(path).is_file():
            raise UserError(f"there is no file {path}")
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception:
            raise UserError(f"{path} is no ONNX file, or a damaged one") from None
        facts = self.session.get_modelmeta().custom_metadata_map.get(METADATA)
        if facts is None:
            raise UserError(f"{path} was not written by `recsys export`: it lacks its vocabularies")
        self.facts: dict[str, Any] = json.loads(facts)
        if self.facts["schema"] != SCHEMA:
            raise UserError(f"{path} was written by another version of `recsys export`; export the run again")
        fields = self.facts["fields"]
        self._number = {f["name"]: {name: _FIRST + i for i, name in enumerate(f["names"])} for f in fields}
        self.single = [field["name"] for field in fields if not field["many"]]
        self.many = [field["name"] for field in fields if field["many"]]
        self.numeric = [(one["name"], one["mean"], one["std"]) for one in self.facts["numeric"]]
        self._wanted = {value.name for value in self.session.get_inputs()}

    def rank(self, request: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """(N,) probabilities of a click.

        Args:
            request: fields that all candidates share, such as the user and the hour: names as text, numbers, lists of
                names, and the user's earlier items under `past`, oldest first. What is left out is missing.
            candidates: the other fields of each.
        """
        return self.score(self.encode(request, candidates))

    def score(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """(N,) probabilities of encoded rows, in the order of `encode`."""
        found: np.ndarray = self.session.run(["probability"], {k: v for k, v in inputs.items() if k in self._wanted})[0]
        return found

    def encode(self, request: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """What `score` takes."""
        count = len(candidates)
        inputs: dict[str, np.ndarray] = {}
        if self.single:
            names = np.empty((count, len(self.single)), np.int64)
            for column, field in enumerate(self.single):
                known = self._number[field]
                if field in request:
                    names[:, column] = _name(known, request[field])
                else:
                    names[:, column] = [_name(known, row.get(field)) for row in candidates]
            inputs["names"] = names
        if self.numeric:
            columns = [
                [_number(row.get(name, request.get(name)), mean, std) for row in candidates]
                for name, mean, std in self.numeric
            ]
            inputs["numbers"] = np.array(columns, np.float32).T.copy()
        for field in self.many:
            known = self._number[field]
            lists = [
                [known[str(name)] for name in row.get(field, request.get(field)) or () if str(name) in known]
                for row in candidates
            ]
            inputs[f"many.{field}"] = _padded(lists)
        if self.facts["behaviour"]:
            inputs |= self._past([str(name) for name in request.get("past") or ()], count)
        return inputs

    def _past(self, items: Sequence[str], count: int) -> dict[str, np.ndarray]:
        field = self.facts["item"]
        items = items[-self.facts["max_length"] :]
        known = self._number[field]
        number = np.array([known.get(name, _UNKNOWN) for name in items] or [_PADDING], np.int64)
        found = {f"past.{field}": np.repeat(number[None], count, axis=0)}
        for name in self.facts["behaviour"][1:]:
            have, words = self._number[name], self.facts["attributes"][name]
            rows = [words[n - _FIRST] if n >= _FIRST else None for n in number.tolist()]
            if name in self.single:
                one = [
                    (_PADDING if n == _PADDING else _UNKNOWN) if row is None else _name(have, row[0] if row else None)
                    for n, row in zip(number.tolist(), rows)
                ]
                found[f"past.{name}"] = np.repeat(np.array([one], np.int64), count, axis=0)
            else:
                width = max(1, *(sum(word in have for word in row) for row in words)) if words else 1
                table = np.zeros((len(rows), width), np.int64)
                for i, row in enumerate(rows):
                    numbers = [have[word] for word in row or () if word in have]
                    table[i, : len(numbers)] = numbers
                found[f"past.{name}"] = np.repeat(table[None], count, axis=0)
        return found


def _name(known: Mapping[str, int], value: Any) -> int:
    if value is None or value == "":
        return _PADDING
    return known.get(str(value), _UNKNOWN)


def _number(value: Any, mean: float, std: float) -> float:
    if value is None or not math.isfinite(value):
        return 0.0
    return (float(value) - mean) / std


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    made = np.zeros((len(rows), max(1, *map(len, rows))) if rows else (0, 1), np.int64)
    for i, row in enumerate(rows):
        made[i, : len(row)] = row
    return made
