"""AP-10K (Yu et al., 2021) as pairs of animals: the benchmark of GeoAware-SC (Zhang et al., CVPR 2024).

The authors' notebook `prepare_ap10k` draws the pairs in the file system's order of folders, so they differ between
machines. Compare only numbers that come from the same folder.
"""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch

from corrzoo.data.pairs import DATASETS, AnnotatedImage, FolderDataset
from corrzoo.data.readers import symmetry
from corrzoo.data.readers.tables import read_box, read_json
from corrzoo.geometry import Size
from corrzoo.types import Record, ZooError

Subset = Literal["intra-species", "cross-species", "cross-family"]
"""The benchmark's parts, as the authors call them."""
SUFFIXES: dict[Subset, str] = {"intra-species": "", "cross-species": "_cross_species", "cross-family": "_cross_family"}
"""Of their folders."""


@DATASETS.register
class AP10K(FolderDataset):
    """AP-10K, with 17 keypoints shared by all species. A pair has those that are visible in both images.

    Args:
        subset: `intra-species`, whose categories are species; `cross-species`, whose categories are families; or
            `cross-family`, with the one category `all`. Only the first has training pairs.
    """

    name = "ap10k"
    folder = "ap-10k"
    holds = "JPEGImages, ImageAnnotation and PairAnnotation"
    origin = "create them from AP-10K with GeoAware-SC's notebook prepare_ap10k"
    splits = ("trn", "val", "test")
    mirror_pairs = symmetry.AP10K
    groups = symmetry.AP10K_GROUPS

    def __init__(
        self, root: str | Path, split: str, size: int | Size = 224, *, subset: Subset = "intra-species", **options: Any
    ) -> None:
        if split in ("trn", "train") and SUFFIXES[subset]:
            raise ZooError(f"{self.name}: the subset {subset} has no training pairs: train on intra-species")
        self.subset = subset
        super().__init__(root, split, size, **options)

    def sources(self) -> list[Path]:
        self._images, self._animals = self.need(self.home / "JPEGImages"), self.need(self.home / "ImageAnnotation")
        self._pairs = self.need(self.home / "PairAnnotation" / f"{self.split}{SUFFIXES[self.subset]}")
        self.pair_folder = self._pairs
        self._names = sorted(name for name in os.listdir(self._pairs) if name.endswith(".json"))
        self.categories = sorted({_category(name) for name in self._names})
        return [self._pairs, *sorted(filter(Path.is_dir, self._animals.glob("*/*")))]

    def read(self) -> Iterator[tuple[str, Record]]:
        animal = cache(self._read_animal)
        for name in self._names:
            path = self._pairs / name
            with read_json(path, "a pair of AP-10K", "write it again") as pair:
                # Their folder is the notebook's; the last three parts are family, species and file.
                src, trg = (PurePosixPath(*PurePosixPath(pair[f"{s}_json_path"]).parts[-3:]) for s in ("src", "trg"))
            yield str(path), self.pair_of(animal(src), animal(trg), _category(name))

    def _read_animal(self, file: PurePosixPath) -> AnnotatedImage:
        path = self._animals / file
        with read_json(path, "an annotation of AP-10K", "write it again") as note:
            x, y, w, h = map(float, note["bbox"])  # COCO: left, top, width, height; keypoints are x, y, visibility
            points = torch.from_numpy(np.array(note["keypoints"], dtype=np.float64).reshape(17, 3))
            box = read_box([x, y, x + w, y + h], str(path))
            image, size = self._images / file.with_suffix(".jpg"), (note["width"], note["height"])
            return AnnotatedImage(image, size, points[:, :2], points[:, 2] > 0, box)


def _category(name: str) -> str:
    return name.removesuffix(".json").rpartition(":")[2]
