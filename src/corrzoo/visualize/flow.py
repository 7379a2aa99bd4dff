"""Dense flow in the Middlebury colours, and its file format."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from corrzoo.geometry import cell_centres, size_of
from corrzoo.types import ZooError
from corrzoo.visualize.figures import FINEST, Images, head, panels, show

WHEEL = (
    [0, 15, 21, 25, 36, 49, 55],
    [[255, 0, 0], [255, 255, 0], [0, 255, 0], [0, 255, 255], [0, 0, 255], [255, 0, 255], [255, 0, 0]],
)
"""Places on the wheel of 55 colours, and the colours there; between them they change evenly (Baker et al., "A database
and evaluation methodology for optical flow")."""


SATURATED = 0.9
"""our choice: in a picture so many of the displacements are told apart by saturation, and the longest are darkened."""


def flow_colours(flow: Tensor, limit: float | None = None) -> Tensor:
    """A flow as an image: the hue is its direction, the saturation its length; white does not move.

    To the right is red, down yellow, left cyan, up violet. What is longer than the limit is darkened.

    Args:
        flow: (2, h, w) displacements (dx, dy).
        limit: The length that is fully saturated; the longest of the flow when not given.

    Returns:
        (3, h, w) uint8.
    """
    u, v = flow.double().cpu().numpy()
    length = np.hypot(u, v) / (limit or max(float(np.hypot(u, v).max()), 1e-12))
    place = (np.arctan2(-v, -u) / np.pi + 1) / 2 * 54  # as released: the wheel's last step is never reached
    anchors, colours = WHEEL[0], np.array(WHEEL[1]) / 255
    hue = np.stack([np.interp(place, anchors, channel) for channel in colours.T])
    shown = np.where(length <= 1, 1 - length * (1 - hue), 0.75 * hue)
    return torch.from_numpy((255 * shown).astype(np.uint8))


def draw_flow(
    src_img: Images, flows: Sequence[Tensor], titles: Sequence[str] | None = None, shared: bool = False
) -> Figure:
    """Images, the flows of their pixels in colours and arrows, and a wheel that says which colour goes where.

    Args:
        src_img: B images (3, H, W) uint8.
        flows: B flows (2, h, w) over them, in pixels.
        titles: A title for each row.
        shared: One scale of colours and arrows for all rows, so that they compare.
    """
    figure, axes = panels([1, 1, 0.6], src_img, titles=titles)
    head(axes, "flow")
    lengths = [flow.norm(dim=0).flatten().cpu().numpy() for flow in flows]
    lengths = [np.concatenate(lengths)] * len(flows) if shared else lengths
    for row, image, flow, length in zip(axes, src_img, flows, lengths, strict=True):
        limit = float(np.quantile(length, SATURATED))
        show(row[0], image)
        _flow_panel(row[1], flow, size_of(image), limit)
        _wheel(row[2], limit)
    return figure


def _flow_panel(ax: Axes, flow: Tensor, image: tuple[int, int], limit: float) -> None:
    """Arrows say without colour what the colours say: 12 on the longer side, the longest reach the next."""
    H, W = image
    h, w = size_of(flow)
    skip = -(-max(h, w) // FINEST)
    shown = flow_colours(flow[:, skip // 2 :: skip, skip // 2 :: skip], limit)
    ax.imshow(shown.permute(1, 2, 0).numpy(), extent=(0, W, H, 0), interpolation="nearest")
    step = max(max(h, w) // 12, 1)
    at = cell_centres((h, w), image).view(h, w, 2)[step // 2 :: step, step // 2 :: step]
    arrows = flow.cpu()[:, step // 2 :: step, step // 2 :: step]
    u, v = arrows / (arrows.norm(dim=0) / max(limit, 1e-12)).clamp(min=1)
    per_arrow = max(limit, 1e-12) / (step * max(H / h, W / w))
    ax.quiver(at[..., 0], at[..., 1], u, v, angles="xy", scale_units="xy", scale=per_arrow, width=0.004, color="black")
    ax.set_xlim(0, W)
    ax.set_ylim(H, 0)


def _wheel(ax: Axes, limit: float) -> None:
    side = torch.linspace(-1, 1, 201)
    v, u = torch.meshgrid(side, side, indexing="ij")
    disc = flow_colours(torch.stack([u, v]), 1.0).permute(1, 2, 0).numpy().copy()
    disc[(u.hypot(v) > 1).numpy()] = 255
    ax.imshow(disc, extent=(-1, 1, 1, -1))
    for x, y, name in ((1.12, 0, "right"), (-1.12, 0, "left"), (0, 1.15, "down"), (0, -1.15, "up")):
        ax.text(x, y, name, fontsize=7, ha={1: "left", -1: "right", 0: "center"}[int(np.sign(x))], va="center")
    ax.set_title(f"rim: {limit:.0f} px, dark: more", fontsize=8)
    ax.set_xlim(-2, 2)
    ax.set_ylim(2, -2)


def write_flo(flow: Tensor, path: Path | str) -> Path:
    """Write a flow (2, H, W) in the Middlebury format: `PIEH`, width and height as int32, then (u, v) row by row.

    Raises:
        ZooError: when the file cannot be written.
    """
    path, (H, W) = Path(path), size_of(flow)
    pixels = flow.permute(1, 2, 0).cpu().numpy().astype("<f4")
    try:
        path.write_bytes(b"PIEH" + np.array([W, H], "<i4").tobytes() + pixels.tobytes())
    except OSError as error:
        raise ZooError(f"cannot write {path}: {error.strerror}") from error
    return path
