"""DAE-Former: the parent of TransDAE (S29).

"DAE-Former: Dual Attention-guided Efficient Transformer for Medical Image Segmentation" (Azad et al., 2022), and the
parts that TransDAE shares with it.

Shapes: B images, L tokens on a grid of cells, C channels of a level, K classes. Tokens of a grid are in row-major
order, (B, L, C).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_medseg.config import DAEFormerConfig
from attn_medseg.models.base import ImageShape, Segmenter
from attn_medseg.models.convolutions import CONVOLUTIONS, as_image, as_tokens, check_levels
from attn_medseg.models.official import Rename, renamed
from attn_shared.errors import UserError
from core_attn import ops
from core_attn.api import build
from core_attn.contract import TokenMixer
from core_attn.mechanisms.channel.transposed import ChannelAttention
from core_attn.mechanisms.linear.efficient import EfficientAttention

Grid = tuple[int, ...]


class HierarchicalSegmenter(Segmenter):
    """What DAE-Former and TransDAE share: cells, an encoder of dual attention, and how images of any size fit in.

    Args:
        config, shape, mixer, mixer_args: see `Segmenter`. The mixer stands in every block in the place of efficient
            attention between tokens; attention between channels stays. Another mechanism than "efficient" gets
            `config.heads` heads; those that use the tokens' grid are told it.

    Raises:
        ValueError: an option out of its range; a mixer that cannot compute noncausal self-attention.
    """

    config: DAEFormerConfig
    head: nn.Linear

    def __init__(
        self,
        config: DAEFormerConfig,
        shape: ImageShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        _check(config)
        self.mixer, self.mixer_args = mixer or "efficient", dict(mixer_args or {})
        self.multiple = config.patch * 2 ** (len(config.channels) - 1)
        widths = (shape.channels, *config.channels)
        self.stages = nn.ModuleList(
            Stage(
                Embedding(shape.ndim, before, after, stride=config.patch if level == 0 else 2),
                [self.block(after) for _ in range(config.blocks)],
            )
            for level, (before, after) in enumerate(pairwise(widths))
        )

    def block(self, dim: int) -> Block:
        """A new block of the model's own mixer."""
        heads = 1 if self.mixer == "efficient" else self.config.heads
        mixer = build(self.mixer, dim=dim, **{"heads": heads, **self.mixer_args})
        return Block(self.shape.ndim, mixer, heads=self.config.heads, expansion=self.config.expansion)

    def logits(self, x: Tensor) -> Tensor:
        tokens, grid = self.decode(self.encode(x))
        return as_image(self.head(tokens), grid)

    def encode(self, x: Tensor) -> list[tuple[Tensor, Grid]]:
        """(B, C, *S) -> the tokens of each stage and their grid, from fine to coarse."""
        found = []
        for stage in self.stages:
            tokens, grid = stage(x)
            found.append((tokens, grid))
            x = as_image(tokens, grid)
        return found

    def decode(self, encoded: Sequence[tuple[Tensor, Grid]]) -> tuple[Tensor, Grid]:
        """What `encode` gives -> (B, L, C) of the image's own pixels or voxels, and their grid."""
        raise NotImplementedError

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """How much a cell is read by all cells together, in the last block of the coarsest stage.

        Of efficient attention; of other mixers nothing.
        """
        mixer = cast(Stage, self.stages[-1]).blocks[-1].attention
        if not isinstance(mixer, EfficientAttention):
            return {}
        seen: list[Tensor] = []
        handle = mixer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            grid = self.encode(x)[-1][1]
        finally:
            handle.remove()
        heads = mixer.heads
        q = mixer.q_proj(seen[0]).unflatten(-1, (heads, -1)).softmax(dim=-1).mean(dim=1)  # (B, H, D)
        k = mixer.k_proj(seen[0]).softmax(dim=1).unflatten(-1, (heads, -1))  # (B, L, H, D)
        read = torch.einsum("bhd,blhd->bl", q, k) / heads
        return {"efficient attention": read.unflatten(1, grid)}


class DAEFormer(HierarchicalSegmenter):
    """A U of transformer blocks in which tokens read tokens and then channels read channels, linear in the tokens.

        stage:  tokens = LN(conv of stride 4, later 2);  blocks;  LN
        block:  x = x + efficient(LN(x));  x = x + FFN(LN(x));  x = x + channel(LN(x));  x = x + FFN(LN(x))
        FFN(x): W2 GELU(LN(W1 x + depthwise3(W1 x)))
        level:  y = W1 of the coarser level;  z = [y, s] + LN(W E(LN(s), LN(s), LN(y)));  z = z + FFN(LN(z));
                blocks(W2 z)

    where s is the encoder's output at the level, E(q, k, v) efficient attention and both norms before E are the same
    one. Between levels, linear layers make 2 × 2 finer tokens of one, at the end 4 × 4; a linear layer makes logits of
    each. There is no encoding of positions: cells overlap and convolutions know the edge.

    The official code's bottom level has blocks and a skip that nothing runs through, and norms in the FFN that nothing
    uses; they are not here. Greyscale images stand in all three of its input channels; here the first layer has as many
    channels as the image, see `from_official`. In volumes everything is the same along three axes.

    Args:
        config, shape, mixer, mixer_args: see `HierarchicalSegmenter`. Efficient attention has one head, as the
            official code has whatever it is told; the mixer does not change the attention in the skips.

    Raises:
        ValueError: see `HierarchicalSegmenter`.
    """

    def __init__(
        self,
        config: DAEFormerConfig,
        shape: ImageShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        widths = config.channels
        self.expand = Expand(shape.ndim, widths[-1], factor=2, out=widths[-1] // 2)
        self.levels = nn.ModuleList(
            Level(
                nn.Linear(coarser // 2, dim),
                CrossBlock(shape.ndim, dim),
                [self.block(dim) for _ in range(config.blocks)],
                Expand(shape.ndim, dim, **finer(config, level, dim)),
            )
            for level, (dim, coarser) in reversed(list(enumerate(pairwise(widths))))
        )
        self.head = nn.Linear(widths[0], shape.classes)
        start(self.expand, self.levels, self.head)

    def decode(self, encoded: Sequence[tuple[Tensor, Grid]]) -> tuple[Tensor, Grid]:
        tokens, grid = self.expand(*encoded[-1])
        for level, (skip, _) in zip(self.levels, reversed(encoded[:-1])):
            tokens, grid = level(tokens, skip, grid)
        return tokens, grid


class Stage(nn.Module):
    """Coarser tokens of a map, blocks, a norm."""

    def __init__(self, embedding: Embedding, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embedding.norm.normalized_shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """(B, C, *S) -> (B, L, C') and the grid."""
        tokens, grid = self.embedding(x)
        for block in self.blocks:
            tokens = block(tokens, grid)
        return self.norm(tokens), grid


class Embedding(nn.Module):
    """Overlapping cells of a map as tokens: a convolution of 2·stride - 1 voxels, and a norm."""

    def __init__(self, ndim: int, channels: int, dim: int, *, stride: int) -> None:
        super().__init__()
        self.conv = CONVOLUTIONS[ndim](channels, dim, 2 * stride - 1, stride=stride, padding=stride - 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """(B, C, *S) -> (B, L, dim) and the grid."""
        x = self.conv(x)
        return self.norm(as_tokens(x)), tuple(x.shape[2:])


class Block(nn.Module):
    """Tokens read tokens, then channels read channels, each followed by a feed-forward layer."""

    def __init__(self, ndim: int, mixer: TokenMixer, *, heads: int, expansion: int) -> None:
        super().__init__()
        dim = mixer.dim
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = mixer
        self.ffn1_norm = nn.LayerNorm(dim)
        self.ffn1 = FeedForward(ndim, dim, expansion * dim)
        self.channels_norm = nn.LayerNorm(dim)
        self.channels = ChannelAttention(dim, heads=heads)
        self.ffn2_norm = nn.LayerNorm(dim)
        self.ffn2 = FeedForward(ndim, dim, expansion * dim)
        self.use_grid = ndim in mixer.info.grid_ranks

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        x = x + self.attention(self.attention_norm(x), grid=grid if self.use_grid else None)
        x = x + self.ffn1(self.ffn1_norm(x), grid)
        x = x + self.channels(self.channels_norm(x))
        found: Tensor = x + self.ffn2(self.ffn2_norm(x), grid)
        return found


class FeedForward(nn.Module):
    """W2 GELU(LN(h + depthwise3(h))) with h = W1 x."""

    def __init__(self, ndim: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.enter = nn.Linear(dim, hidden)
        self.conv = CONVOLUTIONS[ndim](hidden, hidden, 3, padding=1, groups=hidden)
        self.norm = nn.LayerNorm(hidden)
        self.leave = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        x = self.enter(x)
        x = self.norm(x + as_tokens(self.conv(as_image(x, grid))))
        found: Tensor = self.leave(F.gelu(x))
        return found


class CrossBlock(nn.Module):
    """Skip connection with cross attention: what lies below is read by the maps of the encoder's tokens.

    Queries and keys are the encoder's tokens themselves, values those from below, without projections.
    """

    def __init__(self, ndim: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.out_proj = nn.Linear(dim, 2 * dim)
        self.out_norm = nn.LayerNorm(2 * dim)
        self.ffn_norm = nn.LayerNorm(2 * dim)
        # Twice the width, not four times as in the blocks.
        self.ffn = FeedForward(ndim, 2 * dim, 4 * dim)

    def forward(self, x: Tensor, skip: Tensor, grid: Grid) -> Tensor:
        """(B, L, C) twice -> (B, L, 2C)."""
        maps = self.norm(skip).unsqueeze(1)
        read = ops.efficient_attention(maps, maps, self.norm(x).unsqueeze(1)).squeeze(1)
        x = torch.cat((x, skip), dim=-1) + self.out_norm(self.out_proj(read))
        found: Tensor = x + self.ffn(self.ffn_norm(x), grid)
        return found


class Expand(nn.Module):
    """Each token becomes factor^ndim finer ones of `out` channels, normed."""

    def __init__(self, ndim: int, dim: int, *, factor: int, out: int) -> None:
        super().__init__()
        self.ndim, self.factor = ndim, factor
        self.proj = nn.Linear(dim, factor**ndim * out, bias=False)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """(B, L, C) -> (B, L·factor^ndim, out) and their grid."""
        n, f = self.ndim, self.factor
        x = self.proj(x).unflatten(-1, (*[f] * n, -1)).unflatten(1, grid)  # (B, *grid, *[f]*n, out)
        pairs = [axis for i in range(n) for axis in (1 + i, 1 + n + i)]
        x = x.permute(0, *pairs, 2 * n + 1).flatten(1, 2 * n)
        return self.norm(x), tuple(f * size for size in grid)


class Level(nn.Module):
    """A level of the decoder: from below, with the encoder's tokens, through blocks, to a finer grid."""

    def __init__(self, enter: nn.Linear, cross: CrossBlock, blocks: Sequence[Block], expand: Expand) -> None:
        super().__init__()
        dim = enter.out_features
        self.enter = enter
        self.cross = cross
        self.join = nn.Linear(2 * dim, dim)
        self.blocks = nn.ModuleList(blocks)
        self.expand = expand

    def forward(self, x: Tensor, skip: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """(B, L, C') and (B, L, C) -> finer tokens and their grid."""
        x = self.join(self.cross(self.enter(x), skip, grid))
        for block in self.blocks:
            x = block(x, grid)
        finer: tuple[Tensor, Grid] = self.expand(x, grid)
        return finer


def start(*parts: nn.Module) -> None:
    """Weights of a decoder as the official code draws them: linear layers Xavier-uniform with biases 0.

    Its convolutions too; the encoder keeps PyTorch's own.
    """
    for part in parts:
        for module in part.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def finer(config: DAEFormerConfig, level: int, dim: int) -> dict[str, int]:
    """How a level's tokens become finer: the last ones' become voxels."""
    return {"factor": 2, "out": dim // 2} if level else {"factor": config.patch, "out": dim}


def _check(config: DAEFormerConfig) -> None:
    for name in ("patch", "blocks", "heads", "expansion"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    check_levels(config.channels)
    for channels in config.channels:
        if channels % config.heads or channels % 2:
            raise ValueError(f"each of channels must be even and a multiple of heads = {config.heads}, got {channels}")


# -- official weights -------------------------------------------------------------------------------------------------

_UNUSED = re.compile(r"^decoder_2\.(x1_linear|cross_attn|concat_linear|layer_former_\d)\.|\.mlp\d?\.norm[23]\.")
_RENAMES: tuple[Rename, ...] = (
    (r"^backbone\.patch_embed(\d)\.proj\.", r"stages.\1.embedding.conv."),
    (r"^backbone\.patch_embed(\d)\.", r"stages.\1.embedding."),
    (r"^backbone\.block(\d)\.", r"stages.\1.blocks."),
    (r"^backbone\.norm(\d)\.", r"stages.\1.norm."),
    (r"^decoder_2\.layer_up\.", "expand."),
    (r"^decoder_0\.last_layer\.", "head."),
    (r"^decoder_1\.", "levels.0."),
    (r"^decoder_0\.", "levels.1."),
    (r"\.x1_linear\.", ".enter."),
    (r"\.cross_attn\.attn\.reprojection\.", ".cross.out_proj."),
    (r"\.cross_attn\.attn\.norm\.", ".cross.out_norm."),
    (r"\.cross_attn\.norm1\.", ".cross.norm."),
    (r"\.cross_attn\.norm2\.", ".cross.ffn_norm."),
    (r"\.cross_attn\.mlp\.", ".cross.ffn."),
    (r"\.concat_linear\.", ".join."),
    (r"\.layer_former_1\.", ".blocks.0."),
    (r"\.layer_former_2\.", ".blocks.1."),
    (r"\.layer_up\.", ".expand."),
    (r"(^|\.)expand\.expand\.", r"\1expand.proj."),
    (r"(\.blocks\.\d+)\.norm1\.", r"\1.attention_norm."),
    (r"(\.blocks\.\d+)\.norm2\.", r"\1.ffn1_norm."),
    (r"(\.blocks\.\d+)\.norm3\.", r"\1.channels_norm."),
    (r"(\.blocks\.\d+)\.norm4\.", r"\1.ffn2_norm."),
    (r"\.attn\.queries\.", ".attention.q_proj."),
    (r"\.attn\.keys\.", ".attention.k_proj."),
    (r"\.attn\.values\.", ".attention.v_proj."),
    (r"\.attn\.reprojection\.", ".attention.out_proj."),
    (r"\.channel_attn\.proj\.", ".channels.out_proj."),
    (r"\.channel_attn\.", ".channels."),
    (r"\.mlp(\d)\.", r".ffn\1."),
    (r"(\.ffn\d?)\.fc1\.", r"\1.enter."),
    (r"(\.ffn\d?)\.dwconv\.dwconv\.", r"\1.conv."),
    (r"(\.ffn\d?)\.norm1\.", r"\1.norm."),
    (r"(\.ffn\d?)\.fc2\.", r"\1.leave."),
    (r"^stages\.(\d)", lambda found: f"stages.{int(found[1]) - 1}"),
)
_OURS = re.compile(r"^(stages|levels|expand|head)\.")


def from_official(weights: Mapping[str, Tensor], *, channels: int = 3) -> dict[str, Tensor]:
    """The state_dict of an official DAE-Former as the state_dict of ours of the same sizes, two axes.

    Args:
        weights: parameters by the official names, "module." before them or not.
        channels: of our images; with 1 the first layer is summed over its three inputs, as the official code repeats
            greyscale images.

    Returns:
        dict: for `load_state_dict`. Linear in the weights; those that the official code never uses are left out.

    Raises:
        UserError: a key that is none of DAE-Former's; channels other than 1 or 3.
    """
    if channels not in (1, 3):
        raise UserError(f"the official DAE-Former reads images of 1 or 3 channels, not {channels}")
    ours: dict[str, Tensor] = {}
    for key, tensor in renamed(weights, _RENAMES, ours=_OURS, unused=_UNUSED, network="DAE-Former"):
        if key.endswith(".channels.qkv.weight"):
            for name, part in zip("qkv", tensor.chunk(3)):
                ours[key.replace("qkv", f"{name}_proj")] = part
        elif key.endswith(".temperature"):
            ours[key] = tensor.flatten()
        elif key == "stages.0.embedding.conv.weight" and channels == 1:
            ours[key] = tensor.sum(dim=1, keepdim=True)
        elif tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
            ours[key] = tensor.flatten(1)  # 1 × 1 convolutions
        else:
            ours[key] = tensor
    return ours
