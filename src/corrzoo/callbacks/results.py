"""Result files of a run, and score tables in the terminal."""

import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Column, Table

from corrzoo.callbacks.folder import run_folder
from corrzoo.data.pairs import PairDataset
from corrzoo.files import sha256, write_text
from corrzoo.ops import resolve_backend
from corrzoo.scoring.metric import BenchmarkMetric
from corrzoo.tables import csv_text
from corrzoo.types import Pair, ZooError


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

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if trainer.state.fn == "fit" and trainer.global_step:  # in a notebook, the model may be tested now
            pl_module.on_fit_end()

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        # fail before an hour of evaluation, not after it
        resolve_backend(pl_module.backend, next(pl_module.parameters()))
        folder = self._folder(trainer)  # a collective call
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            writable(folder)
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
                "seed": pl_module.trained.get("seed") if pl_module.trained else _seed(),
                "ms_per_pair": 1000 * self._seconds[which] / max(self._pairs[which], 1),  # features are cached
                "peak_memory_mb": _peak_memory_mb(pl_module.device),
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
        self._predictions = {}  # an earlier run may have been interrupted

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Pair, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        rows = self._predictions.setdefault(dataloader_idx, [])
        for index, kps, mask in zip(outputs["index"].tolist(), outputs["points"], outputs["kps_mask"], strict=True):
            rows += [(index, k, x, y) for k, (x, y) in enumerate(kps[mask].tolist())]

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        folder = Path(self.folder or run_folder(trainer)) / "predictions"  # a collective call
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

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.folder or run_folder(trainer) / "results")


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
        model = f"{type(pl_module).__name__} on {pl_module.hparams.backbone}"
        table = _table(f"{model}, validation pairs, {trainer.global_step} steps", "", "before", "after")
        if not self.after:
            table.caption = "Not measured after training: the run ended before its first validation."
        for key in self.before | self.after:
            scores = (f"{side[key]:.1f}" if key in side else "not measured" for side in (self.before, self.after))
            table.add_row(key, *scores)
        Console().print(table)


def describe_scores(metric: BenchmarkMetric, dataset: PairDataset) -> dict[str, Any]:
    """Dataset, protocol and scores of a result. A collective call: every process must make it."""
    values = {key: value.item() for key, value in metric.compute().items()}
    breakdown = metric.breakdown()
    return {
        "dataset": dataset.name,
        "dataset_title": dataset.title,
        "split": dataset.split,
        "fingerprint": dataset.fingerprint(),
        **metric.describe(),
        "measures": [list(column) for column in metric.columns()],
        "pairs": sum(row["pairs"] for row in breakdown["category"].values()),
        metric.name.lower().replace(" ", "_"): values,
        "breakdown": breakdown,
    }


def describe_run(trainer: Trainer, module: Any, dataset: str) -> dict[str, Any]:
    """Describe the model of a result: options, data, cost, checkpoint, machine and versions.

    Only the first process calls this, so it must not make a collective call.
    """
    data = getattr(trainer, "datamodule", None)
    own, inside = module.count_parameters()
    checkpoint = trainer.ckpt_path
    return {
        "head": type(module).__name__,
        "options": {k: v for k, v in dict(module.hparams).items() if not k.startswith("_")},
        "backbone": module.hparams.backbone,
        "weights": module.hparams.weights,
        "dataset_options": (data.hparams.options or {}).get(dataset, {}) if data else {},
        "resolution": data.hparams.image_size if data else None,
        "params_backbone": inside,
        "params_head": own,
        "checkpoint": str(checkpoint) if checkpoint else None,
        "checkpoint_sha256": sha256(checkpoint) if checkpoint and os.path.isfile(checkpoint) else None,  # not of a URL
        "precision": str(trainer.precision),
        "processes": trainer.world_size,
        "device": torch.cuda.get_device_name() if module.device.type == "cuda" else platform.processor() or "cpu",
        "backend": resolve_backend(module.backend, next(module.parameters())),
        "versions": versions(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def describe_training(trainer: Trainer) -> dict[str, Any] | None:
    """Training data and schedule of the weights, for checkpoints; None before the first step."""
    if not trainer.global_step:
        return None
    data = getattr(trainer, "datamodule", None)
    options = dict(data.hparams) if data else {}
    dataset, batch = options.get("train"), options.get("batch_size")  # the batch of all processes together
    batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
    return {
        "dataset": dataset,
        "options": (options.get("options") or {}).get(dataset, {}),
        "augment": options.get("augment"),
        "size": options.get("image_size"),
        "batch_size": batch,
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps,
        "steps": trainer.global_step,
        "pairs_seen": batch and batches * batch,  # repetitions included
        "seed": _seed(),
        **({"before": before} if (before := trainer.lightning_module.before) else {}),
    }


def breakdown_table(name: str, metric: BenchmarkMetric, scores: dict[str, Any]) -> Table:
    """Scores by category, over all pairs, and of geometry-aware keypoints; `scores` are from `describe_scores`."""
    values, breakdown = scores[metric.name.lower().replace(" ", "_")], scores["breakdown"]
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


def writable(folder: Path) -> Path:
    """Create a folder if it is missing, and return it.

    Raises:
        ZooError: if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ZooError(f"cannot write results into {folder}: {error.strerror}; choose another folder") from error
    return folder


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    writable(path.parent)
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_csv(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write a CSV file atomically. Its columns are `columns`, or the keys of the first row."""
    writable(path.parent)
    write_text(path, csv_text(rows, columns))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _seed() -> int | None:
    return int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def versions() -> dict[str, str]:
    """Versions of corrzoo and the packages that results depend on."""
    installed = {package: version(package) for package in ("corrzoo", "lightning", "timm")}
    return installed | {"torch": torch.__version__, "python": platform.python_version()}


@cache
def _commit() -> str | None:
    """Commit of the checkout that holds this file, with '+' for uncommitted changes; None outside a checkout."""
    here = Path(__file__)
    try:
        # a virtual environment can be inside another project's repository
        _git("ls-files", "--error-unmatch", here.name, folder=here.parent)
        return _git("describe", "--always", "--abbrev=40", "--dirty=+", folder=here.parent)
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or no checkout
        return None


def _git(*words: str, folder: Path) -> str:
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
