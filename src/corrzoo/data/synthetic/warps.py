"""Pairs made of one image: two random warps of it, and the masks of its object. Nobody has annotated what matches.

GSF (section 4.3) learns first from such pairs, made of PASCAL VOC 2012's segmentation images in the split of SFNet; the
drawings of the synthetic pairs serve where there is no data.
"""

import csv
import operator
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw
from torch import Tensor

from corrzoo.data.pairs import DATASETS, Augment, PairDataset
from corrzoo.data.readers.pfpascal import CATEGORIES
from corrzoo.data.synthetic.drawing import View, render, view
from corrzoo.data.synthetic.pairs import CATEGORIES as DRAWN
from corrzoo.geometry import Size, cell_centres, size_of
from corrzoo.images import image_size, open_image, read_rgb
from corrzoo.types import Pair, Record, ZooError

SPREAD = 0.15
"""Standard deviation of the six parameters of an affine map around the identity (SFNet's training pairs)."""
BEND = 0.2
"""our choice: how far a control point of the thin-plate spline moves, half the image being 1. weakalign's 0.4 folds
parts of an image over, and leads further than GSF's windows of 5 cells reach."""
LENGTH = 2000
"""our choice: drawings in an epoch."""
VOID = 255
"""What VOC's masks have on the outlines of objects."""


class WarpDataset(PairDataset):
    """Two warps of each image, with masks of the object where both warps show it; training split only, no keypoints.

    Args:
        root: See `PairDataset`, as all the others.
        split: "trn" (or "train").
        size: Side of the square network image, or its (H, W).
        augment: What is done after the warps, such as "photometric".
    """

    splits = ("trn",)

    def __init__(
        self, root: str | Path, split: str, size: int | Size = 224, *, augment: Augment | None = None, **options: Any
    ) -> None:
        super().__init__(root, split, size, **options)
        self.after, self.augment = augment, self._warp

    @abstractmethod
    def read_mask(self, number: int) -> Image.Image:
        """Where the object is in image `number`, as an 8-bit image: 255 on the object."""

    def image_numbers(self, i: int) -> tuple[int, int]:
        return i, i

    def _single(self, size: tuple[int, int], category: str, path: Path | None = None) -> Record:
        none = torch.empty(0, 2, dtype=torch.float64)
        return Record(path, path, none, none, size, size, category)

    def _warp(self, sample: Pair, rng: torch.Generator) -> Pair:
        number = self.image_numbers(int(sample.index))[0]
        mask = self.read_mask(number).resize(self.size[::-1], Image.Resampling.BILINEAR)
        sample = warp_pair(sample, torch.from_numpy(np.array(mask)) / 255, rng)
        return self.after(sample, rng) if self.after else sample


@DATASETS.register
class SyntheticWarps(WarpDataset):
    """Warps of drawn objects, which go on in each epoch with drawings that were never seen.

    Args:
        root: Not used.
        split: See `WarpDataset`, as size and augment.
        length: Drawings in an epoch.
    """

    name = "synthetic_warps"
    categories = DRAWN

    def __init__(
        self, root: str | Path, split: str, size: int | Size = 128, *, length: int = LENGTH, **options: Any
    ) -> None:
        super().__init__(root, split, size, **options)
        if length < 1:
            raise ZooError(f"{self.name}: length {length}: expected at least one drawing")
        self.length, self.images = length, []
        self._drawn: tuple[int, View] | None = None

    def __len__(self) -> int:
        return self.length

    def record(self, i: int) -> Record:
        drawn = self._view(self.image_numbers(i)[0])
        return self._single(drawn.size, self._category(self.image_numbers(i)[0]))

    def image_numbers(self, i: int) -> tuple[int, int]:
        if not 0 <= operator.index(i) < self.length:
            raise IndexError(f"drawing {i} of {self.length}")
        number = i + int(self._epoch) * self.length
        return number, number

    def read_image(self, number: int) -> Image.Image:
        return render(self._view(number))

    def read_mask(self, number: int) -> Image.Image:
        drawn = self._view(number)
        mask = Image.new("L", drawn.size)
        for points, _ in drawn.shapes:
            ImageDraw.Draw(mask).polygon(points.ravel().tolist(), 255)
        if drawn.occluder:
            ImageDraw.Draw(mask).polygon(drawn.occluder[0].ravel().tolist(), 0)
        return mask

    def _category(self, number: int) -> str:
        return self.categories[number % len(self.categories)]

    def _view(self, number: int) -> View:
        if self._drawn is None or self._drawn[0] != number:  # asked for three times by each sample
            # The fourth of the synthetic pairs' streams, whose first three are the splits: no drawing is in both.
            self._drawn = (
                number,
                view(self._category(number), max(self.size), np.random.default_rng([self.seed, 3, number])),
            )
        return self._drawn[1]


@DATASETS.register
class VOCWarps(WarpDataset):
    """Warps of PASCAL VOC 2012's segmentation images.

    Args:
        root: The folder that holds `VOC2012/`, which is `VOCdevkit/VOC2012` of VOC's archive.
        split: See `WarpDataset`, as size and augment.
        images: VOC's list of the images: `train`, `val` or `trainval`.
        exclude: List of image pairs whose images are left out, below root (SFNet leaves out PF-PASCAL's test pairs);
            none when empty.

    Raises:
        ZooError: when a list, an image or a mask is missing.
    """

    name = "voc_warps"
    folder = "VOC2012"
    categories = CATEGORIES

    def __init__(
        self,
        root: str | Path,
        split: str,
        size: int | Size = 224,
        *,
        images: str = "trainval",
        exclude: str = "PF-PASCAL/test_pairs.csv",
        **options: Any,
    ) -> None:
        super().__init__(root, split, size, **options)
        listed = self.home / "ImageSets" / "Segmentation" / f"{images}.txt"
        stems = self._read(listed, "fetch VOC 2012 with download=true").split()
        if exclude:
            text = self._read(Path(root).expanduser() / exclude, "fetch it, or say exclude: '' to keep all images")
            left_out = {Path(cell.strip()).stem for row in csv.reader(text.splitlines()) for cell in row[:2]}
            stems = [stem for stem in stems if stem not in left_out]
        self.images = [self.home / "JPEGImages" / f"{stem}.jpg" for stem in stems]

    def __len__(self) -> int:
        return len(self.images)

    def record(self, i: int) -> Record:
        if not 0 <= operator.index(i) < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        classes = np.bincount(self._classes(i)[self._on_object(i)], minlength=2)
        return self._single(
            image_size(self.images[i]), self.categories[max(int(classes.argmax()), 1) - 1], self.images[i]
        )

    def read_image(self, number: int) -> Image.Image:
        return read_rgb(self.images[number], image_size(self.images[number]))

    def read_mask(self, number: int) -> Image.Image:
        return Image.fromarray(np.where(self._on_object(number), 255, 0).astype(np.uint8))

    def _classes(self, number: int) -> np.ndarray:
        path = self.home / "SegmentationClass" / f"{self.images[number].stem}.png"
        with open_image(path) as image:
            return np.array(image)  # a palette image: its indices are the classes

    def _on_object(self, number: int) -> np.ndarray:
        classes = self._classes(number)
        return (classes > 0) & (classes != VOID)

    def _read(self, path: Path, remedy: str) -> str:
        if not path.is_file():
            raise ZooError(f"{self.name}: no {path}: {remedy}, or train on drawings with --data.train synthetic_warps")
        return path.read_text("utf-8", "replace")


def warp_pair(sample: Pair, mask: Tensor, rng: torch.Generator) -> Pair:
    """Two random views of a sample's source image: affine, bent half of the time, flipped and recoloured.

    The pair is as large as the image. What one view sees of the object and the other does not is in neither mask.

    Args:
        sample: Of one image; its boxes and keypoints are dropped.
        mask: (H, W) in [0, 1], the object in the image.
        rng: Where the randomness comes from.
    """
    image = sample.src_img
    turn = -1.0 if _uniform(0, 1, rng) < 0.5 else 1.0  # both views, or nobody could tell left from right
    places = [random_warp(size_of(image), rng) * torch.tensor([turn, 1.0]) for _ in range(2)]
    views = [_read_at(image.float(), at).round().clamp(0, 255).to(torch.uint8) for at in places]
    seen = [footprint(at) for at in places]
    masks = [_read_at((mask * other)[None], at)[0] for at, other in zip(places, reversed(seen), strict=True)]
    return sample._replace(
        src_img=jitter(views[0], rng),
        trg_img=jitter(views[1], rng),
        src_mask=masks[0],
        trg_mask=masks[1],
        src_box=torch.full((4,), torch.nan),
        trg_box=torch.full((4,), torch.nan),
    )


def random_warp(image: Size, rng: torch.Generator) -> Tensor:
    """Where each pixel of a random view looks in the image: (H, W, 2), which is from -1 to 1 on both axes.

    SFNet's affine map, identity plus normal noise; half of the time, our choice, after a thin-plate spline through
    3 x 3 control points, each moved by up to `BEND`.
    """
    at = cell_centres(image, (2, 2)) - 1
    if _uniform(0, 1, rng) < 0.5:
        at = at + bend(at, (torch.rand(9, 2, generator=rng) * 2 - 1) * BEND)
    affine = torch.eye(2, 3) + SPREAD * torch.randn(2, 3, generator=rng)
    return (at @ affine[:, :2].T + affine[:, 2]).unflatten(0, image)


def bend(points: Tensor, moves: Tensor) -> Tensor:
    """The thin-plate spline that moves the 3 x 3 control points of [-1, 1]^2 by `moves`.

    Args:
        points: (n, 2).
        moves: (9, 2), row by row.

    Returns:
        How far the points move, (n, 2).
    """
    controls = cell_centres((3, 3), (3, 3)) - 1.5

    def basis(at: Tensor) -> Tensor:  # U(r) = r^2 log r^2 of each control point, and an affine map
        r2 = (at.unsqueeze(1) - controls).square().sum(-1)
        return torch.cat([torch.xlogy(r2, r2), torch.ones(len(at), 1), at], 1)

    system = torch.zeros(12, 12)
    system[:9] = basis(controls)
    system[9:, :9] = system[:9, 9:].T
    return basis(points) @ torch.linalg.solve(system, F.pad(moves, (0, 0, 0, 3)))


def footprint(at: Tensor) -> Tensor:
    """The pixels of the image that a view (H, W, 2) looks at: (H, W) of 0 and 1, holes of a pixel or two filled."""
    H, W = at.shape[:2]
    cells = ((at + 1) / 2 * at.new_tensor([W, H])).floor().long().flatten(0, 1)
    x, y = cells[((cells >= 0) & (cells < cells.new_tensor([W, H]))).all(1)].unbind(1)
    seen = torch.zeros(1, H, W)
    seen[0, y, x] = 1
    return F.max_pool2d(seen, 5, stride=1, padding=2)[0]


def jitter(image: Tensor, rng: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue changed by up to a tenth (SFNet's)."""
    for change in (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation):
        image = change(image, _uniform(0.9, 1.1, rng))
    return TF.adjust_hue(image, _uniform(-0.1, 0.1, rng))


def _read_at(maps: Tensor, at: Tensor) -> Tensor:
    """Maps (C, H, W) at the places (H, W, 2) of a view; zero outside."""
    return F.grid_sample(maps[None], at[None], align_corners=False)[0]


def _uniform(low: float, high: float, rng: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))
