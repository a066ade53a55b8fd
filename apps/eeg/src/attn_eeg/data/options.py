"""The options that all data sets share. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SPLITS = ("subject", "session", "trial", "blocked", "random")
PAPER_BANDS = "theta:4-8,alpha:8-14,beta:14-31,gamma:31-49"


@dataclass(kw_only=True)
class EegDataConfig:
    """How recordings are read, cleaned, cut into windows, turned into features and split.

    Attributes:
        label: which of the data set's labels is predicted, such as "valence"; "" = its own default.
        levels: classes made of a rating scale: 2 = above its middle or not, else one class a step of the scale.
        rate: sampling rate of files that do not say it (ARFF, plain arrays), Hz.
        channels: electrodes, in this order; None = those that all recordings share, in the first one's order.
        resample: sampling rate after reading, Hz; 0 = as recorded (all recordings must then agree).
        low: lower edge of the band-pass on the whole recording, Hz; 0 = none.
        high: upper edge of it, Hz; 0 = none.
        order: order of that Butterworth filter.
        causal: filter forward only, so that nothing of the future is used; False = zero phase (forward and backward).
        reference: "average" = subtract the mean of all electrodes at each sample; "none" = as recorded.
        window: length of a window, seconds.
        stride: seconds between the starts of windows, in evaluation.
        train_stride: the same for training windows; 0 = as `stride`.
        features: what the model gets of a window: "bde" = band differential entropy, (C, bands); "raw" = the samples,
            which EEGNet gets in any case.
        bands: names and edges in Hz of the bands, "name:low-high,...".
        band_order: order of the Butterworth band filters inside a window.
        band_causal: those filters forward only, as published; False = zero phase.
        normalize: how a window is standardised before its bands are filtered: "channel" = each electrode by its own
            mean and deviation (the paper's text), "array" = all electrodes by one (the published code), "none".
        baseline: subtract the features of the recording's baseline where it has one.
        scale: how features are standardised: "global" = each by its mean and deviation over the training windows;
            "subject" = each subject's by that subject's own windows, test subjects included (no labels are used, but
            the test subject's data are: results are marked); "none".
        split: what training and test may not share: "subject", "session", "trial"; "blocked" = stretches of time of the
            same recording with `gap` seconds between them; "random" = single windows, as many papers do it (leaks).
        folds: parts; each is the test part once. 0 = one for each subject, session or trial.
        fold: which part is the test part; None = the run's seed modulo folds, so that `--seeds 6` goes through six.
        shuffle: seed of the assignment of groups (or windows) to folds.
        val: share of the training groups (or windows) that chooses the best epoch; 0 = the last epoch is taken.
        gap: seconds left out between the parts of "blocked".
        balance: "smote" = synthetic minority windows in the training part (features "bde" only); "weights" = classes
            weigh alike in the loss; "none".
        keep: share of the training windows used, drawn by `shuffle` (the published configuration drops a tenth).
    """

    label: str = ""
    levels: int = 2
    rate: float = 0.0
    channels: list[str] | None = None
    resample: float = 128.0
    low: float = 0.0
    high: float = 0.0
    order: int = 5
    causal: bool = False
    reference: Literal["none", "average"] = "none"
    window: float = 4.0
    stride: float = 4.0
    train_stride: float = 0.0
    features: Literal["bde", "raw"] = "bde"
    bands: str = PAPER_BANDS
    band_order: int = 5
    band_causal: bool = True
    normalize: Literal["array", "channel", "none"] = "channel"
    baseline: bool = True
    scale: Literal["global", "subject", "none"] = "global"
    split: Literal["subject", "session", "trial", "blocked", "random"] = "subject"
    folds: int = 6
    fold: int | None = None
    shuffle: int = 0
    val: float = 0.2
    gap: float = 4.0
    balance: Literal["none", "smote", "weights"] = "none"
    keep: float = 1.0
