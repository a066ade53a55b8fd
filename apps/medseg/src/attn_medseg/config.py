"""The models' options and their list. Plain dataclasses without torch, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass

from attn_shared.app import ModelCard

SEGMENT = ("segment",)


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
    )
}
