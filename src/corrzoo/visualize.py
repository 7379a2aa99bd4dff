"""Pictures of what a head did; no model code here."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch
from torch import Tensor

from corrzoo.types import ZooError

RIGHT, WRONG, TRUTH = "#1a9850", "#d73027", "#ffffff"


def draw_matches(
    src_img: Tensor,
    trg_img: Tensor,
    src_kps: Sequence[Tensor],
    pred_kps: Sequence[Tensor],
    correct: Sequence[Tensor] | None = None,
    trg_kps: Sequence[Tensor] | None = None,
    titles: Sequence[str] | None = None,
) -> Figure:
    """Pairs side by side, a line from each source point to its match, one pair a row.

    Right matches are green, solid and end in a dot; wrong ones are red, dashed and end in a cross: they can be told
    apart without colour. Where the truth is known, a white ring marks it for the wrong ones.

    Args:
        src_img: (B, 3, H, W) uint8.
        trg_img: (B, 3, H, W) uint8.
        src_kps: B point sets (n, 2), in pixels of the images given.
        pred_kps: B point sets (n, 2), matches of the source points.
        correct: B masks (n,) bool; all count as right when not given.
        trg_kps: B point sets (n, 2), the truth.
        titles: A title for each row.
    """
    rows, (H, W) = len(src_img), src_img.shape[-2:]
    figure = Figure(figsize=(6.4, 3.2 * rows * H / W + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2, squeeze=False)
    for b in range(rows):
        for ax, image in zip(axes[b], (src_img[b], trg_img[b]), strict=True):
            ax.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="lanczos")
            ax.set_axis_off()
        if titles:
            axes[b, 0].set_title(titles[b], fontsize=8, loc="left")
        for k, (start, end) in enumerate(zip(src_kps[b].tolist(), pred_kps[b].tolist(), strict=True)):
            good = correct is None or bool(correct[b][k])
            colour = RIGHT if good else WRONG
            line = ConnectionPatch(
                start, end, "data", "data", axesA=axes[b, 0], axesB=axes[b, 1],
                color=colour, linewidth=1.2, linestyle="-" if good else (0, (4, 2)), alpha=0.9,
            )  # fmt: skip
            figure.add_artist(line)
            axes[b, 0].plot(*start, "o", color=colour, markersize=3.5, markeredgecolor="black", markeredgewidth=0.4)
            axes[b, 1].plot(
                *end, "o" if good else "X", color=colour, markersize=4 if good else 6, markeredgecolor="black",
                markeredgewidth=0.4, zorder=5,
            )  # fmt: skip
            if trg_kps is not None and not good:
                axes[b, 1].plot(
                    *trg_kps[b][k].tolist(), "o", markersize=6, markerfacecolor="none", markeredgecolor=TRUTH, zorder=4
                )
    figure.legend(
        handles=[
            Line2D([], [], color=RIGHT, marker="o", label="right"),
            Line2D([], [], color=WRONG, marker="X", linestyle="--", label="wrong"),
            Line2D([], [], color="grey", marker="o", markerfacecolor="none", linestyle="none", label="truth"),
        ],
        loc="outside lower center", ncols=3, fontsize=7, frameon=False,
    )  # fmt: skip
    return figure


def save_figure(figure: Figure, path: Path | str) -> Path:
    """Write a figure as an image file.

    Raises:
        ZooError: when the folder cannot be written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise ZooError(f"cannot write {path}: {error.strerror}") from error
    return path


def to_array(figure: Figure) -> Tensor:
    """A figure as an image (H, W, 3) uint8, for loggers."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).view(
        *canvas.get_width_height()[::-1], 4
    )[..., :3]
