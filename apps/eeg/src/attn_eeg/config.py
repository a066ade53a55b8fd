"""The models' options and their list. Plain dataclasses without torch, so that `--help` answers at once.

Option names are those of the official code. The defaults of RBTransformer are its smaller published configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

from attn_shared.app import ModelCard


@dataclass(kw_only=True)
class LossConfig:
    """What every model's training loss may do against overfitting to few subjects.

    Attributes:
        label_smoothing: share of a label's weight that is spread over all classes.
        mixup: train on means of pairs of windows and of their labels, weighted by a draw from Beta(mixup, mixup)
            ("mixup: Beyond Empirical Risk Minimization", Zhang et al. 2018); 0 = on windows as they are.
    """

    label_smoothing: float = 0.0
    mixup: float = 0.0


@dataclass(kw_only=True)
class RBTransformerConfig(LossConfig):
    """RBTransformer (S19).

    Attributes:
        embed_dim: channels of an electrode's token.
        depth: inter-cortical attention blocks.
        heads: attention heads of the paper's softmax attention.
        head_dim: channels of one of its heads; heads * head_dim need not be embed_dim.
        mlp_hidden_dim: width of the feed-forward layers.
        dropout: probability, of attention weights too.
    """

    embed_dim: int = 128
    depth: int = 4
    heads: int = 6
    head_dim: int = 32
    mlp_hidden_dim: int = 128
    dropout: float = 0.1
    label_smoothing: float = 0.12


@dataclass(kw_only=True)
class MLPConfig(LossConfig):
    """Features of all electrodes in one vector, then linear layers: a control without tokens.

    Attributes:
        hidden: width of the hidden layers.
        depth: number of hidden layers.
        dropout: probability after each hidden layer.
    """

    hidden: int = 128
    depth: int = 2
    dropout: float = 0.3


@dataclass(kw_only=True)
class LinearConfig(LossConfig):
    """Logistic regression on the features of all electrodes; see `LossConfig`."""


@dataclass(kw_only=True)
class EEGNetConfig(LossConfig):
    """EEGNet, fourth version of the paper: EEGNet-8,2.

    Attributes:
        F1: temporal filters.
        D: spatial filters of each temporal filter.
        F2: filters of the separable convolution; 0 = F1 * D.
        kernel_length: samples of a temporal filter; the paper takes half a second.
        depthwise_kernel_length: samples of the separable convolution's filters, after the first pooling.
        pool1: samples averaged by the first pooling.
        pool2: samples averaged by the second pooling.
        max_norm: largest norm of a spatial filter.
        norm_rate: largest norm of a class's weights in the last layer.
        dropout: probability; the paper takes 0.5 within subjects and 0.25 across subjects.
    """

    F1: int = 8
    D: int = 2
    F2: int = 0
    kernel_length: int = 64
    depthwise_kernel_length: int = 16
    pool1: int = 4
    pool2: int = 8
    max_norm: float = 1.0
    norm_rate: float = 0.25
    dropout: float = 0.25


MODELS: dict[str, ModelCard] = {
    card.name: card
    for card in (
        ModelCard(
            name="rbtransformer",
            title="A Brain Wave Encodes a Thousand Tokens: Modeling Inter-Cortical Neural Interactions for Effective "
            "EEG-based Emotion Recognition",
            source="S19",
            year=2025,
            target="attn_eeg.models.rbtransformer:RBTransformer",
            config=RBTransformerConfig,
            mixer="softmax",
            mixer_patterns=("noncausal_self",),
            note="an electrode is a token; needs features bde",
        ),
        ModelCard(
            name="eegnet",
            title="EEGNet: A Compact Convolutional Neural Network for EEG-based Brain-Computer Interfaces",
            source="Lawhern et al. 2018",
            year=2018,
            target="attn_eeg.models.eegnet:EEGNet",
            config=EEGNetConfig,
            note="convolutions over raw windows; needs features raw",
        ),
        ModelCard(
            name="mlp",
            title="Multilayer perceptron on all features together",
            source="control",
            year=0,
            target="attn_eeg.models.controls:MLP",
            config=MLPConfig,
            note="sees every electrode at its place, without tokens or attention",
        ),
        ModelCard(
            name="linear",
            title="Logistic regression on all features together",
            source="control",
            year=0,
            target="attn_eeg.models.controls:Linear",
            config=LinearConfig,
            note="one linear map",
        ),
    )
}
