"""Warp an image into the frame of the other, by matched points or by a dense flow."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.interpolate import RBFInterpolator
from torch import Tensor

from corrzoo.geometry import Size, cell_centres, sample, size_of
from corrzoo.types import ZooError
from corrzoo.visualize.figures import Images, panels, show

PAPER = 255
"""Grey value where the warped image has no pixel."""


def tps_warp(src_img: Tensor, src_kps: Tensor, trg_kps: Tensor, size: Size) -> Tensor:
    """Warp the source image into the target's frame by a thin-plate spline through the matches.

    The spline is exact at every point (LPMFlow's supplement 3.2 uses predicted keypoints). Of matches within half a
    pixel of each other the first is used.

    Args:
        src_img: (3, H, W) uint8.
        src_kps: (n, 2) points in source pixels.
        trg_kps: (n, 2) their matches in target pixels.
        size: (H', W') of the target.

    Returns:
        (3, H', W') uint8, white outside the source.

    Raises:
        ZooError: if fewer than three matches are distinct, or all lie on one line.
    """
    src, trg = (kps.double().cpu().numpy() for kps in (src_kps, trg_kps))
    apart = np.linalg.norm(trg[:, None] - trg, axis=-1) >= 0.5
    kept = [k for k in range(len(trg)) if apart[k, :k].all()]
    lowered = trg[kept] - trg[kept].mean(0) if kept else np.zeros((0, 2))
    if len(kept) < 3 or np.linalg.svd(lowered, compute_uv=False)[1] < 0.5:
        raise ZooError(f"{len(kept)} distinct matches: a warp needs three that are not on one line")
    spline = RBFInterpolator(trg[kept], src[kept], kernel="thin_plate_spline")
    return _read(src_img, torch.from_numpy(spline(cell_centres(size, size, dtype=torch.float64).numpy())), size)


def flow_warp(trg_img: Tensor, flow: Tensor) -> Tensor:
    """Warp the target image into the source's frame: each source pixel takes the colour of its match.

    Args:
        trg_img: (3, H', W') uint8.
        flow: (2, H, W), target pixels minus source pixels, at the centre of each source pixel.

    Returns:
        (3, H, W) uint8, white where the flow leaves the target.
    """
    size = size_of(flow)
    points = cell_centres(size, size, dtype=flow.dtype) + flow.flatten(1).T.cpu()
    return _read(trg_img, points, size)


def draw_warps(
    src_img: Images,
    trg_img: Images,
    src_kps: Sequence[Tensor],
    pred_kps: Sequence[Tensor],
    titles: Sequence[str] | None = None,
) -> Figure:
    """Draw the source, the source warped onto the target by its matches `src_kps`, `pred_kps`, and the target."""
    figure, axes = panels(src_img, trg_img, titles=titles, columns=["warped by its matches", "target"])
    for b, row in enumerate(axes):
        show(row[0], src_img[b])
        show(row[2], trg_img[b])
        try:
            show(row[1], tps_warp(src_img[b], src_kps[b], pred_kps[b], size_of(trg_img[b])))
        except ZooError as error:  # such as a pair of two keypoints
            row[1].text(0.5, 0.5, str(error), fontsize=6, ha="center", wrap=True, transform=row[1].transAxes)
            continue
        for ax, kps in ((row[0], src_kps[b]), (row[1], pred_kps[b]), (row[2], pred_kps[b])):
            ax.plot(*kps.T.cpu(), "o", ms=3.5, color="white", markeredgecolor="black", markeredgewidth=0.6)
    return figure


def _read(image: Tensor, points: Tensor, size: Size) -> Tensor:
    """Sample an image at points (H*W, 2), white outside -> (3, H, W)."""
    H, W = size_of(image)
    pixels = sample(image.unsqueeze(0).to(points.dtype), points.unsqueeze(0), (H, W))[0]
    inside = ((points >= 0) & (points <= points.new_tensor([W, H]))).all(1, keepdim=True)
    return torch.where(inside, pixels.round(), PAPER).byte().T.unflatten(1, size)
