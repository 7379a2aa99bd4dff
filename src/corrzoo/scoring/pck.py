"""PCK of one pair (`score`) and of a benchmark (`PCK`). Everything is scored in float64 on the CPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corrzoo.geometry import resize_points
from corrzoo.scoring.metric import BenchmarkMetric
from corrzoo.scoring.protocols import AVERAGES, Protocol, Side, get_protocol
from corrzoo.types import DIFFICULTIES, Pair, Record, ZooError, as_points

ALPHAS = (0.05, 0.1, 0.15)
"""The tolerances that most tables report."""


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
