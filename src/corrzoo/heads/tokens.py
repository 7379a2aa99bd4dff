"""Modules shared by ACTR and LPMFlow: attention, window refinement, soft-argmax, and conversion of maps and tokens.

Unless noted, they follow the released code of both papers. Both heads match on a coarse grid of g x g cells and predict
a flow on a finer one. Tokens are (B, 1 + g*g, C): the class token first, then the cells row by row.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from corrzoo.geometry import Size, cells_to_pixels, sample, size_of, transfer
from corrzoo.heads.levels import expected_cells, resize
from corrzoo.matcher import Matcher
from corrzoo.precision import full, full_precision
from corrzoo.types import Features, ZooError

ATTENTION_HEADS = 8
"""Number of heads of every attention of ACTR and LPMFlow."""
TEMPERATURE = 0.02
"""Temperature of the softmax over a correlation."""
UPSCALE = 4
"""Ratio of the refined flow's side to the side of the grid that is matched on."""
REFINED_CHANNELS = 96
"""Channels of the maps that the flow is refined on: the flows and the projected source features."""


class TokenMatcher(Matcher):
    """Base of the heads that match tokens of a square grid, from any backbone, and predict a finer flow.

    Args:
        grid: Side of the grid that is matched on. Maps of another size are resized to it. Default: the grid of the
            last level in an image of `backbone_size` pixels, or the papers' 16.
        width: Channels of the tokens. Default: the backbone's (papers). our choice: others by LayerNorm and linear map.
        read: How a point reads the flow: bilinearly at the `point`, or at its whole `pixel` (released code).
        init: Initial weights: `paper`, or `aligned`. our choice: with `aligned`, queries and keys of the
            cross-attentions have the same orthogonal weights and the refinement's update of the flow is zero, so
            training starts from matches by feature similarity instead of random ones.
        checkpointing: Recompute the refinement, and LPMFlow's decoders, in the backward pass. Saves memory, costs time,
            changes no result.
        **options: Options of Matcher.
    """

    evaluation_options: ClassVar[frozenset[str]] = Matcher.evaluation_options | {"read", "checkpointing"}

    def __init__(
        self,
        grid: int | None = None,
        width: int | None = None,
        read: Literal["point", "pixel"] = "point",
        init: Literal["paper", "aligned"] = "paper",
        checkpointing: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        channels, side = sum(self.backbone.channels), self.hparams.backbone_size
        self.grid = grid or (16 if isinstance(side, bool | None) else side // self.backbone.strides[-1])
        self.width, self.read = width or channels, read
        if self.width % ATTENTION_HEADS:
            multiple = max(self.width // ATTENTION_HEADS, 1) * ATTENTION_HEADS
            raise ZooError(
                f"tokens of {self.width} channels do not divide into {ATTENTION_HEADS} heads: set width={multiple}"
            )
        self.embed = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width)) if width else nn.Identity()

    def prepare(self, features: Features) -> Features:
        """Compute one map (B, width, g, g) and one class token (B, width).

        our choice, as the papers read one level of iBOT: several levels are normalised to weigh the same in every cell.
        With several levels, or without a class token, the mean of the cells is the class token.
        """
        size = (self.grid, self.grid)
        levels = [rearrange(resize(level, size), "b c h w -> b (h w) c") for level in features.maps]
        if len(levels) > 1:
            levels = [F.layer_norm(level, level.shape[-1:]) for level in levels]
        tokens = torch.cat(levels, dim=-1)  # (B, g*g, channels)
        cls = features.cls if features.cls is not None and len(levels) == 1 else tokens.mean(1)
        tokens = self.embed(torch.cat([cls.unsqueeze(1), tokens], dim=1))  # (B, 1 + g*g, width)
        return Features(features.image, [as_map(tokens)], tokens[:, 0])

    def tokens(self, features: Features) -> Tensor:
        """Prepared features -> tokens (B, 1 + g*g, C)."""
        assert features.cls is not None  # set by prepare
        cells = rearrange(features.maps[0], "b c h w -> b (h w) c")
        return torch.cat([features.cls.unsqueeze(1), cells], dim=1)

    def match_points(self, src: Features, trg: Features, points: Tensor) -> Tensor:
        """Read matches of source points (B, n, 2) from the flow, as the option `read` says."""
        return read_flow(points, self.match(src, trg).flow, size_of(src.image), self.read)

    def apply_options(self) -> None:
        """Apply the options `init` and `checkpointing` to the modules; called at the end of a head's `__init__`."""
        for module in self.modules():
            if isinstance(module, Recomputed):
                module.checkpointing = self.hparams.checkpointing
            elif isinstance(module, CrossAttention | FlowHead) and self.hparams.init == "aligned":
                module.align()


# ---------------------------------------------------------------------- attention


class Attention(nn.Module):
    """Multi-head self-attention of a ViT."""

    def __init__(self, dim: int, drop: float = 0.0, heads: int = ATTENTION_HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C); `bias` (heads, N, N) is added to the scaled logits."""
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)
        return self.drop(self.proj(rearrange(attend(q, k, v, bias), "b h n d -> b n (h d)")))


class SelfAttention(nn.Module):
    """Self-attention and MLP of a ViT, each pre-normalised and residual; `bias` returns what is added to the logits."""

    def __init__(
        self, dim: int, drop: float = 0.0, heads: int = ATTENTION_HEADS, bias: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.bias = bias
        self.attention = Attention(dim, drop, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim, drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> the same."""
        x = x + self.attention(self.norm1(x), self.bias() if self.bias is not None else None)
        return x + self.mlp(self.norm2(x))


class CrossAttention(nn.Module):
    """Cross-attention from source to target; its weights are the correlation.

    Without `update` there are no values and no projection.
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
        q = F.linear(s, weight[: self.dim], bias[: self.dim])
        q = rearrange(q, "b n (h d) -> b h n d", h=ATTENTION_HEADS)
        kv = F.linear(t, weight[self.dim :], bias[self.dim :])
        k, *v = rearrange(kv, "b m (kv h d) -> kv b h m d", h=ATTENTION_HEADS, d=q.shape[-1])
        with full_precision(s):
            weights = (full(q) * q.shape[-1] ** -0.5 @ full(k).mT).softmax(-1)  # (B, heads, N, M)
            correlation = weights.sum(1)  # (B, N, M)
        if not self.update:
            return None, correlation
        x = rearrange(weights.to(q.dtype) @ v[0], "b h n d -> b n (h d)")
        return self.drop(self.proj(x)), correlation

    @torch.no_grad()
    def align(self) -> None:
        """Give queries and keys the same orthogonal weights and no bias."""
        weight = nn.init.orthogonal_(torch.empty_like(self.qkv.weight[: self.dim]))
        self.qkv.weight[: 2 * self.dim] = weight.repeat(2, 1)
        self.qkv.bias[: 2 * self.dim] = 0


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Compute softmax(q k^T / sqrt(d) + bias) v for (B, heads, N, d), in the precision of q.

    It is written out where the bias trains: the fused kernels have no gradient for it, and their fallback is slower.
    """
    if bias is None or not (bias.requires_grad and torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
    with full_precision(q):  # no casts in between
        logits = (q * q.shape[-1] ** -0.5) @ k.mT + bias.to(q.dtype)  # (B, heads, N, N)
        return logits.softmax(-1) @ v


# ---------------------------------------------------------------------- refinement


class Recomputed(nn.Module):
    """A module that can keep its inputs alone for the backward pass, and compute the rest again there."""

    checkpointing = False
    compute: Callable[..., Any]

    def forward(self, *inputs: Tensor) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, *inputs, use_reentrant=False)
        return self.compute(*inputs)


class WindowRefinement(Recomputed):
    """One Swin block without shift, a normalised residual around it, and channel attention."""

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp(dim)
        self.norm = nn.LayerNorm(dim)
        self.channels = ChannelAttention(dim)
        self.apply(init_linear)

    def compute(self, maps: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        x = maps.permute(0, 2, 3, 1)  # (B, h, w, C)
        z = x + self.attention(self.norm1(x))
        z = z + self.mlp(self.norm2(z))
        x = x + self.norm(z)
        return self.channels(x.permute(0, 3, 1, 2))


class WindowAttention(Attention):
    """Self-attention inside windows with a learned bias for each offset between two cells (Swin)."""

    index: Tensor

    def __init__(self, dim: int, window: int) -> None:
        super().__init__(dim)
        self.window = window
        self.bias_table = nn.Parameter(
            nn.init.trunc_normal_(torch.empty((2 * window - 1) ** 2, ATTENTION_HEADS), std=0.02)
        )
        row, column = (offsets(window) + window - 1).unbind(-1)  # from 0
        self.register_buffer("index", row * (2 * window - 1) + column, persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, h, w, C) -> the same."""
        rows, columns = (side // self.window for side in x.shape[1:3])
        bias = self.bias_table.index_select(0, self.index.flatten()).T.unflatten(1, self.index.shape)
        windows = "b (r i) (s j) (qkv a d) -> qkv (b r s) a (i j) d"  # a: heads
        q, k, v = rearrange(self.qkv(x), windows, qkv=3, a=ATTENTION_HEADS, i=self.window, j=self.window)
        x = attend(q, k, v, bias)  # (B * windows, heads, window * window, d)
        x = rearrange(x, "(b r s) a (i j) d -> b (r i) (s j) (a d)", r=rows, s=columns, i=self.window)
        return self.proj(x)


class ChannelAttention(nn.Module):
    """x + x * gate, with one gate for each channel, from the map's mean and maximum."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(dim // 16, 1)
        self.fc = nn.Sequential(nn.Conv2d(dim, hidden, 1, bias=False), nn.ReLU(), nn.Conv2d(hidden, dim, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        gate = self.fc(x.mean((2, 3), keepdim=True)) + self.fc(x.amax((2, 3), keepdim=True))
        return x + x * gate.sigmoid()


class FeatureProjection(nn.Sequential):
    """Source features for the refinement: 1 x 1 convolution, upsampling to the flow's grid, dropout of channels."""

    def __init__(self, dim: int, channels: int, grid: int) -> None:
        up = nn.Upsample((grid, grid), mode="bilinear", align_corners=True)
        super().__init__(nn.Conv2d(dim, channels, 1), nn.ReLU(), up, nn.Dropout2d(0.5))


class FlowHead(nn.Sequential):
    """The refined maps' update of the flow: two 3 x 3 convolutions."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(REFINED_CHANNELS, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 2, 3, padding=1))

    @torch.no_grad()
    def align(self) -> None:
        """Start with no update: the last convolution is zero."""
        for parameter in self[-1].parameters():
            parameter.zero_()


# ---------------------------------------------------------------------- from correlation to points


class SoftArgmax(nn.Module):
    """The expected target cell under softmax(scores / 0.02), as a flow.

    The coordinates of rows and columns, from -1 at the first cell's centre to 1 at the last one's, are trained
    parameters, so `ops.readout` with its fixed cells cannot be used. In the released code they train by mistake, as it
    sets `requires_grad` of the tensor inside the parameter; its checkpoints have their trained values.
    """

    cells: Tensor

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = grid
        line = torch.linspace(-1, 1, grid, dtype=torch.float64).float()
        self.x_normal, self.y_normal = nn.Parameter(line), nn.Parameter(line.clone())
        index = torch.arange(grid, dtype=torch.float32)
        self.register_buffer("cells", torch.stack(torch.meshgrid(index, index, indexing="xy")), persistent=False)

    def forward(self, scores: Tensor) -> Tensor:
        """(B, g*g, g*g) -> (B, 2, g, g), in cells."""
        with full_precision(scores):
            weights = (full(scores) / TEMPERATURE).softmax(-1)
            found = expected_cells(weights, self.x_normal, self.y_normal)  # (B, g*g, 2)
            return rearrange(found, "b (h w) xy -> b xy h w", h=self.grid) - self.cells


def upscale(flow: Tensor) -> Tensor:
    """(B, 2, g, g) in cells -> (B, 2, 4g, 4g) in cells of that grid; every fine cell moves as its coarse one does."""
    return F.interpolate(flow, scale_factor=float(UPSCALE), mode="nearest") * UPSCALE


def to_pixels(flow: Tensor, image: Size) -> Tensor:
    """A flow (B, 2, h, w) in cells of its own grid -> in pixels of the (H, W) network image."""
    return cells_to_pixels(flow.movedim(1, -1), size_of(flow), image).movedim(-1, 1)


def read_flow(points: Tensor, flow: Tensor, image: Size, read: str) -> Tensor:
    """Source points (B, n, 2) displaced by a flow (B, 2, h, w), in pixels of the (H, W) network image.

    `read` is "point", or "pixel" as in the released `flow2kps`: a point is truncated to its pixel, and the flow is read
    at that pixel's centre, half a pixel further, and added to the truncated point.
    """
    if read == "point":
        return transfer(points, flow, image)
    x, y = points.trunc().unbind(-1)
    pixels = torch.stack([x.clamp(0, image[1] - 1), y.clamp(0, image[0] - 1)], dim=-1)
    return pixels + sample(flow, pixels + 0.5, image).to(points.dtype)


# ---------------------------------------------------------------------- helpers


def arf(x: Tensor) -> Tensor:
    """Activation of attention outputs: max(0, (e^x - e^-x) / (e^x + e^(-x-4))), from 0 at x <= 0 rising to 1.

    Numerator and denominator are divided by e^x, so that nothing overflows.
    """
    x = full(x).clamp(min=0)
    return -torch.expm1(-2 * x) / (1 + torch.exp(-2 * x - 4))


def as_map(tokens: Tensor) -> Tensor:
    """(B, 1 + g*g, C) -> (B, C, g, g), without the class token."""
    side = math.isqrt(tokens.shape[1] - 1)
    return rearrange(tokens[:, 1:], "b (h w) c -> b c h w", h=side)


def offsets(side: int) -> Tensor:
    """(side*side, side*side, 2) offsets in rows and columns between the cells of a grid: query - key."""
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    return cells.unsqueeze(1) - cells


def mlp(dim: int, drop: float = 0.0) -> Mlp:
    """Linear, exact GELU, Linear."""
    return Mlp(dim, 4 * dim, drop=drop)


def init_linear(module: nn.Module) -> None:
    """Truncated normal 0.02, biases zero: for `apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def check_windows(windows: list[int], side: int, grid: int) -> None:
    """Refuse windows that do not divide a `side` x `side` map, a multiple of the head's grid.

    Raises:
        ZooError: if a window does not divide the map.
    """
    for window in windows:
        if window < 1 or side % window:
            raise ZooError(
                f"windows of {window} cells do not divide {side} x {side}, {side // grid} times the grid of {grid}: "
                "choose another --model.grid, or a --model.backbone_size that gives one"
            )
