"""Pictures of matches, in the run's folder and in the loggers that show pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from torch import Tensor

from corrzoo import visualize
from corrzoo.callbacks.folder import run_folder
from corrzoo.inference import foreground_maps
from corrzoo.registry import nearest
from corrzoo.scoring.evaluation import predict_points
from corrzoo.scoring.metric import BenchmarkMetric
from corrzoo.scoring.pck import correct_points
from corrzoo.types import Pair, ZooError

PICTURES = ("matches", "warp", "flow", "heat", "foreground")


class MatchImages(Callback):
    """Pictures of some validation, test or prediction pairs, in the run's folder and in wandb or TensorBoard.

    They are `<kind>-<stage>.png`: `matches` has right ones green and wrong ones red and dashed; `warp` the source
    warped onto the target by its matches; `flow` the dense flow; `heat` the scores of the target for one source point;
    `foreground` what the backbone takes for the object.

    Args:
        pairs: How many pairs, spread evenly over the dataset.
        alpha: Share of the reference length within which a match counts as right.
        kinds: Which pictures.
        stages: After what they are drawn, of `fit`, `test` and `predict`.
        every: Draw also after every so many validations while training; 0 for the end alone.
    """

    def __init__(
        self,
        pairs: int = 4,
        alpha: float = 0.1,
        kinds: list[str] = ["matches"],  # noqa: B006 - never written to; a plain default is what --help shows
        stages: list[str] = ["fit", "test", "predict"],  # noqa: B006
        every: int = 0,
    ) -> None:
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
            self._save(trainer, pl_module, trainer.val_dataloaders, "val", f"-{trainer.global_step}")

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._save(trainer, pl_module, trainer.val_dataloaders, "fit")

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._save(trainer, pl_module, trainer.test_dataloaders, "test")

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._save(trainer, pl_module, trainer.predict_dataloaders, "predict")

    def _save(self, trainer: Trainer, module: Any, loaders: Any, stage: str, step: str = "") -> None:
        folder = run_folder(trainer)  # asked by every process
        if not trainer.is_global_zero or not loaders or stage not in (*self.stages, "val"):
            return
        loaders = loaders if isinstance(loaders, list) else [loaders]
        for loader, (name, metric) in zip(loaders, module.evaluation.by_name(), strict=True):
            if loader.dataset.outlines:  # they have no points that one could draw
                continue
            place = stage if len(loaders) == 1 else f"{stage}-{name}"
            for kind, figure in self.draw(module, loader.dataset, metric).items():
                path = visualize.save_figure(figure, folder / f"{kind}-{place}{step}.png")
                print(f"{kind}: {path}")
                log_image(trainer, f"{kind}/{place}", path, figure)

    @torch.no_grad()
    def draw(self, module: Any, dataset: Any, metric: BenchmarkMetric) -> dict[str, Figure]:
        """The pictures of some of a dataset's pairs, by their kinds, drawn as the metric's protocol asks."""
        count = min(self.pairs, len(dataset))
        chosen = [
            dataset[(i * len(dataset) // count + i) % len(dataset)] for i in range(count)
        ]  # + i: not one category
        pair = Pair(*(field.to(module.device) for field in dataset.collate(chosen)))
        module.eval()
        # swapped: an evaluator that asks the other way round draws the other way round
        asked = pair if metric.query == "src" else pair.swapped()
        pred = predict_points(module, asked)
        right = correct_points(pred, pair, metric.protocol, self.alpha)
        H, W = pair.src_img.shape[-2:]
        shown = pred * (pred.new_tensor([W, H]) / asked.trg_size).unsqueeze(1)
        titles = [dataset.categories[c] for c in pair.category.tolist()]
        src_img, trg_img, first = asked.src_img.cpu(), asked.trg_img.cpu(), asked.src_kps[:, :1]

        def kept(rows: Tensor) -> list[Tensor]:
            return [row[mask].cpu() for row, mask in zip(rows, pair.kps_mask, strict=True)]

        def heat() -> Figure:
            maps = module.heat_maps(*module.features_of(asked.src_img, asked.trg_img), first)[:, 0]
            ends = shown[:, 0].cpu(), asked.trg_kps[:, 0].cpu()
            return visualize.draw_heat(src_img, trg_img, first[:, 0].cpu(), list(maps), *ends, titles)

        points = kept(asked.src_kps), kept(shown)
        drawn: dict[str, Callable[[], Figure]] = {
            "matches": lambda: visualize.draw_matches(
                src_img, trg_img, *points, kept(right), kept(asked.trg_kps), titles
            ),
            "warp": lambda: visualize.draw_warps(src_img, trg_img, *points, titles),
            "flow": lambda: visualize.draw_flow(
                src_img, list(module(asked.src_img, asked.trg_img).flow.float().cpu()), titles
            ),
            "heat": heat,
            "foreground": lambda: visualize.draw_foreground(
                src_img, list(foreground_maps(module.backbone, asked.src_img, asked.trg_img)), titles
            ),
        }
        figures = {}
        for kind in self.kinds:
            try:
                figures[kind] = drawn[kind]()
            except ZooError as error:  # without a class token there is no foreground; the other pictures stand
                print(f"{kind}: not drawn, {error}")
        return figures


def log_image(trainer: Trainer, name: str, path: Path, figure: Figure) -> None:
    """Hand a picture to the loggers that show pictures."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, visualize.to_array(figure), trainer.global_step, dataformats="HWC")
