"""The dense-correlation op as its equations stand: plain torch, whole volumes, gradients by autograd.

This is what the fast implementations are held against, and what to read first. Arguments are taken as checked
(`functional` checks them); float16 and bfloat16 are computed in float32, float64 stays float64.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from corrzoo.geometry import Size, cell_centres
from corrzoo.precision import full

OUTSIDE = -1e30
"""Logit of a cell outside a crop: its weight is exactly 0, and 0 times it is 0, which minus infinity would not give."""


class Matches(NamedTuple):
    """What a row of the correlation says about its source point. All but `argmax` carry gradients."""

    xy: Tensor
    """(B, N, 2) expected target position, in continuous target cells: multiply by the stride for pixels."""
    max: Tensor
    """(B, N) highest score, before the window."""
    argmax: Tensor
    """(B, N) int64 target cell of the highest score, the lowest index on ties."""
    lse: Tensor
    """(B, N) log-sum-exp of the windowed scores over the temperature."""
    entropy: Tensor
    """(B, N) entropy of the weights that `xy` is the mean under, in nats."""


class Mutual(NamedTuple):
    """Both sides' best partners; indices are int64, the lowest on ties."""

    row_max: Tensor
    """(B, N) best score of every source point."""
    row_argmax: Tensor
    """(B, N) its target cell."""
    col_max: Tensor
    """(B, M) best score of every target cell."""
    col_argmax: Tensor
    """(B, M) its source point."""


def inverse_norm(x: Tensor) -> Tensor:
    """(...) 1 / |x| of features x (..., C); 0 for a zero feature, whose cosine with everything is then 0."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=full(x[..., :0]).dtype)
    return torch.where(norm > 0, 1 / norm.clamp(min=torch.finfo(norm.dtype).tiny), 0)


def unit(x: Tensor, normalize: bool) -> Tensor:
    """Features (..., C) in full precision, of unit length where asked."""
    return full(x) * inverse_norm(x).unsqueeze(-1) if normalize else full(x)


def correlation(src: Tensor, trg: Tensor, normalize: bool = True) -> Tensor:
    """s_ij = <f_i, g_j>: (B, N, C) and (B, M, C) -> (B, N, M)."""
    return unit(src, normalize) @ unit(trg, normalize).mT


def readout(
    scores: Tensor,
    trg_grid: Size,
    temperature: float | Tensor,
    window: str = "none",
    sigma: float = 0.0,
    radius: int = 0,
    centre: Tensor | None = None,
) -> Matches:
    """E[v] under softmax_j(w_ij s_ij / T), v the target cells' centres. See `corrzoo.ops.match` for the windows."""
    scores = full(scores)
    cells = cell_centres(trg_grid, trg_grid, scores.device, scores.dtype)  # (M, 2)
    best, argmax = scores.max(dim=-1)
    if window in ("argmax", "crop"):
        centre = cells[argmax]
    logits = scores / temperature
    if centre is not None and window != "none":
        dx, dy = (cells - centre.to(scores.dtype).unsqueeze(2)).unbind(-1)  # (B, N, M) each
        if window == "crop":
            logits = logits.masked_fill((dx.abs() > radius) | (dy.abs() > radius), OUTSIDE)
        else:
            logits = logits * torch.exp(-(dx.square() + dy.square()) / (2 * sigma**2))
    weights = logits.softmax(dim=-1)
    entropy = -(weights * logits.log_softmax(dim=-1)).sum(dim=-1)
    return Matches(weights @ cells, best, argmax, logits.logsumexp(dim=-1), entropy)


def mutual(src: Tensor, trg: Tensor, normalize: bool = True) -> Mutual:
    """max_j s_ij and max_i s_ij with their indices (NCNet, GSF eq. 4)."""
    scores = correlation(src, trg, normalize)
    return Mutual(*scores.max(dim=2), *scores.max(dim=1))


def local_correlation(src: Tensor, trg: Tensor, centre: Tensor, radius: int, normalize: bool = True) -> Tensor:
    """<f_i, g(c_i + d)> for d in {-r..r}², g read bilinearly and zero outside (RAFT's look-up, ViTSC eq. 8)."""
    src, trg = unit(src, normalize), unit(trg.movedim(1, -1), normalize).movedim(-1, 1)
    h, w = trg.shape[2:]
    d = torch.arange(-radius, radius + 1, device=src.device, dtype=src.dtype)
    dy, dx = torch.meshgrid(d, d, indexing="ij")
    points = centre.to(src.dtype).unsqueeze(2) + torch.stack([dx, dy], dim=-1).flatten(0, 1)  # (B, N, (2r+1)², 2)
    grid = 2 * points / points.new_tensor([w, h]) - 1
    patches = F.grid_sample(trg, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return torch.einsum("bnc,bcnk->bnk", src, patches)
