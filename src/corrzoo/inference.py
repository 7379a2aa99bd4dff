"""Match two images of any size: points, dense flow and heat maps in original pixels."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from corrzoo.geometry import Size, cell_centres, resize_points, size_of, transfer
from corrzoo.images import ImageSource, as_rgb, to_tensor
from corrzoo.types import Features, ZooError, as_points

GRID = 10
"""our choice: without query points, the centres of GRID x GRID cells are matched."""
MAX_CYCLE_ERROR = 0.25
"""our choice: matches of the grid are kept if their cycle error is at most this share of a cell."""


class ImageMatches(NamedTuple):
    """Matched points, (x, y) in original pixels. (0, 0) is the top-left corner of the top-left pixel."""

    src_points: Tensor
    """(n, 2) float64."""
    trg_points: Tensor
    """(n, 2) float64."""
    cycle_error: Tensor
    """(n,) distance in source pixels between a point and its match matched back to the source."""


def open_pair(matcher: Any, src: ImageSource, trg: ImageSource, size: int | Size | None = None) -> "ImagePair":
    """Compute the features of two images once, for any number of queries.

    Args:
        matcher: The model. It is set to evaluation mode, and its weights are loaded.
        src: Source image: a path, PIL image or uint8 pixels, see `images.as_rgb`.
        trg: Target image.
        size: Side or (H, W) of the network image; `matcher.image_size` if None.

    Raises:
        ZooError: if an input is not a readable image.
    """
    matcher.eval().load_weights()
    size = size or matcher.image_size
    H, W = (size, size) if isinstance(size, int) else size
    images = as_rgb(src), as_rgb(trg)
    batch = torch.stack([to_tensor(image, (H, W)) for image in images]).to(matcher.device)
    with torch.no_grad():
        return ImagePair(matcher, *images, *matcher.prepare(matcher.backbone(batch)).halves())


def match_images(
    matcher: Any, src: ImageSource, trg: ImageSource, points: object = None, size: int | Size | None = None
) -> ImageMatches:
    """Match (n, 2) source points; without points, a regular grid, cycle-consistent matches only. See `open_pair`."""
    pair = open_pair(matcher, src, trg, size)
    return pair.confident_matches() if points is None else pair.match_both_ways(points)


@dataclass(frozen=True)
class ImagePair:
    """Two images and their features, see `open_pair`."""

    matcher: Any
    src: Image.Image
    trg: Image.Image
    src_features: Features
    trg_features: Features

    def swapped(self) -> "ImagePair":
        """The same images with source and target exchanged."""
        return ImagePair(self.matcher, self.trg, self.src, self.trg_features, self.src_features)

    @torch.no_grad()
    def match(self, points: object) -> Tensor:
        """Match (n, 2) source points: (n, 2) float64.

        Raises:
            ZooError: if a point lies outside the source image.
        """
        queries = self._to_network(as_points(points))
        found = self.matcher.match_points(self.src_features, self.trg_features, queries)[0].double().cpu()
        return resize_points(found, self._network, torch.tensor(self.trg.size))

    def match_both_ways(self, points: object) -> ImageMatches:
        """Match (n, 2) source points, and their matches back to the source for the cycle error."""
        queries = as_points(points)
        found = self.match(queries)
        inside = torch.minimum(found.clamp(min=0), found.new_tensor(self.trg.size))
        return ImageMatches(queries, found, (self.swapped().match(inside) - queries).norm(dim=1))

    def confident_matches(self) -> ImageMatches:
        """Cycle-consistent matches of a regular grid, see GRID and MAX_CYCLE_ERROR."""
        w, h = self.src.size
        found = self.match_both_ways(cell_centres((GRID, GRID), (h, w), dtype=torch.float64))
        kept = found.cycle_error <= MAX_CYCLE_ERROR * max(w, h) / GRID
        return ImageMatches(*(field[kept] for field in found))

    @torch.no_grad()
    def flow(self) -> Tensor:
        """Dense flow: (2, H, W) float32, target position minus source position of each pixel centre, in pixels."""
        w, h = self.src.size
        flow = self.matcher.match(self.src_features, self.trg_features).flow.float().cpu()
        centres = cell_centres((h, w), (h, w))
        queries = resize_points(centres, torch.tensor(self.src.size), self._network)
        found = transfer(queries.unsqueeze(0), flow, size_of(self.src_features.image))[0]
        return (resize_points(found, self._network, torch.tensor(self.trg.size)) - centres).T.unflatten(1, (h, w))

    @torch.no_grad()
    def heat_map(self, point: object) -> Tensor:
        """(h, w) scores of the target cells for one source point (x, y)."""
        query = self._to_network(as_points(torch.as_tensor(point, dtype=torch.float64)[None]))
        return self.matcher.heat_maps(self.src_features, self.trg_features, query)[0, 0].float().cpu()

    @property
    def _network(self) -> Tensor:
        """(w, h) of the network image."""
        return torch.tensor(self.src_features.image.shape[:1:-1])

    def _to_network(self, points: Tensor) -> Tensor:
        """(n, 2) source points -> (1, n, 2) network pixels on the model's device."""
        w, h = self.src.size
        for x, y in points.tolist():
            if not (0 <= x <= w and 0 <= y <= h):
                raise ZooError(f"the point ({x:g}, {y:g}) lies outside the source image of {w}x{h} pixels")
        resized = resize_points(points, torch.tensor(self.src.size), self._network)
        return resized.float().unsqueeze(0).to(self.src_features.image.device)


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
