"""Pictures of matches, saved in the run's folder and logged to wandb or TensorBoard."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from torch import Tensor

from corrzoo import visualize
from corrzoo.callbacks.folder import run_folder
from corrzoo.errors import check_above_zero
from corrzoo.geometry import resize_points, size_of
from corrzoo.inference import foreground_maps
from corrzoo.registry import nearest
from corrzoo.scoring.evaluation import predict_points
from corrzoo.scoring.metric import BenchmarkMetric
from corrzoo.scoring.pck import correct_points
from corrzoo.types import Pair, ZooError

PICTURES = ("matches", "warp", "flow", "heat", "foreground")


class MatchImages(Callback):
    """Draw pictures of some validation, test or prediction pairs: `<kind>-<stage>.png` in the run's folder.

    Kinds: `matches` (correct matches green, wrong ones red and dashed), `warp` (the source warped to the target by the
    matches), `flow` (dense flow), `heat` (similarity map of a source point), `foreground` (foreground map of the
    backbone).

    Args:
        pairs: Number of pairs, spread evenly over the dataset.
        alpha: PCK tolerance of a correct match.
        kinds: Pictures to draw.
        stages: Stages after which to draw: `fit`, `test` and `predict`.
        every: Draw after every so many validations during training, too; 0 for never.
    """

    def __init__(
        self,
        pairs: int = 4,
        alpha: float = 0.1,
        kinds: list[str] = ["matches"],  # noqa: B006 - --help shows this default, and nothing changes it
        stages: list[str] = ["fit", "test", "predict"],  # noqa: B006
        every: int = 0,
    ) -> None:
        check_above_zero(pairs=pairs)
        for name, given, known in (("kinds", kinds, PICTURES), ("stages", stages, ("fit", "test", "predict"))):
            for value in set(given) - set(known):
                raise ZooError(f"{name}: unknown {value!r}{nearest(value, known) or f', expected {list(known)}'}")
        self.pairs, self.alpha, self.kinds, self.stages, self.every = pairs, alpha, kinds, stages, every
        self._validations = 0

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or not self.every or trainer.state.fn != "fit":
            return
        self._validations += 1
        if self._validations % self.every == 0:
            self._save(trainer, pl_module, "val", f"-{trainer.global_step}")

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._save(trainer, pl_module, "fit")

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._save(trainer, pl_module, "test")

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._save(trainer, pl_module, "predict")

    def _save(self, trainer: Trainer, module: Any, stage: str, step: str = "") -> None:
        folder, evaluation = run_folder(trainer), module.evaluation  # a collective call
        if not trainer.is_global_zero or not evaluation or stage not in (*self.stages, "val"):
            return
        for dataset, metric in zip(evaluation.datasets, evaluation.metrics, strict=True):
            if dataset.outlines:  # without keypoints there are no matches to draw
                continue
            place = stage if len(evaluation.datasets) == 1 else f"{stage}-{dataset.name}"
            for kind, figure in self.draw(module, dataset, metric).items():
                path = visualize.save_figure(figure, folder / f"{kind}-{place}{step}.png")
                print(f"{kind}: {path}")
                log_image(trainer, f"{kind}/{place}", path, figure)

    @torch.no_grad()
    def draw(self, module: Any, dataset: Any, metric: BenchmarkMetric) -> dict[str, Figure]:
        """Draw some pairs of a dataset: a figure by kind. The metric's protocol decides which image is the query."""
        chosen = dataset.collate([dataset[index] for index in spread_evenly(self.pairs, len(dataset))])
        pair = Pair(*(field.to(module.device) for field in chosen))
        asked = pair if metric.query == "src" else pair.swapped()
        features = module.eval().features(asked)
        pred = predict_points(module, asked, features=lambda _: features)
        right = correct_points(pred, pair, metric.protocol, self.alpha)
        shown = resize_points(pred, asked.trg_size, size_of(pair.src_img)[::-1])
        titles = [dataset.categories[c] for c in pair.category.tolist()]
        src_img, trg_img, first = asked.src_img.cpu(), asked.trg_img.cpu(), asked.src_kps[:, :1]

        def kept(rows: Tensor) -> list[Tensor]:
            return [row[mask] for row, mask in zip(rows.cpu(), pair.kps_mask.cpu(), strict=True)]

        def picture(kind: str) -> Figure:
            points = kept(asked.src_kps), kept(shown)
            match kind:
                case "matches":
                    return visualize.draw_matches(src_img, trg_img, *points, kept(right), kept(asked.trg_kps), titles)
                case "warp":
                    return visualize.draw_warps(src_img, trg_img, *points, titles)
                case "flow":
                    return visualize.draw_flow(src_img, list(module.match(*features).flow.float().cpu()), titles)
                case "heat":
                    maps = module.heat_maps(*features, first)[:, 0]
                    ends = shown[:, 0].cpu(), asked.trg_kps[:, 0].cpu()
                    return visualize.draw_heat(src_img, trg_img, first[:, 0].cpu(), list(maps), *ends, titles)
                case _:
                    maps = foreground_maps(module.backbone, asked.src_img, asked.trg_img)
                    return visualize.draw_foreground(src_img, list(maps), titles)

        figures = {}
        for kind in self.kinds:
            try:
                figures[kind] = picture(kind)
            except ZooError as error:  # the foreground map needs a class token
                print(f"{kind}: not drawn, {error}")
        return figures


def spread_evenly(count: int, total: int) -> list[int]:
    """Up to `count` different numbers below `total`. Their steps differ: equal ones may hit the same category."""
    count = min(count, total)
    starts = [i * total // count for i in range(count + 1)]
    return [start + i % (end - start) for i, (start, end) in enumerate(pairwise(starts))]


def log_image(trainer: Trainer, name: str, path: Path, figure: Figure) -> None:
    """Log a picture to wandb and TensorBoard."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, visualize.to_array(figure), trainer.global_step, dataformats="HWC")
