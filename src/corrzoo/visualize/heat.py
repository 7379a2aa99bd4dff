"""Scores laid over images: where a source point is seen in the target, and what counts as foreground."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from corrzoo.visualize.figures import OUTLINE, Images, head, overlay, panels, show


def draw_heat(
    src_img: Images,
    trg_img: Images,
    points: Tensor,
    heat: Sequence[Tensor],
    pred: Tensor | None = None,
    truth: Tensor | None = None,
    titles: Sequence[str] | None = None,
) -> Figure:
    """One source point of each pair, and the scores of the target's cells for it: dark is low, bright is high.

    Args:
        src_img: B images (3, H, W) uint8.
        trg_img: B images (3, H, W) uint8.
        points: (B, 2) source points, in pixels of the images given: ringed.
        heat: B maps (h, w), see `Matcher.heat_maps`.
        pred: (B, 2) their matches, marked with a cross.
        truth: (B, 2) where they should be: ringed.
        titles: A title for each row.
    """
    figure, axes = panels([1, 1], src_img, trg_img, titles=titles)
    for b, row in enumerate(axes):
        show(row[0], src_img[b])
        _ring(row[0], points[b])
        heat_panel(row[1], trg_img[b], heat[b], *(None if p is None else p[b] for p in (pred, truth)))
    marks = {"cross: match": pred, "ring: truth": truth}
    head(axes, ", ".join(name for name, given in marks.items() if given is not None))
    return figure


def draw_foreground(images: Images, weights: Sequence[Tensor], titles: Sequence[str] | None = None) -> Figure:
    """Images, and beside each how much its cells resemble the class tokens (LPMFlow's supplement, figure 1).

    Args:
        images: B images (3, H, W) uint8.
        weights: B maps (h, w), see `Matcher.foreground_maps`.
        titles: A title for each row.
    """
    figure, axes = panels([1, 1], images, titles=titles)
    for row, image, values in zip(axes, images, weights, strict=True):
        show(row[0], image)
        overlay(row[1], image, values)
    head(axes, "foreground weight")
    return figure


def heat_panel(ax: Axes, image: Tensor, heat: Tensor, pred: Tensor | None, truth: Tensor | None) -> None:
    """Scores over a target image, with the match as a cross and the truth as a ring."""
    overlay(ax, image, heat)
    if truth is not None:
        _ring(ax, truth)
    if pred is not None:
        ax.plot(*pred.tolist(), "x", ms=8, mew=1.5, color="white", path_effects=OUTLINE)


def _ring(ax: Axes, point: Tensor) -> None:
    ax.plot(*point.tolist(), "o", ms=10, mfc="none", mec="white", mew=1.5, path_effects=OUTLINE)
