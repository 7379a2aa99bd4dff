"""Parts that ACTR and LPMFlow share: their authors' attention, refinement and read-out, and how tokens come and go.

Sources without an address are both papers' released code. Both heads match on a square grid of g x g cells ("coarse")
and answer on a finer one; token sequences (B, 1 + g*g, C) begin with the class token, cells follow row by row.
"""

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn

from corrzoo.geometry import Size, sample, transfer
from corrzoo.heads.levels import resize
from corrzoo.matcher import Matcher
from corrzoo.precision import full, full_precision
from corrzoo.types import Features, Match, ZooError

ATTENTION_HEADS = 8
"""Heads of every attention."""
MLP_RATIO = 4
TEMPERATURE = 0.02
"""Of the softmax over a correlation."""
UPSCALE = 4
"""Cells of the refined flow to one of the grid that is matched on, on each axis."""
REFINED_CHANNELS = 96
"""Of the maps that the flow is refined on: the flows, and projected source features."""


def arf(x: Tensor) -> Tensor:
    """Activation of attention outputs: max(0, (e^x - e^-x) / (e^x + e^(-x-4))), from 0 at x <= 0 rising to 1.

    Both are divided by e^x, so that nothing overflows.
    """
    x = full(x).clamp(min=0)
    return -torch.expm1(-2 * x) / (1 + torch.exp(-2 * x - 4))


def as_map(tokens: Tensor) -> Tensor:
    """(B, 1 + g*g, C) -> (B, C, g, g), without the class token."""
    side = math.isqrt(tokens.shape[1] - 1)
    return rearrange(tokens[:, 1:], "b (h w) c -> b c h w", h=side)


def init_linear(module: nn.Module) -> None:
    """Truncated normal 0.02, biases zero: for `apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def mlp(dim: int, drop: float = 0.0) -> Mlp:
    """Linear, exact GELU, Linear."""
    return Mlp(dim, MLP_RATIO * dim, drop=drop)


class Attention(nn.Module):
    """Multi-head self-attention of a ViT: q, k and v from one linear map, each laid out head by head."""

    def __init__(self, dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C); `bias` (heads, N, N) is added to the scaled logits."""
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=ATTENTION_HEADS)
        mask = None if bias is None else bias.to(q.dtype).unsqueeze(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.drop(self.proj(rearrange(x, "b h n d -> b n (h d)")))


class CrossAttention(nn.Module):
    """Source tokens ask, target tokens answer; the weights are the correlation that is matched on.

    Without `update` the weights are all there is: no values and no projection.
    """

    def __init__(self, dim: int, drop: float = 0.0, update: bool = True) -> None:
        super().__init__()
        self.dim, self.update = dim, update
        self.qkv = nn.Linear(dim, (3 if update else 2) * dim)
        self.proj = nn.Linear(dim, dim) if update else nn.Identity()
        self.drop = nn.Dropout(drop)

    def forward(self, s: Tensor, t: Tensor) -> tuple[Tensor | None, Tensor]:
        """(B, N, C), (B, M, C) -> the source's update (B, N, C) and the weights summed over the heads (B, N, M)."""
        weight, bias = self.qkv.weight, self.qkv.bias
        q = rearrange(F.linear(s, weight[: self.dim], bias[: self.dim]), "b n (h d) -> b h n d", h=ATTENTION_HEADS)
        kv = F.linear(t, weight[self.dim :], bias[self.dim :])
        k, *v = rearrange(kv, "b m (kv h d) -> kv b h m d", h=ATTENTION_HEADS, d=q.shape[-1])
        with full_precision(s):
            weights = (full(q) * q.shape[-1] ** -0.5 @ full(k).mT).softmax(-1)
        if not self.update:
            return None, weights.sum(1)
        x = rearrange(weights.to(q.dtype) @ v[0], "b h n d -> b n (h d)")
        return self.drop(self.proj(x)), weights.sum(1)


class SoftArgmax(nn.Module):
    """The expected target cell under softmax(scores / 0.02), as a flow.

    The coordinates of rows and columns, from -1 at the first cell's centre to 1 at the last one's, are parameters and
    trained: that is why `ops.readout`, whose cells stay where they are, does not serve. A displacement from cell to
    cell is the same in every convention, so nothing but the unit is left to convert.
    """

    x_normal: nn.Parameter
    y_normal: nn.Parameter

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = grid
        for name in ("x_normal", "y_normal"):
            self.register_parameter(name, nn.Parameter(torch.linspace(-1, 1, grid, dtype=torch.float64).float()))

    def forward(self, scores: Tensor) -> Tensor:
        """(B, g*g, g*g) -> (B, 2, g, g), in cells."""
        g = self.grid
        with full_precision(scores):
            weights = (full(scores) / TEMPERATURE).softmax(-1)
            xy = torch.stack([self.x_normal.repeat(g), self.y_normal.repeat_interleave(g)], dim=1)
            found = (weights @ xy + 1) * ((g - 1) / 2)  # (B, g*g, 2), cell indices
            index = torch.arange(g, dtype=xy.dtype, device=xy.device)
            own = torch.stack(torch.meshgrid(index, index, indexing="xy"))
            return rearrange(found, "b (h w) xy -> b xy h w", h=g) - own


class WindowAttention(Attention):
    """Self-attention inside windows with a learned bias for each offset between two cells (Swin)."""

    index: Tensor

    def __init__(self, dim: int, window: int) -> None:
        super().__init__(dim)
        self.bias_table = nn.Parameter(
            nn.init.trunc_normal_(torch.empty((2 * window - 1) ** 2, ATTENTION_HEADS), std=0.02)
        )
        cells = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        row, column = (cells.unsqueeze(1) - cells + window - 1).unbind(-1)  # query - key, from 0
        self.register_buffer("index", row * (2 * window - 1) + column, persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, window*window, C) -> the same."""
        bias = self.bias_table.index_select(0, self.index.flatten()).T.unflatten(1, self.index.shape)
        return super().forward(x, bias)


class ChannelAttention(nn.Module):
    """x + x * gate, one gate a channel, from the map's mean and maximum."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(dim // 16, 1)
        self.fc = nn.Sequential(nn.Conv2d(dim, hidden, 1, bias=False), nn.ReLU(), nn.Conv2d(hidden, dim, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        gate = self.fc(x.mean((2, 3), keepdim=True)) + self.fc(x.amax((2, 3), keepdim=True))
        return x + x * gate.sigmoid()


class WindowRefinement(nn.Module):
    """One Swin block without shift, a normalised residual around it, and channel attention."""

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp(dim)
        self.norm = nn.LayerNorm(dim)
        self.channels = ChannelAttention(dim)
        self.apply(init_linear)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, h, w) -> the same. Nothing leaves its window before the channel attention, so windows are cut once."""
        rows, columns = (side // self.window for side in maps.shape[-2:])
        x = rearrange(maps, "b c (r i) (s j) -> (b r s) (i j) c", i=self.window, j=self.window)
        z = x + self.attention(self.norm1(x))
        z = z + self.mlp(self.norm2(z))
        x = x + self.norm(z)
        x = rearrange(x, "(b r s) (i j) c -> b (r i) (s j) c", r=rows, s=columns, i=self.window)
        return self.channels(x.permute(0, 3, 1, 2))


class FeatureProjection(nn.Sequential):
    """Source features beside the flows: 1 x 1 convolution, up to the refined flow's grid, whole channels dropped."""

    def __init__(self, dim: int, channels: int, grid: int) -> None:
        up = nn.Upsample((grid, grid), mode="bilinear", align_corners=True)
        super().__init__(nn.Conv2d(dim, channels, 1), nn.ReLU(), up, nn.Dropout2d(0.5))


class FlowHead(nn.Sequential):
    """What is added to the coarse flow: two 3 x 3 convolutions."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(REFINED_CHANNELS, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 2, 3, padding=1))


def upscale(flow: Tensor) -> Tensor:
    """(B, 2, g, g) in cells -> (B, 2, 4g, 4g) in cells of that grid; every fine cell moves as its coarse one does."""
    return F.interpolate(flow, scale_factor=float(UPSCALE), mode="nearest") * UPSCALE


def check_windows(windows: list[int], side: int, grid: int) -> None:
    """Refuse windows that do not divide a `side` x `side` map, a multiple of the head's grid.

    Raises:
        ZooError: naming the window and what to change.
    """
    for window in windows:
        if window < 1 or side % window:
            raise ZooError(
                f"windows of {window} cells do not divide {side} x {side}, {side // grid} times the grid of {grid}: "
                "choose another --model.grid, or a --model.backbone_size that gives one"
            )


def read_pixels(points: Tensor, flow: Tensor, image: Size) -> Tensor:
    """Where a flow takes source points as the released `flow2kps` reads it: whole pixels only.

    A point loses its fraction, and the flow, enlarged to the image, is read at that pixel, which has its centre half
    a pixel further. The answer lacks the fraction that the point lost.

    Args:
        points: (B, n, 2) in pixels of the (H, W) network image.
        flow: (B, 2, h, w) in those pixels.
        image: (H, W).
    """
    H, W = image
    pixels = torch.minimum(points.trunc().clamp(min=0), points.new_tensor([W - 1, H - 1]))
    return pixels + sample(flow, pixels + 0.5, image).to(points.dtype)


class TokenMatcher(Matcher):
    """A head that matches the tokens of a square grid, whatever backbone they come from, and answers a finer flow.

    Args:
        grid: Cells on a side of the grid that is matched on: maps of another size are resized to it. When not given,
            as many as the last level has in an image of `backbone_size` pixels, or the papers' 16.
        width: Channels of the tokens. The backbone's own (the papers' way) when not given; another width, our choice,
            is reached by a LayerNorm and a linear map.
        read: How points read the flow: at the `point`, or as the released code does at its whole `pixel`.
        **options: What every head takes, see Matcher.
    """

    evaluation_options: ClassVar[frozenset[str]] = Matcher.evaluation_options | {"read"}

    def __init__(
        self,
        grid: int | None = None,
        width: int | None = None,
        read: Literal["point", "pixel"] = "point",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        channels, side = sum(self.backbone.channels), self.hparams.backbone_size
        self.grid = grid or (side // self.backbone.strides[-1] if side else 16)
        self.width, self.read = width or channels, read
        if self.width % ATTENTION_HEADS:
            multiple = max(self.width // ATTENTION_HEADS, 1) * ATTENTION_HEADS
            raise ZooError(
                f"tokens of {self.width} channels do not divide into {ATTENTION_HEADS} heads: set width={multiple}"
            )
        self.embed = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width)) if width else nn.Identity()

    def prepare(self, features: Features) -> Features:
        """One map (B, width, g, g) and one class token (B, width).

        our choice, for what the papers' iBOT does not need: several levels weigh the same in every cell, and where
        there is no class token, or not one for all levels, the mean of the cells stands for it.
        """
        size = (self.grid, self.grid)
        levels = [rearrange(resize(level, size), "b c h w -> b (h w) c") for level in features.maps]
        if len(levels) > 1:
            levels = [F.layer_norm(level, level.shape[-1:]) for level in levels]
        tokens = torch.cat(levels, dim=-1)
        cls = features.cls if features.cls is not None and len(levels) == 1 else tokens.mean(1)
        tokens = self.embed(torch.cat([cls.unsqueeze(1), tokens], dim=1))
        return features._replace(maps=[as_map(tokens)], cls=tokens[:, 0])

    def tokens(self, features: Features) -> Tensor:
        """(B, 1 + g*g, C) of prepared features."""
        assert features.cls is not None  # prepare sees to it
        cells = rearrange(features.maps[0], "b c h w -> b (h w) c")
        return torch.cat([features.cls.unsqueeze(1), cells], dim=1)

    def answer(self, flow: Tensor, image: Tensor, correlation: Tensor, **extras: Tensor) -> Match:
        """The Match of a flow (B, 2, h, w) in cells of its own grid, for network images (B, 3, H, W)."""
        (h, w), (H, W) = flow.shape[-2:], image.shape[-2:]
        return Match(flow * flow.new_tensor([W / w, H / h]).view(2, 1, 1), correlation, extras)

    def match_points(self, src: Features, trg: Features, points: Tensor) -> Tensor:
        """See the option `read`."""
        flow, (H, W) = self.match(src, trg).flow, src.image.shape[-2:]
        return transfer(points, flow, (H, W)) if self.read == "point" else read_pixels(points, flow, (H, W))
