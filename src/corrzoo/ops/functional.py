"""The public functions: arguments checked, precision settled, an implementation chosen."""

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

from corrzoo.geometry import Size
from corrzoo.ops import library, reference
from corrzoo.ops.reference import Matches, Mutual
from corrzoo.precision import full_precision
from corrzoo.registry import nearest
from corrzoo.types import ZooError

Window = Literal["none", "argmax", "given", "crop"]
Backend = Literal["auto", "torch", "triton"]
BACKENDS = ("auto", "torch", "triton")
NEEDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "argmax": ("sigma",),
    "given": ("sigma", "centre"),
    "crop": ("radius",),
}


def correlation(src: Tensor, trg: Tensor, normalize: bool = True) -> Tensor:
    """Scores of every source feature against every target feature, the whole volume.

    For heads whose networks read the volume, and for heat maps; a read-out alone is cheaper by `match`.

    Args:
        src: (B, N, C) source features.
        trg: (B, M, C) target features.
        normalize: Divide features by their length, which makes the scores cosines; a zero feature scores 0.

    Returns:
        (B, N, M) in float32 (float64 for float64), inside autocast too.

    Raises:
        ZooError: when the shapes do not fit or something is empty.
    """
    _check_features(src, trg)
    with full_precision(src):
        return reference.correlation(src, trg, normalize)


def readout(
    scores: Tensor,
    trg_grid: Size,
    temperature: float | Tensor,
    window: Window = "none",
    sigma: float | None = None,
    radius: int | None = None,
    centre: Tensor | None = None,
) -> Matches:
    """The expected target position from scores that already exist: `match` without its correlation.

    Args:
        scores: (B, N, M) scores of source points against the cells of the target grid, row by row.
        trg_grid: (h, w) of the target, h * w = M.
        temperature: The softmax is over scores / temperature; a 0-d tensor may carry a gradient.
        window: See `match`, which also says what `sigma`, `radius` and `centre` are.

    Raises:
        ZooError: when the shapes do not fit, something is empty, or the window lacks what it needs.
    """
    if scores.ndim != 3 or 0 in scores.shape:
        raise ZooError(f"expected scores of shape (B, N, M) with nothing empty, got {tuple(scores.shape)}")
    _check_window(scores.shape[:2], scores.shape[2], trg_grid, temperature, window, sigma, radius, centre)
    with full_precision(scores):
        return reference.readout(scores, trg_grid, temperature, window, sigma or 0.0, radius or 0, centre)


def match(
    src: Tensor,
    trg: Tensor,
    trg_grid: Size,
    temperature: float | Tensor,
    window: Window = "none",
    sigma: float | None = None,
    radius: int | None = None,
    centre: Tensor | None = None,
    normalize: bool = True,
    backend: Backend = "auto",
    recompute: bool | Literal["auto"] = "auto",
) -> Matches:
    """Where source points lie in the target: the expectation of the target coordinate under a softmax of the scores.

    It answers `readout(correlation(src, trg, normalize), ...)` without holding the volume. N is free: a query list of
    36 keypoints costs 36 rows. At grids of 32² and below the op is under 0.5 % of a model's arithmetic: it pays in
    memory, at 56² and above, and in evaluation.

    Args:
        src: (B, N, C) features of the source points.
        trg: (B, M, C) features of the target cells, row by row.
        trg_grid: (h, w) of the target, h * w = M.
        temperature: The softmax is over scores / temperature; a 0-d tensor may carry a gradient.
        window: "none" is the plain soft-argmax. "argmax" multiplies the scores by a Gaussian around the row's argmax
            first (SFNet's kernel soft-argmax, the centre is detached). "given" puts that Gaussian around `centre`
            (GSF eq. 8). "crop" keeps the (2 radius + 1)² cells around the argmax that lie in the grid.
        sigma: Standard deviation of the Gaussian, in target cells.
        radius: Of the crop, in target cells.
        centre: (B, N, 2) in continuous target cells; carries a gradient.
        normalize: Divide features by their length; a zero feature scores 0.
        backend: "torch" (strips, any device), "triton" (CUDA), or "auto": triton where it runs.
        recompute: Whether the backward computes the scores again instead of keeping them. "auto" keeps what is
            small. The triton backend always computes them again.

    Raises:
        ZooError: when the shapes do not fit, something is empty, the window lacks what it needs, or the backend
            cannot serve.
    """
    _check_features(src, trg)
    _check_window(src.shape[:2], trg.shape[1], trg_grid, temperature, window, sigma, radius, centre)
    if recompute not in (True, False, "auto"):
        raise ZooError(f"recompute must be True, False or 'auto', got {recompute!r}")
    dtype = torch.promote_types(src.dtype, torch.float32)
    temperature = torch.as_tensor(temperature, dtype=dtype, device=src.device)
    centre = centre.to(dtype) if window == "given" and centre is not None else None
    runs = resolve_backend(backend, src)
    keep: int | torch.SymInt = 0
    if runs == "torch" and recompute is not True and _wants_gradient(src, trg, temperature, centre):
        keep = _points_to_keep(src.shape[0], src.shape[1], trg.shape[1], dtype) if recompute == "auto" else src.shape[1]
    *matches, _ = library.match(
        src, trg, temperature, centre, *trg_grid, window, sigma or 0.0, radius or 0, normalize, keep, runs
    )
    return Matches(*matches)


def mutual(src: Tensor, trg: Tensor, normalize: bool = True, backend: Backend = "auto") -> Mutual:
    """Row and column maxima of the scores with their indices, never the volume (NCNet, GSF eq. 4).

    Args:
        src: (B, N, C) source features.
        trg: (B, M, C) target features.
        normalize: Divide features by their length; a zero feature scores 0.
        backend: As for `match`.

    Returns:
        The maxima carry gradients to both features.

    Raises:
        ZooError: when the shapes do not fit, something is empty, or the backend cannot serve.
    """
    _check_features(src, trg)
    out = Mutual(*library.mutual(src.detach(), trg.detach(), normalize, resolve_backend(backend, src)))
    if not _wants_gradient(src, trg):
        return out
    f, g = reference.unit(src, normalize), reference.unit(trg, normalize)
    row_max = (f * g.take_along_dim(out.row_argmax.unsqueeze(-1), 1)).sum(-1)
    col_max = (f.take_along_dim(out.col_argmax.unsqueeze(-1), 1) * g).sum(-1)
    return out._replace(row_max=row_max, col_max=col_max)


def local_correlation(
    src: Tensor, trg: Tensor, centre: Tensor, radius: int, normalize: bool = True, backend: Backend = "auto"
) -> Tensor:
    """Scores of source points in a square of the target around a moving centre (RAFT's look-up, ViTSC eq. 8).

    Args:
        src: (B, N, C) features of the source points.
        trg: (B, C, h, w) target features.
        centre: (B, N, 2) in continuous target cells (a cell's own centre is at + 0.5).
        radius: The square has (2 radius + 1)² points, at centre + integer offsets.
        normalize: Divide features by their length (the target's before they are read); a zero feature scores 0.
        backend: As for `match`.

    Returns:
        (B, N, (2 radius + 1)²), row by row from the top left: read bilinearly, zero outside the target. Gradients go
        to src, trg and centre.

    Raises:
        ZooError: when the shapes do not fit, something is empty, or the backend cannot serve.
    """
    if trg.ndim != 4:
        raise ZooError(f"expected trg of shape (B, C, h, w), got {tuple(trg.shape)}")
    _check_features(src, trg.flatten(2).mT)
    _check_radius(radius)
    _check_centre(centre, src.shape[:2])
    f = reference.unit(src, normalize)
    g = reference.unit(trg.movedim(1, -1), normalize).contiguous()
    centre = centre.to(f.dtype) - 0.5  # now a cell's own centre is at its index
    corner = centre.detach().floor()
    scores = library.patch_scores(f, g, corner.long() - radius, 2 * radius + 2, resolve_backend(backend, src))
    scores = scores.unflatten(-1, (2 * radius + 2, 2 * radius + 2))
    # Offsets are whole cells, so all (2r + 1)² points lie at the same place between their four cells.
    x, y = (centre - corner).unsqueeze(-2).unbind(-1)
    scores = torch.lerp(scores[..., :-1], scores[..., 1:], x.unsqueeze(-1))
    return torch.lerp(scores[..., :-1, :], scores[..., 1:, :], y.unsqueeze(-1)).flatten(2)


def resolve_backend(backend: str, x: Tensor) -> str:
    """Which implementation runs on features like x: "torch" or "triton".

    Raises:
        ZooError: when it is unknown or cannot serve.
    """
    if backend not in BACKENDS:
        raise ZooError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and (x.device.type != "cuda" or x.dtype == torch.float64)):
        return "torch"
    available = importlib.util.find_spec("triton") is not None
    if backend == "auto":  # the kernels are compiled for compute capability 8.0 and above
        return "triton" if available and torch.cuda.get_device_capability(x.device) >= (8, 0) else "torch"
    if not available:
        raise ZooError("backend='triton' needs the package triton: install it, or use backend='auto'")
    if x.dtype == torch.float64:
        raise ZooError("backend='triton' computes in float32, got float64: use backend='torch'")
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ZooError(f"backend='triton' needs CUDA tensors, got {x.device}: use backend='torch' or 'auto'")
    return "triton"


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _points_to_keep(batch: int, points: int, cells: int, dtype: torch.dtype) -> int | torch.SymInt:
    """Of how many points of each item the logits are kept for the backward.

    Our choice: all of a volume up to 32 MB, half of a larger one up to 512 MB. Computing a score again costs a third
    of its backward, so half a volume buys most of what a whole one does, and a large one is what the op is to avoid.
    """
    row = batch * cells * dtype.itemsize
    return torch.sym_min(points, torch.sym_max(32 * 2**20 // row, torch.sym_min(points // 2, 512 * 2**20 // row)))


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
    points: torch.Size, cells: int, trg_grid: Size, temperature: float | Tensor, window: str, sigma: float | None,
    radius: int | None, centre: Tensor | None,
) -> None:  # fmt: skip
    if trg_grid[0] * trg_grid[1] != cells:
        raise ZooError(f"trg_grid {tuple(trg_grid)} must have as many cells as the target: {cells}")
    if isinstance(temperature, Tensor):
        if temperature.ndim != 0:
            raise ZooError(f"expected temperature as a number or a 0-d tensor, got shape {tuple(temperature.shape)}")
    elif not temperature > 0:
        raise ZooError(f"temperature must be positive, got {temperature}")
    if window not in NEEDS:
        raise ZooError(f"unknown window {window!r}{nearest(window, NEEDS) or ': choose one of ' + ', '.join(NEEDS)}")
    given = {"sigma": sigma, "radius": radius, "centre": centre}
    for name in NEEDS[window]:
        if given[name] is None:
            raise ZooError(f"window {window!r} needs {name}")
    if window in ("argmax", "given") and sigma is not None and not sigma > 0:
        raise ZooError(f"sigma must be positive, got {sigma}")
    if window == "crop":
        _check_radius(radius)
    if window == "given" and centre is not None:
        _check_centre(centre, points)


def _check_radius(radius: int | None) -> None:
    if not isinstance(radius, int) or radius < 0:
        raise ZooError(f"radius must be a whole number of cells, 0 or more, got {radius}")


def _check_centre(centre: Tensor, points: torch.Size) -> None:
    if centre.shape != (*points, 2):
        raise ZooError(f"expected centre of shape {(*points, 2)}, got {tuple(centre.shape)}")
