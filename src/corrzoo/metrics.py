"""PCK and label transfer, of one pair (`score`, `polygon_mask`, `warp_mask`) and of a benchmark over many processes.

Everything is scored in float64 on the CPU: it is little work, and the numbers do not depend on the accelerator.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor

from corrzoo.geometry import resize_points
from corrzoo.protocols import AVERAGES, Protocol, Side, get_protocol
from corrzoo.types import DIFFICULTIES, Pair, Record, ZooError, as_points

ALPHAS = (0.05, 0.1, 0.15)
"""The tolerances that most tables report."""


def pck(
    pred: Tensor,
    gt: Tensor,
    threshold: Tensor,
    alphas: Sequence[float] = ALPHAS,
    mask: Tensor | None = None,
    compare: str = "<=",
) -> Tensor:
    """Fraction of correct keypoints of each pair, when points and thresholds are in one frame already.

    Args:
        pred: (..., n, 2) predicted points.
        gt: (..., n, 2) annotated points.
        threshold: (...) length L of each pair.
        alphas: A tolerances: a point is correct when its error is within alpha * L.
        mask: (..., n) bool, which rows are keypoints; all when None.
        compare: `<=` or `<`: whether an error of exactly alpha * L is correct.

    Returns:
        (..., A) float64 fractions.

    Raises:
        ZooError: when a pair has no keypoint, or a prediction is not finite.

    >>> pck(torch.tensor([[3.0, 4.0], [0.0, 9.0]]), torch.zeros(2, 2), torch.tensor(100.0), (0.05, 0.1))
    tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    mask = torch.ones(pred.shape[:-1], dtype=torch.bool, device=pred.device) if mask is None else mask
    n = mask.sum(-1, keepdim=True)
    if (n == 0).any():
        raise ZooError("a pair has no keypoints, so its PCK is not defined: leave it out")
    return _within(pred, gt, threshold, alphas, mask, compare).sum(-2) / n.double()


def score(
    pred: Tensor, record: Record, protocol: str | Protocol = "default:bbox", alphas: Sequence[float] = ALPHAS
) -> Tensor:
    """PCK of one pair.

    Args:
        pred: (n, 2) predicted points in original pixels of the protocol's evaluated image, whatever frame it scores
            in. That image is `get_protocol(protocol).evaluated`: trg, or src for CATs, NCNet and their kin.
        record: The pair as annotated.
        protocol: A preset with its threshold kind, see `list_protocols()`; or a Protocol.
        alphas: A tolerances.

    Returns:
        (A,) float64 fractions.

    Raises:
        ZooError: for an unknown protocol, predictions of another shape than the keypoints or not finite, a record
            without keypoints, or without the boxes that the protocol needs.
    """
    protocol, points, n = get_protocol(protocol), as_points(pred).cpu(), len(record.trg_kps)
    if len(points) != n or n == 0:
        raise ZooError(f"expected a prediction for each of the record's {n} keypoints (one or more), got {len(points)}")
    src = _record_side(record.src_kps, record.src_size, record.src_box)
    trg = _record_side(record.trg_kps, record.trg_size, record.trg_box)
    evaluated, query = (trg, src) if protocol.evaluated == "trg" else (src, trg)
    hits = _hits(points[None], evaluated, query, torch.ones(1, n, dtype=torch.bool), protocol, alphas)
    return hits[0].double().mean(0)


def correct_points(pred: Tensor, pair: Pair, protocol: str | Protocol, alpha: float) -> Tensor:
    """(B, K) bool, which predictions of a batch are correct, for pictures; arguments as for `PCK.update`."""
    return _pair_hits(pred, pair, get_protocol(protocol), (alpha,))[..., 0]


def _pair_hits(pred: Tensor, pair: Pair, protocol: Protocol, alphas: Sequence[float]) -> Tensor:
    """(B, K, A) bool, for predictions (B, K, 2) in original pixels of the evaluated image."""
    if pred.ndim != 3 or pred.shape != pair.trg_kps.shape:
        raise ZooError(f"expected predictions of shape {tuple(pair.trg_kps.shape)}, got {tuple(pred.shape)}")
    evaluated = _pair_side(pair, protocol.evaluated)
    query = _pair_side(pair, protocol.query) if protocol.asks_query else evaluated  # which then nobody looks at
    return _hits(pred.detach().cpu().double(), evaluated, query, pair.kps_mask.cpu(), protocol, alphas)


def _hits(
    pred: Tensor, evaluated: Side, query: Side, mask: Tensor, protocol: Protocol, alphas: Sequence[float]
) -> Tensor:
    """(B, K, A) bool, for points in original pixels."""
    gt = protocol.frame.points(evaluated.kps, evaluated.size, annotated=True)
    pred = protocol.frame.points(pred, evaluated.size, annotated=False)
    return _within(pred, gt, protocol.thresholds(evaluated, query, mask), alphas, mask, protocol.compare)


def _within(pred: Tensor, gt: Tensor, threshold: Tensor, alphas: Sequence[float], mask: Tensor, compare: str) -> Tensor:
    """(..., n, A) bool, for points and thresholds in one frame."""
    bad = (~pred.isfinite().all(-1) & mask).nonzero()
    if len(bad):
        at = tuple(bad[0].tolist())
        raise ZooError(f"the prediction at {list(at)} is {pred[at].tolist()}: expected a finite (x, y)")
    dx, dy = (pred.double() - gt.double()).unbind(-1)
    error = (dx**2 + dy**2).sqrt().unsqueeze(-1)  # (..., n, 1)
    limit = (threshold.double().unsqueeze(-1) * error.new_tensor(alphas)).unsqueeze(-2)  # (..., 1, A)
    hit = error <= limit if compare == "<=" else error < limit
    return hit & mask.unsqueeze(-1)


def _record_side(kps: Tensor, size: tuple[int, int], box: Tensor | None) -> Side:
    box = torch.full((4,), torch.nan) if box is None else box
    return Side(*(torch.as_tensor(part, dtype=torch.float64)[None] for part in (kps, size, box)))


def _pair_side(pair: Pair, side: str) -> Side:
    """One image of each pair of a batch, its keypoints back in original pixels."""
    kps, size, box = (getattr(pair, f"{side}_{what}").cpu().double() for what in ("kps", "size", "box"))
    H, W = getattr(pair, f"{side}_img").shape[-2:]
    points = resize_points(kps, size.new_tensor([W, H]), size)
    # The way to float32 network pixels and back moves an annotated integer by up to 1e-4 px, which would decide ties
    # with integer predictions, and what VisualAI rounds down to: undo it.
    whole = points.round()
    return Side(torch.where((points - whole).abs() < 1e-3, whole, points), size, box)


class BenchmarkMetric(torchmetrics.Metric, ABC):
    """What the pairs of a benchmark are scored by: `PCK`, or `LabelTransfer` where outlines are annotated.

    Pairs are int64 rows that start with index and category: collected over processes, each pair counted once, in index
    order. `compute()`, `rows()` and `breakdown()` are to be called by every process, give each the result over all, and
    raise when nothing was scored.

    Attributes:
        name: How tables name it; result files write it in lower case, with an underscore.
        protocol: How it scores.
        query: The image whose points or outline are given.
        evaluated: The other, where they are predicted.
    """

    full_state_update = False
    table: list[Tensor]
    name: ClassVar[str]
    protocol: Protocol | str
    query: str = "src"
    evaluated: str = "trg"

    def __init__(self, width: int, categories: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width, self.categories = width, tuple(categories)
        self.add_state("table", [], dist_reduce_fx="cat")

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """How it scores, for a result file."""

    @abstractmethod
    def columns(self) -> list[tuple[str, str, str]]:
        """Of a table of scores: a heading, and the score's name in `breakdown()` and in `compute()`."""

    @abstractmethod
    def _scores(self, table: Tensor) -> dict[str, Tensor]:
        """(N,) columns of what `rows` says of each pair."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a pair, ordered by index: `index`, `category`, and its scores."""
        with self.sync_context():
            table = self._distinct()
        scores = {name: column.tolist() for name, column in self._scores(table).items()}
        return [
            {"index": index, "category": self._category(category)}
            | {name: column[k] for name, column in scores.items()}
            for k, (index, category) in enumerate(table[:, :2].tolist())
        ]

    def breakdown(self) -> dict[str, dict[str, dict[str, float]]]:
        """Averages within groups of pairs: `{"category": {name: row}}`, where a row has `pairs`, how many there are."""
        with self.sync_context():
            return self._groups(self._distinct())

    def _groups(self, table: Tensor) -> dict[str, dict[str, dict[str, float]]]:
        column = table[:, 1]
        return {"category": {self._category(c): self._row(table[column == c]) for c in column.unique().tolist()}}

    def _row(self, table: Tensor) -> dict[str, float]:
        return {"pairs": len(table)} | {name: column.mean().item() for name, column in self._scores(table).items()}

    def _category(self, number: int) -> str:
        return self.categories[number] if self.categories else str(number)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the rows of all processes (torchmetrics calls this)."""
        if not len(self.table):  # torchmetrics would send a flat float tensor for a process that saw no pair
            self.table = [torch.empty(0, self.width, dtype=torch.int64, device=self.device)]
        super().sync(*args, **kwargs)

    def _distinct(self) -> Tensor:
        """(N, width) on the CPU, one row an index: samplers pad a benchmark with repeats so that processes get alike
        many. Whole rows are sorted, so that the outcome does not depend on who saw what when."""
        parts = [self.table] if isinstance(self.table, Tensor) else self.table
        if not sum(map(len, parts)):
            raise ZooError(f"{type(self).__name__} has scored nothing yet: update() it with pairs that have keypoints")
        rows = torch.cat([part.cpu() for part in parts])
        rows = rows[rows[:, 0].argsort()]
        if (rows[:, 0].diff() == 0).any():
            rows = rows.unique(dim=0)  # slow
        return rows[rows[:, 0].diff(prepend=rows[:1, 0] - 1) != 0]


class PCK(BenchmarkMetric):
    """Percentage of correct keypoints over a benchmark.

    `compute()` returns 0-d float64 tensors in percent, for each alpha (of which `pck@0.1` stands here):

    - `pck@0.1`: what the protocol's authors report, one of the following four;
    - `pck@0.1/image`: mean over pairs;
    - `pck@0.1/point`: all correct points over all points;
    - `pck@0.1/category`: mean over categories of their image average;
    - `pck@0.1/category-point`: mean over categories of their point average.

    Pairs without keypoints do not count; pairs seen twice (by their index) count once.

    `rows()` have the flags of `DIFFICULTIES` (-1 where not annotated), `points` (how many keypoints), and for each
    alpha `pck@0.1` in percent. `breakdown()` has groups of the flags beside those of categories,
    `{"viewpoint": {"0": row, "1": row, "2": row, ">0": row}, "scale": ..., ...}`, and rows have `pairs` and `points`
    (how many), and for each alpha `pck@0.1/image` and `pck@0.1/point` in percent. Only groups with pairs are there, and
    pairs without the flag are in none of its groups. `0` and `>0` are the two-valued form that Lucaosti reports.

    Args:
        protocol: A preset with its threshold kind, see `list_protocols()`; or a Protocol.
        alphas: Tolerances.
        categories: The dataset's names for `Pair.category`; it stays a number when empty.
        **kwargs: For torchmetrics.Metric.

    Raises:
        ZooError: for an unknown protocol.
    """

    name = "PCK"
    protocol: Protocol

    def __init__(
        self,
        protocol: str | Protocol = "default:bbox",
        alphas: Sequence[float] = ALPHAS,
        categories: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(7 + len(alphas), categories, **kwargs)  # index, category, 4 flags, points, hits
        self.protocol, self.alphas = get_protocol(protocol), tuple(alphas)
        self.query, self.evaluated = self.protocol.query, self.protocol.evaluated

    def update(self, pred: Tensor, pair: Pair) -> None:
        """Score a batch.

        Args:
            pred: (B, K, 2) predicted points in original pixels of the protocol's evaluated image; rows where
                `pair.kps_mask` is False mean nothing. Where src is evaluated, predict with `pair.swapped()` and score
                with `pair` itself.
            pair: The batch, as the dataset gives it.

        Raises:
            ZooError: when shapes differ, a prediction is not finite, a category has no name, or boxes are missing.
        """
        if self.categories and pair.category.max() >= len(self.categories):
            raise ZooError(f"category {int(pair.category.max())} has no name: PCK was given {len(self.categories)}")
        points = pair.kps_mask.cpu().sum(1, keepdim=True)
        if not points.any():
            return
        hits = _pair_hits(pred, pair, self.protocol, self.alphas).sum(1)
        columns = (pair.index[:, None], pair.category[:, None], pair.difficulty, points, hits)
        rows = torch.cat([column.cpu() for column in columns], dim=1)
        self.table.append(rows[rows[:, 6] > 0].to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """Every average, see the class."""
        table = self._distinct()
        groups = [table[table[:, 1] == category] for category in table[:, 1].unique()]
        per_category = torch.stack([_means(group) for group in groups]).mean(0)
        averages = dict(zip(AVERAGES, [*_means(table), *per_category], strict=True))
        named = {"": averages[self.protocol.averages[0]]} | {f"/{name}": average for name, average in averages.items()}
        return {f"{key}{name}": value for name, values in named.items() for key, value in self._by_alpha(values)}

    def _scores(self, table: Tensor) -> dict[str, Tensor]:
        named = dict(zip((*DIFFICULTIES, "points"), table[:, 2:7].unbind(1), strict=True))
        return named | dict(self._by_alpha(_percent(table).T))

    def _groups(self, table: Tensor) -> dict[str, dict[str, dict[str, float]]]:
        out = super()._groups(table)
        for name, flag in zip(DIFFICULTIES, table[:, 2:6].unbind(1), strict=True):
            groups = {str(value): flag == value for value in flag[flag >= 0].unique().tolist()} | {">0": flag > 0}
            out[name] = {group: self._row(table[members]) for group, members in groups.items() if members.any()}
        return out

    def _row(self, table: Tensor) -> dict[str, float]:
        means = zip(("image", "point"), _means(table), strict=True)
        values = {f"{key}/{name}": value.item() for name, mean in means for key, value in self._by_alpha(mean)}
        return {"pairs": len(table), "points": int(table[:, 6].sum())} | values

    def _by_alpha(self, values: Tensor) -> list[tuple[str, Tensor]]:
        return [(f"pck@{alpha:g}", value) for alpha, value in zip(self.alphas, values, strict=True)]

    def describe(self) -> dict[str, Any]:
        how = {"protocol": str(self.protocol), "flaw": self.protocol.flaw}
        return how | {"alphas": list(self.alphas), "average": self.protocol.averages[0]}

    def columns(self) -> list[tuple[str, str, str]]:
        within = "point" if "point" in self.protocol.averages[0] else "image"
        return [(f"@{alpha:g}", f"pck@{alpha:g}/{within}", f"pck@{alpha:g}") for alpha in self.alphas]


def _percent(table: Tensor) -> Tensor:
    """(N, A) of each of PCK's rows."""
    return 100 * (table[:, 7:].double() / table[:, 6:7])


def _means(table: Tensor) -> Tensor:
    """(2, A) percentages, over pairs and over points, of PCK's rows."""
    return torch.stack([_percent(table).mean(0), 100 * table[:, 7:].sum(0).double() / table[:, 6].sum()])


def polygon_mask(polygon: Tensor, size: tuple[int, int]) -> Tensor:
    """Rasterise a polygon as skimage.draw.polygon does.

    Pixel (row, column) is inside when the point (x, y) = (column, row) is inside by the even-odd rule, or lies on an
    edge or a vertex. What is outside the image is cut off.

    Args:
        polygon: (n, 2) vertices, at least three; the last is joined to the first.
        size: (w, h) of the image.

    Returns:
        (h, w) bool.

    Raises:
        ZooError: for fewer than three vertices, or one that is not finite.

    >>> polygon_mask(torch.tensor([[1, 0], [3, 0], [1, 2]]), (4, 3)).int()
    tensor([[0, 1, 1, 1],
            [0, 1, 1, 0],
            [0, 1, 0, 0]], dtype=torch.int32)
    """
    vertices = as_points(polygon).cpu()
    if len(vertices) < 3 or not vertices.isfinite().all():
        raise ZooError(f"a polygon needs three or more vertices with finite x and y, got {vertices.tolist()}")
    x, y = torch.arange(size[0], dtype=torch.float64), torch.arange(size[1], dtype=torch.float64).unsqueeze(1)
    inside, on_edge = torch.zeros(2, size[1], size[0], dtype=torch.bool)
    for (x0, y0), (x1, y1) in zip(vertices.tolist(), vertices.roll(-1, 0).tolist(), strict=True):
        level = slice(max(math.ceil(min(y0, y1)), 0), max(math.floor(max(y0, y1)) + 1, 0))  # rows that the edge is in
        rows = y[level]
        side = (x1 - x0) * (rows - y0) - (y1 - y0) * (x - x0)  # zero on the edge's line
        inside[level] ^= ((y0 <= rows) != (y1 <= rows)) & ((side > 0) == (y1 > y0))  # crossed on the right
        on_edge[level] |= (side == 0) & (x >= min(x0, x1)) & (x <= max(x0, x1))
    return inside | on_edge


def warp_mask(mask: Tensor, points: Tensor) -> Tensor:
    """The source mask as the target sees it through a dense target -> source grid.

    Args:
        mask: (h, w) bool, of the source image.
        points: (h', w', 2) for each target pixel its source position, in pixels of the source image (`geometry`).

    Returns:
        (h', w') bool: the mask read bilinearly, over one half. Outside the source image is background.
    """
    grid = 2 * points.cpu().double() / torch.tensor([mask.shape[1], mask.shape[0]]) - 1
    read = F.grid_sample(mask.cpu().double()[None, None], grid[None], padding_mode="zeros", align_corners=False)
    return read[0, 0] > 0.5


class LabelTransfer(BenchmarkMetric):
    """LT-ACC and IoU of object outlines that are carried from source to target (Caltech-101), in percent.

    The field has two readings of the carried mask, with different numbers, and both are scored: `polygon`, which is
    `polygon_mask` of the source outline's carried vertices (HPF with images of at most 300 px, DHPF at 240 x 240), and
    `mask`, which is `warp_mask` of the source outline's mask (WeakAlign and the papers that follow it).

    `compute()` returns means over pairs, 0-d float64, for each reading (of which `polygon` stands here):
    `lt_acc_polygon`, the fraction of the target image's pixels that are labelled rightly, and `iou_polygon`; `rows()`
    and `breakdown()` name them alike.

    Args:
        categories: The dataset's names for `Pair.category`; it stays a number when empty.
        **kwargs: For torchmetrics.Metric.
    """

    name = "Label transfer"
    protocol = "label-transfer"
    readings = ("polygon", "mask")

    def __init__(self, categories: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(9, categories, **kwargs)  # index, category, pixels, by reading: right, in both, in either mask

    def update(self, polygon: Tensor, mask: Tensor, gt: Tensor, index: int, category: int = 0) -> None:
        """Score one pair.

        Args:
            polygon: (h, w) bool, what is inside the outline that was carried to the target image.
            mask: (h, w) bool, the source object's mask as the target image sees it.
            gt: (h, w) bool, the target object's mask.
            index: The pair's position in the benchmark.
            category: As in `Pair.category`.

        Raises:
            ZooError: when the shapes differ, or the target mask is empty.
        """
        counts = [index, category, gt.numel()]
        for pred in (polygon, mask):
            if pred.shape != gt.shape or not gt.any():
                got = f"got {pred.shape} for {gt.shape}"
                raise ZooError(f"pair {index}: expected masks of one shape, the target's not empty: {got}")
            counts += [int((pred == gt).sum()), int((pred & gt).sum()), int((pred | gt).sum())]
        self.table.append(torch.tensor([counts], device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """The four means, see the class."""
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
