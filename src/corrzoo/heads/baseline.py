"""Baseline: cosine correlation and a soft-argmax, nothing else to learn but a temperature.

"Bridging the Gap between Semantic Correspondence and Robust Visual Representation" (ViTSC), section 3.1, eqs. 1-6.
"""

from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from corrzoo import ops
from corrzoo.geometry import bilinear_cells, cell_centres, cells_to_pixels, points_to_flow, sample, size_of
from corrzoo.heads.levels import stack_levels
from corrzoo.matcher import HEADS, Matcher
from corrzoo.types import Features, Match, ZooError

READOUT = {"soft": "none", "kernel": "argmax", "window": "crop"}
"""The read-outs that are an expectation, and what `ops` calls their window."""


@HEADS.register
class Baseline(Matcher):
    """ViTSC's Baseline (section 3.1): match by cosine similarity, read the position by a soft-argmax.

    Trained, its backbone learns through the EPE (eq. 6). Untrained, it measures what a backbone's features know.

    Args:
        stride: All feature maps are resized to this stride (3.1: 8).
        readout: How a row of the correlation becomes a position: `kernel` soft-argmax (3.1, after SFNet), plain
            `soft`-argmax, soft-argmax over a `window` around the maximum, `argmax`, or `identity`, which looks at no
            feature and answers the same relative position: the floor under every result.
        temperature: T of eq. 2 (3.1: 0.03).
        learn_temperature: T trains (3.1).
        sigma: Width of the kernel in cells. our choice: a quarter of the target grid's longer side, since the paper
            gives none: 7 on 28 x 28, as SimSC and SD4Match have it.
        radius: The window reaches this many cells to each side of the maximum.
        remove_mean: Each map loses its mean over the image before it is normalised. Helps CNN features, which share
            a large common component.
        point_query: Where single points are queried: `flow` reads the dense flow between the four cells around a
            point (3.1); `features` reads the source features at the point and matches those: finer than the grid.
        mutual: Each score is weighted by how close it comes to the best of its row and of its column (soft mutual
            nearest neighbours: NCNet, GSF eq. 4).
        **options: What every head takes, see Matcher.
    """

    evaluation_options: ClassVar[frozenset[str]] = Matcher.evaluation_options | {
        "readout",
        "sigma",
        "radius",
        "point_query",
        "mutual",
    }

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
        for name, value in {"stride": stride, "temperature": temperature, "sigma": sigma, "radius": radius}.items():
            if value is not None and value <= 0:
                raise ZooError(f"{name} {value}: expected a number above 0")
        self.stride, self.readout = stride, readout
        self.sigma, self.radius = sigma, radius
        self.remove_mean, self.point_query, self.mutual = remove_mean, point_query, mutual
        self.temperature = nn.Parameter(torch.tensor(temperature), requires_grad=learn_temperature)

    def prepare(self, features: Features) -> Features:
        """All levels at one stride, as one map (B, C, h, w)."""
        H, W = features.image.shape[-2:]
        grid = (max(round(H / self.stride), 1), max(round(W / self.stride), 1))
        maps = features.maps
        if self.remove_mean:
            maps = [level - level.mean((2, 3), keepdim=True) for level in maps]
        return features._replace(maps=[stack_levels(maps, grid)])

    def match(self, src: Features, trg: Features) -> Match:
        """Eqs. 1-4 for every cell of the source grid."""
        grid, image = size_of(src.maps[0]), size_of(src.image)
        if self.readout == "identity":
            return Match(src.image.new_zeros(len(src.image), 2, *grid))
        points = self._match_rows(rearrange(src.maps[0], "b c h w -> b (h w) c"), src, trg)
        return Match(points_to_flow(points, grid, image))

    def match_points(self, src: Features, trg: Features, points: Tensor) -> Tensor:
        """See the option `point_query`; `flow` gives what the dense flow gives, from four cells a point."""
        if self.readout == "identity":
            return points
        grid, image = size_of(src.maps[0]), size_of(src.image)
        if self.point_query == "features":
            return self._match_rows(sample(src.maps[0], points, image), src, trg).to(points.dtype)
        cells, weights = bilinear_cells(points, grid, image)  # (B, n, 4)
        rows = rearrange(src.maps[0], "b c h w -> b (h w) c")
        picked = rearrange(cells, "b n four -> b (n four) 1")
        matched = self._match_rows(rows.gather(1, picked.expand(-1, -1, rows.shape[-1])), src, trg)
        centres = cell_centres(grid, image, points.device, matched.dtype)[cells]  # (B, n, 4, 2)
        flow = rearrange(matched, "b (n four) xy -> b n four xy", four=4) - centres
        return points + (weights.unsqueeze(-1) * flow).sum(2)

    def _match_rows(self, rows: Tensor, src: Features, trg: Features) -> Tensor:
        """Target positions (B, N, 2) in pixels of the network image, for source features (B, N, C)."""
        (h, w), (H, W) = trg.maps[0].shape[-2:], trg.image.shape[-2:]
        columns = rearrange(trg.maps[0], "b c h w -> b (h w) c")
        window = READOUT.get(self.readout, "none")
        how: dict[str, Any] = dict(
            window=window,
            sigma=(self.sigma or 0.25 * max(h, w)) if window == "argmax" else None,
            radius=self.radius if window == "crop" else None,
        )
        temperature = self.temperature.clamp(min=1e-3)
        if self.mutual:
            every_row = rearrange(src.maps[0], "b c h w -> b (h w) c")
            best_of_column = ops.mutual(every_row, columns).col_max.unsqueeze(1)
            scores = ops.correlation(rows, columns).relu()
            best_of_row = scores.amax(2, keepdim=True)
            scores = scores**3 / (best_of_row * best_of_column).clamp(min=1e-5)  # s * s/row * s/column
            found = ops.readout(scores, (h, w), temperature, **how)
        else:
            found = ops.match(rows, columns, (h, w), temperature, backend=self.backend, **how)
        cells = found.xy
        if self.readout == "argmax":
            cells = torch.stack([found.argmax % w, found.argmax // w], dim=-1).to(cells) + 0.5
        return cells_to_pixels(cells, (h, w), (H, W))
