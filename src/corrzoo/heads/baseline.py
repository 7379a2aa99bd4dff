"""Baseline: cosine correlation and a soft-argmax; the head has no parameter but its temperature.

"Bridging the Gap between Semantic Correspondence and Robust Visual Representation" (ViTSC), section 3.1, eqs. 1-6.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from corrzoo import ops
from corrzoo.errors import check_above_zero
from corrzoo.geometry import bilinear_cells, cell_centres, cells_to_pixels, points_to_flow, sample, size_of
from corrzoo.heads.guidance import mutual_confidence
from corrzoo.heads.levels import COLDEST, cells_of, rows_of, stack_levels, stride_grid
from corrzoo.matcher import HEADS, Matcher
from corrzoo.types import Features, Match

WINDOWS = {"soft": "none", "kernel": "argmax", "window": "crop"}
"""The window of `ops.match` for each read-out by a soft-argmax."""


@HEADS.register
class Baseline(Matcher):
    """The Baseline of ViTSC (section 3.1): match by cosine similarity, read the position by a soft-argmax.

    Untrained, it measures a backbone's features. Trained, the backbone learns through the EPE (eq. 6). our choice: the
    EPE is on the grid of `stride`; section 3.1 enlarges the flow to the image.

    Args:
        stride: Resize all feature maps to this stride (3.1: 8).
        readout: How a row of the correlation gives a position: `kernel` soft-argmax (3.1, from SFNet), plain
            `soft`-argmax, soft-argmax over a `window` around the maximum, `argmax`, or `identity`: the same relative
            position in the other image, a lower bound that uses no features.
        temperature: T of eq. 2 (3.1: 0.03).
        learn_temperature: Train the temperature (3.1).
        sigma: Width of the kernel in cells. our choice, as the paper gives none: a quarter of the target grid's
            longer side, 7 on 28 x 28 as in SimSC and SD4Match.
        radius: Cells from the maximum to each side of the `window`.
        remove_mean: Subtract each map's mean over the image first, as CNN features share a large common component.
        point_query: How single points are matched: `flow` interpolates the dense flow between the four cells around a
            point (3.1); `features` interpolates the source features at the point and matches those, which is finer.
        mutual: Weight each score by its ratios to the best of its row and of its column (NCNet; GSF eq. 4).
        **options: Options of `Matcher`.
    """

    evaluation_options: ClassVar[frozenset[str]] = Matcher.evaluation_options.union(
        "readout sigma radius point_query mutual".split()
    )

    def __init__(
        self,
        stride: int = 8,
        readout: Literal["kernel", "soft", "window", "argmax", "identity"] = "kernel",
        temperature: float = 0.03,
        learn_temperature: bool = True,
        sigma: float | None = None,
        radius: int = 2,
        remove_mean: bool = False,
        point_query: Literal["flow", "features"] = "flow",
        mutual: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_above_zero(stride=stride, temperature=temperature, sigma=sigma, radius=radius)
        self.stride, self.readout = stride, readout
        self.sigma, self.radius = sigma, radius
        self.remove_mean, self.point_query, self.mutual = remove_mean, point_query, mutual
        self.temperature = nn.Parameter(torch.tensor(temperature), requires_grad=learn_temperature)

    def prepare(self, features: Features) -> Features:
        """All levels (B, C_i, h_i, w_i) as one map (B, C, h, w) of the head's stride."""
        grid = stride_grid(size_of(features.image), self.stride)
        return features.with_maps([stack_levels(features.maps, grid, self.remove_mean)])

    def match(self, src: Features, trg: Features) -> Match:
        """Eqs. 1-4 for every cell of the source grid."""
        grid, image = size_of(src.maps[0]), size_of(src.image)
        if self.readout == "identity":
            return Match(src.image.new_zeros(len(src.image), 2, *grid))
        return Match(points_to_flow(self._match_rows(rows_of(src), src, trg), grid, image))

    def match_points(self, src: Features, trg: Features, points: Tensor) -> Tensor:
        """See the option `point_query`. `flow` gives the same as the dense flow, from four cells per point."""
        if self.readout == "identity":
            return points
        grid, image = size_of(src.maps[0]), size_of(src.image)
        if self.point_query == "features":
            return self._match_rows(sample(src.maps[0], points, image), src, trg).to(points.dtype)
        cells, weights = bilinear_cells(points, grid, image)  # (B, n, 4)
        rows = rows_of(src).take_along_dim(cells.flatten(1).unsqueeze(2), 1)  # (B, n*4, C)
        matched = self._match_rows(rows, src, trg)  # (B, n*4, 2)
        centres = cell_centres(grid, image, points.device, matched.dtype)[cells]  # (B, n, 4, 2)
        flow = matched.unflatten(1, (-1, 4)) - centres
        return points + (weights.unsqueeze(-1) * flow).sum(2)

    def _match_rows(self, rows: Tensor, src: Features, trg: Features) -> Tensor:
        """Target positions (B, N, 2) in pixels of the network image, for source features (B, N, C)."""
        grid, columns = size_of(trg.maps[0]), rows_of(trg)  # (B, h*w, C)
        how: dict[str, Any] = {"window": WINDOWS.get(self.readout, "none"), "radius": self.radius}
        how["sigma"] = self.sigma or 0.25 * max(grid)
        temperature = self.temperature.clamp(min=COLDEST)
        if self.mutual:
            best_of_column = ops.mutual(rows_of(src), columns).col_max.unsqueeze(1)
            scores = ops.correlation(rows, columns).relu()  # (B, N, h*w)
            scores = scores * mutual_confidence(scores, best_of_column)
            found = ops.readout(scores, grid, temperature, **how)
        else:
            found = ops.match(rows, columns, grid, temperature, backend=self.backend, **how)
        cells = (cells_of(found.argmax, grid) + 0.5).to(found.xy) if self.readout == "argmax" else found.xy
        return cells_to_pixels(cells, grid, size_of(trg.image))
