"""Heat maps over images: scores of target cells for a query, and foreground weights."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from corrzoo.visualize.figures import OUTLINE, Images, overlay, panels, show


def draw_heat(
    src_img: Images,
    trg_img: Images,
    points: Tensor,
    heat: Sequence[Tensor],
    pred: Tensor | None = None,
    truth: Tensor | None = None,
    titles: Sequence[str] | None = None,
) -> Figure:
    """Draw one query of each pair, and the scores of the target's cells for it, from dark (low) to bright (high).

    Args:
        points: (B, 2) queries in source pixels, drawn as rings.
        heat: B maps (h, w), see `Matcher.heat_maps`.
        pred: (B, 2) predictions in target pixels, drawn as crosses.
        truth: (B, 2) ground truth in target pixels, drawn as rings.
    """
    marks = [("cross: prediction", pred), ("ring: ground truth", truth)]
    legend = ", ".join(name for name, given in marks if given is not None)
    figure, axes = panels(src_img, trg_img, titles=titles, columns=[legend])
    for b, (src, trg) in enumerate(axes):
        show(src, src_img[b])
        _ring(src, points[b])
        overlay(trg, trg_img[b], heat[b])
        if truth is not None:
            _ring(trg, truth[b])
        if pred is not None:
            trg.plot(*pred[b].tolist(), "x", ms=8, mew=1.5, color="white", path_effects=OUTLINE)
    return figure


def draw_foreground(images: Images, weights: Sequence[Tensor], titles: Sequence[str] | None = None) -> Figure:
    """Draw images, and beside each its `inference.foreground_maps` (h, w) (LPMFlow's supplement, figure 1)."""
    figure, axes = panels(images, titles=titles, columns=["foreground weight"])
    for row, image, values in zip(axes, images, weights, strict=True):
        show(row[0], image)
        overlay(row[1], image, values)
    return figure


def _ring(ax: Axes, point: Tensor) -> None:
    ax.plot(*point.tolist(), "o", ms=10, mfc="none", mec="white", mew=1.5, path_effects=OUTLINE)
