"""The models' options and their list. Plain dataclasses without torch, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass

from attn_shared.app import ModelCard

BOTH = ("sequences", "genome")


@dataclass(kw_only=True)
class CNNConfig:
    """The small convolutional network that every other model must beat.

    Attributes:
        channels: of every layer.
        kernel: bases of the first layer's motifs.
        layers: convolutions after the first, each with twice the dilation of the one before.
        taps: places of those.
        pool: places that are joined by their maximum after the first layer.
        dropout: after each layer.
    """

    channels: int = 64
    kernel: int = 15
    layers: int = 3
    taps: int = 5
    pool: int = 4
    dropout: float = 0.2


@dataclass(kw_only=True)
class HyenaDNAConfig:
    """HyenaDNA (S55). Option names are those of the official code; the defaults are small enough for a CPU.

    Attributes:
        d_model: channels.
        n_layer: blocks.
        d_inner: width of a block's feed-forward layer; 0 = 4 d_model.
        order: gates of the operator.
        l_max: the longest sequence, which filters are functions of; 0 = the longest of training, at least 1,024.
        filter_order: width of the network that writes filters.
        emb_dim: features of a place in it.
        w: frequency its sines begin with.
        short_filter_order: taps of the short convolution.
        embed_dropout: of embeddings.
        resid_dropout: of what a block adds.
        checkpoint: compute blocks again in the backward pass instead of keeping what they computed.
    """

    d_model: int = 128
    n_layer: int = 2
    d_inner: int = 0
    order: int = 2
    l_max: int = 0
    filter_order: int = 64
    emb_dim: int = 5
    w: float = 10.0
    short_filter_order: int = 3
    embed_dropout: float = 0.1
    resid_dropout: float = 0.0
    checkpoint: bool = False


@dataclass(kw_only=True)
class HybriDNAConfig:
    """HybriDNA (S64): Mamba-2 blocks, one in `every` of which is grouped-query attention instead.

    Attributes:
        dim: channels.
        layers: blocks.
        every: one block in so many is attention.
        attention_at: which one of every group, counted from 0; -1 = the last.
        heads: of attention.
        kv_heads: heads of its keys and values.
        head_dim: channels of a head of Mamba-2.
        state: numbers of its state for each of them.
        expand: width inside Mamba-2 over `dim`.
        ffn: width of a feed-forward layer over `dim`; 0 = none.
        window: bases back that attention reads; 0 = all.
        echo: for classes, the sequence is read twice and the second reading counts, in which every base has seen all:
            the paper's echo embedding.
        dropout: of what a block adds.
        checkpoint: compute blocks again in the backward pass instead of keeping what they computed.
    """

    dim: int = 128
    layers: int = 4
    every: int = 4
    attention_at: int = -1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    state: int = 32
    expand: int = 2
    ffn: float = 2.0
    window: int = 0
    echo: bool = False
    dropout: float = 0.0
    checkpoint: bool = False


@dataclass(kw_only=True)
class BiGLAConfig:
    """Gated linear attention in both directions, on motifs that a convolution finds.

    Attributes:
        dim: channels.
        layers: blocks.
        heads: of attention.
        kernel: bases of the first convolution.
        pool: places that are joined by their maximum after it; a language model needs 1.
        ffn: width of a feed-forward layer over `dim`.
        dropout: of embeddings and of what a block adds.
        causal: read what comes before only, so that the model can be trained by the next base and can generate.
        checkpoint: compute blocks again in the backward pass instead of keeping what they computed.
    """

    dim: int = 64
    layers: int = 2
    heads: int = 4
    kernel: int = 15
    pool: int = 1
    ffn: float = 2.0
    dropout: float = 0.1
    causal: bool = False
    checkpoint: bool = False


MODELS: dict[str, ModelCard] = {
    card.name: card
    for card in (
        ModelCard(
            name="bigla",
            title="ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
            source="S220",
            year=2024,
            target="attn_genomics.models.bigla:BiGLA",
            config=BiGLAConfig,
            mixer="vig",
            mixer_patterns=("noncausal_self",),
            mixer_alternatives=(("causal_self",),),
            kinds=BOTH,
            note="gated linear attention (S196) both ways over a convolution; not a published DNA model",
        ),
        ModelCard(
            name="hyenadna",
            title="HyenaDNA: Long-Range Genomic Sequence Modeling at Single Nucleotide Resolution",
            source="S55",
            year=2023,
            target="attn_genomics.models.hyenadna:HyenaDNA",
            config=HyenaDNAConfig,
            mixer="hyena",
            mixer_patterns=("causal_self",),
            kinds=BOTH,
            note="long convolutions; loads the official weights",
        ),
        ModelCard(
            name="hybridna",
            title="HybriDNA: A Hybrid Transformer-Mamba2 Long-Range DNA Language Model",
            source="S64",
            year=2025,
            target="attn_genomics.models.hybridna:HybriDNA",
            config=HybriDNAConfig,
            mixer="mamba2",
            mixer_patterns=("causal_self",),
            kinds=BOTH,
            note="Mamba-2 with grouped-query attention now and then; carries a state",
        ),
        ModelCard(
            name="cnn",
            title="Small convolutional network",
            source="",
            year=0,
            target="attn_genomics.models.cnn:CNN",
            config=CNNConfig,
            kinds=("sequences",),
            note="no attention: what the others must beat",
        ),
    )
}
