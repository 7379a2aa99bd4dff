"""The op in plain torch: the definition that the fast implementations are tested against.

It holds whole correlation volumes and leaves gradients to autograd. Half precision is computed in float32.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from corrzoo.geometry import Size, cell_centres
from corrzoo.precision import full, full_precision
from corrzoo.registry import suggestion
from corrzoo.types import ZooError

Window = Literal["none", "argmax", "crop"]
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
    """1 / |x| (...) of features (..., C); 0 for a zero feature, so that its cosines are 0; NaN if |x|² overflows."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.masked_fill(norm == 0, torch.inf).reciprocal().masked_fill(norm.isinf(), torch.nan)


def unit(x: Tensor, normalize: bool) -> Tensor:
    """Features (..., C) in full precision, divided by their norm if `normalize`."""
    x = full(x)  # once, so that gradients are rounded once
    return x * inverse_norm(x).unsqueeze(-1) if normalize else x


def correlation(src: Tensor, trg: Tensor, normalize: bool = True) -> Tensor:
    """Compute all scores s_ij = <f_i, g_j>, for heads that read them and for heat maps. `match` is cheaper.

    Args:
        src: (B, N, C) source features.
        trg: (B, M, C) target features.
        normalize: Divide features by their norm, so that scores are cosines. A zero feature scores 0.

    Returns:
        (B, N, M) scores in float32 (float64 for float64), also inside autocast.

    Raises:
        ZooError: if the shapes do not fit or a tensor is empty.
    """
    check_features(src, trg)
    with full_precision(src):
        return unit(src, normalize) @ unit(trg, normalize).mT


def readout(
    scores: Tensor, trg_grid: Size, temperature: float | Tensor, window: Window = "none",
    sigma: float | None = None, radius: int | None = None,
) -> Readout:  # fmt: skip
    """Compute E[v] under softmax_j(w_ij s_ij / T), v the cells' centres, of scores (B, N, M). See `match`.

    Raises:
        ZooError: if the shapes do not fit or the window lacks its argument.
    """
    if scores.ndim != 3 or 0 in scores.shape:
        raise ZooError(f"expected scores of shape (B, N, M) with nothing empty, got {tuple(scores.shape)}")
    check_window(scores.shape[-1], trg_grid, temperature, window, sigma, radius)
    with full_precision(scores):
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
    x, y = points.unbind(-1)
    grid = torch.stack([2 * x / w - 1, 2 * y / h - 1], dim=-1)  # no tensor of sizes, which torch.export would fix
    patches = F.grid_sample(trg, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return torch.einsum("bnc,bcnk->bnk", src, patches)


def check_features(src: Tensor, trg: Tensor) -> None:
    """Refuse features that do not fit each other."""
    for name, x in (("src", src), ("trg", trg)):
        if x.ndim != 3 or 0 in x.shape or not x.is_floating_point():
            got = f"{x.dtype} {tuple(x.shape)}"
            raise ZooError(f"expected {name} of shape (B, points, C) with nothing empty, floating, got {got}")
    if src.shape[0] != trg.shape[0] or src.shape[2] != trg.shape[2]:
        raise ZooError(f"src {tuple(src.shape)} and trg {tuple(trg.shape)} must agree in the batch and in C")
    if src.dtype != trg.dtype or src.device != trg.device:
        raise ZooError(f"src is {src.dtype} on {src.device}, trg {trg.dtype} on {trg.device}: they must agree")


def check_window(
    cells: int, trg_grid: Size, temperature: float | Tensor, window: str, sigma: float | None, radius: int | None
) -> None:
    """Refuse options of `match` that do not fit."""
    if trg_grid[0] * trg_grid[1] != cells or min(trg_grid) <= 0:
        raise ZooError(f"trg_grid {tuple(trg_grid)} must have as many cells as the target: {cells}")
    if isinstance(temperature, Tensor):
        if temperature.ndim != 0:
            raise ZooError(f"expected temperature as a number or a 0-d tensor, got shape {tuple(temperature.shape)}")
    elif not temperature > 0:
        raise ZooError(f"temperature must be positive, got {temperature}")
    if window not in get_args(Window):
        raise ZooError(f"unknown window {window!r}{suggestion(window, get_args(Window))}")
    if window == "argmax" and not (sigma or 0) > 1e-6:  # at 1e-20, 2 sigma² is 0 in float32
        raise ZooError(f"window 'argmax' needs sigma above 1e-6, got {sigma}")
    if window == "crop":
        check_radius(radius)


def check_radius(radius: int | None) -> None:
    """Refuse a radius that is no whole number of cells."""
    if not isinstance(radius, int) or radius < 0:
        raise ZooError(f"radius must be a whole number of cells, 0 or more, got {radius}")
