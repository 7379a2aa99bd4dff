"""Synthetic pairs: drawn objects in SPair-71k's terms, rendered on the fly or written to disk in its layout."""

import json
import operator
import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from corrzoo.data.pairs import DATASETS, Augment, PairDataset
from corrzoo.data.synthetic.drawing import OBJECTS, View, render, view
from corrzoo.geometry import Size
from corrzoo.types import Record, ZooError

CATEGORIES = list(OBJECTS)
LENGTHS = {"trn": 2000, "val": 200, "test": 400}
"""our choice: pairs in a split; an epoch of the first renders in seconds."""


@DATASETS.register
class SyntheticPairs(PairDataset):
    """Two different drawn objects of one category in each pair, and the keypoints to be seen in both.

    What is drawn depends on the seed, the split and the pair's number. The training split goes on in each epoch with
    pairs that were never seen; the others stay as they are.

    Args:
        root: Not used.
        split: "trn" (or "train"), "val" or "test".
        size: Side of the square network image, or its (H, W). Images are drawn in varying sizes around it.
        length: Pairs in the split, or in each split by its name; as `LENGTHS` has it where not given.
        augment: See `PairDataset`, as cache_mb.
        seed: Of the drawings and of the augmentation, or in each split by its name; 0 where not given.
    """

    name = "synthetic"
    splits = ("trn", "val", "test")
    categories = CATEGORIES

    def __init__(
        self,
        root: str | Path,
        split: str,
        size: int | Size = 128,
        *,
        length: int | dict[str, int] | None = None,
        augment: Augment | None = None,
        seed: int | dict[str, int] = 0,
        cache_mb: float = 256,
    ) -> None:
        super().__init__(root, split, size, augment=augment, cache_mb=cache_mb)
        self.seed = self._of_split("seed", seed, dict.fromkeys(LENGTHS, 0))
        self.length = self._of_split("length", length, LENGTHS)
        if self.length < 1:
            raise ZooError(f"synthetic: length {self.length} of split {self.split!r}: expected at least one pair")
        self.images = []
        self._drawn: tuple[int, tuple[View, View]] | None = None

    def __len__(self) -> int:
        return self.length

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

    def image_numbers(self, i: int) -> tuple[int, int]:
        number = self._number(i)
        return 2 * number, 2 * number + 1

    def read_image(self, number: int) -> Image.Image:
        return render(self._views(number // 2)[number % 2])

    def _number(self, i: int) -> int:
        """The pair's number among all that the split could ever draw."""
        if not 0 <= operator.index(i) < self.length:
            raise IndexError(f"pair {i} of {self.length}")
        return i + (int(self._epoch) * self.length if self.split == "trn" else 0)

    def _category(self, number: int) -> str:
        return self.categories[number % len(self.categories)]

    def _views(self, number: int) -> tuple[View, View]:
        if self._drawn is None or self._drawn[0] != number:  # asked for three times by each sample
            rng = np.random.default_rng([self.seed, self.splits.index(self.split), number])
            src, trg = (view(self._category(number), max(self.size), rng) for _ in range(2))
            self._drawn = number, (src, trg)
        return self._drawn[1]


def difficulty(src: View, trg: View) -> dict[str, int]:
    """SPair-71k's flags of a pair.

    our choice, as SPair-71k's were set by hand: views 20 or 50 degrees apart are of medium or hard viewpoint variation,
    mirrored ones are hard; boxes whose larger sides differ by factors of 1.3 or 1.8 of medium or hard scale variation.
    """
    turned = 90.0 if src.mirrored != trg.mirrored else abs(src.yaw - trg.yaw)
    sides = [max(v.box[2] - v.box[0], v.box[3] - v.box[1]) / max(v.size) for v in (src, trg)]
    return {
        "viewpoint": int(np.searchsorted([20, 50], turned)),
        "scale": int(np.searchsorted([1.3, 1.8], max(sides) / min(sides))),
        "truncation": src.truncated + 2 * trg.truncated,  # none, source only, target only, both
        "occlusion": (src.occluder is not None) + 2 * (trg.occluder is not None),
    }


def write_spair(
    root: str | Path, pairs_per_split: int = 200, images_per_category: int = 10, size: int = 256, seed: int = 0
) -> Path:
    """Write a dataset of drawn images in SPair-71k's layout, for the reader of that dataset.

    Args:
        root: The folder in which `SPair-71k/` is made.
        pairs_per_split: Pairs of each split, shared evenly by the categories; every fifth also stands in Layout/small.
        images_per_category: Images of a category in each split; no image is in two splits.
        size: About the side of the images.
        seed: Of the drawings and the choice of pairs.

    Returns:
        The dataset's folder.

    Raises:
        ZooError: when the folder is there already, or so many pairs cannot be made.
    """
    folder = Path(root) / "SPair-71k"
    most = len(OBJECTS) * images_per_category * (images_per_category - 1)
    if folder.exists():
        raise ZooError(f"{folder} is there already: choose another root, or remove it")
    if not 0 < pairs_per_split <= most:
        raise ZooError(
            f"{pairs_per_split} pairs of each split: {images_per_category} images a category make 1 to {most}"
        )
    work = folder.with_name(folder.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    for s, split in enumerate(LENGTHS):
        rng = np.random.default_rng([seed, s])
        pairs: list[dict[str, Any]] = []
        for c, category in enumerate(CATEGORIES):
            drawn = [view(category, size, rng) for _ in range(images_per_category)]
            notes = [_note(category, f"2026_{s + 1}{c + 1}{k:04d}", v) for k, v in enumerate(drawn)]
            for note, v in zip(notes, drawn, strict=True):
                stem = Path(note["filename"]).stem
                _write(work / "ImageAnnotation" / category / f"{stem}.json", json.dumps(note))
                (work / "JPEGImages" / category).mkdir(parents=True, exist_ok=True)
                render(v).save(work / "JPEGImages" / category / f"{stem}.jpg", quality=95)
            chosen = rng.permutation(list(permutations(range(images_per_category), 2)))
            for i, j in chosen[: len(range(c, pairs_per_split, len(CATEGORIES)))].tolist():
                flags = difficulty(drawn[i], drawn[j]) | {"mirror": int(drawn[i].mirrored != drawn[j].mirrored)}
                pairs.append(_pair_note(len(pairs) + 1, notes[i], notes[j], flags))
        for pair in pairs:
            _write(work / "PairAnnotation" / split / f"{pair['filename']}.json", json.dumps(pair))
        for layout, some in (("large", pairs), ("small", pairs[::5])):
            _write(work / "Layout" / layout / f"{split}.txt", "".join(f"{pair['filename']}\n" for pair in some))
    work.rename(folder)
    return folder


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _note(category: str, stem: str, drawn: View) -> dict[str, Any]:
    """An ImageAnnotation. Keypoints are whole pixels inside the image, boxes are counted from 1 as PASCAL VOC's."""
    w, h = drawn.size
    kps = np.clip(np.rint(drawn.kps), 0, (w - 1, h - 1)).astype(int).tolist()
    return {
        "filename": f"{stem}.jpg",
        **dict.fromkeys(("src_database", "src_annotation", "src_image"), "synthetic"),
        "image_width": w,
        "image_height": h,
        "image_depth": 3,
        "category": category,
        "pose": "Left" if drawn.mirrored else "Right",
        "truncated": int(drawn.truncated),
        "occluded": int(drawn.occluder is not None),
        "difficult": 0,
        "bndbox": np.clip(np.rint(drawn.box), 1, (w, h, w, h)).astype(int).tolist(),
        "kps": {str(k): kps[k] if k < len(kps) and drawn.visible[k] else None for k in range(30)},
        "azimuth_id": int((drawn.yaw + 180 * drawn.mirrored) // 45) % 8,
    }


def _pair_note(number: int, src: dict[str, Any], trg: dict[str, Any], flags: dict[str, int]) -> dict[str, Any]:
    """A PairAnnotation, from the annotations of its images."""
    both = [k for k in src["kps"] if src["kps"][k] and trg["kps"][k]]
    stems = "-".join(Path(note["filename"]).stem for note in (src, trg))
    pair = {"pair_id": number, "filename": f"{number:06d}-{stems}:{src['category']}", "category": src["category"]}
    for side, note in (("src", src), ("trg", trg)):
        pair |= {
            f"{side}_imname": note["filename"],
            f"{side}_imsize": [note["image_width"], note["image_height"], 3],
            f"{side}_bndbox": note["bndbox"],
            f"{side}_pose": note["pose"],
            f"{side}_kps": [note["kps"][k] for k in both],
        }
    varied = {f"{name}_variation": flags.pop(name) for name in ("viewpoint", "scale")}
    return pair | {"kps_ids": both} | varied | flags
