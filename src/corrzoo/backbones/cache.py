"""Features of an image, computed once: in SPair-71k's test split an image recurs in 68 pairs on average."""

from collections.abc import Callable

import torch
from torch import Tensor

from corrzoo.files import LRU
from corrzoo.types import Features

Row = tuple[list[Tensor], Tensor | None]
"""One image's levels (C, h, w) and its class token (C,)."""


class FeatureCache:
    """Features by image number, bounded in bytes.

    On a CPU each image is computed alone: in a batch, the last bits of a CNN's features depend on the batch's size, so
    a cached feature would differ from a fresh one.

    Args:
        max_bytes: Upper bound of the cached features. A batch that does not fit is computed all the same.
    """

    def __init__(self, max_bytes: int) -> None:
        self._cache: LRU[int, Row] = LRU(max_bytes, _nbytes)

    @property
    def used(self) -> int:
        """Bytes of the cached features."""
        return self._cache.used

    def __call__(self, images: Tensor, ids: Tensor, compute: Callable[[Tensor], Features]) -> Features:
        """Features of a batch, computed only for the images that are not in the cache.

        Args:
            images: (B, 3, H, W), normalised.
            ids: (B,) int64 image numbers, none negative.
            compute: The backbone, (b, 3, H, W) -> Features.
        """
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
                # clone: a row that is kept as a view would keep its whole batch in memory
                cls = None if fresh.cls is None else fresh.cls[row].clone()
                known[image] = ([level[row].clone() for level in fresh.maps], cls)
        for image in first:
            self._cache.put(image, known[image])
        rows = [known[image] for image in wanted]
        maps = [torch.stack(level) for level in zip(*(maps for maps, _ in rows), strict=True)]
        cls = None if rows[0][1] is None else torch.stack([c for _, c in rows if c is not None])
        return Features(images, maps, cls)


def _nbytes(row: Row) -> int:
    maps, cls = row
    return sum(t.nbytes for t in ([*maps, cls] if cls is not None else maps))
