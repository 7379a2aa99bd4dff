"""Position embeddings of plain ViTs, resized to the grid of the image."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corrzoo.geometry import Size


def resize_pos_embed(embed: Tensor, old: Size, new: Size, prefix: int, official: bool) -> Tensor:
    """Resize a learned position embedding (1, prefix + H0*W0, C) to (1, prefix + h*w, C).

    The grids `old` (H0, W0) and `new` (h, w) are stored row by row. The leading `prefix` entries belong to tokens
    without a cell, such as the class token, and are kept. The interpolation runs in float32 or float64.

    `official`, as DINO, iBOT and DINOv2: bicubic without antialiasing, by the *scale* (h + 0.1) / H0, which reads the
    old grid every H0 / (h + 0.1) cells. Otherwise as timm and DINOv2 with registers: bicubic with antialiasing, to the
    size. The two differ by 10-30% of the embedding's norm at DINOv2's 37 -> 16.
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
    """`resize_pos_embed` that keeps its last result until the embedding is written to or moved, or `forget` is called.

    A copy of the object starts empty. torch.compile and torch.export see the plain function.
    """

    _kept: tuple[tuple[Any, ...], Tensor, Tensor] | None = None  # key, embedding, result

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
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # a training step can use the result, too
                # The embedding's memory is kept as well, so that no other tensor gets its address.
                self._kept = key, embed.detach(), resize_pos_embed(embed, old, new, prefix, official)
        return self._kept[2]

    def __reduce__(self) -> tuple[type["ResizeOnce"], tuple[()]]:
        return type(self), ()
