"""Bags, split and standardised, in the form that training and evaluation read.

A batch: "x" (B, N, C) float32, filled up with zeros to the largest bag; "mask" (B, N) bool, True = an instance; "label"
(B,); "index" (B,) place in the part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attn_medseg.pathology import splits
from attn_medseg.pathology.bags.corpus import Bag, Corpus
from attn_medseg.pathology.bags.options import BagsDataConfig
from attn_medseg.pathology.bags.readers import load_corpus
from attn_medseg.pathology.pieces import PiecesSet
from attn_shared.bundle import DataBundle
from attn_shared.errors import UserError

PARTS = ("train", "val", "test")


class BagSet(PiecesSet):
    """The bags of one part.

    Args:
        bags: whose labels are known.
        state: of the bundle: "mean" and "scale" of the features, "features" their number.
        most: instances of a bag at most, drawn anew each epoch; 0 = all.
    """

    def __init__(self, bags: Sequence[Bag], state: Mapping[str, Any], *, most: int = 0) -> None:
        super().__init__(len(bags), most=most)
        self.bags = tuple(bags)
        self.state = state
        patients = {name: number for number, name in enumerate(dict.fromkeys(bag.patient for bag in bags))}
        self.patients = [patients[bag.patient] for bag in bags]

    def read(self, index: int) -> NDArray[np.float32]:
        bag = self.bags[index]
        return standardised(bag.read().features, self.state, bag.name)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        x, mask = self.drawn(indices)
        return {
            "x": x,
            "mask": mask,
            "label": torch.tensor([self.bags[i].label for i in indices]),
            "index": torch.tensor(list(indices)),
            "patient": torch.tensor([self.patients[i] for i in indices]),
        }

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])


def standardised(values: NDArray[np.float32], state: Mapping[str, Any], name: str) -> NDArray[np.float32]:
    """(N, C) as the model gets them.

    Raises:
        UserError: another number of features than in training.
    """
    if values.shape[1] != state["features"]:
        raise UserError(f"{name} has {values.shape[1]} features, where the training bags have {state['features']}")
    if not state["mean"]:
        return values
    mean, scale = (np.asarray(state[one], np.float32) for one in ("mean", "scale"))
    return (values - mean) / scale


def load_bundle(
    data: str, args: BagsDataConfig, *, seed: int = 0, state: Mapping[str, Any] | None = None
) -> DataBundle:
    """Read, split and standardise.

    Args:
        seed: of the run, which chooses the fold where none is named.
        state: of a trained model; nothing is then fitted anew.

    Raises:
        UserError: data or options that cannot be used; one sentence.
    """
    check_options(args)
    corpus = load_corpus(data, args, classes=state["classes"] if state else ())
    unknown = [bag.name for bag in corpus.bags if bag.label < 0]
    bags = [bag for bag in corpus.bags if bag.label >= 0]
    if not bags:
        raise UserError(f"{data} has no labels; `predict` reads bags without labels")
    if len(corpus.classes) < 2:
        raise UserError(f"{data} has only one class, {corpus.classes[0]!r}; at least two are needed")
    parts, told = parts_of(bags, args, seed)
    chosen = {part: [bag for bag in bags if parts[bag.patient] == part] for part in PARTS}
    found = dict(state) if state else fit(corpus, chosen["train"] or bags, args)
    sets = {
        part: BagSet(own, found, most=args.instances if part == "train" else 0) if own else None
        for part, own in chosen.items()
    }
    facts: dict[str, Any] = {
        part: ", ".join(f"{count} {found['classes'][kind]}" for kind, count in _counts(own))
        for part, own in chosen.items()
        if own
    }
    notes = [*corpus.notes, *([f"{len(unknown)} bags without a label left out"] if unknown else [])]
    if notes:
        facts["notes"] = "; ".join(notes)
    return DataBundle(
        train=sets["train"],
        val=sets["val"],
        test=sets["test"],
        state=found,
        facts=facts,
        protocol=f"{told}; features {'standardised on the training bags' if found['mean'] else 'as they are'}",
    )


def parts_of(bags: Sequence[Bag], args: BagsDataConfig, seed: int) -> tuple[dict[str, str], str]:
    """Patient -> part, and how that came about, in words.

    Raises:
        UserError: a split that the data do not allow.
    """
    classes = splits.common([bag.patient for bag in bags], [bag.label for bag in bags])
    given = any(bag.part for bag in bags)
    if args.split == "given" and not given:
        raise UserError("the data name no parts of their own; leave --data_args.split at auto")
    if not given or args.split == "random" or (args.split == "auto" and args.folds) or args.test == 1:
        fold, shuffle = splits.turn(args.folds, args.fold, args.shuffle, seed)
        return splits.parts(classes, folds=args.folds, fold=fold, val=args.val, test=args.test, shuffle=shuffle)
    found: dict[str, str] = {}
    for bag in bags:
        if found.setdefault(bag.patient, bag.part) != bag.part:
            raise UserError(f"patient {bag.patient} is in two parts, {found[bag.patient]} and {bag.part or 'none'}")
    if any(bag.part == "val" for bag in bags):
        return found, "parts as the data have them"
    return splits.held_out(found, classes, args.val, args.shuffle, "test part as the data have it")


def fit(corpus: Corpus, bags: Sequence[Bag], args: BagsDataConfig) -> dict[str, Any]:
    """The state: names of the classes, number of features, and their mean and scale over bags that weigh alike."""
    normalise = corpus.normalise if args.normalise == "auto" else args.normalise
    first = bags[0].read().features
    state: dict[str, Any] = {
        "classes": list(corpus.classes),
        "features": int(first.shape[1]),
        "mean": [],
        "scale": [],
        "counts": [sum(bag.label == kind for bag in bags) for kind in range(len(corpus.classes))],
    }
    if normalise == "none":
        return state
    total, square = np.zeros(first.shape[1]), np.zeros(first.shape[1])
    for bag in bags:
        values = bag.read().features.astype(np.float64)
        if values.shape[1] != len(total):
            raise UserError(f"{bag.name} has {values.shape[1]} features and {bags[0].name} {len(total)}")
        total += values.mean(axis=0)
        square += (values**2).mean(axis=0)
    mean = total / len(bags)
    scale = np.sqrt(np.maximum(square / len(bags) - mean**2, 0.0))
    scale[scale < 1e-8 * np.maximum(1.0, np.abs(mean))] = 1.0  # a feature that never changes says nothing
    return {**state, "mean": mean.tolist(), "scale": scale.tolist()}


def _counts(bags: Sequence[Bag]) -> list[tuple[int, int]]:
    return sorted(Counter(bag.label for bag in bags).items())


def check_options(args: BagsDataConfig) -> None:
    """Refuse options that mean nothing.

    Raises:
        UserError: which one, and what it may be.
    """
    splits.check(args.folds, args.fold, args.val, args.test)
    if args.instances < 0:
        raise UserError(f"--data_args.instances must be 0 (all) or more, got {args.instances}")
