"""Images pulled into each other's frame, by a few points or by a dense flow."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.interpolate import RBFInterpolator
from torch import Tensor

from corrzoo.geometry import Size, cell_centres, sample, size_of
from corrzoo.types import ZooError
from corrzoo.visualize.figures import Images, head, panels, show

PAPER = 255
"""What is shown where there is no image to be read."""


def tps_warp(src_img: Tensor, src_kps: Tensor, trg_kps: Tensor, size: Size) -> Tensor:
    """The source image in the target's frame: a thin-plate spline through the matches says where each pixel is read.

    The spline is exact at every point (LPMFlow's supplement 3.2 guides it by predicted keypoints). Of points whose
    matches lie within half a pixel of each other the first one counts: a place cannot show two.

    Args:
        src_img: (3, H, W) uint8.
        src_kps: (n, 2) points in its pixels.
        trg_kps: (n, 2) their matches, in pixels of the target.
        size: (H', W') of the target.

    Returns:
        (3, H', W') uint8, white where the source does not reach.

    Raises:
        ZooError: for fewer than three places, or places on one line: no spline is determined by them.
    """
    src, trg = (kps.double().cpu().numpy() for kps in (src_kps, trg_kps))
    apart = np.linalg.norm(trg[:, None] - trg, axis=-1) >= 0.5
    kept = [k for k in range(len(trg)) if apart[k, :k].all()]
    lowered = trg[kept] - trg[kept].mean(0) if kept else np.zeros((0, 2))
    if len(kept) < 3 or np.linalg.svd(lowered, compute_uv=False)[1] < 0.5:
        raise ZooError(f"{len(trg)} matches at {len(kept)} places: a warp needs three that are not on one line")
    spline = RBFInterpolator(trg[kept], src[kept], kernel="thin_plate_spline")
    return _read(src_img, torch.from_numpy(spline(cell_centres(size, size, dtype=torch.float64).numpy())), size)


def flow_warp(trg_img: Tensor, flow: Tensor) -> Tensor:
    """The target image in the source's frame: each source pixel shows what its flow leads to.

    Args:
        trg_img: (3, H', W') uint8.
        flow: (2, H, W), from the centre of each source pixel, in pixels of the target less those of the source.

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
    """Source, source warped onto the target by its matches, and target, one pair a row.

    Args:
        src_img: B images (3, H, W) uint8.
        trg_img: B images (3, H, W) uint8.
        src_kps: B point sets (n, 2), in pixels of the images given.
        pred_kps: B point sets (n, 2), matches of the source points.
        titles: A title for each row.
    """
    figure, axes = panels([1, 1, 1], src_img, trg_img, titles=titles)
    head(axes, "warped by its matches", "target")
    for b, row in enumerate(axes):
        show(row[0], src_img[b])
        show(row[2], trg_img[b])
        try:
            show(row[1], tps_warp(src_img[b], src_kps[b], pred_kps[b], size_of(trg_img[b])))
        except ZooError as error:  # a pair with two keypoints is no reason to lose the picture
            row[1].text(0.5, 0.5, str(error), fontsize=6, ha="center", wrap=True, transform=row[1].transAxes)
            continue
        for ax, kps in ((row[0], src_kps[b]), (row[1], pred_kps[b]), (row[2], pred_kps[b])):
            ax.plot(*kps.T.cpu(), "o", ms=3.5, color="white", markeredgecolor="black", markeredgewidth=0.6)
    return figure


def _read(image: Tensor, points: Tensor, size: Size) -> Tensor:
    """An image read at points (H*W, 2) of a picture of that size; paper outside."""
    H, W = size_of(image)
    pixels = sample(image.unsqueeze(0).to(points.dtype), points.unsqueeze(0), (H, W))[0]
    inside = ((points >= 0) & (points <= points.new_tensor([W, H]))).all(1, keepdim=True)
    return torch.where(inside, pixels.round(), PAPER).byte().T.unflatten(1, size)
