"""The dense-correlation op in plain torch: the definition that the fast implementations are tested against.

It holds whole correlation volumes and leaves the gradients to autograd. `functional` has checked the arguments.
float16 and bfloat16 are computed in float32; float64 stays float64.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from corrzoo.geometry import Size, cell_centres
from corrzoo.precision import full

OUTSIDE = -1e30
"""Logit of a cell outside the crop. Its weight is exactly 0, as with -inf, but 0 * OUTSIDE is not NaN."""


class Readout(NamedTuple):
    """Position of each source point in the target."""

    xy: Tensor
    """(B, N, 2) expected position in target cells, continuous; carries a gradient."""
    argmax: Tensor
    """(B, N) int64 target cell with the highest score before the window; the lowest index on ties."""


class Mutual(NamedTuple):
    """Best match of every source point and of every target cell. Maxima carry gradients."""

    row_max: Tensor
    """(B, N) highest score of each source point."""
    row_argmax: Tensor
    """(B, N) int64 target cell of that score; the lowest index on ties."""
    col_max: Tensor
    """(B, M) highest score of each target cell."""
    col_argmax: Tensor
    """(B, M) int64 source point of that score; the lowest index on ties."""


def inverse_norm(x: Tensor) -> Tensor:
    """1 / |x| (...) of features (..., C); 0 for a zero feature, so that its cosines are 0."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.where(norm > 0, 1 / norm.clamp(min=torch.finfo(norm.dtype).tiny), 0)


def unit(x: Tensor, normalize: bool) -> Tensor:
    """Features (..., C) in full precision, divided by their norm if `normalize`."""
    return full(x) * inverse_norm(x).unsqueeze(-1) if normalize else full(x)


def correlation(src: Tensor, trg: Tensor, normalize: bool = True) -> Tensor:
    """s_ij = <f_i, g_j>: (B, N, C) and (B, M, C) -> (B, N, M)."""
    return unit(src, normalize) @ unit(trg, normalize).mT


def readout(
    scores: Tensor,
    trg_grid: Size,
    temperature: float | Tensor,
    window: str = "none",
    sigma: float | None = None,
    radius: int | None = None,
) -> Readout:
    """E[v] under softmax_j(w_ij s_ij / T), with v the target cells' centres. `functional.match` names the windows."""
    scores = full(scores)
    cells = cell_centres(trg_grid, trg_grid, scores.device, scores.dtype)  # (M, 2)
    argmax = scores.argmax(dim=-1)
    logits = scores / temperature
    dx, dy = (cells - cells[argmax].unsqueeze(2)).unbind(-1)  # (B, N, M) each
    if window == "crop" and radius is not None:
        logits = logits.masked_fill((dx.abs() > radius) | (dy.abs() > radius), OUTSIDE)
    if window == "argmax" and sigma is not None:
        logits = logits * torch.exp(-(dx.square() + dy.square()) / (2 * sigma**2))
    return Readout(logits.softmax(dim=-1) @ cells, argmax)


def mutual(src: Tensor, trg: Tensor, normalize: bool = True) -> Mutual:
    """max_j s_ij and max_i s_ij with their indices (NCNet; GSF eq. 4)."""
    scores = correlation(src, trg, normalize)
    return Mutual(*scores.max(dim=2), *scores.max(dim=1))


def local_correlation(src: Tensor, trg: Tensor, centre: Tensor, radius: int, normalize: bool = True) -> Tensor:
    """<f_i, g(c_i + d)> for d in {-r..r}², g read bilinearly and zero outside (RAFT's look-up; ViTSC eq. 8)."""
    src, trg = unit(src, normalize), unit(trg.movedim(1, -1), normalize).movedim(-1, 1)
    h, w = trg.shape[2:]
    d = torch.arange(-radius, radius + 1, device=src.device, dtype=src.dtype)
    dy, dx = torch.meshgrid(d, d, indexing="ij")
    points = centre.to(src.dtype).unsqueeze(2) + torch.stack([dx, dy], dim=-1).flatten(0, 1)  # (B, N, (2r+1)², 2)
    grid = 2 * points / points.new_tensor([w, h]) - 1
    patches = F.grid_sample(trg, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return torch.einsum("bnc,bcnk->bnk", src, patches)
