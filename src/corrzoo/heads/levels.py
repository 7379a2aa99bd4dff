"""Backbone levels, maps of several sizes and scales, on one grid, and the cells of that grid."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from corrzoo.geometry import Size, size_of
from corrzoo.types import Features


def stride_grid(image: Size, stride: int) -> Size:
    """The (h, w) nearest to a stride in pixels for an (H, W) image, at least one cell."""
    return max(round(image[0] / stride), 1), max(round(image[1] / stride), 1)


def resize(maps: Tensor, size: Size, align_corners: bool = False) -> Tensor:
    """Maps (B, C, h, w) at another size, bilinearly between cell centres; unchanged if they have it already.

    With `align_corners`, the outermost cells keep their values, as in CATs and TransforMatcher.
    """
    if size_of(maps) == size:
        return maps
    if maps.is_cuda and maps.shape[1] >= 16:  # torch's kernel for channels-first maps is many times slower
        maps = maps.contiguous(memory_format=torch.channels_last)
    return F.interpolate(maps, size, mode="bilinear", align_corners=align_corners)


def stack_levels(maps: list[Tensor], size: Size, remove_mean: bool = False) -> Tensor:
    """All levels, resized, as one map (B, sum of C, h, w). `remove_mean` subtracts each map's mean over the image.

    Two levels or more are normalised in every cell, so that they weigh the same whatever their scale; after the
    resizing, as the mean of two unit vectors is shorter than one.
    """
    if remove_mean:
        maps = [level - level.mean((2, 3), keepdim=True) for level in maps]
    maps = [resize(level, size) for level in maps]
    return torch.cat([F.normalize(level, dim=1) for level in maps], dim=1) if len(maps) > 1 else maps[0]


def nearly_unit(x: Tensor, dim: int = 1) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6) along a dimension, as in the released code of NCNet, CATs and LPMFlow."""
    return x / (x.square().sum(dim, keepdim=True) + 1e-6).sqrt()


def rows_of(features: Features) -> Tensor:
    """The cells of the first prepared map as rows, (B, h*w, C)."""
    return rearrange(features.maps[0], "b c h w -> b (h w) c")


COLDEST = 1e-3
"""our choice: the lowest temperature that is learned. A parameter that falls below it counts as this, and stays."""


def expected_cells(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Mean cell indices (..., 2) under weights (..., h*w) that sum to one, by trained coordinates.

    x (w,) of the columns and y (h,) of the rows run from -1 at the first cell to 1 at the last one.
    """
    xy = torch.stack([x.repeat(len(y)), y.repeat_interleave(len(x))], dim=1)  # (h*w, 2)
    mean_x, mean_y = ((weights @ xy + 1) / 2).unbind(-1)
    return torch.stack([mean_x * (len(x) - 1), mean_y * (len(y) - 1)], dim=-1)


def cells_of(index: Tensor, grid: Size) -> Tensor:
    """Columns and rows (..., 2) of cells that are numbered row by row; centres are half a cell further."""
    return torch.stack([index % grid[1], index // grid[1]], dim=-1)
