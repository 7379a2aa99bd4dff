"""Position embeddings of plain ViTs, resized to the grid of the image at hand."""

import torch
import torch.nn.functional as F
from torch import Tensor

from corrzoo.geometry import Size


def resize_pos_embed(embed: Tensor, old: Size, new: Size, prefix: int, official: bool) -> Tensor:
    """A learned position embedding at another grid size; the embedding itself where the grids agree.

    The two ways differ by 10-30% of the embedding's norm at DINOv2's 37 -> 16, which is why both are offered.

    Args:
        embed: (1, prefix + H0*W0, C), row by row.
        old: (H0, W0) that it was learned on.
        new: (h, w) that is needed.
        prefix: Leading entries that belong to no cell (the class token's), handed through as they are.
        official: DINO's, iBOT's and DINOv2's own way: bicubic without antialiasing, told the *scale* (h + 0.1) / H0,
            so that it reads the old grid every H0 / (h + 0.1) cells. Else timm's (and that of DINOv2 with
            registers): bicubic with antialiasing, told the size.

    Returns:
        (1, prefix + h*w, C) in the dtype of `embed`; interpolated in float32 at least.
    """
    if new == old:
        return embed
    cells = embed[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2)
    cells = cells.to(torch.promote_types(embed.dtype, torch.float32))
    if official:
        scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
        cells = F.interpolate(cells, scale_factor=scale, mode="bicubic")
    else:
        cells = F.interpolate(cells, size=new, mode="bicubic", antialias=True)
    return torch.cat([embed[:, :prefix], cells.flatten(2).transpose(1, 2).to(embed.dtype)], dim=1)
