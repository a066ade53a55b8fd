"""The options of segmenting images and volumes. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class SegmentDataConfig:
    """How images and their masks are read, brought to one grid, cut and split.

    Axes are those of the files: x, y, z of a volume (NIfTI's order), height and width of a picture.

    Attributes:
        size: voxels of a training patch along each axis, or one number for all; empty = the data set's own, else the
            median size of the training cases, rounded up to a multiple of 16.
        resize: "whole" = every image is brought to `size` as a whole, its predictions back; "none" = patches of `size`
            are cut; "auto" = the data set's own, else whole for pictures of different sizes.
        spacing: millimetres between voxels to which volumes are resampled, an axis each or one number; 0 = as the file
            has it; empty = the data set's own, else the median of the training cases where spacings differ.
        normalise: "zscore" = each image's own mean and deviation, in volumes of what is not 0; "minmax" = its own
            smallest and largest value; "percentile" = its own 0.5th and 99.5th percentile; "clip" = `clip_low` and
            `clip_high` to 0 and 1, as for CT; "none"; "auto" = the data set's own, else zscore. Never a statistic of
            another image.
        slices: axis along which volumes are taken slice by slice, for models of two axes; -1 = the data set's own,
            whole volumes for most.
        clip_low, clip_high: of "clip", in the file's units.
        supervision: "full" masks, or "scribble" where the data set has them: loss on drawn voxels alone. Evaluation
            always reads full masks.
        augment: "none"; "flip"; "full" = flips, rotation, zoom, brightness, contrast and noise, drawn from seed, epoch
            and index.
        flips: axes along which training patches may be flipped, such as 0,1; empty = the data set's own, else none.
        patches: patches drawn of each training case in an epoch.
        foreground: share of those drawn around a voxel of a structure.
        split: "random" = patients drawn; "kfold" = part `fold` of `folds` for test; "given" = the data set's own
            parts; "auto" = given where there are any, else drawn. A patient is never in two parts.
        folds, fold: of "kfold".
        patient: regular expression whose first group is the patient in the name of a case; empty = the name without
            its end that numbers a frame, time, phase, slice or visit, such as patient001 of patient001_frame01.
        structures: names of labels 1, 2, … where the files do not tell them.
        splits: JSON file of names or patients by part, or by fold, to read; where it does not exist it is written.
        val: share of the training patients held out for validation where there is no such part.
        test: share of the patients held out for test where there is none; 1 = everything, such as to evaluate a folder.
        max_train: training patients at most, drawn, for learning curves; 0 = all.
        cache: share of the cases kept decoded in memory, 0 to 1; about 6 GB at most.
        shuffle: seed of what is drawn once: splits and patients.
    """

    size: tuple[int, ...] = ()
    resize: Literal["auto", "none", "whole"] = "auto"
    slices: int = -1
    spacing: tuple[float, ...] = ()
    normalise: Literal["auto", "zscore", "minmax", "percentile", "clip", "none"] = "auto"
    clip_low: float = -125.0
    clip_high: float = 275.0
    supervision: Literal["full", "scribble"] = "full"
    augment: Literal["none", "flip", "full"] = "full"
    flips: tuple[int, ...] = ()
    patches: int = 1
    foreground: float = 0.5
    split: Literal["auto", "random", "kfold", "given"] = "auto"
    folds: int = 5
    fold: int = 0
    patient: str = ""
    structures: tuple[str, ...] = ()
    splits: str | None = None
    val: float = 0.1
    test: float = 0.2
    max_train: int = 0
    cache: float = 1.0
    shuffle: int = 0


@dataclass(kw_only=True)
class SegmentTaskConfig:
    """How images are segmented and scored.

    Attributes:
        loss: "dice_ce" = soft Dice of the structures plus cross-entropy; "dice"; "ce"; "focal".
        dice_background: soft Dice counts the background too.
        class_weights: cross-entropy counts all classes the same however rare they are.
        overlap: share of a window that neighbouring windows of a large image share in evaluation and prediction.
        flips: evaluate and predict as the mean over the flips of training's `flips`.
        empty: Dice and IoU of a structure that is neither in the image nor predicted: "none" = not counted, "one", or
            "zero". A structure in the image that is missed wholly is Dice 0 always.
        missed: distances of a missed or invented structure: "none" = not counted (the number of such cases stands
            beside every mean), or "diagonal" = the image's diagonal.
        hd95: "pooled" = the percentile of both directed sets of distances together, as MedPy; "maximum" = the larger of
            both percentiles, as MONAI. Both are in the table of cases.
        case: what a score is of: a "volume", a "slice", or "auto" = a volume where slices belong to one.
        bootstrap: resamples of patients for 95 % intervals; 0 = none.
    """

    loss: Literal["dice_ce", "dice", "ce", "focal"] = "dice_ce"
    dice_background: bool = False
    class_weights: bool = False
    overlap: float = 0.25
    flips: bool = False
    empty: Literal["none", "one", "zero"] = "none"
    missed: Literal["none", "diagonal"] = "none"
    hd95: Literal["pooled", "maximum"] = "pooled"
    case: Literal["auto", "volume", "slice"] = "auto"
    bootstrap: int = 1000


@dataclass(kw_only=True)
class SegmentPredictOptions:
    """What is written for images and volumes.

    Attributes:
        overlap: share of a window that neighbouring windows share; below 0 = as the run has it.
        flips: the mean over flips too.
        format: "same" = as the input (pictures as PNG, DICOM series as NIfTI), or "nii.gz", "nrrd", "png".
        probabilities: the probabilities of the structures too, as float32.
        overlays: a picture of each case with its structures drawn over it.
        window: voxels of a window along each axis; empty = as in training.
    """

    overlap: float = -1.0
    flips: bool = False
    format: Literal["same", "nii.gz", "nrrd", "png"] = "same"
    probabilities: bool = False
    overlays: bool = True
    window: tuple[int, ...] = ()
