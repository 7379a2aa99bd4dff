"""Result files of a run, and score tables in the terminal."""

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Column, Table

from corrzoo.callbacks.describe import describe_run, describe_scores, peak_memory_mb, seed
from corrzoo.callbacks.folder import run_folder
from corrzoo.callbacks.lock import FolderLock
from corrzoo.files import writable, write_json
from corrzoo.ops import resolve_backend
from corrzoo.scoring.metric import BenchmarkMetric
from corrzoo.tables import write_csv
from corrzoo.types import Pair


class ResultsWriter(Callback):
    """Write the scores of `corrzoo test` and the points of `corrzoo predict` into the run's folder.

    `results/<dataset>.json` has the scores, the model, the protocol and the cost, see `describe_run`.
    `results/<dataset>.csv` has one row per pair. `predictions/<dataset>.csv` has predicted points in original pixels of
    the protocol's evaluated image.

    Args:
        folder: Output folder of the results, with `predictions` in it; `results` and `predictions` in the run's folder
            if None.
        table: Print the scores by category.
        label: Name of this run in the leaderboard beside head and backbone, such as the name of an ablation.
    """

    def __init__(self, folder: str | None = None, table: bool = True, label: str = "") -> None:
        self.folder, self.table, self.label = folder, table, label
        self._predictions: dict[int, list[tuple[int, int, float, float]]] = {}
        self._lock = FolderLock()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._lock.release()
        if trainer.state.fn == "fit" and trainer.global_step:  # in a notebook, the model may be tested now
            pl_module.on_fit_end()

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        # fail before an hour of evaluation, not after it
        resolve_backend(pl_module.backend, next(pl_module.parameters()))
        self._claim(trainer, self._folder(trainer))
        self._seconds: dict[int, float] = defaultdict(float)
        self._pairs: dict[int, int] = defaultdict(int)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._tick = _now(pl_module.device)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Pair, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seconds[dataloader_idx] += _now(pl_module.device) - self._tick
        self._pairs[dataloader_idx] += len(batch.index)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        folder = self._folder(trainer)  # a collective call
        datasets = pl_module.evaluation.datasets
        for which, (dataset, (name, metric)) in enumerate(zip(datasets, pl_module.evaluation.by_name(), strict=True)):
            scores, rows = describe_scores(metric, dataset), metric.rows()
            if not trainer.is_global_zero:
                continue
            result = {"label": self.label} | describe_run(trainer, pl_module, name)
            result |= {
                "trained": pl_module.trained,
                "seed": pl_module.trained.get("seed") if pl_module.trained else seed(),
                "ms_per_pair": 1000 * self._seconds[which] / max(self._pairs[which], 1),  # features are cached
                "peak_memory_mb": peak_memory_mb(pl_module.device),
            }
            if self.table:
                Console().print(breakdown_table(name, metric, scores))
            if trainer.fast_dev_run:  # type: ignore[attr-defined]  # scores of one batch are no results
                continue
            write_json(folder / f"{name}.json", result | scores)
            write_csv(folder / f"{name}.csv", rows)
            if self.table:
                print(f"results: {folder / name}.json and .csv")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._claim(trainer, self._predictions_folder(trainer))
        self._predictions = {}  # an earlier run may have been interrupted

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Pair, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        rows = self._predictions.setdefault(dataloader_idx, [])
        for index, kps, mask in zip(outputs["index"].tolist(), outputs["points"], outputs["kps_mask"], strict=True):
            rows += [(index, k, x, y) for k, (x, y) in enumerate(kps[mask].tolist())]

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        folder = self._predictions_folder(trainer)  # a collective call
        for which, (name, metric) in enumerate(pl_module.evaluation.by_name()):
            parts: list[Any] = [self._predictions.get(which, [])]
            if trainer.world_size > 1:
                parts = [None] * trainer.world_size
                torch.distributed.all_gather_object(parts, self._predictions.get(which, []))
            if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                image = metric.evaluated
                points = sorted({(index, k): (x, y) for part in parts for index, k, x, y in part}.items())
                rows = [{"index": i, "keypoint": k, "image": image, "x": x, "y": y} for (i, k), (x, y) in points]
                write_csv(folder / f"{name}.csv", rows, ("index", "keypoint", "image", "x", "y"))
                print(f"predictions: {folder / name}.csv, in original pixels of the {image} images")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._lock.release()

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.folder or run_folder(trainer) / "results")

    def _predictions_folder(self, trainer: Trainer) -> Path:
        return Path(self.folder or run_folder(trainer)) / "predictions"

    def _claim(self, trainer: Trainer, folder: Path) -> None:
        """Check that the folder can be written, and lock that of a run: evaluations that start together share it."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        writable(folder)
        if self.folder is None:
            self._lock.claim(folder, f"another run writes into {folder}: start this command again")


class ScoreTable(Callback):
    """Print PCK before and after training. Needs `trainer.num_sanity_val_steps: -1`, a validation before training."""

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            self.before = dict(pl_module.scores)
        else:
            self.after = dict(pl_module.scores)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        table = _table(f"{pl_module.title}, validation pairs, {trainer.global_step} steps", "", "before", "after")
        if not self.after:
            table.caption = "Not measured after training: the run ended before its first validation."
        for key in self.before | self.after:
            scores = (f"{side[key]:.1f}" if key in side else "not measured" for side in (self.before, self.after))
            table.add_row(key, *scores)
        Console().print(table)


def breakdown_table(name: str, metric: BenchmarkMetric, scores: dict[str, Any]) -> Table:
    """Scores by category, over all pairs, and of geometry-aware keypoints; `scores` are from `describe_scores`."""
    values, breakdown = scores[metric.key], scores["breakdown"]
    how, columns = metric.describe(), metric.columns()
    title = f"{metric.name} on {name} (%), {how['protocol']}, average per {how['average']}"
    table = _table(title, "category", "pairs", *(heading for heading, _, _ in columns))
    for category, row in breakdown["category"].items():
        table.add_row(category, str(row["pairs"]), *(f"{row[key]:.1f}" for _, key, _ in columns))
    table.add_section()
    table.add_row("all", str(scores["pairs"]), *(f"{values[key]:.1f}" for _, _, key in columns))
    if aware := breakdown.get("geometry", {}).get("aware"):
        table.add_row("geometry-aware", str(aware["pairs"]), *(f"{aware[key]:.1f}" for _, key, _ in columns))
    return table


def _table(title: str, words: str, *numbers: str) -> Table:
    """A table with one column of words, and columns of numbers."""
    return Table(words, *(Column(name, justify="right") for name in numbers), title=title)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
