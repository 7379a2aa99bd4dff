"""Matches as lines between two images: one pair a row, or one model a row."""

from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch
from torch import Tensor

from corrzoo.visualize.figures import OUTLINE, Images, head, panels, show
from corrzoo.visualize.heat import heat_panel

RIGHT, WRONG, TRUTH = "#1a9850", "#d73027", "#ffffff"


def draw_matches(
    src_img: Images,
    trg_img: Images,
    src_kps: Sequence[Tensor],
    pred_kps: Sequence[Tensor],
    correct: Sequence[Tensor] | None = None,
    trg_kps: Sequence[Tensor] | None = None,
    titles: Sequence[str] | None = None,
) -> Figure:
    """Pairs side by side, a line from each source point to its match, one pair a row.

    Right matches are green, solid and end in a dot; wrong ones are red, dashed and end in a cross: they can be told
    apart without colour. Where the truth is known, a white ring marks it for the wrong ones. Where nothing is known,
    each match has a number and a colour of its own.

    Args:
        src_img: B images (3, H, W) uint8.
        trg_img: B images (3, H, W) uint8.
        src_kps: B point sets (n, 2), in pixels of the images given.
        pred_kps: B point sets (n, 2), matches of the source points.
        correct: B masks (n,) bool, where it is known what is right.
        trg_kps: B point sets (n, 2), the truth.
        titles: A title for each row.
    """
    figure, axes = panels([1, 1], src_img, trg_img, titles=titles)
    for b, row in enumerate(axes):
        show(row[0], src_img[b])
        show(row[1], trg_img[b])
        right, truth = (None if given is None else given[b] for given in (correct, trg_kps))
        connect(figure, row[0], row[1], src_kps[b], pred_kps[b], right, truth)
    if correct is not None:
        legend(figure)
    return figure


def draw_comparison(
    src_img: Tensor,
    trg_img: Tensor,
    src_kps: Tensor,
    pred_kps: dict[str, Tensor],
    correct: dict[str, Tensor],
    trg_kps: Tensor,
    heat: dict[str, Tensor] | None = None,
    point: int = 0,
) -> Figure:
    """One pair under several models, one above the other: before and after, with and without (LPMFlow's figure 3).

    Args:
        src_img: (3, H, W) uint8.
        trg_img: (3, H, W) uint8.
        src_kps: (n, 2) source points, in pixels of the images given.
        pred_kps: Model: its matches (n, 2).
        correct: Model: which of them are right, (n,) bool.
        trg_kps: (n, 2), the truth.
        heat: Model: scores (h, w) of the target for one source point; they make a third column.
        point: Which source point the heat is of.
    """
    rows = len(pred_kps)
    titles = [f"{name}: {int(correct[name].sum())} of {len(src_kps)} right" for name in pred_kps]
    figure, axes = panels([1, 1, 1] if heat else [1, 1], [src_img] * rows, [trg_img] * rows, titles=titles)
    for row, (name, matched) in zip(axes, pred_kps.items(), strict=True):
        show(row[0], src_img)
        show(row[1], trg_img)
        connect(figure, row[0], row[1], src_kps, matched, correct[name], trg_kps)
        if heat:
            row[0].plot(*src_kps[point].tolist(), "o", ms=9, mfc="none", mec=TRUTH, path_effects=OUTLINE)
            heat_panel(row[2], trg_img, heat[name], matched[point], trg_kps[point])
    head(axes, "", "heat of the ringed point")
    legend(figure)
    return figure


def connect(
    figure: Figure, src: Axes, trg: Axes, start: Tensor, end: Tensor, correct: Tensor | None, truth: Tensor | None
) -> None:
    """Lines from points (n, 2) in one panel to points (n, 2) in another, which may lie outside its image."""
    for k, (a, b) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        good = correct is None or bool(correct[k])
        colour = colormaps["tab20"](k % 20) if correct is None else RIGHT if good else WRONG
        line = ConnectionPatch(
            a, b, "data", "data", axesA=src, axesB=trg,
            color=colour, linewidth=1.2 if len(start) <= 20 else 0.7, linestyle="-" if good else (0, (4, 2)), alpha=0.9,
        )  # fmt: skip
        line.set_in_layout(False)
        figure.add_artist(line)
        edge: Any = {"markeredgecolor": "black", "markeredgewidth": 0.4}
        src.plot(*a, "o", color=colour, markersize=3.5, zorder=5, **edge)
        (mark,) = trg.plot(*b, "o" if good else "X", color=colour, ms=4 if good else 7, zorder=5, clip_on=False, **edge)
        mark.set_in_layout(False)
        if correct is None:
            for ax, (x, y) in ((src, a), (trg, b)):
                ax.annotate(
                    str(k + 1), (x, y), (3, 3), textcoords="offset points", color="white", fontsize=6, zorder=6,
                    path_effects=OUTLINE, annotation_clip=False,
                ).set_in_layout(False)  # fmt: skip
        if truth is not None and not good:
            trg.plot(*truth[k].tolist(), "o", ms=6, mfc="none", mec=TRUTH, zorder=4, path_effects=OUTLINE)


def legend(figure: Figure) -> None:
    """What the marks mean."""
    figure.legend(
        handles=[
            Line2D([], [], color=RIGHT, marker="o", label="right"),
            Line2D([], [], color=WRONG, marker="X", linestyle="--", label="wrong"),
            Line2D([], [], color="grey", marker="o", markerfacecolor="none", linestyle="none", label="truth"),
        ],
        loc="outside lower center", ncols=3, fontsize=7, frameon=False,
    )  # fmt: skip
