"""Dense flow as colours, and as a Middlebury file."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import flow_to_image

from corrzoo.files import write_bytes
from corrzoo.geometry import size_of
from corrzoo.types import ZooError
from corrzoo.visualize.figures import FINEST, Images, panels, show

SATURATED = 0.9
"""our choice: quantile of the flow's lengths that is drawn in full colour, so that outliers do not set the scale."""


def flow_colours(flow: Tensor, limit: float | None = None) -> Tensor:
    """Colour a flow by direction (hue) and length (saturation); zero is white.

    Right is red, down yellow, left cyan, up violet (Baker et al., "A database and evaluation methodology for optical
    flow").

    Args:
        flow: (2, h, w) displacements (dx, dy).
        limit: Length in full colour, as is everything longer; the longest of the flow if None.

    Returns:
        (3, h, w) uint8.
    """
    lengths = flow.norm(dim=0).clamp(min=1e-12)
    limit = limit or float(lengths.max())
    flow = flow.float() * (limit / lengths).clamp(max=1).float()
    scale = flow.new_tensor([limit, 0.0]).view(2, 1, 1).expand(2, 1, flow.shape[2])  # a row as long as the limit
    return flow_to_image(torch.cat([flow, scale], 1))[:, :-1]


def draw_flow(
    src_img: Images, flows: Sequence[Tensor], titles: Sequence[str] | None = None, shared: bool = False
) -> Figure:
    """Draw images, and beside each its flow (2, h, w), in pixels of the image; `shared`: one scale for all rows."""
    figure, axes = panels(src_img, titles=titles, columns=["red: right, yellow: down, cyan: left, violet: up"])
    lengths = [flow.norm(dim=0).flatten().cpu().numpy() for flow in flows]
    lengths = [np.concatenate(lengths)] * len(flows) if shared else lengths
    limits = [max(float(np.quantile(length, SATURATED)), 1e-12) for length in lengths]
    for row, image, flow, limit in zip(axes, src_img, flows, limits, strict=True):
        show(row[0], image)
        (H, W), skip = size_of(image), math.ceil(max(size_of(flow)) / FINEST)
        colours = flow_colours(flow[:, skip // 2 :: skip, skip // 2 :: skip].cpu(), limit)
        row[1].imshow(colours.permute(1, 2, 0).numpy(), extent=(0, W, H, 0), interpolation="nearest")
        row[1].text(0.02 * W, 0.98 * H, f"full colour: {limit:.0f} px", fontsize=6, va="bottom")
    return figure


def write_flo(flow: Tensor, path: Path | str) -> Path:
    """Write a flow (2, H, W) in the Middlebury format: `PIEH`, width and height as int32, then (u, v) row by row.

    Raises:
        ZooError: if the file cannot be written.
    """
    path, (H, W) = Path(path), size_of(flow)
    pixels = flow.permute(1, 2, 0).cpu().numpy().astype("<f4")
    try:
        write_bytes(path, b"PIEH" + np.array([W, H], "<i4").tobytes() + pixels.tobytes())
    except OSError as error:
        raise ZooError(f"cannot write {path}: {error.strerror}") from error
    return path
