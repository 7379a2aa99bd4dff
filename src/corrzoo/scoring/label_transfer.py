"""Label transfer accuracy (LT-ACC) and IoU of object outlines (Caltech-101), in float64 on the CPU."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from corrzoo.scoring.metric import BenchmarkMetric
from corrzoo.types import ZooError, as_points


class LabelTransfer(BenchmarkMetric):
    """LT-ACC and IoU of source object masks that are transferred to the target (Caltech-101), in percent.

    The field transfers masks in two ways, with different numbers. Both are scored:

    - `polygon`: `polygon_mask` of the matched vertices of the source outline (HPF up to 300 px, DHPF at 240 x 240);
    - `mask`: `warp_mask` of the source mask (WeakAlign and the papers that follow it).

    `compute()` returns means over pairs, 0-d float64: `lt_acc_polygon`, the share of target pixels with the correct
    label, `iou_polygon`, `lt_acc_mask` and `iou_mask`. `rows()` and `breakdown()` have the same names.

    Args:
        categories: Names of the values of `Pair.category`; numbers if empty.
        **kwargs: Options of torchmetrics.Metric.
    """

    name = "Label transfer"
    protocol = "label-transfer"
    readings = ("polygon", "mask")

    def __init__(self, categories: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(9, categories, **kwargs)  # index, category, pixels, by reading: right, in both, in either mask

    def update(self, polygon: Tensor, mask: Tensor, gt: Tensor, index: int, category: int = 0) -> None:
        """Score one pair.

        Args:
            polygon: (h, w) bool, inside of the outline that was matched to the target image.
            mask: (h, w) bool, the source object's mask warped to the target image.
            gt: (h, w) bool, the target object's mask.
            index: Position of the pair in the benchmark.
            category: As in `Pair.category`.

        Raises:
            ZooError: if shapes differ, or the target mask is empty.
        """
        counts = [index, category, gt.numel()]
        for pred in (polygon, mask):
            if pred.shape != gt.shape or not gt.any():
                got = f"got {pred.shape} for {gt.shape}"
                raise ZooError(f"pair {index}: expected masks of one shape and a target mask that is not empty, {got}")
            counts += [int((pred == gt).sum()), int((pred & gt).sum()), int((pred | gt).sum())]
        self.table.append(torch.tensor([counts], device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """Means over pairs by name, see the class."""
        return {name: values.mean() for name, values in self._scores(self._distinct()).items()}

    def describe(self) -> dict[str, Any]:
        return {"protocol": self.protocol, "flaw": None, "alphas": [], "average": "image"}

    def columns(self) -> list[tuple[str, str, str]]:
        measures = (("LT-ACC", "lt_acc"), ("IoU", "iou"))
        keys = [(f"{shown} {r}", f"{name}_{r}") for r in self.readings for shown, name in measures]
        return [(heading, key, key) for heading, key in keys]

    def _scores(self, table: Tensor) -> dict[str, Tensor]:
        pixels, *counts = table[:, 2:].double().unbind(1)
        out: dict[str, Tensor] = {}
        for reading, right, both, either in zip(self.readings, counts[::3], counts[1::3], counts[2::3], strict=True):
            out |= {f"lt_acc_{reading}": 100 * right / pixels, f"iou_{reading}": 100 * both / either}
        return out


def polygon_mask(polygon: Tensor, size: tuple[int, int]) -> Tensor:
    """Rasterise a polygon as skimage.draw.polygon does.

    Pixel (row, column) is inside if the point (x, y) = (column, row) is inside by the even-odd rule, or on an edge.

    Args:
        polygon: (n, 2) vertices, three or more; the last is joined to the first.
        size: (w, h) of the image.

    Returns:
        (h, w) bool.

    Raises:
        ZooError: if there are fewer than three vertices, or one is not finite.

    >>> polygon_mask(torch.tensor([[1, 0], [3, 0], [1, 2]]), (4, 3)).int()
    tensor([[0, 1, 1, 1],
            [0, 1, 1, 0],
            [0, 1, 0, 0]], dtype=torch.int32)
    """
    vertices = as_points(polygon)
    if len(vertices) < 3 or not vertices.isfinite().all():
        raise ZooError(f"a polygon needs three or more vertices with finite x and y, got {vertices.tolist()}")
    x, y = torch.arange(size[0], dtype=torch.float64), torch.arange(size[1], dtype=torch.float64).unsqueeze(1)
    inside, on_edge = torch.zeros(2, size[1], size[0], dtype=torch.bool)
    for (x0, y0), (x1, y1) in zip(vertices.tolist(), vertices.roll(-1, 0).tolist(), strict=True):
        level = slice(max(math.ceil(min(y0, y1)), 0), max(math.floor(max(y0, y1)) + 1, 0))  # rows that the edge crosses
        rows = y[level]
        side = (x1 - x0) * (rows - y0) - (y1 - y0) * (x - x0)  # 0 on the line through the edge
        inside[level] ^= ((y0 <= rows) != (y1 <= rows)) & ((side > 0) == (y1 > y0))  # the edge is crossed to the right
        on_edge[level] |= (side == 0) & (x >= min(x0, x1)) & (x <= max(x0, x1))
    return inside | on_edge


def warp_mask(mask: Tensor, points: Tensor) -> Tensor:
    """Warp a source mask to the target image.

    Args:
        mask: (h, w) bool, of the source image.
        points: (h', w', 2) source position of each target pixel, in pixels of the source image.

    Returns:
        (h', w') bool: whether the bilinearly sampled mask is above 0.5. Outside the source image is background.
    """
    grid = 2 * points.cpu().double() / torch.tensor([mask.shape[1], mask.shape[0]]) - 1
    read = F.grid_sample(mask.cpu().double()[None, None], grid[None], padding_mode="zeros", align_corners=False)
    return read[0, 0] > 0.5
