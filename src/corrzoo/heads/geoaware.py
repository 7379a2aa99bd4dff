"""GeoAware: a small network on frozen features learns to tell left from right; window soft-argmax.

"Telling Left from Right: Identifying Geometry-Aware Semantic Correspondence", CVPR 2024 (arXiv 2311.17034), and its
released code GeoAware-SC, which decides where the two differ.
"""

import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from corrzoo import ops
from corrzoo.data.pairs import mirror
from corrzoo.geometry import (
    Size,
    cells_to_pixels,
    check_keypoints,
    mirror_points,
    pixels_to_cells,
    points_to_flow,
    size_of,
)
from corrzoo.heads.levels import cells_of, expected_cells, resize, rows_of, stack_levels
from corrzoo.losses import Term, mean_where, pair_means
from corrzoo.matcher import HEADS, Matcher
from corrzoo.precision import full, full_precision
from corrzoo.types import Features, Match, Pair, ZooError

TEMPERATURE = 0.02
"""Temperature of every softmax over cosines (released code)."""
GROUPS = 32
"""Groups of every GroupNorm (released code)."""
EPS = 1e-10
"""Added to a descriptor's length (released code)."""
FLIP_WEIGHTS = {"double": 1.0, "self": 0.25}
"""Weights of the pair augmentation's terms beside the pair itself (released code)."""
WINDOWS = {"window": "crop", "gaussian": "argmax"}
"""The window of `ops.match` for each read-out that has one."""
MIRRORED = 1 << 40
"""Added to the number of an image whose mirror image is meant, so that features of both can be kept."""


class Points(NamedTuple):
    """Corresponding points of two images, in cells of the grid."""

    src: Tensor  # (B, K, 2)
    trg: Tensor  # (B, K, 2)
    mask: Tensor  # (B, K) bool, which rows are points
    length: Tensor  # (B,) that the noise of the ground truth is relative to, in cells of the target


@HEADS.register
class GeoAware(Matcher):
    """An aggregation network of one bottleneck for each level, and a sparse and a dense loss, also on mirrored pairs.

    On the released features, three levels of Stable Diffusion and DINOv2-B's block 11 before the final norm, it equals
    the released network of 5,150,214 parameters, without `self_logit_scale`, which never has a gradient. Coordinates
    that the dense loss reads are trained, too, and not used in evaluation.

    our choice: images are resized, as for every head; the released code pads them to a square. The loss of a batch is
    the mean over its pairs; the released code trains on one pair a step.

    Args:
        grid: Cells per side of the descriptors' grid, or [h, w]; every level is resized to it (released code: 60).
        width: Channels of the descriptors, a multiple of 128 (released code: 768).
        network: Ablation: the aggregation network. Without it, the descriptors are the normalised levels (zero-shot).
            our choice: each level is normalised; the authors normalise the three of Stable Diffusion together.
        dropout: Share of the network's input that is dropped in training (released code: 0.2).
        dense: Ablation: the dense loss, beside the sparse one.
        noise: Deviation of the dense loss's ground truth, as a share of half of `noise_length` (released code: 0.1).
        noise_length: The larger side of the target's `box` (without one: of the image), or of the `image`, which is
            PF-PASCAL's threshold. `pixels` is the released code's mistake there: its 840 pixels are taken for cells.
        pair_augment: Also train on mirrored pairs: both images mirrored and, if the dataset lists left-right parts,
            the source with its own mirror image. our choice: the latter with keypoints that are visible in both images,
            as datasets give no others; the released code takes all of the source.
        readout: How a row of cosines gives a position: a soft-argmax over a `window` around the maximum, with a
            `gaussian` around it, or over all cells (`soft`); or the maximum itself (`argmax`).
        window: Radius of the window in cells (released code: 7, zero-shot 5), or the Gaussian's standard deviation.
        outside: What cells outside the window count as: a cosine of `zero`, as in the released code, which matters
            where the best cosine is below about 0.2; or nothing (`excluded`, our choice).
        read: How a point is matched: from the flow around the `point`, or as its whole `cell` (released code).
        pose_alignment: In evaluation, match the source's mirror image if its nearest neighbours in the target are
            nearer (adaptive pose alignment, for zero-shot). Keypoints take the places of their mirror twins.
        **options: Options of Matcher.
    """

    evaluation_options: ClassVar[frozenset[str]] = Matcher.evaluation_options.union(
        "readout window outside read pose_alignment".split()
    )

    def __init__(
        self,
        grid: int | list[int] = 60,
        width: int = 768,
        network: bool = True,
        dropout: float = 0.2,
        dense: bool = True,
        noise: float = 0.1,
        noise_length: Literal["box", "image", "pixels"] = "box",
        pair_augment: bool = True,
        readout: Literal["window", "gaussian", "soft", "argmax"] = "window",
        window: int = 7,
        outside: Literal["zero", "excluded"] = "zero",
        read: Literal["point", "cell"] = "point",
        pose_alignment: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if width % (4 * GROUPS):
            raise ZooError(f"width {width}: expected a multiple of {4 * GROUPS}")
        if window < 1:
            raise ZooError(f"window {window}: expected a number above 0; readout='soft' reads all cells")
        self.grid: Size = (grid, grid) if isinstance(grid, int) else (grid[0], grid[1])
        self.dense, self.noise, self.noise_length, self.pair_augment = dense, noise, noise_length, pair_augment
        self.readout, self.window, self.outside, self.read = readout, window, outside, read
        self.pose_alignment = pose_alignment
        self.dropout = nn.Dropout(dropout)
        channels = self.backbone.channels if network else []
        self.bottlenecks = nn.ModuleList(Bottleneck(level, width) for level in channels)
        self.mixing_weights = nn.Parameter(torch.ones(len(channels))) if len(channels) > 1 else None
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        rows, columns = (torch.linspace(-1, 1, side, dtype=torch.float64).float() for side in self.grid)
        self.y_normal = nn.Parameter(rows, requires_grad=dense)
        self.x_normal = nn.Parameter(columns, requires_grad=dense)

    def prepare(self, features: Features) -> Features:
        """Levels (B, C_i, h_i, w_i) -> one map (B, width, h, w) of normalised descriptors."""
        if len(self.bottlenecks):
            maps = full(self.aggregate(features.maps))
        else:
            maps = full(stack_levels(features.maps, self.grid))
        return features.with_maps([maps / (torch.linalg.vector_norm(maps, dim=1, keepdim=True) + EPS)])

    def aggregate(self, levels: list[Tensor]) -> Tensor:
        """Levels (B, C_i, h_i, w_i) -> their weighted sum (B, width, h, w) after the bottlenecks."""
        levels = [self.dropout(resize(level, self.grid)) for level in levels]
        maps = torch.stack([block(level) for block, level in zip(self.bottlenecks, levels, strict=True)])  # (L, B, ...)
        if self.mixing_weights is None:
            return maps[0]
        return torch.einsum("l,lbchw->bchw", self.mixing_weights.softmax(0), maps)

    def match(self, src: Features, trg: Features) -> Match:
        """The flow of every cell; `extras` has the descriptors, which the loss reads."""
        rows, columns = rows_of(src), rows_of(trg)
        found = cells_to_pixels(self.find(rows, columns), self.grid, size_of(trg.image))
        flow = points_to_flow(found, self.grid, size_of(src.image))
        return Match(flow, extras={"src": rows, "trg": columns})

    def find(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Positions (B, N, 2) in cells of the target, for descriptors (B, N, C) and the target's (B, h*w, C)."""
        if self.readout == "window" and self.outside == "zero":
            scores = zero_outside(ops.correlation(rows, columns, normalize=False), self.grid, self.window)
            return ops.readout(scores, self.grid, TEMPERATURE).xy
        how: dict[str, Any] = {"window": WINDOWS.get(self.readout, "none"), "sigma": self.window, "radius": self.window}
        found = ops.match(rows, columns, self.grid, TEMPERATURE, normalize=False, backend=self.backend, **how)
        return (cells_of(found.argmax, self.grid) + 0.5).to(found.xy) if self.readout == "argmax" else found.xy

    def match_points(self, src: Features, trg: Features, points: Tensor) -> Tensor:
        """Read matches of source points (B, n, 2) as the option `read` says."""
        if self.read == "point":
            return super().match_points(src, trg, points)
        asked = pick(rows_of(src), cell_of(pixels_to_cells(points, self.grid, size_of(src.image)), self.grid))
        return cells_to_pixels(self.find(asked, rows_of(trg)), self.grid, size_of(trg.image)).to(points.dtype)

    def match_keypoints(self, src: Features, trg: Features, pair: Pair) -> Tensor:
        """Matches (B, K, 2) of the source's keypoints; see the option `pose_alignment`."""
        found = super().match_keypoints(src, trg, pair)
        if not self.pose_alignment:
            return found
        mirrored = self.prepare(self.backbone(src.image.flip(-1)))
        nearer = mutual_distance(rows_of(mirrored), rows_of(trg)) < mutual_distance(rows_of(src), rows_of(trg))
        places, twins, known = self_flip(pair.src_kps, pair.kps_ids, pair.mirror_ids, pair.kps_mask, src.image.shape[3])
        asked = pick(places, twins)  # a part is where its twin is, mirrored
        aligned = self.match_points(mirrored, trg, asked)
        return torch.where((nearer.unsqueeze(1) & known).unsqueeze(2), aligned, found)

    # ------------------------------------------------------------------ losses

    def loss(self, match: Match, pair: Pair) -> Tensor:
        """Sparse and dense loss of the pair as it is, the mean over pairs with keypoints."""
        return mean_where(*self.pair_loss(match.extras["src"], match.extras["trg"], self.points(pair)))

    def training_losses(self, pair: Pair) -> Tensor:
        """The loss with pair augmentation; the mirrored images pass through the backbone, too."""
        src, trg = (rows_of(side) for side in self.training_features(pair))
        terms = [(1.0, *self.pair_loss(src, trg, self.points(pair)))]
        if self.pair_augment and self.dense:
            mirrored = mirror_images(pair)
            src_mirrored, trg_mirrored = (rows_of(side) for side in self.training_features(mirrored))
            double, own = self.points(mirrored), self.points_of_self_flip(pair)
            terms.append((FLIP_WEIGHTS["double"], *self.dense_loss(src_mirrored, trg_mirrored, double)))
            terms.append((FLIP_WEIGHTS["self"], *self.dense_loss(src_mirrored, src, own)))
        return mean_where(*combine(terms))

    def points(self, pair: Pair) -> Points:
        """The pair's keypoints."""
        check_keypoints(pair.src_kps)
        image = size_of(pair.src_img)
        src, trg = (pixels_to_cells(kps, self.grid, image) for kps in (pair.src_kps, pair.trg_kps))
        return Points(src, trg, pair.kps_mask, self.length(pair.trg_box, pair.trg_size))

    def points_of_self_flip(self, pair: Pair) -> Points:
        """From the source's mirror image to the source: a part is where its mirror twin is in the other."""
        image = size_of(pair.src_img)
        kps, twin, known = self_flip(pair.src_kps, pair.kps_ids, pair.mirror_ids, pair.kps_mask, image[1])
        src, trg = (pixels_to_cells(points, self.grid, image) for points in (kps, pick(pair.src_kps, twin)))
        return Points(src, trg, known, self.length(pair.src_box, pair.src_size))

    def length(self, box: Tensor, size: Tensor) -> Tensor:
        """`noise_length` (B,) in cells, from the target's box (B, 4) and size (B, 2) in original pixels."""
        side = (box[:, 2:] - box[:, :2]).amax(1) / size.amax(1)
        whole = torch.ones_like(side)
        if self.noise_length == "pixels":
            return 14 * max(self.grid) * whole  # 840 for a grid of 60
        return max(self.grid) * (whole if self.noise_length == "image" else torch.where(side.isnan(), whole, side))

    def pair_loss(self, src: Tensor, trg: Tensor, points: Points) -> Term:
        """Losses (B,), and which pairs have points (B,); descriptors (B, h*w, C)."""
        sparse = self.sparse_loss(src, trg, points)
        return (sparse + self.dense_loss(src, trg, points)[0] if self.dense else sparse), points.mask.any(1)

    def sparse_loss(self, src: Tensor, trg: Tensor, points: Points) -> Tensor:
        """CLIP's loss (B,): each point's descriptor is nearer to its match than to any other point's, both ways."""
        mask = points.mask
        with full_precision(src):
            f, g = (pick(rows, cell_of(kps, self.grid)) for rows, kps in ((src, points.src), (trg, points.trg)))
            logits = self.logit_scale.exp() * f @ g.mT  # (B, K, K)
            own = logits.diagonal(dim1=1, dim2=2)
            lowest = torch.finfo(logits.dtype).min
            by_row = logits.masked_fill(~mask.unsqueeze(1), lowest).logsumexp(2) - own
            by_column = logits.masked_fill(~mask.unsqueeze(2), lowest).logsumexp(1) - own
            return (pair_means(by_row, mask)[0] + pair_means(by_column, mask)[0]) / 2

    def dense_loss(self, src: Tensor, trg: Tensor, points: Points) -> Term:
        """Error (B,) in cells of the flow by a soft-argmax over all cells; and which pairs have points (B,).

        The flow is read at the whole cell around a point. The ground truth has noise in training.
        """
        index = cell_of(points.src, self.grid)
        with full_precision(src):
            weights = (pick(src, index) @ trg.mT / TEMPERATURE).softmax(2)  # (B, K, h*w)
            found = expected_cells(weights, self.x_normal, self.y_normal)  # (B, K, 2)
            truth = points.trg - points.src
            if self.training and self.noise:
                deviation = (self.noise * points.length / 2).view(-1, 1, 1)
                truth = truth + deviation * torch.randn_like(truth)
            error = found - cells_of(index, self.grid) - truth
            error = torch.where(points.mask.unsqueeze(2), error, 1)  # the root's gradient is infinite at zero
            return pair_means(torch.linalg.vector_norm(error, dim=2), points.mask)


# ---------------------------------------------------------------------- aggregation network


class Bottleneck(nn.Module):
    """ResNet's bottleneck without stride, with GroupNorm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = NormedConv(inputs, outputs // 4, 1)
        self.conv2 = NormedConv(outputs // 4, outputs // 4, 3)
        self.conv3 = NormedConv(outputs // 4, outputs, 1)
        self.shortcut = NormedConv(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h, w)."""
        y = self.conv2(self.conv1(x).relu()).relu()
        return (self.conv3(y) + self.shortcut(x)).relu()


class NormedConv(nn.Conv2d):
    """A convolution without bias that keeps the size, and GroupNorm."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(GROUPS, outputs)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


# ---------------------------------------------------------------------- read-out


def zero_outside(scores: Tensor, grid: Size, radius: int) -> Tensor:
    """Scores (B, N, h*w) with zeros at cells that are not in the window around the argmax."""
    cells = torch.arange(scores.shape[2], device=scores.device)
    rows, columns = cells // grid[1], cells % grid[1]
    best = scores.argmax(2, keepdim=True)
    far = ((rows - best // grid[1]).abs() > radius) | ((columns - best % grid[1]).abs() > radius)
    return scores.masked_fill(far, 0.0)


def mutual_distance(src: Tensor, trg: Tensor) -> Tensor:
    """Mean distance (B,) of mutual nearest neighbours; descriptors (B, N, C) and (B, M, C) of unit length."""
    best = ops.mutual(src, trg, normalize=False)
    back = best.col_argmax.gather(1, best.row_argmax)  # (B, N)
    number = torch.arange(back.shape[1], device=back.device)
    return pair_means((2 - 2 * best.row_max).clamp(min=0).sqrt(), back == number)[0]


# ---------------------------------------------------------------------- pair augmentation


def mirror_images(pair: Pair) -> Pair:
    """Both images mirrored, with their keypoints; the mirror images have numbers of their own."""
    numbers = {name: getattr(pair, name) for name in ("src_id", "trg_id")}
    return mirror(pair)._replace(**{name: torch.where(n < 0, n, n + MIRRORED) for name, n in numbers.items()})


def self_flip(kps: Tensor, ids: Tensor, mirrored: Tensor, mask: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Corresponding keypoints of an image's mirror image and the image itself, `width` pixels wide.

    Args:
        kps: (B, K, 2) in pixels.
        ids: (B, K) parts that they mark, -1 if unknown.
        mirrored: (B, K) parts that they mark in the mirror image.
        mask: (B, K) bool, which rows are keypoints.

    Returns:
        Keypoints of the mirror image (B, K, 2); for each the row (B, K) of the image's keypoint that marks the same
        part; and whether there is one (B, K) bool.
    """
    same = (mirrored.unsqueeze(2) == ids.unsqueeze(1)) & (ids >= 0).unsqueeze(1) & mask.unsqueeze(1)  # (B, K, K)
    twin = same.to(torch.int8).argmax(2)  # (B, K)
    return mirror_points(kps, width), twin, mask & same.any(2)


def combine(terms: list[tuple[float, Tensor, Tensor]]) -> Term:
    """Weighted mean (B,) of the terms that a pair has; terms are (weight, values (B,), which pairs have it (B,))."""
    weights = torch.stack([weight * counts for weight, _, counts in terms])  # (terms, B)
    values = torch.stack([value for _, value, _ in terms])
    return (weights * values).sum(0) / weights.sum(0).clamp(min=1e-9), weights.sum(0) > 0


# ---------------------------------------------------------------------- helpers


def cell_of(points: Tensor, grid: Size) -> Tensor:
    """Numbers (B, K) of the cells that points (B, K, 2) in cells lie in; those outside the grid in the nearest."""
    x, y = points.floor().unbind(-1)
    return (y.clamp(0, grid[0] - 1) * grid[1] + x.clamp(0, grid[1] - 1)).long()


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (B, K, C) of (B, N, C) by their numbers (B, K)."""
    return rows.take_along_dim(index.unsqueeze(2), 1)
