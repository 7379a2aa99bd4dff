"""Position embeddings of plain ViTs, resized to the grid of the image."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corrzoo.geometry import Size


def resize_pos_embed(embed: Tensor, old: Size, new: Size, prefix: int, official: bool) -> Tensor:
    """Resize a learned position embedding to another grid; unchanged if the grids are the same.

    The two ways differ by 10-30% of the embedding's norm at DINOv2's 37 -> 16, so both are offered.

    Args:
        embed: (1, prefix + H0*W0, C), row by row.
        old: (H0, W0), the grid of `embed`.
        new: (h, w), the grid to resize to.
        prefix: Leading entries of tokens without a cell, such as the class token; they are kept.
        official: As DINO, iBOT and DINOv2: bicubic without antialiasing, by the *scale* (h + 0.1) / H0, which reads
            the old grid every H0 / (h + 0.1) cells. Otherwise as timm and DINOv2 with registers: bicubic with
            antialiasing, to the size.

    Returns:
        (1, prefix + h*w, C) in the dtype of `embed`; interpolated in float32 or float64.
    """
    if new == old:
        return embed
    cells = embed[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2)  # (1, C, H0, W0)
    cells = cells.to(torch.promote_types(embed.dtype, torch.float32))
    if official:
        scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
        cells = F.interpolate(cells, scale_factor=scale, mode="bicubic")
    else:
        cells = F.interpolate(cells, size=new, mode="bicubic", antialias=True)
    return torch.cat([embed[:, :prefix], cells.flatten(2).transpose(1, 2).to(embed.dtype)], dim=1)


class ResizeOnce:
    """`resize_pos_embed` that keeps its last result while the embedding does not change.

    A result is used again for the same grid until the embedding is written to or moved, or `forget` is called. A copy
    of the object starts empty, and torch.compile and torch.export see the plain function.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[Any, ...], Tensor, Tensor] | None = None

    def forget(self) -> None:
        """Drop the result. Fused optimisers and writes to `embed.data` change the embedding, but not its version."""
        self._kept = None

    def __call__(self, embed: Tensor, old: Size, new: Size, prefix: int, official: bool, trained: bool) -> Tensor:
        """See `resize_pos_embed`; nothing is kept if the embedding is `trained`."""
        if trained:
            self.forget()
        traced = torch.compiler.is_compiling() or type(embed) is not nn.Parameter  # a fake or functorch tensor
        if trained or traced or new == old or embed.is_inference():
            return resize_pos_embed(embed, old, new, prefix, official)
        key = (old, new, prefix, official, embed._version, embed.data_ptr(), embed.dtype)
        kept = self._kept
        if kept is None or kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # a training step can use the result, too
                # The embedding's memory is kept as well, so that no other tensor gets its address.
                kept = self._kept = key, embed.detach(), resize_pos_embed(embed, old, new, prefix, official)
        return kept[2]

    def __reduce__(self) -> tuple[type["ResizeOnce"], tuple[()]]:
        return type(self), ()
