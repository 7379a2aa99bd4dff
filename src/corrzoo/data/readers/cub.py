"""CUB-200-2011 (Wah et al., 2011): 11,788 photographs of 200 bird species with 15 parts, paired by a rule."""

import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from corrzoo.data.pairs import DATASETS, AnnotatedImage, FolderDataset
from corrzoo.errors import one_line
from corrzoo.geometry import Size
from corrzoo.images import image_size
from corrzoo.types import Record, ZooError

CATEGORIES = ["bird"]
LENGTHS = {"trn": 10_000, "val": 400, "test": 2_000}
"""our choice: pairs of each split."""
PARTS, SPECIES, IMAGES = 15, 200, 11_788
COMMON = 5
"""our choice: parts that must be visible in an image, and in both images of a pair."""
MIRROR_PAIRS = {"*": [(7, 11), (8, 12), (9, 13)]}
"""The bird's own left and right eye, leg and wing, by their numbers in parts.txt."""
CROP = 227
"""Side in pixels of a copy's images that were cut to their boxes and resized to a square."""


@DATASETS.register
class CUB(FolderDataset):
    """CUB-200-2011: pairs of birds, in general of different species.

    The dataset has no pairs. our choice: images are split by species, so that no species of the test split is seen in
    training (the official split is by image), and `draw_pairs` chooses the pairs. Images of images.txt that are not on
    disk are left out. A pair's keypoints are the parts visible in both images. Their ids are the part numbers.

    Args:
        length: Pairs of the split, or of each split by its name; `LENGTHS` by default.
    """

    name = "cub"
    folder = "CUB_200_2011"
    holds = "images, images.txt, image_class_labels.txt, bounding_boxes.txt and parts/part_locs.txt"
    splits = ("trn", "val", "test")
    categories = CATEGORIES
    mirror_pairs = MIRROR_PAIRS
    groups = MIRROR_PAIRS
    # our choice: some parts of the whole dataset lie outside their images. Those of another copy lie further outside.
    border = 100.0

    def __init__(
        self,
        root: str | Path,
        split: str,
        size: int | Size = 224,
        *,
        length: int | dict[str, int] | None = None,
        **options: Any,
    ) -> None:
        self._length = length
        super().__init__(root, split, size, **options)

    @property
    def length(self) -> int:
        """Number of pairs of the split."""
        return self._checked(self._of_split("length", self._length, LENGTHS))

    @property
    def title(self) -> str:
        """The name, with the number of species, or else of images, and "crops" if the copy is partial."""
        _, paths, species = self._images()
        found = species[[os.path.isfile(path) for path in paths]]
        notes = []
        if (kinds := len(np.unique(found))) < SPECIES:
            notes.append(f"{kinds} species")
        elif len(found) < IMAGES:
            notes.append(f"{len(found):,} images")
        if (self._index.sizes == CROP).all():
            notes.append("crops")
        return f"{self.name} ({', '.join(notes)})" if notes else self.name

    def variant(self) -> str:
        return f"-{self.length}"

    def sources(self) -> list[Path]:
        folder = self.need(self.home / "images")
        names = ("images.txt", "image_class_labels.txt", "bounding_boxes.txt", "parts/part_locs.txt")
        return [*(self.need(self.home / name) for name in names), *sorted(filter(Path.is_dir, folder.iterdir()))]

    def read(self) -> Iterator[tuple[str, Record]]:
        ids, paths, species = self._images()
        boxes = self._rows("bounding_boxes.txt", 5, ids)[:, 1:]  # (N, 4) x, y, w, h
        boxes[:, 2:] += boxes[:, :2]
        parts = self._parts(ids)  # (N, 15, 3) x, y, visible
        visible = parts[..., 2] == 1
        chosen = (split_of(species) == self.split) & (visible.sum(1) >= COMMON)
        rows = np.array([i for i in np.flatnonzero(chosen) if os.path.isfile(paths[i])], dtype=np.int64)
        if (possible := possible_pairs(visible[rows])) < self.length:
            told = f"split {self.split!r} has {possible} pairs of images with {COMMON} common parts"
            remedy = "choose a smaller length, or restore the missing images"
            raise ZooError(f"{self.home}: {told}, fewer than length {self.length}: {remedy}")
        points, seen, box = map(torch.from_numpy, (parts[..., :2], visible, boxes))
        bird = cache(lambda i: AnnotatedImage(paths[i], image_size(paths[i]), points[i], seen[i], box[i]))
        for pair in draw_pairs(self.split, visible[rows], self.length):
            a, b = rows[list(pair)].tolist()
            record = self.pair_of(bird(a), bird(b), CATEGORIES[0], first_part=1)
            yield f"{self.home}: images {ids[a]} and {ids[b]}", record

    def _images(self) -> tuple[NDArray, list[Path], NDArray]:
        """The images in images.txt: ids (N,) in ascending order, files, and class numbers (N,)."""
        path = self.home / "images.txt"
        images = {}
        for number, line in enumerate(path.read_text("utf-8", "replace").split("\n"), 1):
            found = re.fullmatch(r"(\d{1,9}) (.+)", line, re.ASCII)
            if not line:
                continue
            if not found or int(found[1]) in images:
                raise ZooError(f"{path}:{number}: expected a unique id and a file, found {line!r}: correct it")
            images[int(found[1])] = self.home / "images" / found[2]
        ids = np.array(sorted(images), dtype=np.int64)
        species = self._rows("image_class_labels.txt", 2, ids)[:, 1]
        if (wrong := species[~np.isin(species, range(1, SPECIES + 1))]).size:
            file = self.home / "image_class_labels.txt"
            raise ZooError(f"{file}: class {wrong[0]:g}: expected 1 to {SPECIES}, correct it")
        return ids, [images[i] for i in ids.tolist()], species.astype(np.int64)

    def _parts(self, ids: NDArray) -> NDArray:
        """(N, 15, 3) x, y and visibility of the parts of each image."""
        rows = self._rows("parts/part_locs.txt", 5, np.repeat(ids, PARTS)).reshape(-1, PARTS, 5)
        wrong = (rows[..., 1] != np.arange(1, PARTS + 1)) | ~np.isin(rows[..., 4], (0, 1))
        if wrong.any():
            where = f"{self.home / 'parts/part_locs.txt'}: image {ids[wrong.any(1).argmax()]}"
            told = f"{where}: expected parts 1 to {PARTS}, each visible (1) or not (0)"
            raise ZooError(f"{told}: correct it, or fetch the dataset again")
        return rows[..., 2:]

    def _rows(self, file: str, columns: int, ids: NDArray) -> NDArray:
        """Rows of a file of numbers, sorted by the first two columns. The first column must then equal `ids`."""
        path = self.home / file
        try:
            with warnings.catch_warnings(action="ignore"):  # about an empty file
                rows = np.loadtxt(path, comments=None, encoding="utf-8", ndmin=2)
        except ValueError as error:
            raise ZooError(f"{path}: {one_line(error)}: correct it, or fetch the dataset again") from error
        if (rows.size and rows.shape[1] != columns) or not np.isfinite(rows).all():
            raise ZooError(f"{path}: expected {columns} columns of finite numbers: fetch the dataset again")
        rows = rows.reshape(-1, columns)
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        if not np.array_equal(rows[:, 0], ids):
            odd = np.setxor1d(rows[:, 0], ids)
            which = f"image {odd[0]:g} is only in one of them" if odd.size else "some have more rows than others"
            raise ZooError(f"{path}: its images differ from images.txt ({which}): fetch the dataset again")
        return rows


def split_of(species: NDArray) -> NDArray:
    """(N,) names of the splits of (N,) class numbers: "test" if n % 5 = 0, "val" if n % 10 = 1, otherwise "trn"."""
    return np.where(species % 5 == 0, "test", np.where(species % 10 == 1, "val", "trn"))


def draw_pairs(split: str, visible: NDArray, length: int) -> Iterator[tuple[int, int]]:
    """Choose `length` pairs of images, the same on every machine: positions of the source and the target image.

    our choice: h(i) is the first 8 bytes of SHA-256("split:i") as a big-endian integer, modulo the number of images.
    Candidate k is (h(2k), h(2k + 1)). It is skipped if both are the same image, if fewer than 5 parts are visible in
    both, or if the two images are a pair already, in either order. `visible` (N, 15) bool has the parts of the split's
    images in the order of their ids.
    """

    def h(i: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{split}:{i}".encode("ascii")).digest()[:8], "big") % len(visible)

    chosen: set[frozenset[int]] = set()
    for k in count():
        if len(chosen) == length:
            return
        a, b = h(2 * k), h(2 * k + 1)
        if a != b and (visible[a] & visible[b]).sum() >= COMMON and frozenset((a, b)) not in chosen:
            chosen.add(frozenset((a, b)))
            yield a, b


def possible_pairs(visible: NDArray) -> int:
    """Number of unordered pairs of different images with enough common parts, from `visible` as in `draw_pairs`."""
    patterns, images = np.unique(visible, axis=0, return_counts=True)
    common = patterns.astype(np.int64) @ patterns.T.astype(np.int64)
    return (int(images @ (common >= COMMON) @ images) - len(visible)) // 2
