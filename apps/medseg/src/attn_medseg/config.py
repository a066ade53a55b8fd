"""The models' options and their list. Plain dataclasses without torch, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass

from attn_shared.app import ModelCard

SEGMENT = ("segment",)
BAGS = ("bags",)
SURVIVAL = ("survival",)


@dataclass(kw_only=True)
class UNetConfig:
    """MONAI's residual U-Net: the control beside every other model.

    Attributes:
        channels: of each level, from fine to coarse; each level halves the grid.
        residual_units: convolutions of a level's residual unit; 0 = plain convolutions.
        norm: "instance", "batch" or "group".
        dropout: after each convolution.
    """

    channels: tuple[int, ...] = (16, 32, 64, 128)
    residual_units: int = 2
    norm: str = "instance"
    dropout: float = 0.0


@dataclass(kw_only=True)
class DAEFormerConfig:
    """DAE-Former; the defaults are a model small enough to train on a CPU.

    Attributes:
        channels: of each level, from fine to coarse; 128,320,512 as published.
        patch: voxels of a cell of the finest level along each axis; each further level halves the grid.
        blocks: blocks of a level, in the encoder and in the decoder.
        heads: heads of attention between channels, and of another mixer than the paper's between tokens.
        expansion: how many times wider feed-forward layers of blocks are.
    """

    channels: tuple[int, ...] = (32, 80, 128)
    patch: int = 4
    blocks: int = 2
    heads: int = 8
    expansion: int = 4


@dataclass(kw_only=True)
class TransDAEConfig(DAEFormerConfig):
    """TransDAE; the defaults are a model small enough to train on a CPU.

    Attributes:
        kernel: cells across which large kernel attention reaches in the skips.
        dilation: of its second convolution; the first one has 2 dilation - 1 cells.
    """

    kernel: int = 21
    dilation: int = 3


@dataclass(kw_only=True)
class AGUNetConfig:
    """AGUNet.

    Attributes:
        channels: of each level, from fine to coarse; each level halves the grid.
        multiscale: levels read the image at their own scale too.
        supervision: every level of the decoder is told the labels, not the finest alone.
        norm: "batch" or "instance".
        dropout: of channels, after each convolution of the encoder and the decoder.
    """

    channels: tuple[int, ...] = (16, 32, 64, 128)
    multiscale: bool = True
    supervision: bool = True
    norm: str = "batch"
    dropout: float = 0.0


@dataclass(kw_only=True)
class DAUNetConfig(AGUNetConfig):
    """DAUNet.

    Attributes:
        guide: how the coarsest level's dual attention goes to each level of the decoder: "linear", "deconv" (as the
            official code, which leaves most voxels out from the third level on) or "none".
        channel_form: of channel attention: "plain", "transposed" (as the official code) or "inverse" (as DANet's).
        attention_dropout: of channels, in the dual attention.
        heads: of another mixer than the paper's.
    """

    guide: str = "linear"
    channel_form: str = "plain"
    attention_dropout: float = 0.5
    heads: int = 4


@dataclass(kw_only=True)
class WAUConfig:
    """A U-Net with Window Attention Upsample.

    Attributes:
        channels: of each level, from fine to coarse; each level halves the grid.
        upsample: "wau", or as controls "bilinear" (trilinear in volumes) or "deconv".
        window: coarse pixels of a window along each axis; one such pixel is two fine ones wide.
        heads: of the attention, fewer where they do not divide a level's channels.
        norm: "batch" or "instance".
        dropout: of channels, after each convolution.
    """

    channels: tuple[int, ...] = (16, 32, 64, 128)
    upsample: str = "wau"
    window: int = 4
    heads: int = 4
    norm: str = "instance"
    dropout: float = 0.0


@dataclass(kw_only=True)
class AttentionUNetConfig:
    """Attention U-Net.

    Attributes:
        channels: of each level, from fine to coarse; each level halves the grid.
        dropout: after each convolution.
    """

    channels: tuple[int, ...] = (16, 32, 64, 128)
    dropout: float = 0.0


@dataclass(kw_only=True)
class GatedUNetConfig:
    """The segmentor of multi-scale adversarial attention gates.

    Attributes:
        channels: of each level, from fine to coarse; 32,64,128,256,512 as published.
        gates: attention gates in the decoder; without them it is a plain U-Net.
        upsample: "nearest" and a convolution, or "deconv".
        norm: "batch" or "instance".
    """

    channels: tuple[int, ...] = (8, 16, 32, 64, 128)
    gates: bool = True
    upsample: str = "nearest"
    norm: str = "batch"


@dataclass(kw_only=True)
class MAAGConfig(GatedUNetConfig):
    """Multi-scale adversarial attention gates.

    Attributes:
        adversary: a discriminator learns masks of other patients and judges the output and the gates; without it the
            loss is the task's own.
        adversarial: weight of the adversarial loss beside the supervised one.
        dynamic: the supervised loss is scaled to the size of the adversarial one at each step.
        push: "real" moves masks towards what is drawn; "both" as the official code, which beside this, with twice the
            weight, moves them towards what is told from drawn ones.
        discriminator_channels: of its first convolution; 32 as published.
        squeeze: channels of the discriminator's features where a coarser mask joins them.
        noise: deviation of what is added to the masks that the discriminator reads.
        flip: how often the discriminator is told the contrary, a share of its calls.
        flip_form: "label" turns what is asked for; "sign" as the official code: flips leave gradients as they are.
    """

    adversary: bool = True
    adversarial: float = 0.1
    dynamic: bool = True
    push: str = "real"
    discriminator_channels: int = 16
    squeeze: int = 13
    noise: float = 0.2
    flip: float = 0.1
    flip_form: str = "label"


@dataclass(kw_only=True)
class DAFConfig:
    """Multi-scale self-guided attention; the defaults are a model small enough to train on a CPU.

    Attributes:
        backbone: "pyramid", a small encoder that halves the grid at each level, or "resnext101", as published.
        channels: of the pyramid's levels, from fine to coarse, the finest on 1/4 of the image's grid.
        width: channels of each scale where attention reads; 64 as published.
        norm: "batch" as published, or "instance".
        guided: weight of the difference between what both passes' autoencoders find.
        reconstruction: weight of what the autoencoders cannot rebuild.
        heads: of another mixer than the paper's.
    """

    backbone: str = "pyramid"
    channels: tuple[int, ...] = (32, 64, 96, 128)
    width: int = 16
    norm: str = "batch"
    guided: float = 0.25
    reconstruction: float = 0.1
    heads: int = 4


@dataclass(kw_only=True)
class ABMILConfig:
    """Gated attention multiple-instance learning.

    Attributes:
        channels: of each layer that encodes an instance by itself, ReLU after each.
        hidden: channels of the two gates of the attention.
        bias: of the encoder; none in ACMIL's official code.
        dropout: of channels, after each layer of the encoder.
    """

    channels: tuple[int, ...] = (128,)
    hidden: int = 128
    bias: bool = False
    dropout: float = 0.0


@dataclass(kw_only=True)
class ACMILConfig(ABMILConfig):
    """ACMIL; the defaults are those of its paper and official code.

    Attributes:
        branches: of attention.
        top: so many of the instances that score highest in a branch may be masked in training; 0 = none.
        drop: share of them that is masked, drawn at each step; the official notes advise 0 where training is unstable.
        diversity: weight of the branches' mean cosine similarity in the loss.
    """

    branches: int = 5
    top: int = 10
    drop: float = 0.6
    diversity: float = 1.0


@dataclass(kw_only=True)
class AttSwinUNetConfig:
    """Attention Swin U-Net; the defaults are a model small enough to train on a CPU.

    Attributes:
        channels: of each level, from fine to coarse; each level halves the grid. As published 96,192,384,768.
        blocks: of each level, in the encoder and in the decoder; 2,2,6,2 as published.
        heads: of each level; 3,6,12,24 as published.
        patch: voxels of a cell of the finest level along each axis; 4 as published.
        window: cells of a window along each axis; 7 as published.
        expansion: how many times wider feed-forward layers of blocks are.
        spatial: blocks of the decoder read by the attention of the encoder too.
        context: skips with cross-contextual attention.
        context_depth: how often each side reads the other.
        context_heads, context_width: heads of this attention and channels of a head; 8 and 64 as published.
        exact: as the official code, where the encoder's attention has no effect, and what the context has learned
            stands in the place of the first token.
        drop_path: share of images that pass by the encoder's last block in training, less before; 0.1 as published.
    """

    channels: tuple[int, ...] = (32, 64, 128)
    blocks: tuple[int, ...] = (2, 2, 2)
    heads: tuple[int, ...] = (2, 4, 8)
    patch: int = 4
    window: int = 4
    expansion: int = 4
    spatial: bool = True
    context: bool = True
    context_depth: int = 2
    context_heads: int = 4
    context_width: int = 16
    exact: bool = False
    drop_path: float = 0.0


@dataclass(kw_only=True)
class MOTCatConfig:
    """MOTCat; the defaults are those of its official code.

    Attributes:
        width: channels of every token.
        heads: of both transformers' attention.
        layers: of each transformer.
        dropout: everywhere.
        reg: weight of the transport's entropy; 0.05 of the official runs on BLCA.
        tau: weight of its deviations from even masses.
    """

    width: int = 256
    heads: int = 8
    layers: int = 2
    dropout: float = 0.25
    reg: float = 0.1
    tau: float = 0.5


@dataclass(kw_only=True)
class SNNConfig:
    """A self-normalising network on genes.

    Attributes:
        channels: of each layer.
        dropout: alpha dropout after each.
    """

    channels: tuple[int, ...] = (256, 256, 256, 256)
    dropout: float = 0.25


MODELS: dict[str, ModelCard] = {
    card.name: card
    for card in (
        ModelCard(
            name="unet",
            title="U-Net: Convolutional Networks for Biomedical Image Segmentation",
            source="Ronneberger 2015, MONAI",
            year=2015,
            target="attn_medseg.models.unet:UNet",
            config=UNetConfig,
            kinds=SEGMENT,
            note="no attention: the control that every other model must beat",
        ),
        ModelCard(
            name="daeformer",
            title="DAE-Former: Dual Attention-guided Efficient Transformer for Medical Image Segmentation",
            source="Azad 2022",
            year=2022,
            target="attn_medseg.models.daeformer:DAEFormer",
            config=DAEFormerConfig,
            kinds=SEGMENT,
            mixer="efficient",
            mixer_patterns=("noncausal_self",),
            note="efficient attention between tokens and attention between channels in every block; parent of TransDAE",
        ),
        ModelCard(
            name="transdae",
            title="TransDAE: Dual Attention Mechanism in a Hierarchical Transformer for Efficient Medical Image "
            "Segmentation",
            source="S29",
            year=2024,
            target="attn_medseg.models.transdae:TransDAE",
            config=TransDAEConfig,
            kinds=SEGMENT,
            mixer="efficient",
            mixer_patterns=("noncausal_self",),
            note="DAE-Former's blocks, with skips in which all scales meet under a large kernel",
        ),
        ModelCard(
            name="agunet",
            title="Meningioma Segmentation in T1-Weighted MRI Leveraging Global Context and Attention Mechanisms",
            source="S227",
            year=2021,
            target="attn_medseg.models.agunet:AGUNet",
            config=AGUNetConfig,
            kinds=SEGMENT,
            note="attention gates that join signal and skip, images of every scale, deep supervision",
        ),
        ModelCard(
            name="daunet",
            title="Meningioma Segmentation in T1-Weighted MRI Leveraging Global Context and Attention Mechanisms",
            source="S227",
            year=2021,
            target="attn_medseg.models.agunet:DAUNet",
            config=DAUNetConfig,
            kinds=SEGMENT,
            mixer="position",
            mixer_patterns=("noncausal_self",),
            note="position and channel attention at the coarsest level, sent to every level of the decoder",
        ),
        ModelCard(
            name="wau",
            title="More than Encoder: Introducing Transformer Decoder to Upsample",
            source="S86",
            year=2021,
            target="attn_medseg.models.wau:WAUNet",
            config=WAUConfig,
            kinds=SEGMENT,
            note="upsampling that looks at the skip connection; controls: --model_args.upsample bilinear, deconv",
        ),
        ModelCard(
            name="attention_unet",
            title="Attention U-Net: Learning Where to Look for the Pancreas",
            source="Oktay 2018, MONAI",
            year=2018,
            target="attn_medseg.models.attention_unet:AttentionUNet",
            config=AttentionUNetConfig,
            kinds=SEGMENT,
            note="attention gates that add signal and skip",
        ),
        ModelCard(
            name="daf",
            title="Multi-scale self-guided attention for medical image segmentation",
            source="S71",
            year=2021,
            target="attn_medseg.models.daf:DAF",
            config=DAFConfig,
            kinds=SEGMENT,
            mixer="position",
            mixer_patterns=("noncausal_self",),
            note="position and channel attention at four scales, in two passes, guided by autoencoders",
        ),
        ModelCard(
            name="att_swin_unet",
            title="Attention Swin U-Net: Cross-Contextual Attention Mechanism for Skin Lesion Segmentation",
            source="S81",
            year=2023,
            target="attn_medseg.models.att_swin_unet:AttSwinUNet",
            config=AttSwinUNetConfig,
            kinds=SEGMENT,
            mixer="swin",
            mixer_patterns=("noncausal_self",),
            note="Swin blocks down and up; skips that hand on attention and context",
        ),
        ModelCard(
            name="maag",
            title="Learning to Segment from Scribbles using Multi-scale Adversarial Attention Gates",
            source="S195",
            year=2021,
            target="attn_medseg.models.maag:MAAG",
            config=MAAGConfig,
            kinds=SEGMENT,
            note="learns from scribbles and masks of other patients: a discriminator judges output and gates",
        ),
        ModelCard(
            name="gated_unet",
            title="Learning to Segment from Scribbles using Multi-scale Adversarial Attention Gates",
            source="S195",
            year=2021,
            target="attn_medseg.models.maag:GatedUNet",
            config=GatedUNetConfig,
            kinds=SEGMENT,
            note="the segmentor of maag without its adversary: the control, which sees no masks of others",
        ),
        ModelCard(
            name="abmil",
            title="Attention-based Deep Multiple Instance Learning",
            source="Ilse 2018",
            year=2018,
            target="attn_medseg.models.mil:ABMIL",
            config=ABMILConfig,
            kinds=(*BAGS, *SURVIVAL),
            targets={"survival": "attn_medseg.models.motcat:SlideSurvival"},
            note="one branch of gated attention: the control beside acmil; of survival, slides alone",
        ),
        ModelCard(
            name="acmil",
            title="Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification",
            source="S142",
            year=2024,
            target="attn_medseg.models.mil:ACMIL",
            config=ACMILConfig,
            kinds=BAGS,
            note="five branches of gated attention that must differ; instances of highest score are masked at random",
        ),
        ModelCard(
            name="motcat",
            title="Multimodal Optimal Transport-based Co-Attention Transformer with Global Structure Consistency for "
            "Survival Prediction",
            source="S8",
            year=2023,
            target="attn_medseg.models.motcat:MOTCat",
            config=MOTCatConfig,
            kinds=SURVIVAL,
            note="optimal transport says which patches of a slide each group of genes reads",
        ),
        ModelCard(
            name="snn",
            title="Self-Normalizing Neural Networks",
            source="Klambauer 2017, MCAT",
            year=2017,
            target="attn_medseg.models.motcat:SNN",
            config=SNNConfig,
            kinds=SURVIVAL,
            note="genes alone: a control beside motcat",
        ),
    )
}
