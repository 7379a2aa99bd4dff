"""The public functions: check the arguments and choose the implementation."""

from typing import Literal

import torch
from torch import Tensor

from corrzoo.geometry import Size
from corrzoo.ops import reference, strips
from corrzoo.ops.reference import Mutual, Readout
from corrzoo.precision import full_precision
from corrzoo.registry import nearest
from corrzoo.types import ZooError

Window = Literal["none", "argmax", "crop"]
WINDOWS = ("none", "argmax", "crop")
Backend = Literal["auto", "torch", "triton"]


def correlation(src: Tensor, trg: Tensor, normalize: bool = True) -> Tensor:
    """Compute the whole volume of scores, for networks that read it and for heat maps. `match` is cheaper.

    Args:
        src: (B, N, C) source features.
        trg: (B, M, C) target features.
        normalize: Divide features by their norm, so that scores are cosines. A zero feature scores 0.

    Returns:
        (B, N, M) scores in float32 (float64 for float64), also inside autocast.

    Raises:
        ZooError: if the shapes do not fit or a tensor is empty.
    """
    _check_features(src, trg)
    with full_precision(src):
        return reference.correlation(src, trg, normalize)


def readout(
    scores: Tensor, trg_grid: Size, temperature: float | Tensor, window: Window = "none",
    sigma: float | None = None, radius: int | None = None,
) -> Readout:  # fmt: skip
    """Compute expected target positions from scores (B, N, M): `match` without its correlation, same arguments.

    Raises:
        ZooError: if the shapes do not fit, a tensor is empty, or the window lacks its argument.
    """
    if scores.ndim != 3 or 0 in scores.shape:
        raise ZooError(f"expected scores of shape (B, N, M) with nothing empty, got {tuple(scores.shape)}")
    _check_window(scores.shape[2], trg_grid, temperature, window, sigma, radius)
    with full_precision(scores):
        return reference.readout(scores, trg_grid, temperature, window, sigma, radius)


def match(
    src: Tensor, trg: Tensor, trg_grid: Size, temperature: float | Tensor, window: Window = "none",
    sigma: float | None = None, radius: int | None = None, normalize: bool = True,
    backend: Backend = "auto", memory: int | None = None,
) -> Readout:  # fmt: skip
    """Match source points to target positions: the mean of the target coordinate under a softmax of the scores.

    The same as `readout(correlation(src, trg, normalize), ...)` without the volume in memory.

    Args:
        src: (B, N, C) features of the source points; any N.
        trg: (B, M, C) features of the target cells, row by row.
        trg_grid: (h, w) of the target, h * w = M.
        temperature: The softmax is over scores / temperature. A 0-d tensor may carry a gradient.
        window: "none": soft-argmax. "argmax": kernel soft-argmax (SFNet), scores multiplied by a Gaussian around each
            row's argmax. "crop": softmax over the (2 radius + 1)² cells around the argmax that lie in the grid.
        sigma: Standard deviation of the Gaussian, in target cells.
        radius: Radius of the crop, in target cells.
        normalize: Divide features by their norm. A zero feature scores 0.
        backend: "torch" (any device), "triton" (CUDA), or "auto": triton where it runs.
        memory: Bytes of scores held at a time; nothing is kept for the backward. Default: as fast as possible, with
            up to 256 MB on a GPU, and up to 512 MB kept for the backward.

    Raises:
        ZooError: if the shapes do not fit, a tensor is empty, the window lacks its argument, or the backend cannot run.
    """
    _check_features(src, trg)
    _check_window(trg.shape[1], trg_grid, temperature, window, sigma, radius)
    if memory is not None and memory <= 0:
        raise ZooError(f"memory must be above 0 bytes, got {memory}")
    tensor = temperature.to(src.device) if isinstance(temperature, Tensor) else None
    value = 0.0 if isinstance(temperature, Tensor) else float(temperature)
    extent = float((sigma if window == "argmax" else radius) or 0)
    keep = strips.points_to_keep(src, trg) if strips.wants_gradient(src, trg, tensor) and not memory else 0
    options = (value, window, *trg_grid, extent, normalize, memory or 0, keep, backend)
    return Readout(*strips.rows(src, trg, tensor, None, *options)[:2])


def mutual(src: Tensor, trg: Tensor, normalize: bool = True) -> Mutual:
    """Compute row and column maxima of the scores and their indices, without the volume (NCNet; GSF eq. 4).

    Args:
        src: (B, N, C) source features.
        trg: (B, M, C) target features.
        normalize: Divide features by their norm. A zero feature scores 0.

    Raises:
        ZooError: if the shapes do not fit or a tensor is empty.
    """
    _check_features(src, trg)
    found = Mutual(*strips.mutual(src.detach(), trg.detach(), normalize))
    if not strips.wants_gradient(src, trg):
        return found
    with full_precision(src):
        f, g = reference.unit(src, normalize), reference.unit(trg, normalize)
        row_max = (f * g.take_along_dim(found.row_argmax.unsqueeze(-1), 1)).sum(-1)
        col_max = (f.take_along_dim(found.col_argmax.unsqueeze(-1), 1) * g).sum(-1)
    return found._replace(row_max=row_max, col_max=col_max)


def local_correlation(src: Tensor, trg: Tensor, centre: Tensor, radius: int, normalize: bool = True) -> Tensor:
    """Compute scores of source points in a square of the target around a centre (RAFT's look-up; ViTSC eq. 8).

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
    cells = trg.flatten(2).mT  # (B, h * w, C)
    _check_features(src, cells)
    _check_radius(radius)
    if centre.shape != (*src.shape[:2], 2):
        raise ZooError(f"expected centre of shape {(*src.shape[:2], 2)}, got {tuple(centre.shape)}")
    side = 2 * radius + 2
    with full_precision(src):
        centre = centre.to(torch.promote_types(src.dtype, torch.float32)) - 0.5  # the first cell is at (0, 0)
        corner = centre.detach().floor()
        options = (1.0, "square", *trg.shape[2:], float(side), normalize, 0, 0, "torch")
        scores, *_ = strips.rows(src, cells, None, corner.long() - radius, *options)
        scores = scores.unflatten(-1, (side, side))
        # Offsets are whole cells, so all points have the same place between their four cells.
        x, y = (centre - corner).unsqueeze(-2).unbind(-1)
        scores = torch.lerp(scores[..., :-1], scores[..., 1:], x.unsqueeze(-1))
        return torch.lerp(scores[..., :-1, :], scores[..., 1:, :], y.unsqueeze(-1)).flatten(2)


def _check_features(src: Tensor, trg: Tensor) -> None:
    for name, x in (("src", src), ("trg", trg)):
        if x.ndim != 3 or 0 in x.shape:
            raise ZooError(f"expected {name} of shape (B, points, C) with nothing empty, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ZooError(f"expected {name} of a floating dtype, got {x.dtype}")
    if src.shape[0] != trg.shape[0] or src.shape[2] != trg.shape[2]:
        raise ZooError(f"src {tuple(src.shape)} and trg {tuple(trg.shape)} must agree in the batch and in C")
    if src.dtype != trg.dtype or src.device != trg.device:
        raise ZooError(f"src is {src.dtype} on {src.device}, trg {trg.dtype} on {trg.device}: they must agree")


def _check_window(
    cells: int, trg_grid: Size, temperature: float | Tensor, window: str, sigma: float | None, radius: int | None
) -> None:
    if trg_grid[0] * trg_grid[1] != cells:
        raise ZooError(f"trg_grid {tuple(trg_grid)} must have as many cells as the target: {cells}")
    if isinstance(temperature, Tensor):
        if temperature.ndim != 0:
            raise ZooError(f"expected temperature as a number or a 0-d tensor, got shape {tuple(temperature.shape)}")
    elif not temperature > 0:
        raise ZooError(f"temperature must be positive, got {temperature}")
    if window not in WINDOWS:
        known = nearest(window, WINDOWS) or f": choose one of {', '.join(WINDOWS)}"
        raise ZooError(f"unknown window {window!r}{known}")
    if window == "argmax" and not (sigma or 0) > 0:
        raise ZooError(f"window 'argmax' needs sigma above 0, got {sigma}")
    if window == "crop":
        _check_radius(radius)


def _check_radius(radius: int | None) -> None:
    if not isinstance(radius, int) or radius < 0:
        raise ZooError(f"radius must be a whole number of cells, 0 or more, got {radius}")
