"""The models' options and their list. Plain dataclasses without torch, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attn_shared.app import ModelCard


@dataclass(kw_only=True)
class MossFormerConfig:
    """MossFormer (S72); the defaults are a model small enough to train on a CPU.

    Attributes:
        filters: filters of encoder and decoder.
        kernel: samples of a filter; frames start every kernel/2 samples.
        dim: channels of a block.
        blocks: gated blocks of joint attention.
        group: frames of a group, inside which attention is quadratic.
        qk_dim: channels of queries and keys.
        taps: frames of a depthwise convolution.
        dropout: probability, of attention weights too.
        causal: no voice depends on what comes later than the encoder's window: attention, convolutions and norms.
    """

    filters: int = 96
    kernel: int = 16
    dim: int = 96
    blocks: int = 4
    group: int = 128
    qk_dim: int = 128
    taps: int = 17
    dropout: float = 0.0
    causal: bool = False


@dataclass(kw_only=True)
class MossFormerSConfig(MossFormerConfig):
    """MossFormer-S; see `MossFormerConfig`. The paper gives its 10.8 M parameters, not the number of its blocks."""

    filters: int = 256
    dim: int = 256
    blocks: int = 23
    group: int = 256
    dropout: float = 0.1


@dataclass(kw_only=True)
class MossFormerMConfig(MossFormerSConfig):
    """MossFormer-M; see `MossFormerConfig`."""

    filters: int = 512
    dim: int = 384
    blocks: int = 25


@dataclass(kw_only=True)
class MossFormerLConfig(MossFormerSConfig):
    """MossFormer-L; see `MossFormerConfig`."""

    filters: int = 512
    dim: int = 512
    blocks: int = 24


@dataclass(kw_only=True)
class ConvTasNetConfig:
    """Conv-TasNet; letters are the paper's.

    Attributes:
        N: filters of encoder and decoder.
        L: samples of a filter; frames start every L/2 samples.
        B: channels between blocks.
        Sc: channels of the skip connections.
        H: channels inside a block.
        P: frames of a block's depthwise convolution.
        X: blocks in a repeat, of dilation 1, 2, 4, … .
        R: repeats.
        mask: what bounds the masks; the paper takes sigmoid, later code relu.
        causal: convolutions that read the past only, and norms over the frames so far.
    """

    N: int = 512
    L: int = 16
    B: int = 128
    Sc: int = 128
    H: int = 512
    P: int = 3
    X: int = 8
    R: int = 3
    mask: Literal["sigmoid", "relu"] = "sigmoid"
    causal: bool = False


MODELS: dict[str, ModelCard] = {
    card.name: card
    for card in (
        ModelCard(
            name="convtasnet",
            title="Conv-TasNet: Surpassing Ideal Time-Frequency Magnitude Masking for Speech Separation",
            source="Luo and Mesgarani 2019",
            year=2019,
            target="attn_speech.models.convtasnet:ConvTasNet",
            config=ConvTasNetConfig,
            note="dilated convolutions over a learned transform, no attention: the baseline",
        ),
    )
}
