"""Matches as lines between two images."""

from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch
from torch import Tensor

from corrzoo.visualize.figures import OUTLINE, Images, panels, show

CORRECT, WRONG, TRUTH = "#1a9850", "#d73027", "#ffffff"
MANY = 20
"""our choice: more matches than this have thinner lines, and no numbers, which would overlap."""


def draw_matches(
    src_img: Images,
    trg_img: Images,
    src_kps: Sequence[Tensor],
    pred_kps: Sequence[Tensor],
    correct: Sequence[Tensor] | None = None,
    trg_kps: Sequence[Tensor] | None = None,
    titles: Sequence[str] | None = None,
    confident: Sequence[Tensor] | None = None,
) -> Figure:
    """Draw pairs side by side, with a line from each source point to its match.

    Correct matches are green, solid and end in a dot; wrong ones are red, dashed and end in a cross, to differ without
    colour too. White rings are the ground truth of wrong matches. Without `correct`, each match has a colour of its
    own and, unless there are more than MANY, a number; uncertain matches are dashed.

    Args:
        src_kps: Queries in source pixels.
        pred_kps: Predictions in target pixels.
        correct: B masks (n,) bool.
        trg_kps: Ground truth in target pixels.
        confident: B masks (n,) bool, if there is no `correct`.
    """
    figure, axes = panels(src_img, trg_img, titles=titles)
    for b, (src, trg) in enumerate(axes):
        show(src, src_img[b])
        show(trg, trg_img[b])
        good, truth, sure = (None if given is None else given[b] for given in (correct, trg_kps, confident))
        connect(figure, src, trg, src_kps[b], pred_kps[b], good, truth, sure)
    if correct is not None:
        legend(figure)
    return figure


def connect(
    figure: Figure, src: Axes, trg: Axes, start: Tensor, end: Tensor,
    correct: Tensor | None, truth: Tensor | None, confident: Tensor | None,
) -> None:  # fmt: skip
    """Draw lines from points (n, 2) in one panel to points (n, 2) in another; these may lie outside the image."""
    edge: Any = {"markeredgecolor": "black", "markeredgewidth": 0.4}
    for k, (a, b) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        good = correct is None or bool(correct[k])
        solid = good and (confident is None or bool(confident[k]))
        colour = colormaps["tab20"](k % 20) if correct is None else CORRECT if good else WRONG
        line = ConnectionPatch(
            a, b, "data", "data", axesA=src, axesB=trg,
            color=colour, linewidth=1.2 if len(start) <= MANY else 0.7, alpha=0.9,
            linestyle="-" if solid else (0, (4, 2)),
        )  # fmt: skip
        line.set_in_layout(False)
        figure.add_artist(line)
        src.plot(*a, "o", color=colour, markersize=3.5, zorder=5, **edge)
        (mark,) = trg.plot(*b, "o" if good else "X", color=colour, ms=4 if good else 7, zorder=5, clip_on=False, **edge)
        mark.set_in_layout(False)
        if correct is None and len(start) <= MANY:
            for ax, point in ((src, a), (trg, b)):
                ax.annotate(
                    str(k + 1), point, (3, 3), textcoords="offset points", color="white", fontsize=6, zorder=6,
                    path_effects=OUTLINE, annotation_clip=False,
                ).set_in_layout(False)  # fmt: skip
        if truth is not None and not good:
            trg.plot(*truth[k].tolist(), "o", ms=6, mfc="none", mec=TRUTH, zorder=4, path_effects=OUTLINE)


def legend(figure: Figure) -> None:
    """Explain the marks below the figure."""
    figure.legend(
        handles=[
            Line2D([], [], color=CORRECT, marker="o", label="correct"),
            Line2D([], [], color=WRONG, marker="X", linestyle="--", label="wrong"),
            Line2D([], [], color="grey", marker="o", markerfacecolor="none", linestyle="none", label="ground truth"),
        ],
        loc="outside lower center", ncols=3, fontsize=7, frameon=False,
    )  # fmt: skip
