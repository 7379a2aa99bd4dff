"""The functions that read a correlation without holding it: they check the arguments and call the loop over strips.

torch.export traces the reference instead: an exported program has no operator that needs corrzoo, but holds the volume.
"""

from typing import Literal

import torch
from torch import Tensor

from corrzoo.geometry import Size
from corrzoo.ops import reference, strips
from corrzoo.ops.reference import Mutual, Readout, Window, check_features, check_radius, check_window, unit
from corrzoo.precision import full_precision
from corrzoo.types import ZooError

Backend = Literal["auto", "torch", "triton"]


def match(
    src: Tensor, trg: Tensor, trg_grid: Size, temperature: float | Tensor, window: Window = "none",
    sigma: float | None = None, radius: int | None = None, normalize: bool = True, backend: Backend = "auto",
) -> Readout:  # fmt: skip
    """Match source points to target positions: the mean of the target coordinate under a softmax of the scores.

    The same as `readout(correlation(src, trg, normalize), ...)` without the volume in memory.

    Args:
        src: (B, N, C) features of the source points; any N.
        trg: (B, M, C) features of the target cells, row by row.
        trg_grid: (h, w) of the target, h * w = M.
        temperature: The softmax is over scores / temperature, above 0. A 0-d tensor may carry a gradient; its value is
            not checked, as that would wait for the device.
        window: "none": soft-argmax. "argmax": kernel soft-argmax (SFNet), scores multiplied by a Gaussian around each
            row's argmax. "crop": softmax over the (2 radius + 1)² cells around the argmax that lie in the grid.
        sigma: Standard deviation of the Gaussian, in target cells.
        radius: Radius of the crop, in target cells.
        normalize: Divide features by their norm. A zero feature scores 0; one whose squared norm overflows, NaN.
        backend: "torch" (any device), "triton" (CUDA), or "auto": triton where it runs.

    Raises:
        ZooError: if the shapes do not fit, a tensor is empty, the window lacks its argument, or the backend cannot run.
    """
    check_features(src, trg)
    check_window(trg.shape[1], trg_grid, temperature, window, sigma, radius)
    if torch.compiler.is_exporting():
        return reference.readout(
            reference.correlation(src, trg, normalize), trg_grid, temperature, window, sigma, radius
        )
    extent = float((sigma if window == "argmax" else radius) or 0)
    return Readout(*strips.rows(src, trg, temperature, None, window, *trg_grid, extent, normalize, backend)[:2])


def mutual(src: Tensor, trg: Tensor, normalize: bool = True) -> Mutual:
    """Compute row and column maxima of the scores and their indices, without the volume (NCNet; GSF eq. 4).

    Args:
        src: (B, N, C) source features.
        trg: (B, M, C) target features.
        normalize: Divide features by their norm. A zero feature scores 0.

    Raises:
        ZooError: if the shapes do not fit or a tensor is empty.
    """
    check_features(src, trg)
    if torch.compiler.is_exporting():
        return reference.mutual(src, trg, normalize)
    found = Mutual(*strips.mutual(src.detach(), trg.detach(), normalize))
    if not (torch.is_grad_enabled() and (src.requires_grad or trg.requires_grad)):
        return found
    with full_precision(src):
        f, g = unit(src, normalize), unit(trg, normalize)
        row_max = (f * g.take_along_dim(found.row_argmax.unsqueeze(-1), 1)).sum(-1)
        col_max = (f.take_along_dim(found.col_argmax.unsqueeze(-1), 1) * g).sum(-1)
    return found._replace(row_max=row_max, col_max=col_max)


def local_correlation(src: Tensor, trg: Tensor, centre: Tensor, radius: int, normalize: bool = True) -> Tensor:
    """Compute scores of source points in a square of the target around a centre (RAFT's look-up; ViTSC eq. 8).

    As in `match`, the scores with all cells are computed in strips, and then those of the square are kept.

    Args:
        src: (B, N, C) features of the source points.
        trg: (B, C, h, w) target features.
        centre: (B, N, 2) in target cells, continuous: the centre of the first cell is (0.5, 0.5).
        radius: The square has (2 radius + 1)² points at integer offsets from the centre.
        normalize: Divide features by their norm (the target's before interpolation). A zero feature scores 0.

    Returns:
        (B, N, (2 radius + 1)²), row by row: read bilinearly, zero outside the target. Gradients to src, trg and centre.

    Raises:
        ZooError: if the shapes do not fit or a tensor is empty.
    """
    if trg.ndim != 4:
        raise ZooError(f"expected trg of shape (B, C, h, w), got {tuple(trg.shape)}")
    cells, side = trg.flatten(2).mT, 2 * radius + 2  # (B, h * w, C)
    check_features(src, cells)
    check_radius(radius)
    if centre.shape != (*src.shape[:2], 2):
        raise ZooError(f"expected centre of shape {(*src.shape[:2], 2)}, got {tuple(centre.shape)}")
    if torch.compiler.is_exporting():
        return reference.local_correlation(src, trg, centre, radius, normalize)
    with full_precision(src):
        centre = centre.to(torch.promote_types(src.dtype, torch.float32)) - 0.5  # the first cell is at (0, 0)
        corner = centre.detach().floor()
        scores, *_ = strips.rows(
            src, cells, 1.0, corner.long() - radius, "square", *trg.shape[2:], side, normalize, "auto"
        )
        scores = scores.unflatten(-1, (side, side))
        # Offsets are whole cells, so all points have the same place between their four cells.
        x, y = (centre - corner).unsqueeze(-2).unbind(-1)
        scores = torch.lerp(scores[..., :-1], scores[..., 1:], x.unsqueeze(-1))
        return torch.lerp(scores[..., :-1, :], scores[..., 1:, :], y.unsqueeze(-1)).flatten(2)
