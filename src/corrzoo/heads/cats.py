"""CATs: transformers aggregate the correlations of several levels, together with their features.

"CATs: Cost Aggregation Transformers for Visual Correspondence", NeurIPS 2021, and its released code, which decides
where the two differ.
"""

from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from corrzoo.geometry import size_of
from corrzoo.heads.levels import nearly_unit, resize
from corrzoo.heads.tokens import SelfAttention, SoftArgmax, init_linear, read_flow, to_pixels
from corrzoo.losses import mean_where
from corrzoo.matcher import HEADS, Matcher
from corrzoo.precision import full, full_precision
from corrzoo.types import Features, Match, Pair, ZooError

RADIUS = 17 / 16
"""Half the side of the square that a keypoint supervises, in cells (released code: 35 pixels of 256, 16 cells).

our choice: other grids keep the share of a cell, so that every keypoint supervises the cell it lies in.
"""


@HEADS.register
class CATs(Matcher):
    """Filtered cosines of several levels, refined by self-attention within and across levels, read by a soft-argmax.

    With ResNet-101 it has 47,123,552 parameters and equals the released model, which has 49,173,320. The other
    2,049,768 never influence its output: the backbone's classifier and `decoder.norm`. The released
    `net(target, source)` takes query points in its target image, which is `src` here.

    our choice: with a ViT, which the paper does not read, any blocks are the levels. BatchNorm keeps its pretrained
    statistics, as for every head; the released training puts it into training mode, although the backbone is frozen.

    Args:
        grid: Side of the grid that is matched on (released code: 16). Every level is resized to it.
        width: Channels of the projected features (released code: 128).
        depth: Number of aggregation blocks (released training: 1).
        attention_heads: Number of heads of every attention (released code: 6).
        appearance: Ablation: tokens have projected features, too (appearance affinity modelling).
        inter: Ablation: self-attention across levels (multi-level aggregation). Without it, levels are only averaged.
        swapping: Ablation: the correlation is refined a second time, the target's cells being the tokens.
        residual: Ablation: the filtered correlation is added to the output of each pass.
        read: How a point reads the flow: bilinearly at the `point`, or at its whole `pixel` (released code).
        init: Initial weights: `paper`, or `aligned`. our choice: with `aligned`, the last linear map is zero, so
            training starts from the filtered cosines instead of random scores.
        **options: Options of Matcher.
    """

    evaluation_options: ClassVar[frozenset[str]] = Matcher.evaluation_options | {"read"}

    def __init__(
        self,
        grid: int = 16,
        width: int = 128,
        depth: int = 1,
        attention_heads: int = 6,
        appearance: bool = True,
        inter: bool = True,
        swapping: bool = True,
        residual: bool = True,
        read: Literal["point", "pixel"] = "point",
        init: Literal["paper", "aligned"] = "paper",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        channels, cells = self.backbone.channels, grid**2
        self.grid, self.read, self.swapping, self.residual = grid, read, swapping, residual
        self.project = nn.ModuleList(nn.Linear(level, width) for level in channels if appearance)
        dim = cells + width if appearance else cells
        if dim % attention_heads or dim % 2:
            parts = f"{grid} x {grid} cells{f' + width={width}' if appearance else ''}"
            raise ZooError(
                f"tokens of {dim} channels ({parts}) do not divide into {attention_heads} heads and two halves: "
                "set attention_heads, grid or width"
            )
        self.pos_embed_x = nn.Parameter(torch.zeros(1, len(channels), 1, grid, dim // 2))
        self.pos_embed_y = nn.Parameter(torch.zeros(1, len(channels), grid, 1, dim // 2))
        levels = len(channels) if inter else 1
        self.blocks = nn.Sequential(*(Aggregation(dim, attention_heads, levels) for _ in range(depth)))
        self.to_scores = nn.Linear(dim, cells)
        for embedding in (self.pos_embed_x, self.pos_embed_y):
            nn.init.trunc_normal_(embedding, std=0.02)
        init_linear(self.to_scores)
        if init == "aligned":
            nn.init.zeros_(self.to_scores.weight)
        self.soft_argmax = SoftArgmax(grid)

    def prepare(self, features: Features) -> Features:
        """Each level (B, C_i, g, g) of normalised features, then each level (B, width, g, g) of projected ones."""
        levels = [full(resize(level, (self.grid, self.grid), align_corners=True)) for level in features.maps]
        normalised = [nearly_unit(level) for level in levels]
        projections = zip(self.project, levels, strict=False)  # none without appearance
        projected = [project(level.movedim(1, -1)).movedim(-1, 1) for project, level in projections]
        return features.with_maps(normalised + projected)

    def match(self, src: Features, trg: Features) -> Match:
        """The flow (B, 2, g, g); `correlation` has the refined scores, the mean of the levels."""
        levels = len(self.backbone.channels)
        correlation = mutual_filter(correlate(src.maps[:levels], trg.maps[:levels]))  # (B, L, g*g, g*g)
        residual = correlation if self.residual else correlation.new_zeros(())
        scores = self.aggregate(correlation, src.maps[levels:]) + residual
        if self.swapping:
            scores = self.aggregate(scores.mT, trg.maps[levels:]).mT + residual
        scores = scores.mean(1)  # (B, g*g, g*g)
        flow = self.soft_argmax(scores)  # (B, 2, g, g), in cells
        return Match(to_pixels(flow, size_of(src.image)), scores)

    def aggregate(self, scores: Tensor, projected: list[Tensor]) -> Tensor:
        """Refine the scores (B, L, g*g, g*g) of the rows' cells, whose projected features are L maps (B, width, g, g).

        A token is a cell: its scores against all cells of the other image, and its features (appearance affinity).
        """
        features = [rearrange(level, "b c h w -> b (h w) c") for level in projected]  # none without appearance
        tokens = torch.cat([scores, torch.stack(features, dim=1)], dim=-1) if features else scores  # (B, L, g*g, D)
        shape = (-1, -1, self.grid, self.grid, -1)
        # (1, L, g, g, D)
        position = torch.cat([self.pos_embed_x.expand(shape), self.pos_embed_y.expand(shape)], dim=-1)
        return self.to_scores(self.blocks(tokens + position.flatten(2, 3)))

    def match_points(self, src: Features, trg: Features, points: Tensor) -> Tensor:
        """Read matches of source points (B, n, 2) from the flow, as the option `read` says."""
        return read_flow(points, self.match(src, trg).flow, size_of(src.image), self.read)

    def loss(self, match: Match, pair: Pair) -> Tensor:
        """EPE in cells against the pseudo-flow around the keypoints."""
        return mean_where(*self.keypoint_errors(match, pair, RADIUS))


# ---------------------------------------------------------------------- correlation


def correlate(src: list[Tensor], trg: list[Tensor]) -> Tensor:
    """Scores (B, L, g*g, g*g) of every source cell against every target cell; L maps (B, C_i, g, g) of each image."""
    with full_precision(src[0]):
        return torch.stack([a.flatten(2).mT @ b.flatten(2) for a, b in zip(src, trg, strict=True)], dim=1)


def mutual_filter(scores: Tensor) -> Tensor:
    """Multiply each score (B, L, N, M) by its ratios to the best of its row and of its column.

    As in the released code, a maximum below zero turns the signs of its row or column, and one of zero is 1e-30.
    """
    row, column = (scores.amax(dim, keepdim=True) for dim in (-1, -2))
    row, column = (best.masked_fill(best == 0, 1e-30) for best in (row, column))
    return scores * (scores / row) * (scores / column)


# ---------------------------------------------------------------------- transformer aggregator


class Aggregation(nn.Module):
    """One block: self-attention within each level, then across the levels of each token if there are several."""

    def __init__(self, dim: int, heads: int, levels: int) -> None:
        super().__init__()
        self.intra = SelfAttention(dim, heads=heads).apply(init_linear)
        self.inter = SelfAttention(dim, heads=heads).apply(init_linear) if levels > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, N, D) -> the same."""
        batch = len(x)
        x = self.intra(rearrange(x, "b l n d -> (b l) n d"))
        x = rearrange(x, "(b l) n d -> b l n d", b=batch)
        if self.inter is None:
            return x
        x = self.inter(rearrange(x, "b l n d -> (b n) l d"))
        return rearrange(x, "(b n) l d -> b l n d", b=batch)
