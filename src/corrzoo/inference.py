"""Match two images of any size: points, dense flow and heat maps in original pixels."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from corrzoo.geometry import Size, cell_centres, pixels_to_cells, resize_points, size_of, transfer
from corrzoo.images import ImageSource, as_rgb, to_tensor
from corrzoo.types import Features, PointMatcher, ZooError, as_points

GRID = 10
"""our choice: without query points, the centres of GRID x GRID cells are matched."""
MAX_CYCLE_ERROR = 0.25
"""our choice: a match is confident if its cycle error is at most this share of a cell of GRID x GRID cells."""
FLAT = 8
"""our choice: a cell of the grid whose grey values (0 to 255) differ by at most this much shows nothing to match."""


class ImageMatches(NamedTuple):
    """Matched points, (x, y) in original pixels. (0, 0) is the top-left corner of the top-left pixel."""

    src_points: Tensor
    """(n, 2) float64."""
    trg_points: Tensor
    """(n, 2) float64."""
    cycle_error: Tensor
    """(n,) distance in source pixels between a point and its match matched back to the source."""


def open_pair(matcher: PointMatcher, src: ImageSource, trg: ImageSource, size: int | Size | None = None) -> "ImagePair":
    """Compute the features of two images once, for any number of queries.

    Args:
        matcher: The model. It is set to evaluation mode, and its weights are loaded.
        src: Source image: a path, a file's bytes, a PIL image, or pixels as uint8 or floats; see `images.as_rgb`.
        trg: Target image.
        size: Side or (H, W) of the network image; `matcher.image_size` if None.

    Raises:
        ZooError: if an input is not a readable image.
    """
    images = as_rgb(src), as_rgb(trg)
    return ImagePair(matcher, *images, *_features(matcher, [*images], size).halves())


def match_images(
    matcher: PointMatcher, src: ImageSource, trg: ImageSource, points: object = None, size: int | Size | None = None
) -> ImageMatches:
    """Match (n, 2) source points; without points, a regular grid, confident matches only. See `open_pair`."""
    pair = open_pair(matcher, src, trg, size)
    return pair.confident_matches() if points is None else pair.match_both_ways(points)


def match_batch(
    matcher: PointMatcher,
    src: Iterable[ImageSource],
    trg: Iterable[ImageSource],
    points: Iterable[object],
    size: int | Size | None = None,
) -> list[ImageMatches]:
    """Match the points of many pairs in one pass of the model. The matches are those of `match_images`.

    Args:
        matcher: The model.
        src: B source images of any sizes, or a tensor (B, 3, H, W).
        trg: B target images.
        points: B sets of (n, 2) source points; n may differ.
        size: As in `open_pair`.

    Raises:
        ZooError: as `match_images`, or if the numbers of images and point sets differ.
    """
    srcs, trgs, queries = [*map(as_rgb, src)], [*map(as_rgb, trg)], [*map(as_points, points)]
    if not len(srcs) == len(trgs) == len(queries) > 0:
        raise ZooError(f"{len(srcs)} source images, {len(trgs)} target images, {len(queries)} sets of points")
    features = _features(matcher, [*srcs, *trgs], size)
    return _Pairs(matcher, _sizes(srcs), _sizes(trgs), *features.halves()).match_both_ways(queries)


@torch.no_grad()
def _features(matcher: PointMatcher, images: list[Image.Image], size: int | Size | None) -> Features:
    matcher.eval()
    matcher.load_weights()
    size = size or matcher.image_size
    H, W = (size, size) if isinstance(size, int) else size
    batch = torch.stack([to_tensor(image, (H, W)) for image in images]).to(matcher.device)
    return matcher.prepare(matcher.backbone(batch))


@dataclass(frozen=True)
class _Pairs:
    """Features of B pairs. Points are lists of B tensors (n, 2) in original pixels; n may differ."""

    matcher: PointMatcher
    src_sizes: Tensor  # (B, 2) original (w, h)
    trg_sizes: Tensor  # (B, 2)
    src_features: Features
    trg_features: Features

    @property
    def network(self) -> Size:
        """(w, h) of the network image."""
        return size_of(self.src_features.image)[::-1]

    def queries(self, points: list[Tensor]) -> Tensor:
        """(B, N, 2) source points in network pixels on the model's device, with zeros after the last of each pair."""
        resized = []
        for asked, size in zip(points, self.src_sizes, strict=True):
            w, h = size.tolist()
            for x, y in asked.tolist():
                if not (0 <= x <= w and 0 <= y <= h):
                    raise ZooError(f"the point ({x:g}, {y:g}) lies outside the source image of {w}x{h} pixels")
            resized.append(resize_points(asked, size, self.network))
        return pad_sequence(resized, batch_first=True).float().to(self.src_features.image.device)

    @torch.no_grad()
    def match(self, points: list[Tensor]) -> list[Tensor]:
        """Matches of source points in the target images."""
        if not any(map(len, points)):
            return points
        found = self.matcher.match_points(self.src_features, self.trg_features, self.queries(points)).double().cpu()
        each = zip(found, points, self.trg_sizes, strict=True)
        return [resize_points(one[: len(p)], self.network, size) for one, p, size in each]

    def match_both_ways(self, points: list[Tensor]) -> list[ImageMatches]:
        """Matches of source points, and their cycle errors."""
        found = self.match(points)
        inside = [torch.minimum(f.clamp(min=0), size) for f, size in zip(found, self.trg_sizes, strict=True)]
        back = _Pairs(self.matcher, self.trg_sizes, self.src_sizes, self.trg_features, self.src_features).match(inside)
        return [ImageMatches(p, f, (b - p).norm(dim=1)) for p, f, b in zip(points, found, back, strict=True)]


@dataclass(frozen=True)
class ImagePair:
    """Two images and their features, see `open_pair`."""

    matcher: PointMatcher
    src: Image.Image
    trg: Image.Image
    src_features: Features
    trg_features: Features

    def swapped(self) -> "ImagePair":
        """The same images with source and target exchanged."""
        return ImagePair(self.matcher, self.trg, self.src, self.trg_features, self.src_features)

    def match(self, points: object) -> Tensor:
        """Match (n, 2) source points: (n, 2) float64.

        Raises:
            ZooError: if a point lies outside the source image.
        """
        return self._pairs.match([as_points(points)])[0]

    def match_both_ways(self, points: object) -> ImageMatches:
        """Match (n, 2) source points, and their matches back to the source for the cycle error."""
        return self._pairs.match_both_ways([as_points(points)])[0]

    def confident_matches(self, grid: int = GRID, max_error: float | None = None) -> ImageMatches:
        """Match the centres of grid x grid cells, and keep confident matches between cells that are not flat, see FLAT.

        Args:
            grid: Cells along each side.
            max_error: Largest cycle error of a confident match in source pixels; `self.max_error` if None.
        """
        found = self.match_both_ways(cell_centres((grid, grid), self.src.size[::-1], dtype=torch.float64))
        kept = found.cycle_error <= (self.max_error if max_error is None else max_error)
        for image, points in ((self.src, found.src_points), (self.trg, found.trg_points)):
            cells = pixels_to_cells(points, (grid, grid), image.size[::-1]).long().clamp(0, grid - 1)
            kept &= _contrast(image, grid)[cells[:, 1], cells[:, 0]] > FLAT
        return ImageMatches(*(field[kept] for field in found))

    @property
    def max_error(self) -> float:
        """Largest cycle error of a confident match, in source pixels, see MAX_CYCLE_ERROR."""
        return MAX_CYCLE_ERROR * max(self.src.size) / GRID

    @torch.no_grad()
    def flow(self) -> Tensor:
        """Dense flow: (2, H, W) float32, target position minus source position of each pixel centre, in pixels."""
        w, h = self.src.size
        flow = self.matcher.match(self.src_features, self.trg_features).flow.float().cpu()
        centres, pairs = cell_centres((h, w), (h, w)).unsqueeze(0), self._pairs  # (1, H*W, 2)
        found = transfer(resize_points(centres, pairs.src_sizes, pairs.network), flow, size_of(self.src_features.image))
        return (resize_points(found, pairs.network, pairs.trg_sizes) - centres)[0].T.unflatten(1, (h, w))

    @torch.no_grad()
    def heat_map(self, point: object) -> Tensor:
        """(h, w) scores of the target cells for one source point (x, y)."""
        query = self._pairs.queries([as_points(torch.as_tensor(point, dtype=torch.float64)[None])])
        return self.matcher.heat_maps(self.src_features, self.trg_features, query)[0, 0].float().cpu()

    @property
    def _pairs(self) -> _Pairs:
        return _Pairs(self.matcher, _sizes([self.src]), _sizes([self.trg]), self.src_features, self.trg_features)


def _sizes(images: list[Image.Image]) -> Tensor:
    """(B, 2) original (w, h)."""
    return torch.tensor([image.size for image in images])


def _contrast(image: Image.Image, grid: int) -> Tensor:
    """(grid, grid) differences between the largest and the smallest grey value of each cell, 0 to 255."""
    grey = to_tensor(image, (16 * grid, 16 * grid)).float().mean(0, keepdim=True)  # 16 pixels a cell
    return (F.max_pool2d(grey, 16) + F.max_pool2d(-grey, 16))[0]


def foreground_maps(backbone: Any, src_img: Tensor, trg_img: Tensor) -> Tensor:
    """(B, h, w) similarity of source cells to the pair's mean class token, scaled to [0, 1] (LPMFlow, supplement 1.2).

    Raises:
        ZooError: if the backbone has no class token.
    """
    features = backbone(torch.cat([src_img, trg_img]))
    if features.cls is None:
        raise ZooError(f"{backbone.spec.key} has no class token, which the foreground map needs: use a ViT")
    mean = F.normalize(sum(features.cls.chunk(2)), dim=1)
    heat = torch.einsum("bchw,bc->bhw", F.normalize(features.maps[-1][: len(src_img)], dim=1), mean)
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    return (heat - low) / (high - low).clamp(min=1e-12)
