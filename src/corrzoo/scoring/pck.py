"""PCK of one pair (`score`) and of a benchmark (`PCK`), in float64 on the CPU."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from corrzoo.geometry import resize_points
from corrzoo.scoring.metric import BenchmarkMetric
from corrzoo.scoring.protocols import AVERAGES, Protocol, Side, get_protocol
from corrzoo.types import DIFFICULTIES, Pair, Record, ZooError, as_points

ALPHAS = (0.05, 0.1, 0.15)
"""Tolerances that most papers report."""
BUFFERED = 4096
"""our choice: pairs that `PCK` buffers and scores at once. Scoring 16 at a time takes about twice as long."""


def score(
    pred: Tensor, record: Record, protocol: str | Protocol = "default:bbox", alphas: Sequence[float] = ALPHAS
) -> Tensor:
    """Compute the PCK of one pair.

    Args:
        pred: (n, 2) predictions in original pixels of the evaluated image, which is
            `get_protocol(protocol).evaluated`: the target, or the source for protocols such as CATs'.
        record: The annotated pair.
        protocol: A name of `list_protocols()`, or a Protocol.
        alphas: Tolerances, A of them.

    Returns:
        (A,) float64 fractions of correct keypoints.

    Raises:
        ZooError: if the protocol is unknown, `pred` has the wrong shape or is not finite, or the record lacks keypoints
            or the boxes that the protocol needs.
    """
    protocol = get_protocol(protocol)
    hits, mask, _ = _record_hits(pred, record, protocol, alphas)
    return pck_compute(_counts(hits, mask))[0]


def _counts(hits: Tensor, mask: Tensor) -> Tensor:
    """(B, 1 + A) int64: numbers of keypoints, from a mask (B, K), and of correct ones by alpha, from hits (B, K, A)."""
    return torch.cat([mask.sum(1, keepdim=True), hits.sum(1)], dim=1)


def pck_compute(rows: Tensor) -> Tensor:
    """(N, 1 + A) counts of `_counts` -> (N, A) float64 fractions of correct keypoints."""
    return rows[:, 1:].double() / rows[:, :1]


def correct(pred: Tensor, gt: Tensor, threshold: Tensor, alphas: Sequence[float], mask: Tensor, compare: str) -> Tensor:
    """Compare predictions with ground truth. All lengths are in one frame.

    Args:
        pred: (..., n, 2) predictions.
        gt: (..., n, 2) ground truth.
        threshold: (...) length L of each pair.
        alphas: Tolerances, A of them.
        mask: (..., n) bool, True for rows that are keypoints.
        compare: `<=` or `<`, applied to the error and alpha * L.

    Returns:
        (..., n, A) bool: correct keypoints.

    Raises:
        ZooError: if a prediction is not finite.
    """
    bad = (~pred.isfinite().all(-1) & mask).nonzero()
    if len(bad):
        at = tuple(bad[0].tolist())
        raise ZooError(f"the prediction at {list(at)} is {pred[at].tolist()}: expected a finite (x, y)")
    dx, dy = (pred.double() - gt.double()).unbind(-1)
    error = (dx**2 + dy**2).sqrt().unsqueeze(-1)  # (..., n, 1)
    limit = (threshold.double().unsqueeze(-1) * error.new_tensor(alphas)).unsqueeze(-2)  # (..., 1, A)
    hit = error <= limit if compare == "<=" else error < limit
    return hit & mask.unsqueeze(-1)


def correct_points(pred: Tensor, pair: Pair, protocol: str | Protocol, alpha: float) -> Tensor:
    """(B, K) bool: correct predictions of a batch, for pictures. Arguments as for `PCK.update`."""
    if not pred.shape[1]:  # a protocol may need the box around the keypoints
        return pair.kps_mask.cpu()
    return _pair_hits(pred, pair, get_protocol(protocol), (alpha,))[..., 0]


def _hits(pred: Tensor, sides: dict[str, Side], mask: Tensor, protocol: Protocol, alphas: Sequence[float]) -> Tensor:
    """(B, K, A) bool: correct keypoints, from points in original pixels."""
    evaluated, query = sides[protocol.evaluated], sides[protocol.query]
    gt = protocol.frame.points(evaluated.kps, evaluated.size, annotated=True)
    pred = protocol.frame.points(pred, evaluated.size, annotated=False)
    return correct(pred, gt, protocol.thresholds(evaluated, query, mask), alphas, mask, protocol.compare)


def _record_hits(
    pred: Tensor, record: Record, protocol: Protocol, alphas: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Correct predictions (1, n, A) of one pair, its keypoints (1, n), and those that look alike (1, n)."""
    points, n = as_points(pred), len(record.trg_kps)
    if len(points) != n or n == 0:
        raise ZooError(f"expected a prediction for each of {n} keypoints (one or more), got {len(points)}")
    sides = {
        "src": _record_side(record.src_kps, record.src_size, record.src_box),
        "trg": _record_side(record.trg_kps, record.trg_size, record.trg_box),
    }
    mask = torch.ones(1, n, dtype=torch.bool)
    alike = record.src_alike if protocol.evaluated == "src" else record.trg_alike
    return _hits(points[None], sides, mask, protocol, alphas), mask, ~mask if alike is None else alike[None]


def _record_side(kps: Tensor, size: tuple[int, int], box: Tensor | None) -> Side:
    box = torch.full((4,), torch.nan) if box is None else box
    return Side(*(torch.as_tensor(part, dtype=torch.float64)[None] for part in (kps, size, box)))


def _pair_hits(pred: Tensor, pair: Pair, protocol: Protocol, alphas: Sequence[float]) -> Tensor:
    """Correct predictions (B, K, A) of a batch."""
    sides = {side: _pair_side(pair, side) for side in ("src", "trg")}
    return _hits(pred.detach().cpu().double(), sides, pair.kps_mask.cpu(), protocol, alphas)


def _pair_side(pair: Pair, side: str) -> Side:
    """Annotations of one image of each pair, in original pixels."""
    kps, size, box = (getattr(pair, f"{side}_{what}").cpu().double() for what in ("kps", "size", "box"))
    H, W = getattr(pair, f"{side}_img").shape[-2:]
    points = resize_points(kps, (W, H), size)
    # Resizing to float32 network pixels and back moves an integer annotation by up to 1e-4 px. Undo it: it would decide
    # ties with integer predictions, and the integer that VisualAI rounds down to.
    whole = points.round()
    return Side(torch.where((points - whole).abs() < 1e-3, whole, points), size, box)


class PCK(BenchmarkMetric):
    """Percentage of correct keypoints over a benchmark.

    `compute()` returns 0-d float64 tensors in percent, for each alpha (here 0.1):

    - `pck@0.1`: the average that the protocol's authors report, one of the next four;
    - `pck@0.1/image`: mean over pairs;
    - `pck@0.1/point`: correct points over all points;
    - `pck@0.1/category`: mean over categories of their `image` average;
    - `pck@0.1/category-point`: mean over categories of their `point` average.

    Pairs without keypoints do not count.

    `rows()` adds the flags of `DIFFICULTIES` (-1 if not annotated), `points` (number of keypoints), and `pck@0.1` in
    percent. `breakdown()` adds groups by flag: `{"viewpoint": {"0": row, "1": row, "2": row, ">0": row}, ...}`, where a
    row has `pairs`, `points`, `pck@0.1/image` and `pck@0.1/point`. Empty groups are left out. `0` and `>0` are the two
    groups that Lucaosti reports.

    `breakdown()["geometry"]`, `{"aware": row, "other": row}`, groups keypoints instead of pairs. A keypoint is
    geometry-aware (GeoAware-SC, CVPR 2024) if another part that looks alike is visible in the evaluated image, such as
    the other eye. A row counts the pairs that have such keypoints. Without any, `"geometry"` is left out.

    Args:
        protocol: A name of `list_protocols()`, or a Protocol.
        alphas: Tolerances.
        categories: Names of the values of `Pair.category`; numbers if empty.
        **kwargs: Options of torchmetrics.Metric.

    Raises:
        ZooError: if the protocol is unknown.
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
        self._buffer: list[tuple[Tensor, Pair]] = []
        self._buffered = 0
        # index, category, 4 flags; number of keypoints, and of correct ones by alpha; the same of geometry-aware ones
        super().__init__(6 + 2 * (1 + len(alphas)), categories, **kwargs)
        self.protocol, self.alphas = get_protocol(protocol), tuple(alphas)
        self.query, self.evaluated = self.protocol.query, self.protocol.evaluated
        # A MetricCollection updates only one of the metrics whose states are equal after the first batch. Their rows
        # can be equal by chance, so what decides on them is part of the state.
        decides = torch.tensor(list(repr((self.protocol, self.alphas)).encode()))
        self.add_state("decides", decides, dist_reduce_fx="max")

    @property
    def table(self) -> list[Tensor]:
        """The rows. Buffered batches are scored first, as torchmetrics reads and replaces the state in many places."""
        self._score_buffer()
        return self._table

    @table.setter
    def table(self, rows: list[Tensor]) -> None:
        self._table = rows

    def update(self, pred: Tensor, pair: Pair | Record, index: int = 0, category: int = 0) -> None:
        """Add a batch, or one annotated pair. Batches are buffered, so a later call may raise the error of this one.

        Args:
            pred: (B, K, 2) predictions in original pixels of the protocol's evaluated image. Rows where `pair.kps_mask`
                is False are ignored. If the source is evaluated, predict from `pair.swapped()`, but pass `pair` here.
            pair: The batch from the dataset; or a record, for (n, 2) predictions.
            index: Position of a record in the benchmark.
            category: As in `Pair.category`, for a record.

        Raises:
            ZooError: if shapes differ, a prediction is not finite, a category has no name, or boxes are missing.
        """
        if isinstance(pair, Record):
            if not len(pair.trg_kps) and not len(pred):
                return
            start = torch.tensor([[index, category, *(pair.flags.get(name, -1) for name in DIFFICULTIES)]])
            self._add(start, *_record_hits(pred, pair, self.protocol, self.alphas))
            return
        if pred.ndim != 3 or pred.shape != pair.trg_kps.shape:
            raise ZooError(f"expected predictions of shape {tuple(pair.trg_kps.shape)}, got {tuple(pred.shape)}")
        small = _without_images(pair)
        if self._buffer and self._buffer[-1][1].src_img.shape[2:] != small.src_img.shape[2:]:
            self._score_buffer()
        self._buffer.append((pred.detach(), small))
        self._buffered += len(pred)
        if self._buffered >= BUFFERED or not len(self._table):  # the first batch at once, to find set-up errors early
            self._score_buffer()

    def reset(self) -> None:
        """Forget all pairs."""
        self._buffer, self._buffered = [], 0  # first, or it would be scored
        super().reset()

    def _score_buffer(self) -> None:
        """Turn buffered batches into rows."""
        if not self._buffer:
            return
        preds, pairs = zip(*self._buffer, strict=True)
        self._buffer, self._buffered = [], 0
        K = max(pred.shape[1] for pred in preds)
        pred = torch.cat([_pad(pred, K) for pred in preds])
        ragged = ("src_kps", "trg_kps", "kps_mask", "src_alike", "trg_alike")
        fields = zip(Pair._fields, zip(*pairs, strict=True), strict=True)
        pair = Pair(*(torch.cat([_pad(x, K) if name in ragged else x for x in xs]).cpu() for name, xs in fields))
        if not pair.kps_mask.any():
            return
        hits = _pair_hits(pred, pair, self.protocol, self.alphas)
        start = torch.cat([pair.index[:, None], pair.category[:, None], pair.difficulty], dim=1)
        self._add(start, hits, pair.kps_mask, getattr(pair, f"{self.evaluated}_alike"))

    def _add(self, start: Tensor, hits: Tensor, mask: Tensor, alike: Tensor) -> None:
        """Add rows: their start (B, 6), hits (B, K, A), keypoints and those that look alike (B, K)."""
        category = int(start[:, 1].max())
        if self.categories and category >= len(self.categories):
            raise ZooError(f"category {category} has no name: PCK was given {len(self.categories)}")
        aware = mask & alike
        rows = torch.cat([start, _counts(hits, mask), _counts(hits & aware[..., None], aware)], dim=1)
        self._table.append(rows[rows[:, 6] > 0].to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """Averages by name, see the class."""
        table = self._distinct()
        groups = [self._all(table[table[:, 1] == category]) for category in table[:, 1].unique()]
        per_category = torch.stack([_means(group) for group in groups]).mean(0)
        averages = dict(zip(AVERAGES, [*_means(self._all(table)), *per_category], strict=True))
        named = {"": averages[self.protocol.averages[0]]} | {f"/{name}": average for name, average in averages.items()}
        return {f"{key}{name}": value for name, values in named.items() for key, value in self._by_alpha(values)}

    def _scores(self, table: Tensor) -> dict[str, Tensor]:
        named = dict(zip((*DIFFICULTIES, "points"), table[:, 2:7].unbind(1), strict=True))
        return named | dict(self._by_alpha(100 * pck_compute(self._all(table)).T))

    def _groups(self, table: Tensor) -> dict[str, dict[str, dict[str, float]]]:
        out = super()._groups(table)
        for name, flag in zip(DIFFICULTIES, table[:, 2:6].unbind(1), strict=True):
            groups = {str(value): flag == value for value in flag[flag >= 0].unique().tolist()} | {">0": flag > 0}
            out[name] = {group: self._row(table[members]) for group, members in groups.items() if members.any()}
        aware = table[:, 7 + len(self.alphas) :]
        if aware.any():
            parts = {"aware": aware, "other": self._all(table) - aware}
            out["geometry"] = {name: self._summary(counts) for name, counts in parts.items() if counts.any()}
        return out

    def _all(self, table: Tensor) -> Tensor:
        """(N, 1 + A) counts of all keypoints."""
        return table[:, 6 : 7 + len(self.alphas)]

    def _row(self, table: Tensor) -> dict[str, float]:
        return self._summary(self._all(table))

    def _summary(self, counts: Tensor) -> dict[str, float]:
        """Averages of the pairs that have keypoints, from counts (N, 1 + A)."""
        counts = counts[counts[:, 0] > 0]
        means = zip(("image", "point"), _means(counts), strict=True)
        values = {f"{key}/{name}": value.item() for name, mean in means for key, value in self._by_alpha(mean)}
        return {"pairs": len(counts), "points": int(counts[:, 0].sum())} | values

    def _by_alpha(self, values: Tensor) -> list[tuple[str, Tensor]]:
        return [(f"pck@{alpha:g}", value) for alpha, value in zip(self.alphas, values, strict=True)]

    def describe(self) -> dict[str, Any]:
        how = {"protocol": str(self.protocol), "flaw": self.protocol.flaw}
        return how | {"alphas": list(self.alphas), "average": self.protocol.averages[0]}

    def columns(self) -> list[tuple[str, str, str]]:
        within = "point" if "point" in self.protocol.averages[0] else "image"
        return [(f"@{alpha:g}", f"pck@{alpha:g}/{within}", f"pck@{alpha:g}") for alpha in self.alphas]


def _means(counts: Tensor) -> Tensor:
    """Counts (N, 1 + A) -> (2, A) percentages: `image` and `point` average."""
    points, right = counts[:, 0].sum(), counts[:, 1:].sum(0)
    return torch.stack([(100 * pck_compute(counts)).mean(0), 100 * right.double() / points])


def _without_images(pair: Pair) -> Pair:
    """The batch without what scoring does not read. Images keep their size, with 0 channels."""
    empty, (B, _, *src), trg = pair.index.new_empty, pair.src_img.shape, pair.trg_img.shape[2:]
    small: dict[str, Tensor] = dict.fromkeys(("src_mask", "trg_mask", "kps_ids", "mirror_ids"), empty(B, 0))
    small |= {name: getattr(pair, name).expand(pair.kps_mask.shape) for name in ("src_alike", "trg_alike")}
    return pair._replace(src_img=empty(B, 0, *src), trg_img=empty(B, 0, *trg), **small)


def _pad(x: Tensor, K: int) -> Tensor:
    """(B, k, ...) -> (B, K, ...), padded with zeros."""
    return x if x.shape[1] == K else F.pad(x, (0, 0) * (x.ndim - 2) + (0, K - x.shape[1]))
