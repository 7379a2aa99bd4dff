"""Synthetic pairs: two different objects of one category, rendered on the fly, annotated as in SPair-71k."""

import operator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from corrzoo.data.pairs import DATASETS, Augment, PairDataset
from corrzoo.data.synthetic.drawing import OBJECTS, View, render, view
from corrzoo.geometry import Size
from corrzoo.types import Record

CATEGORIES = list(OBJECTS)
LENGTHS = {"trn": 2000, "val": 200, "test": 400}
"""our choice: pairs of each split. An epoch of 2,000 renders in seconds."""


class RenderedDataset(PairDataset):
    """Images of synthetic objects. An image depends on the seed, the stream and its number.

    The training split shows new objects in every epoch. The other splits are always the same.
    """

    categories = CATEGORIES
    images: list[Path] = []  # noqa: RUF012 - never written to
    views_per_pair: ClassVar[int]
    length: int
    stream: int
    """Number of a sequence of random objects, another one for each dataset and split, so that they share no object."""
    _last: tuple[int, list[View]] | None = None

    def __len__(self) -> int:
        return self.length

    def image_numbers(self, i: int) -> tuple[int, int]:
        first = self.views_per_pair * self._number(i)
        return first, first + self.views_per_pair - 1

    def read_image(self, number: int) -> Image.Image:
        return render(self._views(number // self.views_per_pair)[number % self.views_per_pair])

    def _number(self, i: int) -> int:
        """Pair i's number in the stream."""
        if not 0 <= operator.index(i) < self.length:
            raise IndexError(f"pair {i} of {self.length}")
        return i + (int(self._epoch) * self.length if self.split == "trn" else 0)

    def _category(self, number: int) -> str:
        return self.categories[number % len(self.categories)]

    def _views(self, number: int) -> list[View]:
        """The objects of a pair. The last ones are kept: each sample asks for them three times."""
        if self._last is None or self._last[0] != number:
            rng = np.random.default_rng([self.seed, self.stream, number])
            category, side = self._category(number), max(self.size)
            self._last = number, [view(category, side, rng) for _ in range(self.views_per_pair)]
        return self._last[1]


@DATASETS.register
class SyntheticPairs(RenderedDataset):
    """Two different synthetic objects of one category, with the keypoints that are visible in both images.

    Original sizes vary around `size`.

    Args:
        length: Pairs of the split, or of each split by its name; `LENGTHS` by default.
        seed: Seed of the objects and of the augmentation, or that of each split by its name; 0 by default.
    """

    name = "synthetic"
    splits = ("trn", "val", "test")
    views_per_pair = 2

    def __init__(
        self,
        root: str | Path,
        split: str,
        size: int | Size = 128,
        *,
        length: int | dict[str, int] | None = None,
        augment: Augment | None = None,
        seed: int | dict[str, int] = 0,
    ) -> None:
        super().__init__(root, split, size, augment=augment)
        self.seed = self._of_split("seed", seed, dict.fromkeys(LENGTHS, 0))
        self.length = self._checked(self._of_split("length", length, LENGTHS))
        self.stream = self.splits.index(self.split)

    def record(self, i: int) -> Record:
        number = self._number(i)
        src, trg = self._views(number)
        both = src.visible & trg.visible
        return Record(
            src_path=None,
            trg_path=None,
            src_kps=torch.from_numpy(src.kps[both]),
            trg_kps=torch.from_numpy(trg.kps[both]),
            src_size=src.size,
            trg_size=trg.size,
            category=self._category(number),
            src_box=torch.from_numpy(src.box),
            trg_box=torch.from_numpy(trg.box),
            flags=difficulty(src, trg),
        )


def difficulty(src: View, trg: View) -> dict[str, int]:
    """SPair-71k's difficulty flags of a pair.

    our choice, because SPair-71k's were set by hand: viewpoint variation is medium (1) from a yaw difference of 20
    degrees and hard (2) from 50 degrees or if one view is mirrored; scale variation is medium from a ratio of 1.3
    between the larger sides of the boxes, relative to their images, and hard from 1.8.
    """
    turned = 90.0 if src.mirrored != trg.mirrored else abs(src.yaw - trg.yaw)
    sides = [max(v.box[2] - v.box[0], v.box[3] - v.box[1]) / max(v.size) for v in (src, trg)]
    return {
        "viewpoint": int(np.searchsorted([20, 50], turned)),
        "scale": int(np.searchsorted([1.3, 1.8], max(sides) / min(sides))),
        "truncation": src.truncated + 2 * trg.truncated,  # none, source only, target only, both
        "occlusion": (src.occluder is not None) + 2 * (trg.occluder is not None),
    }
