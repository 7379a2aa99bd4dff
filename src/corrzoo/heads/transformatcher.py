"""TransforMatcher: every match of two images attends to all others, by an attention that is linear in their number.

"TransforMatcher: Match-to-Match Attention for Semantic Correspondence", CVPR 2022, and its released code, which decides
where the two differ.
"""

import math
from copy import deepcopy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from corrzoo import ops
from corrzoo.geometry import Size, cell_centres, cells_to_pixels, check_keypoints, pixels_to_cells, size_of
from corrzoo.heads.levels import resize
from corrzoo.losses import mean_where, pair_means
from corrzoo.matcher import HEADS, Matcher
from corrzoo.precision import full, full_precision
from corrzoo.types import Features, Match, Pair

WIDTH = 16
"""Channels of a match (released code)."""
ATTENTION_HEADS, HEAD_DIM = 8, 4
"""Heads of the attention, and channels of each (released code)."""
UPSCALE = 2
"""Ratio of the output grid's side G to the side g of the grid that is matched on (released code: 30 to 15)."""
SIGMA = 10 / 30
"""Width of the Gaussian around the best target cell, as a share of G (released code: 10 of 30)."""
SPACING = 2 / 29
"""Between neighbours of the released output grid, whose 30 cells a side reach from -1 to 1."""
REACH_IN_TRAINING, REACH = 0.1 / SPACING, 0.05 / SPACING
"""Radius within which a point reads its neighbours, in cells (released code: 0.1 and 0.05, from -1 to 1).

our choice: other grids keep the number of cells, so that every point has neighbours.
"""
EPS = 1e-5
"""Added to a squared distance before its root, and to the sum of a point's weights (released code)."""


@HEADS.register
class TransforMatcher(Matcher):
    """Correlations of many levels as channels of a match, refined by attention among all matches; a soft-argmax.

    With ResNet-101 it has 42,526,253 parameters and equals the released model, which has 87,885,413. The other
    45,359,160 are a second backbone (see `two_streams`), and `posenc` and the backbone's classifier, which never
    influence its output.

    our choice: with a ViT, which the paper does not read, any blocks are the levels. BatchNorm keeps its pretrained
    statistics, as for every head; the released training puts it into training mode.

    Args:
        grid: Side g of the grid that is matched on (released code: 15). Every level is resized to it: g ** 4 matches.
        layers: Number of attention layers (released code: 6).
        rotary: Rotary embedding of a match's number n. `literal` is the released one, whose two frequencies of pi and
            5 pi rotate by half a turn from n to n + 1, and so encode only whether n is even, up to rounding. `parity`
            is the exact (-1) ** n, and `none` is without.
        two_streams: Source and target have a backbone each, equal before training (released code). Takes twice the
            backbone's time. our choice: off, as the paper describes one backbone for both.
        **options: Options of Matcher.
    """

    frequencies: Tensor

    def __init__(
        self,
        grid: int = 15,
        layers: int = 6,
        rotary: Literal["literal", "parity", "none"] = "literal",
        two_streams: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.grid, self.rotary = grid, rotary
        self.target_backbone = deepcopy(self.backbone) if two_streams else None
        self.embed = nn.Linear(len(self.backbone.channels), WIDTH)
        self.layers = nn.ModuleList(MatchToMatch() for _ in range(layers))
        self.to_score = nn.Linear(WIDTH, 1)
        turns = torch.linspace(1, 5, HEAD_DIM // 2, dtype=torch.float64) * math.pi
        self.register_buffer("frequencies", turns.float(), persistent=False)

    def prepare(self, features: Features) -> Features:
        """Each level (B, C_i, g, g) of normalised features; with two streams, those of the target's backbone follow."""
        levels = list(features.maps)
        if self.target_backbone is not None:
            levels += self.target_backbone(features.image).maps
        return features.with_maps([resize(normalise(level), (self.grid, self.grid), True) for level in levels])

    def match(self, src: Features, trg: Features) -> Match:
        """The flow (B, 2, G, G); `correlation` has the refined scores, `extras` the match of each source cell."""
        levels = len(self.backbone.channels)
        x = self.embed(correlate(src.maps[:levels], trg.maps[-levels:]))  # (B, N, 16), N = g ** 4
        turn = self.rotation(x.shape[1])
        for layer in self.layers:
            x = layer(x, turn)
        scores = upsample(full(self.to_score(x)).view(-1, *[self.grid] * 4))  # (B, G*G, G*G)
        matched = soft_argmax(scores)  # (B, G*G, 2)
        return Match(to_flow(matched, size_of(src.image)), scores, {"matched": matched})

    def rotation(self, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (N, 1, 4) of the rotary embedding; with float32, they have the released rounding."""
        number = torch.arange(count, device=self.frequencies.device, dtype=self.frequencies.dtype)
        if self.rotary == "literal":
            angle = (number.unsqueeze(1) * self.frequencies).repeat_interleave(2, dim=1).unsqueeze(1)
            return angle.cos(), angle.sin()
        cosine = 1 - 2 * (number % 2) if self.rotary == "parity" else torch.ones_like(number)
        cosine = cosine.view(-1, 1, 1).expand(-1, 1, HEAD_DIM)
        return cosine, torch.zeros_like(cosine)

    def match_points(self, src: Features, trg: Features, points: Tensor) -> Tensor:
        """Read matches of source points (B, n, 2) from the cells around them."""
        matched = self.match(src, trg).extras["matched"]
        found = read_points(to_unit(points, size_of(src.image)), matched, REACH)
        return cells_to_pixels(found + 1, (2, 2), size_of(trg.image)).to(points.dtype)

    def loss(self, match: Match, pair: Pair) -> Tensor:
        """Mean over an image's keypoints of the squared distance from -1 to 1, then over the images that have any."""
        check_keypoints(pair.src_kps)
        found = read_points(to_unit(pair.src_kps, size_of(pair.src_img)), match.extras["matched"], REACH_IN_TRAINING)
        error = (found - to_unit(pair.trg_kps, size_of(pair.trg_img))).square().sum(-1)  # (B, K)
        return mean_where(*pair_means(error, pair.kps_mask))


# ---------------------------------------------------------------------- multi-level correlation


def normalise(level: Tensor) -> Tensor:
    """A level (B, C, h, w) with features of length one; a feature that is exactly zero stays so."""
    length = torch.linalg.vector_norm(full(level), dim=1, keepdim=True)
    return full(level) / length.masked_fill(length == 0, 1)


def correlate(src: list[Tensor], trg: list[Tensor]) -> Tensor:
    """Every match's score in each of L levels (B, C_i, g, g), those below zero as zero: (B, g ** 4, L).

    The features were resized after they were normalised, so between cells they are shorter than one (released code).
    """
    with full_precision(src[0]):
        levels = [a.flatten(2).mT @ b.flatten(2) for a, b in zip(src, trg, strict=True)]  # (B, g*g, g*g) each
        return torch.stack(levels, dim=-1).flatten(1, 2).relu()


# ---------------------------------------------------------------------- match-to-match attention


class MatchToMatch(nn.Module):
    """One layer: additive attention among all matches, and a feed-forward network, each pre-normalised and residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(WIDTH)
        self.attention = AdditiveAttention()
        self.norm_ffn = nn.LayerNorm(WIDTH)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Matches (B, N, 16), and cosines and sines (N, 1, 4) of their rotary embedding -> matches (B, N, 16)."""
        x = x + self.attention(self.norm_attention(x), turn)
        return x + self.ffn(self.norm_ffn(x))


class AdditiveAttention(nn.Module):
    """Attention linear in the number of matches (Fastformer): one query and one key stand for all of them.

    The global query is a mean of the queries, weighted by a score of each. It multiplies every key, which gives their
    scores. The global key, their weighted mean, multiplies every value. As released, only the means are of rotated
    queries and keys.
    """

    def __init__(self) -> None:
        super().__init__()
        inner = ATTENTION_HEADS * HEAD_DIM
        self.qkv = nn.Linear(WIDTH, 3 * inner, bias=False)
        self.query_score = nn.Linear(HEAD_DIM, 1, bias=False)
        self.key_score = nn.Linear(HEAD_DIM // 2, 1, bias=False)
        self.value = nn.Linear(HEAD_DIM // 2, HEAD_DIM)
        self.out = nn.Linear(inner, WIDTH)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Matches (B, N, 16) -> their update (B, N, 16)."""
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b n h d", qkv=3, h=ATTENTION_HEADS)
        query = weighted_mean(rotate(q, *turn), self.query_score(q))  # (B, 1, heads, 4)
        key = weighted_mean(rotate(k, *turn), self.key_score(fold(k * query)))
        return self.out((self.value(fold(v * key)) + q).flatten(2))


def weighted_mean(values: Tensor, scores: Tensor) -> Tensor:
    """Mean of values (B, N, heads, 4) under a softmax over N of scores (B, N, heads, 1): (B, 1, heads, 4)."""
    weights = (full(scores) * HEAD_DIM**-0.5).softmax(1)
    return (weights * values).sum(1, keepdim=True)


def fold(x: Tensor) -> Tensor:
    """Sums of neighbouring channels: (..., 4) -> (..., 2)."""
    return x.unflatten(-1, (-1, 2)).sum(-1)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Neighbouring channels of x (B, N, heads, 4), turned by their match's angle."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cosine + torch.stack([-second, first], dim=-1).flatten(-2) * sine


# ---------------------------------------------------------------------- from scores to points
# The released output grid has its outermost cells on the image's border: coordinates from -1 to 1 with
# `torch.linspace`, unlike those of `corrzoo.geometry`. They are converted here.


def upsample(scores: Tensor) -> Tensor:
    """Scores (B, g, g, g, g) on the output grid, bilinearly in both images: (B, G*G, G*G)."""
    g = scores.shape[1]
    size = (UPSCALE * g, UPSCALE * g)
    by_source = resize(rearrange(scores, "b h w i j -> b (i j) h w"), size, align_corners=True)
    return resize(rearrange(by_source, "b (i j) h w -> b (h w) i j", i=g), size, align_corners=True).flatten(2)


def soft_argmax(scores: Tensor) -> Tensor:
    """The expected target (B, G*G, 2), from -1 to 1, under a softmax of scores (B, G*G, G*G).

    A Gaussian around the best cell multiplies the scores. As released, those below zero are thus raised.
    """
    side = math.isqrt(scores.shape[2])
    cells = ops.readout(scores, (side, side), 1.0, "argmax", SIGMA * side).xy  # cell c is at c + 0.5
    return (cells - 0.5) * (2 / (side - 1)) - 1


def read_points(points: Tensor, matched: Tensor, reach: float) -> Tensor:
    """Matches (B, n, 2) of points (B, n, 2): means of the cells' matches (B, G*G, 2) that fall to zero with distance.

    Coordinates are from -1 to 1. `reach` is the distance in cells at which a cell's weight is zero.
    """
    side = math.isqrt(matched.shape[1])
    offset = points.to(matched.dtype).unsqueeze(2) - lattice(side, matched)  # (B, n, G*G, 2)
    distance = (offset.square().sum(-1) + EPS).sqrt()
    weights = (reach * (2 / (side - 1)) - distance).clamp(min=0)
    with full_precision(matched):
        return (weights / (weights.sum(-1, keepdim=True) + EPS)) @ matched


def to_flow(matched: Tensor, image: Size) -> Tensor:
    """The flow (B, 2, G, G) in pixels at the cells' centres of `corrzoo.geometry`, from the released grid's matches.

    The displacement of the released grid's cells is interpolated, linearly.
    """
    side = math.isqrt(matched.shape[1])
    moved = rearrange(matched - lattice(side, matched), "b (h w) xy -> b xy h w", h=side)
    centres = cell_centres((side, side), (2, 2), matched.device, matched.dtype) - 1  # (G*G, 2) from -1 to 1
    # All centres lie inside. With "zeros", torch 2.11 compiles no call on a GPU whose sizes are dynamic.
    centres = centres.expand(len(moved), 1, -1, -1)
    flow = F.grid_sample(moved, centres, padding_mode="border", align_corners=True)  # (B, 2, 1, G*G)
    return cells_to_pixels(flow.squeeze(2).mT, (2, 2), image).mT.unflatten(2, (side, side))


def lattice(side: int, like: Tensor) -> Tensor:
    """(G*G, 2) coordinates of the output grid's cells, row by row, from -1 to 1."""
    line = torch.linspace(-1, 1, side, device=like.device, dtype=like.dtype)
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).flatten(0, 1)


def to_unit(points: Tensor, image: Size) -> Tensor:
    """Points (B, n, 2) in pixels of an (H, W) image -> from -1 to 1."""
    return pixels_to_cells(points, (2, 2), image) - 1
