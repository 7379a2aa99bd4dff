"""A cache of image features. In SPair-71k's test split an image recurs in 68 pairs on average."""

from collections.abc import Callable

import torch
from torch import Tensor

from corrzoo.files import LRU
from corrzoo.types import Features

Row = tuple[list[Tensor], Tensor | None]
"""One image's levels (C, h, w) and its class token (C,)."""


class FeatureCache:
    """Features by image number, up to `max_bytes`. A batch that does not fit is still computed.

    On a CPU each image is computed alone. In a batch, the last bits of a CNN's features depend on the batch size, so
    cached features would differ from fresh ones.
    """

    def __init__(self, max_bytes: int) -> None:
        self._cache: LRU[int, Row] = LRU(max_bytes, _nbytes)

    @property
    def used(self) -> int:
        """Bytes of the cached features."""
        return self._cache.used

    def __call__(self, images: Tensor, ids: Tensor, compute: Callable[[Tensor], Features]) -> Features:
        """Features of normalised images (B, 3, H, W) with numbers `ids` (B,); `compute` is called for the missing."""
        wanted = ids.tolist()
        first: dict[int, int] = {}  # image number -> its first row in the batch
        for row, image in enumerate(wanted):
            first.setdefault(image, row)
        known = {image: kept for image in first if (kept := self._cache.get(image)) is not None}
        missing = [image for image in first if image not in known]
        batches = [[image] for image in missing] if images.device.type == "cpu" else [missing]
        for batch in filter(None, batches):
            fresh = compute(images[torch.tensor([first[image] for image in batch], device=images.device)])
            for row, image in enumerate(batch):
                # a view would keep its whole batch in memory
                cls = None if fresh.cls is None else fresh.cls[row].clone()
                known[image] = ([level[row].clone() for level in fresh.maps], cls)
        for image in first:
            self._cache.put(image, known[image])
        rows = [known[image] for image in wanted]
        maps = [_stack(level) for level in zip(*(maps for maps, _ in rows), strict=True)]
        cls = None if rows[0][1] is None else torch.stack([c for _, c in rows if c is not None])
        return Features(images, maps, cls)


def _nbytes(row: Row) -> int:
    maps, cls = row
    return sum(t.nbytes for t in ([*maps, cls] if cls is not None else maps))


def _stack(level: tuple[Tensor, ...]) -> Tensor:
    """(C, h, w) each -> (B, C, h, w) in the same memory format, which `torch.stack` does not keep."""
    if level[0].is_contiguous():
        return torch.stack(level)
    return torch.stack([row.movedim(0, -1) for row in level]).movedim(-1, 1)
