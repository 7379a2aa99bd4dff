"""Confident matches guide all others: eqs. 4 to 8 of "Guided Semantic Flow" (ECCV 2020), without a parameter.

And the consensus of neighbouring matches, which MirrorGuided applies before them.
"""

from math import ceil

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from corrzoo.geometry import Size

EPS = 1e-5
"""Lower bound of the product of maxima in eq. 4 (NCNet)."""
FALLBACK = 8
"""our choice: number of rows that count as confident if no match passes the threshold; eq. 7 would be 0 / 0."""


def mutual_confidence(scores: Tensor) -> Tensor:
    """Eq. 4: Q_ij = C_ij^2 / (max_i C_ij * max_j C_ij) of scores (B, N, M); 1 for mutual nearest neighbours."""
    return scores**2 / (scores.amax(1, keepdim=True) * scores.amax(2, keepdim=True)).clamp(min=EPS)


def truncate(confidence: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """T(X, rho) of eq. 5 for confidences (B, N, M): X where X > rho, with its gradient, else 0.

    Also the set S of confident cells (B, N) bool. If no match of a pair passes, the best matches of its `FALLBACK` most
    confident rows do, so that S is never empty.
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


def modulate(scores: Tensor, centre: Tensor, cells: Tensor, c: float) -> Tensor:
    """Eq. 8: C'_ij = exp(-|j - centre_i|^2 / 2c^2) C_ij of scores (B, N, M) with centres (B, N, 2) in cells."""
    return scores * torch.exp(-(cells - centre.unsqueeze(2)).square().sum(-1) / (2 * c**2))


def neighbour_consensus(scores: Tensor, grid: Size, grid_trg: Size, sigma: float) -> Tensor:
    """The Gaussian mean of C_(i+d, j+d) over offsets d inside both grids, of scores (B, N, M).

    A match counts more where neighbours match neighbours. The Gaussian reaches ceil(sigma) cells. It separates into the
    axes, and along each it is a convolution with a diagonal kernel.
    """
    if not sigma:
        return scores
    reach = ceil(sigma)
    offsets = torch.arange(-reach, reach + 1, device=scores.device, dtype=scores.dtype)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2)).diag()[None, None]
    (h, w), (h_trg, w_trg) = grid, grid_trg
    shape = {"h": h, "w": w, "y": h_trg, "x": w_trg}

    def along(volume: Tensor) -> Tensor:
        """Mean along the diagonals of (n, 1, a, b)."""
        inside = F.conv2d(torch.ones_like(volume[:1]), kernel, padding=reach)
        return F.conv2d(volume, kernel, padding=reach) / inside

    rows = along(rearrange(scores, "b (h w) (y x) -> (b w x) 1 h y", **shape))
    both = along(rearrange(rows, "(b w x) 1 h y -> (b h y) 1 w x", w=w, x=w_trg))
    return rearrange(both, "(b h y) 1 w x -> b (h w) (y x)", h=h, y=h_trg)
