"""What a result file says of scores, of a run and of its training."""

import os
import platform
import resource
import subprocess
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from corrzoo.data.pairs import PairDataset
from corrzoo.files import sha256
from corrzoo.ops import resolve_backend
from corrzoo.scoring.metric import BenchmarkMetric
from corrzoo.version import __version__


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
        metric.key: values,
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
        "head": module.head_name,
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
        "seed": seed(),
        **({"before": before} if (before := trainer.lightning_module.before) else {}),
    }


def versions() -> dict[str, str]:
    """Versions of corrzoo and the packages that results depend on."""
    installed = {"corrzoo": __version__} | {package: version(package) for package in ("lightning", "timm")}
    return installed | {"torch": torch.__version__, "python": platform.python_version()}


def seed() -> int | None:
    """The seed that Lightning's `seed_everything` has set; None without one."""
    return int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: allocated on a GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


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
