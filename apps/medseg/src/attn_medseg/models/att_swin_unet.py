"""Attention Swin U-Net: a U of Swin blocks whose skips hand on attention, not tokens alone.

"Attention Swin U-Net: Cross-Contextual Attention Mechanism for Skin Lesion Segmentation" (S81), in two axes and in
three. The official code (NITR098/AttSwinUNet) is the source of every formula, except where it does not do what it is
written for, see `AttSwinUNet`.

Shapes: B images, L tokens on a grid of cells, C channels of a level, K classes, H heads, D channels of a head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_medseg.config import AttSwinUNetConfig
from attn_medseg.models.base import ImageShape, Segmenter
from attn_medseg.models.convolutions import CONVOLUTIONS, as_image, as_tokens, check_levels
from attn_medseg.models.daeformer import Expand, Grid
from attn_medseg.models.official import Rename, renamed
from attn_shared.errors import UserError
from core_attn import ops
from core_attn.api import build
from core_attn.contract import TokenMixer
from core_attn.mechanisms.local.swin import SwinAttention, SwinVolumeAttention


@dataclass(frozen=True)
class Encoded:
    """What a stage of the encoder hands on.

    Attributes:
        skip: (B, L, C) its tokens before the blocks, the skip connection.
        tokens: (B, L, C) the same after the blocks.
        seen: (B, L, C) what the last block's attention was made from.
        grid: of its cells.
    """

    skip: Tensor
    tokens: Tensor
    seen: Tensor
    grid: Grid


class AttSwinUNet(Segmenter):
    """Swin blocks down and up, with two kinds of attention on the way across.

        down:   cells of `patch`, LN;  blocks;  2 × 2 cells joined to one, LN, linear
        block:  x = x + windows(LN(x));  x = x + MLP(LN(x)), windows shifted by half in every second block
        up:     x = finer(x);  [a, b] = context(x, skip);  x = W [a, b];  blocks with the encoder's attention

    Spatial attention: the weights W_e of the stage's last block in the encoder, over its windows, are added to the
    weights W_d of each block of the decoder at that level: it reads (W_d + W_e) V. The official code adds the weights
    after the output has been made, so that they change nothing, and for every second block it would add those of other
    windows; here W_e V is read in the windows of the encoder's block.

    Cross-contextual attention: c_x and c_s are the means of the decoder's and the skip's tokens. `context_depth` times
    c_x reads [c_x, tokens of s], then c_s reads [c_s, tokens of x]. What the means have learned on the way is added to
    every token of its own side. The official code puts them in the place of the first token of each side, which loses
    the corner of the image, and has only its window know of them.

    `exact` is the official code's form of both. Its parameters are the same, so that official weights fit. Of training,
    the official code takes binary cross-entropy of what are no probabilities; the task's loss stands in its place.

    Args:
        config, shape: see `Segmenter`.
        mixer, mixer_args: another mechanism in every block in the place of window attention. It gets the level's heads,
            and the grid where it uses one. Then there is no spatial attention, which adds up weights of windows.

    Raises:
        ValueError: an option out of its range; a mixer that cannot compute noncausal self-attention.
    """

    config: AttSwinUNetConfig

    def __init__(
        self,
        config: AttSwinUNetConfig,
        shape: ImageShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        _check(config)
        widths, ndim, count = config.channels, shape.ndim, len(config.channels)
        self.multiple = config.patch * 2 ** (count - 1)
        self.mixer = mixer or ("swin" if ndim == 2 else "swin_3d")
        self.mixer_args = dict(mixer_args or {})
        self.embed = CONVOLUTIONS[ndim](shape.channels, widths[0], config.patch, stride=config.patch)
        self.embed_norm = nn.LayerNorm(widths[0])
        # Stochastic depth grows with the block's place in the encoder; a level of the decoder has that of its stage.
        total = sum(config.blocks)
        drops = iter([config.drop_path * i / max(1, total - 1) for i in range(total)])
        shares = [[next(drops) for _ in range(blocks)] for blocks in config.blocks]
        self.stages = nn.ModuleList(self._blocks(level, shares[level]) for level in range(count))
        self.merges = nn.ModuleList(Merge(ndim, dim, out) for dim, out in pairwise(widths))
        self.norm = nn.LayerNorm(widths[-1])
        self.expand = Expand(ndim, widths[-1], factor=2, out=widths[-2])
        below = [Expand(ndim, dim, factor=2, out=out) for out, dim in pairwise(widths[:-1])]
        finest = Expand(ndim, widths[0], factor=config.patch, out=widths[0])
        self.levels = nn.ModuleList(
            Level(config, dim, self._blocks(level, shares[level]), expand)
            for level, (dim, expand) in reversed(list(enumerate(zip(widths, [None, *below]))))
        )
        self.out_norm = nn.LayerNorm(widths[0])
        self.finest = finest
        self.head = CONVOLUTIONS[ndim](widths[0], shape.classes, 1, bias=False)
        self.apply(_start)

    def _blocks(self, level: int, shares: Sequence[float]) -> Blocks:
        config, built = self.config, []
        options: dict[str, Any] = {"heads": config.heads[level], **self.mixer_args}
        windows = self.mixer in ("swin", "swin_3d")
        for i, share in enumerate(shares):
            if windows:
                window = options.get("window", config.window)
                half = window // 2 if isinstance(window, int) else [one // 2 for one in window]
                options |= {"window": window, "shift": half if i % 2 else 0}
            mixer = build(self.mixer, dim=config.channels[level], **options)
            built.append(Block(mixer, self.shape.ndim, expansion=config.expansion, drop_path=share))
        return Blocks(built)

    def encode(self, x: Tensor) -> list[Encoded]:
        """(B, C, *S) -> what each stage hands on, from fine to coarse."""
        x = self.embed(x)
        grid, tokens = tuple(x.shape[2:]), self.embed_norm(as_tokens(x))
        found: list[Encoded] = []
        for i, stage in enumerate(self.stages):
            if i:
                tokens, grid = self.merges[i - 1](tokens, grid)
            found.append(cast(Blocks, stage).encode(tokens, grid))
            tokens = found[-1].tokens
        return found

    def logits(self, x: Tensor) -> Tensor:
        encoded = self.encode(x)
        tokens, grid = self.expand(self.norm(encoded[-1].tokens), encoded[-1].grid)
        lent = reversed([cast(Blocks, stage).blocks[-1] for stage in self.stages[:-1]])
        for level, skip, block in zip(self.levels, reversed(encoded[:-1]), lent):
            tokens, grid = level(tokens, skip, cast(Block, block))
        tokens, grid = self.finest(self.out_norm(tokens), grid)
        found: Tensor = self.head(as_image(tokens, grid))
        return found

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """What the mean of the decoder's tokens reads of the skip's, 1 where it reads evenly, from fine to coarse."""
        levels = [cast(Level, one) for one in reversed(self.levels)]
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        handles = [
            cast(Reader, cast(nn.ModuleList, one.context.readers[0])[0]).register_forward_pre_hook(
                lambda _, inputs, i=i: seen.update({i: inputs})  # type: ignore[misc]
            )
            for i, one in enumerate(levels, 1)
            if one.context is not None
        ]
        try:
            self.logits(x)
        finally:
            for handle in handles:
                handle.remove()
        found = {}
        for i, (own, other) in sorted(seen.items()):
            reader = cast(Reader, cast(nn.ModuleList, cast(Context, levels[i - 1].context).readers[0])[0])
            weights = reader.weights(own, other).mean(dim=1)[:, 0, 1:]
            weights = F.pad(weights, (1, 0)) if self.config.exact else weights
            grid = [-(-size // (self.config.patch * 2 ** (i - 1))) for size in x.shape[2:]]
            found[f"context of level {i}"] = (weights * weights.shape[1]).unflatten(1, grid)
        return found


class Blocks(nn.Module):
    """The blocks of a level."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def encode(self, x: Tensor, grid: Grid) -> Encoded:
        """(B, L, C) -> what the stage hands on."""
        skip, seen = x, x
        for block in self.blocks:
            seen = x
            x = block(x, grid)
        return Encoded(skip=skip, tokens=x, seen=cast(Block, self.blocks[-1]).norm1(seen), grid=grid)

    def forward(self, x: Tensor, grid: Grid, lent: Lent | None = None) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        for block in self.blocks:
            x = block(x, grid, lent)
        return x


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, mixer: TokenMixer, ndim: int, *, expansion: int, drop_path: float) -> None:
        super().__init__()
        from monai.networks.layers.drop_path import DropPath

        dim = mixer.dim
        self.norm1 = nn.LayerNorm(dim)
        self.attention = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, expansion * dim), nn.GELU(), nn.Linear(expansion * dim, dim))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.use_grid = ndim in mixer.info.grid_ranks

    def forward(self, x: Tensor, grid: Grid, lent: Lent | None = None) -> Tensor:
        """(B, L, C) -> (B, L, C), its values read by the weights of `lent` too."""
        normed = self.norm1(x)
        read = self.attention(normed, grid=grid if self.use_grid else None)
        if lent is not None:
            read = read + lent.read(normed, cast(SwinAttention, self.attention))
        x = x + self.drop_path(read)
        found: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return found


class Lent:
    """The attention of a block of the encoder, for blocks of the decoder on the same grid."""

    def __init__(self, attention: SwinAttention, seen: Tensor, grid: Grid) -> None:
        self.attention, self.grid = attention, grid
        self.q = attention.split_heads(attention.q_proj(seen))
        self.k = attention.split_heads(attention.k_proj(seen))

    def read(self, x: Tensor, own: SwinAttention) -> Tensor:
        """(B, L, C) what the block's own attention `own` is made from -> (B, L, C), W_e V through its projections.

        The sum of both heads' outputs before the projection out is the sum of their projections without the bias.
        """
        windows = self.attention.windows(self.grid)
        read = ops.window_cross_attention(
            self.q,
            self.k,
            own.split_heads(own.v_proj(x)),
            grid=windows.grid,
            window=windows.window,
            shift=windows.shift,
            rpb=self.attention.bias_of(windows),
            backend=self.attention.backend,
        )
        return F.linear(own.merge_heads(read), own.out_proj.weight)


class Merge(nn.Module):
    """2 × 2 (× 2) cells joined to one: LN and a linear layer of their channels, in row-major order."""

    def __init__(self, ndim: int, dim: int, out: int) -> None:
        super().__init__()
        self.ndim = ndim
        self.norm = nn.LayerNorm(2**ndim * dim)
        self.proj = nn.Linear(2**ndim * dim, out, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """(B, L, C) -> (B, L / 2^ndim, out) and their grid."""
        n = self.ndim
        x = x.unflatten(1, [part for size in grid for part in (size // 2, 2)])
        cells, parts = range(1, 2 * n, 2), range(2, 2 * n + 1, 2)
        x = x.permute(0, *cells, *parts, 2 * n + 1).flatten(n + 1).flatten(1, n)
        return self.proj(self.norm(x)), tuple(size // 2 for size in grid)


class Level(nn.Module):
    """A level of the decoder: from below, with the skip connection, through blocks, to a finer grid."""

    def __init__(self, config: AttSwinUNetConfig, dim: int, blocks: Blocks, expand: Expand | None) -> None:
        super().__init__()
        self.spatial = config.spatial and not config.exact
        self.context = Context(config, dim) if config.context else None
        self.join = nn.Linear(2 * dim, dim)
        self.blocks = blocks
        self.expand = expand

    def forward(self, x: Tensor, skip: Encoded, block: Block) -> tuple[Tensor, Grid]:
        """(B, L, C), what the encoder's stage handed on and its last block -> finer tokens and their grid."""
        grid, lent = skip.grid, None
        pair = (x, skip.skip) if self.context is None else self.context(x, skip.skip)
        x = self.join(torch.cat(pair, dim=-1))
        if self.spatial and block.use_grid and isinstance(block.attention, (SwinAttention, SwinVolumeAttention)):
            lent = Lent(cast(SwinAttention, block.attention), skip.seen, grid)
        x = self.blocks(x, grid, lent)
        if self.expand is not None:
            x, grid = self.expand(x, grid)
        return x, grid


class Context(nn.Module):
    """Two sets of tokens learn of each other through their means."""

    def __init__(self, config: AttSwinUNetConfig, dim: int) -> None:
        super().__init__()
        self.exact = config.exact
        self.readers = nn.ModuleList(
            nn.ModuleList(Reader(dim, heads=config.context_heads, width=config.context_width) for _ in range(2))
            for _ in range(config.context_depth)
        )

    def forward(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, C) twice -> the same, each with what its mean has learned of the other."""
        means = [one.mean(dim=1, keepdim=True) for one in (x, skip)]
        a, b = means
        # The official code's own tokens, without the one that is lost.
        x_rest, skip_rest = (x[:, 1:], skip[:, 1:]) if self.exact else (x, skip)
        for pair in self.readers:
            of_x, of_skip = cast(nn.ModuleList, pair)
            a = a + of_x(a, skip_rest)
            b = b + of_skip(b, x_rest)
        if self.exact:
            return torch.cat((a, x_rest), dim=1), torch.cat((b, skip_rest), dim=1)
        return x + (a - means[0]), skip + (b - means[1])


class Reader(nn.Module):
    """One token reads itself and others, by H heads of a width of their own; the token alone is normed."""

    def __init__(self, dim: int, *, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.q_proj = nn.Linear(dim, heads * width, bias=False)
        self.k_proj = nn.Linear(dim, heads * width, bias=False)
        self.v_proj = nn.Linear(dim, heads * width, bias=False)
        self.out_proj = nn.Linear(heads * width, dim)

    def forward(self, own: Tensor, other: Tensor) -> Tensor:
        """(B, 1, C), (B, L, C) -> (B, 1, C)."""
        q, k, source = self._heads(own, other)
        v = self.v_proj(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        read = ops.softmax_attention(q, k, v)
        found: Tensor = self.out_proj(read.transpose(1, 2).flatten(-2))
        return found

    def weights(self, own: Tensor, other: Tensor) -> Tensor:
        """(B, H, 1, 1 + L) what is read, the token itself first."""
        q, k, _ = self._heads(own, other)
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)

    def _heads(self, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = self.norm(own)
        source = torch.cat((own, other), dim=1)
        q, k = (
            f(one).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f, one in ((self.q_proj, own), (self.k_proj, source))
        )
        return q, k, source


def _start(module: nn.Module) -> None:
    """Weights as the official code draws them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check(config: AttSwinUNetConfig) -> None:
    check_levels(config.channels)
    if not len(config.channels) == len(config.blocks) == len(config.heads):
        raise ValueError(
            "channels, blocks and heads need a number for each level, got "
            f"{list(config.channels)}, {list(config.blocks)} and {list(config.heads)}"
        )
    for name in ("patch", "window", "expansion", "context_heads", "context_width", "context_depth"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if min(config.blocks) < 1:
        raise ValueError(f"blocks must be at least 1 at each level, got {list(config.blocks)}")
    if not 0 <= config.drop_path < 1:
        raise ValueError(f"drop_path must be 0 or more and below 1, got {config.drop_path}")


# -- official weights -------------------------------------------------------------------------------------------------

_UNUSED = re.compile(r"^patch_embed\.|^decoder\.norm\.|\.(attn_mask|relative_position_index)$")
_RENAMES: tuple[Rename, ...] = (
    (r"^encoder\.patch_embed\.proj\.", "embed."),
    (r"^encoder\.patch_embed\.norm\.", "embed_norm."),
    (r"^encoder\.norm\.", "norm."),
    (r"^encoder\.layers\.(\d)\.downsample\.reduction\.", r"merges.\1.proj."),
    (r"^encoder\.layers\.(\d)\.downsample\.", r"merges.\1."),
    (r"^encoder\.layers\.(\d)\.blocks\.", r"stages.\1.blocks."),
    (r"^decoder\.layers_up\.0\.", "expand."),
    (r"^decoder\.layers_up\.(\d)\.blocks\.", r"levels.\1.blocks.blocks."),
    (r"^decoder\.layers_up\.(\d)\.upsample\.", r"levels.\1.expand."),
    (r"^decoder\.concat_back_dim\.(\d)\.", r"levels.\1.join."),
    (r"^decoder\.Crossvit_layer\.(\d)\.layers\.(\d)\.(\d)\.fn\.norm\.", r"context.\1.readers.\2.\3.norm."),
    (r"^decoder\.Crossvit_layer\.(\d)\.layers\.(\d)\.(\d)\.fn\.fn\.", r"context.\1.readers.\2.\3."),
    (r"^decoder\.norm_up\.", "out_norm."),
    (r"^decoder\.up\.", "finest."),
    (r"^decoder\.output\.", "head."),
    (r"(^|\.)(expand|finest)\.expand\.", r"\1\2.proj."),
    (r"\.attn\.proj\.", ".attention.out_proj."),
    (r"\.attn\.relative_position_bias_table$", ".attention.rpb"),
    (r"\.attn\.", ".attention."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
    (r"\.to_q\.", ".q_proj."),
    (r"\.to_out\.0\.", ".out_proj."),
)
_OURS = re.compile(r"^(embed|embed_norm|stages|merges|norm|expand|levels|out_norm|finest|head)\.")


def from_official(weights: Mapping[str, Tensor], *, window: int = 7, channels: int = 3) -> dict[str, Tensor]:
    """The state_dict of an official SwinAttentionUnet as ours of the same sizes, two axes.

    Args:
        weights: parameters by the official names, "module." before them or not.
        window: ours; tables of levels whose grid is smaller than it become the middle of ours.
        channels: of our images; with 1 the first layer is summed over its three inputs, as the official code repeats
            greyscale images.

    Returns:
        dict: for `load_state_dict`; those that the official code never uses are left out.

    Raises:
        UserError: a key that is none of SwinAttentionUnet's; channels other than 1 or 3.
    """
    if channels not in (1, 3):
        raise UserError(f"the official SwinAttentionUnet reads images of 1 or 3 channels, not {channels}")
    ours: dict[str, Tensor] = {}
    coarsest = max((int(key.split(".layers_up.")[1][0]) for key in weights if ".layers_up." in key), default=1)
    renames: list[Rename] = [
        *_RENAMES,
        # The official decoder's first layer is what brings the coarsest tokens up.
        (r"^levels\.(\d)", lambda found: f"levels.{int(found[1]) - 1}"),
        (r"^context\.(\d)", lambda found: f"levels.{coarsest - 1 - int(found[1])}.context"),
    ]
    for key, tensor in renamed(weights, renames, ours=_OURS, unused=_UNUSED, network="SwinAttentionUnet"):
        if "merges." in key and "norm" not in key:
            ours[key] = _columns_first(tensor)
        elif "merges." in key:
            ours[key] = _columns_first(tensor[None])[0]
        elif ".qkv." in key:
            for name, part in zip("qkv", tensor.chunk(3)):
                ours[key.replace("qkv", f"{name}_proj")] = part
        elif ".to_kv." in key:
            for name, part in zip("kv", tensor.chunk(2)):
                ours[key.replace("to_kv", f"{name}_proj")] = part
        elif key.endswith(".rpb"):
            side = round(tensor.shape[0] ** 0.5)
            rest = window - (side + 1) // 2
            ours[key] = F.pad(tensor.T.unflatten(1, (side, side)), (rest, rest, rest, rest))
        elif key == "embed.weight" and channels == 1:
            ours[key] = tensor.sum(dim=1, keepdim=True)
        else:
            ours[key] = tensor
    return ours


def _columns_first(rows: Tensor) -> Tensor:
    """The official code joins the four cells down the columns, we along the rows."""
    a, b, c, d = rows.chunk(4, dim=1)
    return torch.cat((a, c, b, d), dim=1)
