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
        kernel: samples of a filter; frames start every kernel/2 samples. Longer ones leave fewer frames and train
            faster, and separate less well in the end.
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
    qk_dim: int = 64
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
    qk_dim: int = 128
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
class MossFormer2Config(MossFormerConfig):
    """MossFormer2; see `MossFormerConfig`. The defaults are a model small enough to train on a CPU.

    Attributes:
        inner: channels inside a memory.
        order: a memory's filters have 2 * order - 1 frames.
    """

    inner: int = 64
    order: int = 20


@dataclass(kw_only=True)
class MossFormer2LConfig(MossFormer2Config):
    """MossFormer2, the larger; see `MossFormer2Config`."""

    filters: int = 512
    dim: int = 512
    blocks: int = 24
    group: int = 256
    qk_dim: int = 128
    dropout: float = 0.1
    inner: int = 256


@dataclass(kw_only=True)
class MossFormer2SConfig(MossFormer2LConfig):
    """MossFormer2, the smaller; see `MossFormer2Config`."""

    filters: int = 384
    dim: int = 384
    blocks: int = 25


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
        R: repeats of those blocks.
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


_MOSSFORMER = (
    "MossFormer: Pushing the Performance Limit of Monaural Speech Separation Using Gated Single-Head Transformer "
    "with Convolution-Augmented Joint Self-Attentions"
)
_MOSSFORMER2 = (
    "MossFormer2: Combining Transformer and RNN-Free Recurrent Network for Enhanced Time-Domain Monaural Speech "
    "Separation"
)


def _mossformer(name: str, config: type, note: str) -> ModelCard:
    second = issubclass(config, MossFormer2Config)
    return ModelCard(
        name=name,
        title=_MOSSFORMER2 if second else _MOSSFORMER,
        source="Zhao et al. 2024" if second else "S72",
        year=2024 if second else 2023,
        target=f"attn_speech.models.mossformer{'2:MossFormer2' if second else ':MossFormer'}",
        config=config,
        mixer="joint",
        mixer_patterns=("noncausal_self",),
        mixer_alternatives=(("causal_self",),),
        note=note,
    )


MODELS: dict[str, ModelCard] = {
    card.name: card
    for card in (
        _mossformer("mossformer", MossFormerConfig, "small enough to train on a CPU"),
        _mossformer("mossformer_s", MossFormerSConfig, "the paper's S, 10.8 M parameters"),
        _mossformer("mossformer_m", MossFormerMConfig, "the paper's M, 25.3 M parameters"),
        _mossformer("mossformer_l", MossFormerLConfig, "the paper's L, 42.1 M parameters"),
        _mossformer("mossformer2", MossFormer2Config, "small enough to train on a CPU"),
        _mossformer("mossformer2_s", MossFormer2SConfig, "the paper's smaller, 37.8 M parameters"),
        _mossformer("mossformer2_l", MossFormer2LConfig, "the paper's larger, 55.7 M parameters"),
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
