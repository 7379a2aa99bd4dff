"""NCNet: a 4-D network on all pairs of cells keeps the matches that their neighbours agree with; weakly supervised.

"Neighbourhood Consensus Networks", NeurIPS 2018 (arXiv 1810.10510), and its released code, which decides where the two
differ. Axes of a volume (B, 1, h, w, h', w') are the rows and columns of the source, then those of the target.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from corrzoo import ops
from corrzoo.geometry import Size, cells_to_pixels, size_of
from corrzoo.heads.levels import cells_of, nearly_unit, stack_levels
from corrzoo.losses import next_in_batch
from corrzoo.matcher import HEADS, Matcher
from corrzoo.precision import full, full_precision
from corrzoo.types import Features, Match, Pair, ZooError

MUTUAL_EPS = 1e-5
"""Added to the maxima of the soft mutual nearest neighbour filter (released code)."""
L1_EPS = 1e-4
"""Added to the sum that `normalisation: l1` divides by (released code)."""
FRAME = 224
"""Side of the square, in pixels, that the released evaluation scales annotated points to."""


@HEADS.register
class NCNet(Matcher):
    """Soft mutual filter, neighbourhood consensus network, the filter again, and the best cell of each row.

    The parts that the paper uses, ResNet-101 up to `layer3` and the consensus network of 180,033 parameters, have
    27,715,457 and equal the released model. The loss reads images alone, no keypoint.

    Args:
        kernel_sizes: Side of each 4-D kernel (released training: 5, 5, 5).
        channels: Output channels of each layer; the last has one (released training: 16, 16, 1).
        symmetric: Ablation: add the network's output on the transposed volume, so that both directions agree.
        mutual: Ablation: the soft mutual nearest neighbour filter, before and after the network.
        consensus: Ablation: the network. Without it, features are matched by the filter alone.
        relocalization: Max-pool the volume over cells of this side. A match then is the best of the pooled cell pair
            (the paper's experiments on InLoc: 2). our choice: its displacement is that of the pooled source cell.
        normalisation: How a cell's scores are normalised for the loss: `softmax`, `l1`, or `none`.
        read: How a point is matched: by the flow at the `point`, or as the released evaluation does: `corners` puts
            the centres of the outermost cells on the image's first and last pixel, counted from 1, at 224 pixels.
        **options: Options of Matcher.
    """

    evaluation_options: ClassVar[frozenset[str]] = Matcher.evaluation_options | {"read"}

    def __init__(
        self,
        kernel_sizes: list[int] = [5, 5, 5],  # noqa: B006 - never written to; a plain default is what --help shows
        channels: list[int] = [16, 16, 1],  # noqa: B006
        symmetric: bool = True,
        mutual: bool = True,
        consensus: bool = True,
        relocalization: int = 1,
        normalisation: Literal["softmax", "l1", "none"] = "softmax",
        read: Literal["point", "corners"] = "point",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if len(kernel_sizes) != len(channels) or not channels or channels[-1] != 1:
            raise ZooError(f"channels {channels}: expected one for each of kernel_sizes {kernel_sizes}, the last 1")
        if any(side < 1 or side % 2 == 0 for side in kernel_sizes):
            raise ZooError(f"kernel_sizes {kernel_sizes}: expected odd numbers")
        if relocalization < 1 or (relocalization > 1 and read == "corners"):
            raise ZooError(f"relocalization {relocalization}: expected 1 or more, and 1 with read='corners'")
        self.symmetric, self.mutual, self.relocalization = symmetric, mutual, relocalization
        self.normalisation, self.read = normalisation, read
        layers = zip([1, *channels[:-1]], channels, kernel_sizes, strict=True)
        self.consensus = nn.Sequential(
            *(layer for sizes in layers for layer in (Conv4d(*sizes), nn.ReLU())) if consensus else ()
        )

    def prepare(self, features: Features) -> Features:
        """Levels (B, C_i, h_i, w_i) -> one map (B, C, h, w) of normalised features.

        our choice, as the paper reads one level: several are normalised to weigh the same, on the grid of the last.
        """
        stacked = full(stack_levels(features.maps, size_of(features.maps[-1])))
        return features.with_maps([nearly_unit(stacked)])

    def match(self, src: Features, trg: Features) -> Match:
        """The filtered volume as `correlation`; `extras` has the features, which the loss reads."""
        volume, offsets = self.volume(src.maps[0], trg.maps[0])
        scores = self.filter(volume)  # (B, h*w, h'*w')
        best, k = scores.argmax(2), self.relocalization  # (B, h*w), the first of equal ones
        grid = volume.shape[2], volume.shape[3]
        cells = k * cells_of(best, size_of(volume))  # (B, h*w, 2)
        own = k * cells_of(torch.arange(scores.shape[1], device=scores.device), grid)  # (h*w, 2)
        if k > 1:
            at = offsets.flatten(3).flatten(1, 2).gather(2, best.unsqueeze(2)).squeeze(2)  # (B, h*w), of k^4
            own, cells = own + cells_of(at // k**2, (k, k)), cells + cells_of(at % k**2, (k, k))
        moved = cells_to_pixels((cells - own).to(scores.dtype), size_of(src.maps[0]), size_of(src.image))
        flow = rearrange(moved, "b (h w) xy -> b xy h w", h=grid[0])
        return Match(flow, scores, {"cells": cells, "src": src.maps[0], "trg": trg.maps[0]})

    def volume(self, src: Tensor, trg: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines (B, 1, h, w, h', w') of features (B, C, h, w) and (B, C, h', w').

        With `relocalization` k, the maximum of each k x k x k x k block, and its place in the block, 0 to k^4 - 1:
        (B, h, w, h', w') int64. No cosine is clipped and no row normalised, unlike in the papers before.
        """
        with full_precision(src):
            cosines = torch.einsum("bchw,bcij->bhwij", src, trg)
        if self.relocalization == 1:
            return cosines.unsqueeze(1), torch.zeros((), dtype=torch.int64, device=src.device)
        k = self.relocalization
        if any(side % k for side in cosines.shape[1:]):
            raise ZooError(f"relocalization {k} does not divide the grids {size_of(src)} and {size_of(trg)}")
        windows = rearrange(cosines, "b (h i) (w j) (y k) (x l) -> b h w y x (i j k l)", i=k, j=k, k=k, l=k)
        pooled, offsets = windows.max(5)
        return pooled.unsqueeze(1), offsets

    def filter(self, volume: Tensor) -> Tensor:
        """M(N(M(V))) of a volume (B, 1, h, w, h', w'): scores (B, h*w, h'*w')."""
        if self.mutual:
            volume = mutual_matching(volume)
        if len(self.consensus):
            swapped = volume.permute(0, 1, 4, 5, 2, 3)
            agreed = full(self.consensus(volume))
            volume = agreed + full(self.consensus(swapped)).permute(0, 1, 4, 5, 2, 3) if self.symmetric else agreed
        if self.mutual:
            volume = mutual_matching(volume)
        return volume.flatten(4).flatten(1, 3)

    def match_points(self, src: Features, trg: Features, points: Tensor) -> Tensor:
        """Read matches of source points (B, n, 2) as the option `read` says."""
        if self.read == "point":
            return super().match_points(src, trg, points)
        grids, frame = (size_of(src.maps[0]), size_of(trg.maps[0])), (FRAME, FRAME)
        points = cells_to_pixels(points, size_of(src.image), frame)
        found = read_corners(points, self.match(src, trg).extras["cells"].to(points.dtype), *grids)
        return cells_to_pixels(found, frame, size_of(trg.image))

    def loss(self, match: Match, pair: Pair) -> dict[str, Tensor]:
        """Confidence of pairs of different objects minus that of the annotated pairs; both in the batch.

        The target of each pair is matched to the source of the next pair of the whole batch, over all processes. As
        released, that may show an object of the same category.
        """
        assert match.correlation is not None
        src = next_in_batch(match.extras["src"])
        other = self.filter(self.volume(src, match.extras["trg"])[0])
        with full_precision(other):
            positive, negative = (confidence(scores, self.normalisation) for scores in (match.correlation, other))
        return {"loss": negative - positive, "positive": positive, "negative": negative}


class Conv4d(nn.Module):
    """A 4-D convolution that keeps sizes, with zeros around the volume; torch's initial weights for a convolution."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *[kernel] * 4))
        self.bias = nn.Parameter(torch.empty(outputs))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.uniform_(self.bias, -((inputs * kernel**4) ** -0.5), (inputs * kernel**4) ** -0.5)

    def forward(self, volume: Tensor) -> Tensor:
        """(B, inputs, h, w, h', w') -> (B, outputs, h, w, h', w')."""
        return ops.conv4d(volume, self.weight, self.bias)


def mutual_matching(volume: Tensor) -> Tensor:
    """M: multiply each score of a volume (B, 1, h, w, h', w') by its ratios to the best of its row and column."""
    with full_precision(volume):
        of_row = volume.amax((4, 5), keepdim=True) + MUTUAL_EPS
        of_column = volume.amax((2, 3), keepdim=True) + MUTUAL_EPS
        return volume * ((volume / of_column) * (volume / of_row))  # in brackets: symmetric to the last bit


def confidence(scores: Tensor, normalisation: str) -> Tensor:
    """Mean over both images' cells of the best normalised score; scores (B, N, M) -> scalar."""
    sides = []
    for dim in (1, 2):
        best = scores.amax(dim)
        if normalisation == "softmax":
            best = (best - scores.logsumexp(dim)).exp()
        elif normalisation == "l1":
            best = best / (scores.sum(dim) + L1_EPS)
        sides.append(best.mean())
    return (sides[0] + sides[1]) / 2


def read_corners(points: Tensor, cells: Tensor, src_grid: Size, trg_grid: Size) -> Tensor:
    """Interpolate the matched cells of the four cells around each point, in images of FRAME x FRAME pixels.

    Cell c of n has its centre at pixel 1 + c (FRAME - 1) / (n - 1). A point beyond the outermost centres is weighted by
    its distances to the last two, as in the released code; there it may read another row, here it does not.

    Points (B, n, 2) in pixels of the source; columns and rows (B, h*w, 2) of the target that its cells match.
    """
    (h, w), (rows, columns) = src_grid, trg_grid
    (left, x), (top, y) = _between(points[..., 0], w), _between(points[..., 1], h)  # (B, n) each
    found = torch.zeros_like(points)
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        index = (top + dy).clamp(max=h - 1) * w + (left + dx).clamp(max=w - 1)
        share = (x if dx else 1 - x) * (y if dy else 1 - y)
        found = found + share.unsqueeze(-1) * cells.take_along_dim(index.long().unsqueeze(-1), 1)
    x, y = found.unbind(-1)
    return 1 + torch.stack([x / max(columns - 1, 1), y / max(rows - 1, 1)], dim=-1) * (FRAME - 1)


def _between(x: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """The cell below each coordinate, and the weight of the next one."""
    at = (x - 1) * ((cells - 1) / (FRAME - 1))
    low = (at.ceil() - 1).clamp(0, max(cells - 2, 0))
    before, after = (at - low).abs(), (low + 1 - at).abs()
    return low, before / (before + after)
