"""An image's features, computed once: in SPair-71k's test split an image recurs in 68 pairs."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from corrzoo.types import Features


class FeatureCache:
    """The least recently used features leave first; its size is bounded in bytes.

    On a CPU each image is computed alone: in a batch, a CNN's features depend in their last bits on the batch's size,
    so that what is known already would change what is found.

    Args:
        max_bytes: Upper bound of what is kept. A batch is served also when it does not fit.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[int, tuple[list[Tensor], Tensor | None]] = OrderedDict()
        self._bytes = 0

    def __call__(self, images: Tensor, ids: Tensor, compute: Callable[[Tensor], Features]) -> Features:
        """Features of a batch of images, running `compute` on those alone that are not known yet.

        Args:
            images: (B, 3, H, W), normalised.
            ids: (B,) int64 image numbers, none negative.
            compute: The backbone, (b, 3, H, W) -> Features.
        """
        wanted = ids.tolist()
        first: dict[int, int] = {}
        for row, image in enumerate(wanted):
            first.setdefault(image, row)
        known = {image: self._kept[image] for image in first if image in self._kept}
        missing = [image for image in first if image not in known]
        batches = [[image] for image in missing] if images.device.type == "cpu" else [missing]
        for batch in filter(None, batches):
            fresh = compute(images[torch.tensor([first[image] for image in batch], device=images.device)])
            for row, image in enumerate(batch):
                # clone: a row that is kept as a view would keep its whole batch alive
                cls = None if fresh.cls is None else fresh.cls[row].clone()
                known[image] = ([level[row].clone() for level in fresh.maps], cls)
        for image in first:
            self._keep(image, known[image])
        rows = [known[image] for image in wanted]
        maps = [torch.stack(level) for level in zip(*(maps for maps, _ in rows), strict=True)]
        cls = None if rows[0][1] is None else torch.stack([c for _, c in rows if c is not None])
        return Features(images, maps, cls)

    def _keep(self, image: int, features: tuple[list[Tensor], Tensor | None]) -> None:
        if image in self._kept:
            self._kept.move_to_end(image)
            return
        self._kept[image] = features
        self._bytes += _nbytes(features)
        while self._bytes > self.max_bytes:
            _, gone = self._kept.popitem(last=False)
            self._bytes -= _nbytes(gone)


def _nbytes(features: tuple[list[Tensor], Tensor | None]) -> int:
    maps, cls = features
    return sum(t.nbytes for t in ([*maps, cls] if cls is not None else maps))
