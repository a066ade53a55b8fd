"""MossFormer, from "MossFormer: Pushing the Performance Limit of Monaural Speech Separation Using Gated Single-Head
Transformer with Convolution-Augmented Joint Self-Attentions" (S72).

Shapes: B mixtures, T samples, C voices, N filters of the encoder, L frames, d channels of a block, s of a query or key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_shared.layers import Dropout
from attn_speech.config import MossFormerConfig
from attn_speech.models.base import Separator
from attn_speech.models.frames import FramesNorm, depthwise, frame_mask, only, shift, unit
from core_attn import registry
from core_attn.api import build, parameters
from core_attn.contract import Pattern, TokenMixer
from core_attn.ops import joint_attention

OWN = "joint"  # the paper's attention among the mechanisms


class Frames(NamedTuple):
    """What all blocks need to know about a batch of frames.

    Attributes:
        mask: (B, L), True = real; None where all are.
        real: (B,) how many frames are real; None with the mask.
        turns: (L, 1, r / 2, 2) cosine and sine by which rotary embedding turns pairs of channels.
    """

    mask: Tensor | None
    real: Tensor | None
    turns: Tensor


class MossFormer(Separator):
    """Masks on a learned transform, made by gated blocks of joint attention.

        w = relu(conv(mixture)),  h = W norm(w) + sinusoids
        h = h + block(h),  `blocks` times
        h = PReLU(norm(LN(h)) + W norm(w) + sinusoids)
        voice_c = transposed conv(w ⊙ relu(W_m (tanh(W_t h_c) ⊙ σ(W_g h_c)))),  h_c = W_c h

    Args:
        config, speakers, mixer, mixer_args: see `Separator`. Another mechanism than the paper's reads the frames that
            the block projects to v and u, at width d with its own projections; a linear map of what it gives takes the
            place of v' and u', and the gates stay.

    Raises:
        ValueError: an option out of its range; a mixer that cannot do what it must here.
    """

    config: MossFormerConfig

    def __init__(
        self,
        config: MossFormerConfig,
        speakers: int,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, speakers)
        c = config
        for name in ("filters", "dim", "blocks", "group", "qk_dim", "kernel"):
            if getattr(c, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(c, name)}")
        if c.dim % 2 or c.kernel % 2:
            raise ValueError(f"dim and kernel must be even, got {c.dim} and {c.kernel}")
        if mixer in (None, OWN) and mixer_args:
            raise ValueError(
                f"the attention of MossFormer has no mixer_args; its options are model_args, not {mixer_args}"
            )
        self.kernel, self.stride = c.kernel, c.kernel // 2
        self.reach = c.kernel - 1 if c.causal else None
        n, d = c.filters, c.dim
        self.encoder = nn.Linear(c.kernel, n, bias=False)
        self.norm = FramesNorm(n, eps=1e-8, together=True, causal=c.causal)
        self.project = nn.Linear(n, d, bias=False)
        self.position_scale = nn.Parameter(torch.ones(1))
        self.blocks = nn.ModuleList(Block(c, mixer, mixer_args or {}) for _ in range(c.blocks))
        self.last_norm = nn.LayerNorm(d, eps=1e-6)
        self.out_norm = FramesNorm(d, eps=1e-8, together=True, causal=c.causal)
        self.prelu = nn.PReLU()
        self.split = nn.Linear(d, speakers * d)
        self.gate = nn.Linear(d, 2 * d)
        self.mask = nn.Linear(d, n, bias=False)
        self.decoder = nn.Linear(n, c.kernel, bias=False)
        # As torch draws a transposed convolution, whose fan is the kernel's.
        nn.init.uniform_(self.decoder.weight, -(c.kernel**-0.5), c.kernel**-0.5)

    def forward(self, mixture: Tensor, lengths: Tensor | None = None) -> Tensor:
        if mixture.dim() != 2:
            raise ValueError(f"a separator takes mixtures of shape (B, T), got {tuple(mixture.shape)}")
        batch, samples = mixture.shape
        if not samples:
            return mixture.new_zeros(batch, self.speakers, 0)
        if lengths is not None:
            mixture = mixture.masked_fill(torch.arange(samples, device=mixture.device) >= lengths[:, None], 0.0)
        if samples < self.kernel:
            mixture = F.pad(mixture, (0, self.kernel - samples))
        pieces = mixture.unfold(1, self.kernel, self.stride)
        count = None if lengths is None else ((lengths - self.kernel) // self.stride + 1).clamp(min=1)
        mask = frame_mask(count, pieces.shape[1])
        encoded = F.relu(self.encoder(pieces))
        masks = self.masks(encoded, mask, None if mask is None else count)
        voices = self.decoder(encoded.unsqueeze(2) * masks)  # (B, L, C, kernel)
        if mask is not None:
            voices = voices * mask[:, :, None, None].to(voices.dtype)
        out = self._overlap_add(voices, samples)
        if lengths is not None:
            out = out * (torch.arange(samples, device=out.device) < lengths[:, None, None]).to(out.dtype)
        return out

    def masks(self, encoded: Tensor, mask: Tensor | None, count: Tensor | None) -> Tensor:
        """(B, L, N) -> (B, L, C, N), not negative."""
        x = self.project(self.norm(encoded, mask))
        length, d = x.shape[1], x.shape[2]
        start = x = x + self.position_scale * sinusoids(length, d, like=x).to(x.dtype)
        width = min(32, self.config.qk_dim - self.config.qk_dim % 2)
        frames = Frames(mask, count, turns(length, width, like=x))
        x = self.through_blocks(x, frames)
        x = self.prelu(self.out_norm(self.last_norm(x), mask) + start)
        x = self.split(x).unflatten(-1, (self.speakers, d))
        content, gate = self.gate(x).chunk(2, dim=-1)
        return F.relu(self.mask(torch.tanh(content) * torch.sigmoid(gate)))

    def through_blocks(self, x: Tensor, frames: Frames) -> Tensor:
        """(B, L, d) -> (B, L, d)."""
        for block in self.blocks:
            x = block(x, frames)
        return x

    def _overlap_add(self, pieces: Tensor, samples: int) -> Tensor:
        """(B, L, C, kernel) -> (B, C, samples): pieces begin a stride apart; what no piece reaches is 0."""
        first, second = pieces.transpose(1, 2).split(self.stride, dim=-1)
        out = (F.pad(first, (0, 0, 0, 1)) + F.pad(second, (0, 0, 1, 0))).flatten(2)
        return out[..., :samples] if out.shape[2] >= samples else F.pad(out, (0, samples - out.shape[2]))


class Block(nn.Module):
    """x + FFConv((u' ⊙ v) ⊙ σ(v' ⊙ u)); v, u and z = FFConv(x shifted), v' and u' = joint attention of z over v, u.

    FFConv is ScaleNorm, a linear map, SiLU, a depthwise convolution added to its input, and dropout. The maps to v, u
    and z are one, as are their convolutions: rows belong to v, u, z in this order. Each ScaleNorm has a factor.
    """

    def __init__(self, config: MossFormerConfig, mixer: str | None, mixer_args: Mapping[str, Any]) -> None:
        super().__init__()
        c, d = config, config.dim
        self.config = c
        self.sizes = [4 * d, c.qk_dim if mixer in (None, OWN) else 0]
        width = sum(self.sizes)
        self.in_scale = nn.Parameter(torch.ones(2 if self.sizes[1] else 1))
        self.in_proj = nn.Linear(d, width)
        self.in_conv = conv_weight(width, c.taps)
        self.mixer: TokenMixer | None = None
        if self.sizes[1]:
            self.gamma = nn.Parameter(torch.empty(4, c.qk_dim).normal_(std=0.02))
            self.beta = nn.Parameter(torch.zeros(4, c.qk_dim))
        else:
            assert mixer is not None
            self.mixer = frame_mixer(mixer, c, mixer_args)
            self.read = nn.Linear(d, 4 * d)
        self.out_scale = nn.Parameter(torch.ones(1))
        self.out_proj = nn.Linear(2 * d, d)
        self.out_conv = conv_weight(d, c.taps)
        self.dropout = Dropout(c.dropout)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        """(B, L, d) -> (B, L, d)."""
        normed = unit(shift(x))
        scale = self.in_scale if self.mixer is not None else self._row_scale()
        hidden = self._convolve(normed, scale, self.in_proj, self.in_conv, frames)
        vu, z = hidden.split(self.sizes, dim=-1)
        read = self._joint(z, vu, frames) if self.mixer is None else self.read(self._mix(normed, frames))
        gated = unit(gate(vu, read.to(vu.dtype)))
        return x + self._convolve(gated, self.out_scale, self.out_proj, self.out_conv, frames)

    def _row_scale(self) -> Tensor:
        return torch.cat([scale.expand(size) for scale, size in zip(self.in_scale, self.sizes)]).unsqueeze(1)

    def _convolve(self, x: Tensor, scale: Tensor, linear: nn.Linear, taps: Tensor, frames: Frames) -> Tensor:
        """The rest of an FFConv after the division by the norm: (B, L, ·) -> (B, L, ·)."""
        c = self.config
        mixed: Tensor = self.dropout(
            ff_conv(x, linear.weight * scale, linear.bias, taps, mask=frames.mask, causal=c.causal)
        )
        return mixed

    def _joint(self, z: Tensor, vu: Tensor, frames: Frames) -> Tensor:
        copies = turn(torch.addcmul(self.beta, z.unsqueeze(2), self.gamma).contiguous(), frames.turns)
        quad_q, lin_q, quad_k, lin_k = copies.to(vu.dtype).unbind(2)
        if frames.mask is not None:
            quad_k, lin_k = only(quad_k, frames.mask), only(lin_k, frames.mask)
        out = joint_attention(
            quad_q.unsqueeze(1),
            quad_k.unsqueeze(1),
            vu.unsqueeze(1),
            lin_q=lin_q.unsqueeze(1),
            lin_k=lin_k.unsqueeze(1),
            group=self.config.group,
            causal=self.config.causal,
            count=frames.real,
            dropout=self.config.dropout if self.training else 0.0,
        )
        return out.squeeze(1)

    def _mix(self, x: Tensor, frames: Frames) -> Tensor:
        assert self.mixer is not None
        if frames.mask is None:
            found: Tensor = self.mixer(x)
            return found
        if self.mixer.info.padding:
            found = self.mixer(x, key_padding_mask=frames.mask)
            return found
        assert frames.real is not None
        out = torch.zeros_like(x)
        for i, count in enumerate(frames.real.tolist()):
            out[i, :count] = self.mixer(x[i : i + 1, :count])[0]
        return out


def ff_conv(x: Tensor, weight: Tensor, bias: Tensor, taps: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
    """y + depthwise convolution of y, y = SiLU(W x + b): FFConv without its norm and its dropout."""
    y = F.linear(x, weight, bias)
    y = only(F.silu(y, inplace=not torch.is_grad_enabled()), mask)
    # The input that is added is a tap of one in the middle, or at the end where no later frame is read.
    identity = torch.zeros_like(taps)
    identity[:, -1 if causal else taps.shape[1] // 2] = 1.0
    return depthwise(y, taps + identity, causal=causal)


def conv_weight(channels: int, taps: int) -> nn.Parameter:
    """(channels, taps), drawn as torch draws those of a depthwise convolution."""
    return nn.Parameter(torch.empty(channels, taps).uniform_(-(taps**-0.5), taps**-0.5))


def sinusoids(length: int, width: int, *, like: Tensor) -> Tensor:
    """(length, width): sines, then cosines."""
    angles = _angles(length, width, like)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def turns(length: int, width: int, *, like: Tensor) -> Tensor:
    """(length, 1, width / 2, 2) cosines and sines of rotary embedding."""
    angles = _angles(length, width, like)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).unsqueeze(1)


def _angles(length: int, width: int, like: Tensor) -> Tensor:
    # The rates are those of float32 whatever the model's dtype: that is what published weights were trained with.
    rates = 1.0 / 10000.0 ** (torch.arange(0, width, 2, device=like.device).float() / width)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.arange(length, device=like.device, dtype=dtype)[:, None] * rates.to(dtype)


class _Turn(torch.autograd.Function):
    """Rotary embedding of adjacent pairs of the first channels, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Tensor) -> Tensor:
        ctx.save_for_backward(by)
        ctx.mark_dirty(x)
        _pairs(x, by).mul_(torch.view_as_complex(by))
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (by,) = ctx.saved_tensors
        grad = grad.clone()
        _pairs(grad, by).mul_(torch.view_as_complex(by).conj())
        return grad, None


def _pairs(x: Tensor, by: Tensor) -> Tensor:
    return torch.view_as_complex(x[..., : 2 * by.shape[2]].unflatten(-1, (-1, 2)))


def turn(x: Tensor, by: Tensor) -> Tensor:
    """Turn pairs of the first channels of x (B, L, 4, s), which is used up, by what `turns` gave."""
    if x.dtype is by.dtype and x.dtype is not torch.float16 and x.shape[-1] % 2 == 0:
        found: Tensor = _Turn.apply(x, by)
        return found
    cos, sin = by.unbind(-1)
    width = 2 * by.shape[2]
    a, b = x[..., 0:width:2].to(by.dtype), x[..., 1:width:2].to(by.dtype)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., width:]], dim=-1)


class _Gate(torch.autograd.Function):
    """(u' ⊙ v) ⊙ σ(v' ⊙ u): keeps nothing but its inputs."""

    @staticmethod
    def forward(ctx: Any, vu: Tensor, read: Tensor) -> Tensor:
        ctx.save_for_backward(vu, read)
        (v, u), (read_v, read_u) = vu.chunk(2, -1), read.chunk(2, -1)
        return (read_v * u).sigmoid_().mul_(read_u).mul_(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        vu, read = ctx.saved_tensors
        (v, u), (read_v, read_u) = vu.chunk(2, -1), read.chunk(2, -1)
        dvu, dread = torch.empty_like(read), torch.empty_like(read)
        (dv, du), (dread_v, dread_u) = dvu.chunk(2, -1), dread.chunk(2, -1)
        share = (read_v * u).sigmoid_()
        inner = torch.ops.aten.sigmoid_backward((grad * read_u).mul_(v), share)
        torch.mul(inner, u, out=dread_v)
        torch.mul(inner, read_v, out=du)
        outer = share.mul_(grad)
        torch.mul(outer, v, out=dread_u)
        torch.mul(outer, read_u, out=dv)
        return dvu, dread


def gate(vu: Tensor, read: Tensor) -> Tensor:
    """(B, L, 4 d) v and u, and v' and u' -> (B, L, 2 d)."""
    found: Tensor = _Gate.apply(vu, read)
    return found


def frame_mixer(name: str, config: MossFormerConfig, options: Mapping[str, Any]) -> TokenMixer:
    """The mechanism `name` in place of the paper's attention in a block.

    Raises:
        ValueError: the mechanism does not exist, cannot mix frames as it must here, or refuses an option.
    """
    mechanism = registry.get(name)
    patterns = mechanism.info.patterns if issubclass(mechanism, TokenMixer) else frozenset()
    if config.causal and Pattern.CAUSAL_SELF not in patterns:
        raise ValueError(f"{name} cannot compute causal self attention, which a causal separator needs")
    if not patterns & {Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}:
        raise ValueError(f"{name} cannot compute self attention, which is what mixes frames here")
    if "dropout" in parameters(mechanism):
        options = {"dropout": config.dropout, **options}
    # Frames lie in order of time, so that a mechanism without a noncausal form still makes sense.
    causal = config.causal or Pattern.NONCAUSAL_SELF not in patterns
    return build(name, dim=config.dim, heads=math.gcd(config.dim, 8), causal=causal, **options)
