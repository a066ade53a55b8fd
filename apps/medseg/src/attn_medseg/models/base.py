"""What every segmentation model is: its shape and its signature.

Shapes: B images, C channels, K classes with the background, S = (H, W) of pictures or (D, H, W)-like axes of volumes in
the order of the files (x, y, z).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from attn_medseg.models.convolutions import resized
from attn_medseg.models.pad import crop, pad

Criterion = Callable[[Tensor, Tensor], Tensor]
"""(B, K, *S) logits and (B, *S) labels, IGNORE where nobody drew -> a scalar; resizes logits of a coarser grid."""

IGNORE = 255
"""Label of voxels that no loss counts."""


@dataclass(frozen=True, kw_only=True)
class ImageShape:
    """The shape of a segmentation problem.

    Attributes:
        ndim: 2 or 3.
        channels: C.
        classes: K, the background among them.
        size: voxels of a training patch; models take any size in `forward`.

    Raises:
        ValueError: something else than 2 or 3 axes, no channel, fewer than two classes, another number of sizes.
    """

    ndim: int
    channels: int
    classes: int
    size: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.ndim not in (2, 3):
            raise ValueError(f"an image has 2 or 3 axes, got {self.ndim}")
        if self.channels < 1 or self.classes < 2:
            raise ValueError(
                f"there must be a channel and two classes, got channels={self.channels} and classes={self.classes}"
            )
        if len(self.size) != self.ndim or min(self.size) < 1:
            raise ValueError(f"a patch of {self.ndim} axes needs as many sizes of at least 1, got {self.size}")


class Segmenter(nn.Module):
    """An image -> logits of the classes at each voxel.

    Args:
        config: the model's dataclass in `attn_medseg.config`.
        shape: the segmentation problem.
        mixer: name of the `core_attn` mechanism that mixes tokens; None = the paper's own.
        mixer_args: its options.

    Attributes:
        ndims: numbers of axes that the model can have.
        wants_masks: training batches hold "masks": full masks of other training images, for an adversary.
        multiple: `logits` takes sizes that are multiples of it; images are padded to them.
        least: of how many multiples at least.
    """

    ndims: ClassVar[tuple[int, ...]] = (2, 3)
    wants_masks: ClassVar[bool] = False
    least: ClassVar[int] = 1
    multiple: int = 1

    def __init__(
        self, config: Any, shape: ImageShape, *, mixer: str | None = None, mixer_args: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        if shape.ndim not in self.ndims:
            raise ValueError(f"{type(self).__name__} takes images of {self.ndims} axes, got {shape.ndim}")
        self.config = config
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, K, *S), any S of at least 1."""
        padded, inside = pad(x, self.multiple, self.least)
        return crop(self.logits(padded), inside)

    def logits(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, K, *S), every size a multiple of `multiple`."""
        raise NotImplementedError

    def loss(self, batch: Mapping[str, Tensor], criterion: Criterion) -> Tensor:
        """What training lowers. A model with several outputs or losses of its own overrides it.

        Args:
            batch: "image" (B, C, *S), "label" (B, *S), and "masks" (B, *S) where `wants_masks`.
            criterion: the task's loss.
        """
        return criterion(self(batch["image"]), batch["label"])

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """What the model's attention looks at in images, for the report: nothing where that cannot be read.

        Args:
            x: (B, C, *S).

        Returns:
            Name of a map -> (B, *S) of amounts from 0 on.
        """
        padded, inside = pad(x, self.multiple, self.least)
        grid = tuple(padded.shape[2:])
        found = {name: resized(amounts[:, None], grid) for name, amounts in self.maps(padded).items()}
        return {name: crop(amounts, inside)[:, 0] for name, amounts in found.items()}

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """`attention` of images whose sizes are multiples of `multiple`: (B, *s), on a grid as fine or coarser."""
        return {}
