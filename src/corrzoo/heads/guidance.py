"""Confident matches guide all others: eqs. 4 to 8 of "Guided Semantic Flow" (ECCV 2020), without a parameter.

And the consensus of neighbouring matches, which MirrorGuided applies before them.
"""

from math import ceil, exp

import torch
import torch.nn.functional as F
from torch import Tensor

from corrzoo.geometry import Size

EPS = 1e-5
"""Lower bound of what divides: the product of maxima in eq. 4 (NCNet), and a support."""
BETA = 50.0
"""Inverse temperature of the softmax over confident matches (SFNet, as in GSF)."""
FALLBACK = 8
"""our choice: number of rows that count as confident if no match passes the threshold; eq. 7 would be 0 / 0."""


def mutual_confidence(scores: Tensor, best_of_column: Tensor | None = None) -> Tensor:
    """Eq. 4: Q_ij = C_ij^2 / (max_i C_ij * max_j C_ij) of scores (B, N, M); 1 for mutual nearest neighbours.

    If `scores` are some of the rows only, `best_of_column` (B, 1, M) has the maxima over all rows.
    """
    best_of_column = scores.amax(1, keepdim=True) if best_of_column is None else best_of_column
    return scores**2 / (best_of_column * scores.amax(2, keepdim=True)).clamp(min=EPS)


def truncate(confidence: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """T(X, rho) of eq. 5 for confidences X (B, N, M): X where X > rho, else 0. Also the confident cells S (B, N), bool.

    The gradient is 1 where X is kept and 0 elsewhere. S has the source cells that keep a match. A pair that would keep
    none keeps the best matches of its `FALLBACK` most confident cells, so that S is never empty.
    """
    kept = confidence > rho
    best = confidence.amax(2)  # (B, N)
    few = best.topk(min(FALLBACK, best.shape[1])).indices  # (B, FALLBACK)
    chosen = torch.zeros_like(kept[..., 0]).scatter(1, few, True).unsqueeze(2)  # (B, N, 1)
    kept = kept | (~kept.any((1, 2), keepdim=True) & chosen & (confidence >= best.unsqueeze(2)))
    return confidence * kept, kept.any(2)


def displacements(kept: Tensor, cells: Tensor, cells_trg: Tensor, beta: float) -> Tensor:
    """Eq. 6: G_i = sum_j softmax_j(beta Q'_ij) j - i over the kept targets j of Q' (B, N, M): (B, N, 2) in cells.

    `cells` (N, 2) are the source's, `cells_trg` (M, 2) the target's.
    Rows without a kept target, which are not in S, get a value without meaning.
    """
    logits = (beta * kept).masked_fill(kept == 0, torch.finfo(kept.dtype).min)
    return logits.softmax(2) @ cells_trg - cells


def moving_least_squares(values: Tensor, known: Tensor, cells: Tensor, c: float) -> Tensor:
    """Eq. 7: G'_i = sum_{s in S} w(s - i) G_s / sum_{s in S} w(s - i), w(z) = exp(-|z|^2 / 2c^2).

    Values (B, N, K), finite, with S as `known` (B, N) bool -> (B, N, K); zero if S is empty. The weights are normalised
    as logarithms: cells many widths away from S follow the nearest cells of S.
    """
    logits = -(cells.unsqueeze(1) - cells).square().sum(-1) / (2 * c**2)  # (N, N)
    logits = logits.masked_fill(~known.unsqueeze(1), torch.finfo(logits.dtype).min)  # (B, N, N)
    return (logits.softmax(2) * known.unsqueeze(1)) @ values


def confident_field(scores: Tensor, cells: Tensor, cells_trg: Tensor, rho: float, c: float) -> Tensor:
    """Eqs. 4 to 7: displacements G' (B, N, 2) in cells that follow the confident matches of scores (B, N, M) >= 0."""
    kept, confident = truncate(mutual_confidence(scores), rho)
    return moving_least_squares(displacements(kept, cells, cells_trg, BETA), confident, cells, c)


def modulate(scores: Tensor, centre: Tensor, cells: Tensor, c: float) -> Tensor:
    """Eq. 8: C'_ij = exp(-|j - centre_i|^2 / 2c^2) C_ij of scores (B, N, M) with centres (B, N, 2) in cells."""
    return scores * torch.exp(-(cells - centre.unsqueeze(2)).square().sum(-1) / (2 * c**2))


def neighbour_consensus(scores: Tensor, grid: Size, grid_trg: Size, sigma: float) -> Tensor:
    """The Gaussian mean of C_(i+d, j+d) over offsets d inside both grids, of scores (B, N, M).

    A match counts more where neighbours match neighbours. The Gaussian reaches ceil(sigma) cells.
    """
    if not sigma:
        return scores
    reach = ceil(sigma)

    def along(volume: Tensor) -> Tensor:
        """Mean along the diagonals of the last two axes."""
        a, b = volume.shape[-2:]
        padded = F.pad(volume, (reach,) * 4)
        inside = F.pad(volume.new_ones(a, b), (reach,) * 4)
        total, weights = torch.zeros_like(volume), volume.new_zeros(a, b)
        for d in range(-reach, reach + 1):
            weight, start = exp(-d * d / (2 * sigma**2)), reach + d
            rows, columns = slice(start, start + a), slice(start, start + b)
            total = total + weight * padded[..., rows, columns]
            weights = weights + weight * inside[rows, columns]
        return total / weights

    (h, w), (y, x) = grid, grid_trg
    # The Gaussian is separable: one axis of both grids after the other.
    volume = along(scores.unflatten(1, (h, w)).unflatten(3, (y, x)).permute(0, 2, 4, 1, 3))  # (B, w, x, h, y)
    return along(volume.permute(0, 3, 4, 1, 2)).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)  # from (B, h, y, w, x)
