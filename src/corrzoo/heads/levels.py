"""How a backbone's levels, maps of several sizes and scales, come onto one grid: what every head does first."""

import torch
import torch.nn.functional as F
from torch import Tensor

from corrzoo.geometry import Size, size_of


def resize(maps: Tensor, size: Size) -> Tensor:
    """Maps (B, C, h, w) at another size, bilinearly between cell centres; as they are when it is theirs."""
    return maps if size_of(maps) == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)


def stack_levels(maps: list[Tensor], size: Size) -> Tensor:
    """All levels as one map (B, C, h, w).

    Several weigh the same in every cell, whatever their scale: each has length one there, after it was resized, for
    between two unit vectors lies a shorter one.
    """
    maps = [resize(level, size) for level in maps]
    return torch.cat([F.normalize(level, dim=1) for level in maps], dim=1) if len(maps) > 1 else maps[0]
