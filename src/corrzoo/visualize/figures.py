"""Figures of panels in rows, with images in the zoo's coordinates, and their files."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor

from corrzoo.files import whole_file
from corrzoo.types import ZooError

OUTLINE = [withStroke(linewidth=2, foreground="black")]
"""Keeps white text and rings visible on any image."""
FINEST = 2048
"""our choice: longest side of a drawn image in pixels; larger images take half a minute."""
TALLEST = 4.0
"""our choice: aspect ratio, and its inverse, beyond which an image is drawn smaller."""
Images = Tensor | Sequence[Tensor]
"""(B, 3, H, W) uint8, or B images (3, H, W) of any sizes."""


def panels(
    *images: Images, titles: Sequence[str] | None = None, columns: Sequence[str] = ("",)
) -> tuple[Figure, np.ndarray]:
    """Create a figure with one row of panels for each pair; returns the figure and its axes (rows, columns).

    Args:
        images: Sets of B images; row b is as high as the highest b-th image needs.
        titles: Title of each row, above its first panel.
        columns: Title of each column after the first.
    """
    ratios = [max(image.shape[-2] / image.shape[-1] for image in row) for row in zip(*images, strict=True)]
    ratios = [min(max(ratio, 1 / TALLEST), TALLEST) for ratio in ratios]
    inches = 3.2 if len(ratios) > 1 else 4.8
    size = (inches * (1 + len(columns)), inches * sum(ratios) + 0.25 * len(ratios) + 0.25)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(ratios), 1 + len(columns), squeeze=False, height_ratios=ratios)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, title in zip(axes[:, 0], titles or [], strict=bool(titles)):
        ax.set_title(title, fontsize=8, loc="left")
    for ax, title in zip(axes[0, 1:], columns, strict=True):
        ax.set_title(title, fontsize=8)
    return figure, axes


def show(ax: Axes, image: Tensor) -> None:
    """Draw an image (3, H, W) uint8; its top-left corner is (0, 0), as everywhere in the zoo."""
    H, W = image.shape[-2:]
    pixels = Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).reduce(math.ceil(max(H, W) / FINEST))
    ax.imshow(np.asarray(pixels), interpolation="lanczos", extent=(0, W, H, 0))
    ax.autoscale(False)  # points outside the image do not shrink it


def overlay(ax: Axes, image: Tensor, values: Tensor) -> None:
    """Draw values (h, w) over the grey image, from dark (lowest) to bright (highest)."""
    H, W = image.shape[-2:]
    show(ax, (0.7 * image.float().mean(0, keepdim=True)).byte().expand(3, -1, -1))
    ax.imshow(values.float().cpu().numpy(), cmap="inferno", alpha=0.6, interpolation="bicubic", extent=(0, W, H, 0))


def save_figure(figure: Figure, path: Path | str) -> Path:
    """Write a figure as an image file, atomically. The suffix names the format.

    Raises:
        ZooError: if the file cannot be written.
    """
    path = Path(path)
    try:
        with whole_file(path) as partial:
            figure.savefig(partial, format=path.suffix[1:])
    except OSError as error:
        raise ZooError(f"cannot write {path}: {error.strerror}") from error
    return path


def to_array(figure: Figure) -> Tensor:
    """Render a figure as an image (H, W, 3) uint8, for loggers."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3])
