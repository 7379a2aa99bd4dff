"""Two images of one's own under one matcher: matches, flow and heat maps in the images' own pixels."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from corrzoo.geometry import cell_centres, resize_points, size_of, transfer
from corrzoo.types import Features, ZooError, as_points

if TYPE_CHECKING:
    from corrzoo.matcher import Matcher

GRID = 10
"""our choice: where no points are asked for, the centres of so many cells on each axis are tried."""
ROUND_TRIP = 0.25
"""our choice: of those, the ones are kept whose match is matched back to within this share of a cell."""


class ImageMatches(NamedTuple):
    """Points of a source image and their matches: (x, y) in pixels of the images as they were given.

    Pixel i covers [i, i + 1): (0, 0) is the image's top-left corner and (w, h) its bottom-right one.
    """

    src_points: Tensor
    """(n, 2) float64."""
    trg_points: Tensor
    """(n, 2) float64."""
    round_trip: Tensor
    """(n,) float64: how far from its source point a match is matched back to, in source pixels; trust the small."""


@dataclass(frozen=True)
class ImagePair:
    """Two images whose features are computed already: see `Matcher.open_images`."""

    matcher: "Matcher"
    src: Image.Image
    """RGB, as given."""
    trg: Image.Image
    src_features: Features
    """Prepared, a batch of one."""
    trg_features: Features

    def swapped(self) -> "ImagePair":
        """The same images asked the other way round."""
        return ImagePair(self.matcher, self.trg, self.src, self.trg_features, self.src_features)

    @torch.no_grad()
    def match(self, points: object) -> Tensor:
        """Matches (n, 2) float64 of source points (n, 2), both in pixels of the images as given.

        Raises:
            ZooError: when a point lies outside the source image.
        """
        asked = self._to_network(as_points(points))
        found = self.matcher.match_points(self.src_features, self.trg_features, asked)[0].double().cpu()
        return resize_points(found, self._network, torch.tensor(self.trg.size))

    def match_both_ways(self, points: object) -> ImageMatches:
        """Matches of source points (n, 2), and how far from the points these are matched back to."""
        asked = as_points(points)
        found = self.match(asked)
        inside = torch.minimum(found.clamp(min=0), found.new_tensor(self.trg.size))
        return ImageMatches(asked, found, (self.swapped().match(inside) - asked).norm(dim=1))

    def confident_matches(self) -> ImageMatches:
        """Matches of a regular grid of points, as far as they hold in both directions: see GRID and ROUND_TRIP."""
        w, h = self.src.size
        found = self.match_both_ways(cell_centres((GRID, GRID), (h, w), dtype=torch.float64))
        kept = found.round_trip <= ROUND_TRIP * max(w, h) / GRID
        return ImageMatches(*(field[kept] for field in found))

    @torch.no_grad()
    def flow(self) -> Tensor:
        """(2, H, W) float32, a displacement for each pixel of the source as given.

        The pixel in column x and row y lies at (x + 0.5, y + 0.5), and its match at that plus the displacement, in
        pixels of the target as given: where the images differ in size, equal places do not have a flow of zero.
        """
        w, h = self.src.size
        flow = self.matcher.match(self.src_features, self.trg_features).flow.float().cpu()
        centres = cell_centres((h, w), (h, w))
        asked = resize_points(centres, torch.tensor(self.src.size), self._network)
        found = transfer(asked.unsqueeze(0), flow, size_of(self.src_features.image))[0]
        return (resize_points(found, self._network, torch.tensor(self.trg.size)) - centres).T.unflatten(1, (h, w))

    @torch.no_grad()
    def heat_map(self, point: object) -> Tensor:
        """(h, w) scores of the target's cells for one source point (x, y): see `Matcher.heat_maps`."""
        asked = self._to_network(as_points(torch.as_tensor(point, dtype=torch.float64)[None]))
        return self.matcher.heat_maps(self.src_features, self.trg_features, asked)[0, 0].float().cpu()

    @property
    def _network(self) -> Tensor:
        """(w, h) of the network image."""
        return torch.tensor(self.src_features.image.shape[:1:-1])

    def _to_network(self, points: Tensor) -> Tensor:
        """Source points (n, 2) as (1, n, 2) in pixels of the network image, on the matcher's device."""
        w, h = self.src.size
        for x, y in points.tolist():
            if not (0 <= x <= w and 0 <= y <= h):
                raise ZooError(f"the point ({x:g}, {y:g}) lies outside the source image of {w}x{h} pixels")
        asked = resize_points(points, torch.tensor(self.src.size), self._network)
        return asked.float().unsqueeze(0).to(self.src_features.image.device)
