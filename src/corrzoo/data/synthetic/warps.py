"""Pairs of two random warps of one image, with the masks of its object and without keypoints.

GSF's first training stage (section 4.3) uses such pairs of PASCAL VOC 2012's segmentation images, as in SFNet.
Synthetic objects replace them if there is no data.
"""

import csv
import operator
from abc import abstractmethod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw
from scipy.interpolate import RBFInterpolator
from torch import Tensor

from corrzoo.data.augment import chance, uniform
from corrzoo.data.pairs import DATASETS, Augment, PairDataset
from corrzoo.data.readers.pfpascal import CATEGORIES as VOC_CATEGORIES
from corrzoo.data.synthetic.pairs import RenderedDataset
from corrzoo.geometry import Size, cell_centres, size_of
from corrzoo.images import image_size, open_image, read_rgb
from corrzoo.types import Pair, Record, ZooError

SPREAD = 0.15
"""Standard deviation of the six parameters of an affine map around the identity (SFNet's training pairs)."""
BEND = 0.2
"""our choice: largest move of a control point of the thin-plate spline, in half image sides. WeakAlign's 0.4 folds
parts of an image over, and moves points further than GSF's windows of 5 cells reach."""
LENGTH = 2000
"""our choice: synthetic images in an epoch."""
VOID = 255
"""Label of the outlines of objects in VOC's masks."""


class WarpDataset(PairDataset):
    """Two warps of each image, with masks of the object part that both warps show. Training split only, no keypoints.

    Args:
        augment: Augmentation after the warps, such as "photometric".
    """

    splits = ("trn",)

    def __init__(
        self, root: str | Path, split: str, size: int | Size = 224, *, augment: Augment | None = None, **options: Any
    ) -> None:
        super().__init__(root, split, size, **options)
        self.after, self.augment = augment, self._warp

    @abstractmethod
    def read_mask(self, number: int) -> Image.Image:
        """Mask of the object in image `number`, 8-bit: 255 on the object."""

    def image_numbers(self, i: int) -> tuple[int, int]:
        return i, i

    def _record(self, size: tuple[int, int], category: str, path: Path | None = None) -> Record:
        no_kps = torch.empty(0, 2, dtype=torch.float64)
        return Record(path, path, no_kps, no_kps, size, size, category)

    def _warp(self, sample: Pair, rng: torch.Generator) -> Pair:
        number = self.image_numbers(int(sample.index))[0]
        mask = self.read_mask(number).resize(self.size[::-1], Image.Resampling.BILINEAR)
        sample = warp_pair(sample, torch.from_numpy(np.array(mask)) / 255, rng)
        return self.after(sample, rng) if self.after else sample


@DATASETS.register
class SyntheticWarps(RenderedDataset, WarpDataset):
    """Warps of synthetic objects. Every epoch has new objects.

    Args:
        length: Images in an epoch.
    """

    name = "synthetic_warps"
    views_per_pair = 1
    stream = 3  # 0, 1 and 2 are the splits of the synthetic pairs

    def __init__(
        self, root: str | Path, split: str, size: int | Size = 128, *, length: int = LENGTH, **options: Any
    ) -> None:
        super().__init__(root, split, size, **options)
        self.length = self._checked(length)

    def record(self, i: int) -> Record:
        number = self._number(i)
        return self._record(self._views(number)[0].size, self._category(number))

    def read_mask(self, number: int) -> Image.Image:
        (placed,) = self._views(number)
        mask = Image.new("L", placed.size)
        for points, _ in placed.shapes:
            ImageDraw.Draw(mask).polygon(points.ravel().tolist(), 255)
        if placed.occluder:
            ImageDraw.Draw(mask).polygon(placed.occluder[0].ravel().tolist(), 0)
        return mask


@DATASETS.register
class VOCWarps(WarpDataset):
    """Warps of PASCAL VOC 2012's segmentation images.

    Args:
        root: Folder that contains `VOC2012/`, which is `VOCdevkit/VOC2012` of VOC's archive.
        images: VOC's list of images: `train`, `val` or `trainval`.
        exclude: List of image pairs, below root, whose images are left out; empty for none. SFNet leaves out
            PF-PASCAL's test pairs.

    Raises:
        ZooError: if a list, an image or a mask is missing.
    """

    name = "voc_warps"
    folder = "VOC2012"
    categories = VOC_CATEGORIES

    def __init__(
        self,
        root: str | Path,
        split: str,
        size: int | Size = 224,
        *,
        images: Literal["train", "val", "trainval"] = "trainval",
        exclude: str = "PF-PASCAL/test_pairs.csv",
        **options: Any,
    ) -> None:
        super().__init__(root, split, size, **options)
        listed = self.home / "ImageSets" / "Segmentation" / f"{images}.txt"
        stems = self._read(listed, "fetch VOC 2012 with download=true").split()
        if exclude:
            text = self._read(Path(root).expanduser() / exclude, "fetch it, or set exclude: '' to keep all images")
            left_out = {Path(cell.strip()).stem for row in csv.reader(text.splitlines()) for cell in row[:2]}
            stems = [stem for stem in stems if stem not in left_out]
        self.images = [self.home / "JPEGImages" / f"{stem}.jpg" for stem in stems]

    def __len__(self) -> int:
        return len(self.images)

    def record(self, i: int) -> Record:
        if not 0 <= operator.index(i) < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        counts = np.bincount(self._classes(i).ravel(), minlength=2)[1:]  # pixels of each class
        return self._record(image_size(self.images[i]), self.categories[counts.argmax()], self.images[i])

    def read_image(self, number: int) -> Image.Image:
        return read_rgb(self.images[number], image_size(self.images[number]))

    def read_mask(self, number: int) -> Image.Image:
        return Image.fromarray(np.where(self._classes(number), 255, 0).astype(np.uint8))

    def _classes(self, number: int) -> np.ndarray:
        """(h, w) class of each pixel, counted from 1; 0 where there is no object."""
        with open_image(self.home / "SegmentationClass" / f"{self.images[number].stem}.png") as image:
            classes = np.array(image)  # indices of the palette
        return np.where(classes == VOID, 0, classes)

    def _read(self, path: Path, remedy: str) -> str:
        if not path.is_file():
            raise ZooError(f"{self.name}: no {path}: {remedy}, or use synthetic images: --data.train synthetic_warps")
        return path.read_text("utf-8", "replace")


def warp_pair(sample: Pair, mask: Tensor, rng: torch.Generator) -> Pair:
    """Two random views of a sample's source image: affine, bent with p = 0.5, mirrored with p = 0.5, and recoloured.

    `mask` (H, W) in [0, 1] is the object in the image. A view's mask leaves out what the other view does not show.
    """
    image = sample.src_img
    turn = -1.0 if chance(0.5, rng) else 1.0  # for both views: left and right must remain distinguishable
    places = [random_warp(size_of(image), rng) * torch.tensor([turn, 1.0]) for _ in range(2)]
    views = [_read_at(image.float(), at).round().clamp(0, 255).to(torch.uint8) for at in places]
    seen = [footprint(at) for at in places]
    masks = [_read_at((mask * other)[None], at)[0] for at, other in zip(places, reversed(seen), strict=True)]
    src_img, trg_img = (jitter(view, rng) for view in views)
    (src_mask, trg_mask), no_box = masks, torch.full((4,), torch.nan)
    return sample._replace(
        src_img=src_img, trg_img=trg_img, src_mask=src_mask, trg_mask=trg_mask, src_box=no_box, trg_box=no_box
    )


def random_warp(image: Size, rng: torch.Generator) -> Tensor:
    """(H, W, 2) place (x, y) in the image that each pixel of a random view shows. The image is [-1, 1] on both axes.

    SFNet's affine map: identity plus normal noise. our choice: with p = 0.5 it follows a thin-plate spline through
    3 x 3 control points, each moved by up to `BEND`.
    """
    at = cell_centres(image, (2, 2)) - 1
    if chance(0.5, rng):
        at = at + bend(at, (torch.rand(9, 2, generator=rng) * 2 - 1) * BEND)
    affine = torch.eye(2, 3) + SPREAD * torch.randn(2, 3, generator=rng)
    return (at @ affine[:, :2].T + affine[:, 2]).unflatten(0, image)


def bend(points: Tensor, moves: Tensor) -> Tensor:
    """Displacements (n, 2) of points (n, 2) by the thin-plate spline that moves 3 x 3 control points of [-1, 1]^2.

    `moves` (9, 2) are those of the control points, row by row.
    """
    spline = RBFInterpolator(cell_centres((3, 3), (3, 3)) - 1.5, moves, kernel="thin_plate_spline")
    return torch.from_numpy(spline(points)).to(points.dtype)


def footprint(at: Tensor) -> Tensor:
    """The pixels of the image that a view (H, W, 2) shows: (H, W) of 0 and 1, with holes of a pixel or two filled."""
    H, W = at.shape[:2]
    cells = ((at + 1) / 2 * at.new_tensor([W, H])).floor().long().flatten(0, 1)  # (H*W, 2)
    x, y = cells[((cells >= 0) & (cells < cells.new_tensor([W, H]))).all(1)].unbind(1)
    seen = torch.zeros(1, H, W)
    seen[0, y, x] = 1
    return F.max_pool2d(seen, 5, stride=1, padding=2)[0]


def jitter(image: Tensor, rng: torch.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue by up to a tenth, as SFNet does."""
    for change in (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation):
        image = change(image, uniform(0.9, 1.1, rng))
    return TF.adjust_hue(image, uniform(-0.1, 0.1, rng))


def _read_at(maps: Tensor, at: Tensor) -> Tensor:
    """Read maps (C, H, W) at the places (H, W, 2) of a view; zero outside."""
    return F.grid_sample(maps[None], at[None], align_corners=False)[0]
