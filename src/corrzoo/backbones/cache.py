"""A cache of image features. In SPair-71k's test split an image recurs in 68 pairs on average."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from corrzoo.types import Features

Row = tuple[list[Tensor], Tensor | None]
"""One image's levels (C, h, w) and its class token (C,)."""


class FeatureCache:
    """Features by image number, up to `max_bytes`; the least recently used are dropped. Larger batches still work.

    On a CPU each image is computed alone: the last bits of a CNN's features depend on the batch size, so cached
    features would differ from fresh ones.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.used = max_bytes, 0
        self._rows: OrderedDict[int, Row] = OrderedDict()  # the least recently used first

    def __call__(self, images: Tensor, ids: Sequence[int], compute: Callable[[Tensor], Features]) -> Features:
        """Features of normalised images (B, 3, H, W) with numbers `ids`; `compute` is called for the missing."""
        first: dict[int, int] = {}  # image number -> its first row in the batch
        for row, image in enumerate(ids):
            first.setdefault(image, row)
        known = {image: self._rows[image] for image in first if image in self._rows}
        missing = [image for image in first if image not in known]
        batches = [[image] for image in missing] if images.device.type == "cpu" else [missing]
        for batch in filter(None, batches):
            fresh = compute(torch.stack([images[first[image]] for image in batch]))
            for row, image in enumerate(batch):
                cls = None if fresh.cls is None else fresh.cls[row].clone()  # a view would keep its whole batch
                known[image] = ([level[row].clone() for level in fresh.maps], cls)
        self.used += sum(_nbytes(known[image]) for image in missing)
        for image in first:
            self._rows[image] = known[image]
            self._rows.move_to_end(image)
        while self.used > self.max_bytes:
            self.used -= _nbytes(self._rows.popitem(last=False)[1])
        rows = [known[image] for image in ids]
        maps = [_stack(level) for level in zip(*(maps for maps, _ in rows), strict=True)]
        cls = None if rows[0][1] is None else torch.stack([c for _, c in rows if c is not None])
        return Features(images, maps, cls)


def _nbytes(row: Row) -> int:
    maps, cls = row
    return sum(level.nbytes for level in maps) + (0 if cls is None else cls.nbytes)


def _stack(level: tuple[Tensor, ...]) -> Tensor:
    """(C, h, w) each -> (B, C, h, w) in the same memory format, which `torch.stack` does not keep."""
    if level[0].is_contiguous():
        return torch.stack(level)
    return torch.stack([row.movedim(0, -1) for row in level]).movedim(-1, 1)
