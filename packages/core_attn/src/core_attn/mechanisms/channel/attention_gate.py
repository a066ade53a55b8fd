"""Attention gates: a coarser signal says where a skip connection is let through.

"Attention U-Net: Learning Where to Look for the Pancreas" (2018), section 2.2, where the two maps are added, and
"Meningioma segmentation in T1-weighted MRI leveraging global context and attention mechanisms" (S227), where they are
joined. Two maps go in, so a gate is no `FeatureGate`, which takes one, and not among the registered mechanisms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_attn.naming import unknown

FORMS = ("sum", "concat")
_CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_MODES = {2: "bilinear", 3: "trilinear"}


class AttentionGate(nn.Module):
    """x · σ(ψ(relu(W_g g + W_x x))), or with [W_g g, W_x x] in place of their sum: one gate a pixel or voxel.

    W_g, W_x and ψ are 1 × 1 convolutions, each followed by a batch norm. A signal of another size than x is
    interpolated to it after its convolution, which is the same as before it, and cheaper for a coarser one.

    Args:
        channels: channels of the map x that is gated.
        signal_channels: channels of the gating signal g.
        hidden: channels of W_g g and of W_x x; half of `channels` where None.
        axes: 2 for images, 3 for volumes.
        form: "sum" (Attention U-Net, MONAI) or "concat" (S227).
        norm: whether there are the batch norms, or what makes another norm of a number of channels.

    Raises:
        ValueError: an option out of its range.
        UnknownNameError: no such form.
    """

    def __init__(
        self,
        channels: int,
        signal_channels: int,
        *,
        hidden: int | None = None,
        axes: int = 2,
        form: str = "sum",
        norm: bool | Callable[[int], nn.Module] = True,
    ) -> None:
        super().__init__()
        hidden = max(1, channels // 2) if hidden is None else hidden
        if min(channels, signal_channels, hidden) < 1 or axes not in _CONVOLUTIONS:
            raise ValueError(
                "channels, signal_channels and hidden must be positive and axes 2 or 3, got "
                f"{channels}, {signal_channels}, {hidden} and {axes}"
            )
        if form not in FORMS:
            raise unknown("form", form, FORMS)
        self.channels, self.signal_channels = channels, signal_channels
        self.axes = axes
        self.form = form
        convolution = _CONVOLUTIONS[axes]
        self.signal = convolution(signal_channels, hidden, 1)
        self.input = convolution(channels, hidden, 1)
        self.psi = convolution(hidden if form == "sum" else 2 * hidden, 1, 1)
        if isinstance(norm, bool):
            norm = _NORMS[axes] if norm else nn.Identity
        self.signal_norm, self.input_norm, self.psi_norm = (norm(n) for n in (hidden, hidden, 1))

    def gate(self, x: Tensor, signal: Tensor) -> Tensor:
        """The gates (B, 1, *spatial of x), between 0 and 1; arguments as `forward`."""
        if x.dim() != self.axes + 2 or signal.dim() != self.axes + 2 or x.shape[0] != signal.shape[0]:
            raise ValueError(
                f"the gate takes a map and a signal of {self.axes} axes and one batch size, got {tuple(x.shape)} and "
                f"{tuple(signal.shape)}"
            )
        if (x.shape[1], signal.shape[1]) != (self.channels, self.signal_channels):
            raise ValueError(
                f"the gate takes a map of {self.channels} channels and a signal of {self.signal_channels}, got "
                f"{tuple(x.shape)} and {tuple(signal.shape)}"
            )
        read = self.signal(signal)
        if read.shape[2:] != x.shape[2:]:
            read = F.interpolate(read, size=x.shape[2:], mode=_MODES[self.axes])
        read, own = self.signal_norm(read), self.input_norm(self.input(x))
        joined = read + own if self.form == "sum" else torch.cat([read, own], dim=1)
        return torch.sigmoid(self.psi_norm(self.psi(F.relu(joined))))

    def forward(self, x: Tensor, signal: Tensor) -> Tensor:
        """Gate a map.

        Args:
            x: (B, channels, *spatial), such as a skip connection.
            signal: (B, signal_channels, *spatial), of any size; interpolated to that of x.

        Returns:
            (B, channels, *spatial).

        Raises:
            ValueError: shapes that do not fit.
        """
        return x * self.gate(x, signal)

    def extra_repr(self) -> str:
        return f"form={self.form}"
