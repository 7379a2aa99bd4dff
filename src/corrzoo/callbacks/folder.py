"""Folder of a run, `runs/<head>-<backbone>/<run>`: its configuration, checkpoints, results and pictures."""

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

from corrzoo.recipes import class_name

if TYPE_CHECKING:
    from jsonargparse import Namespace


def group_name(head: str, backbone: str) -> str:
    """Name of the folder of all runs of a head on a backbone, `<head>-<backbone>`."""
    return f"{head}-{backbone.replace('/', '-')}"


def name_run(config: "Namespace", command: str, root: Path) -> None:
    """Complete the logger's options in `config`: its folder, and an evaluation's name, after the run it evaluates.

    Lightning's loggers number training runs: `version_0`, `version_1`. A test of `version_0`'s checkpoint becomes
    `version_0-test`. Names that the user has given stay, and so does `trainer.default_root_dir` in place of `root`.
    Without a logger, or if the logger has no folder, `trainer.default_root_dir` becomes the run's folder, such as
    `fit`, so that nothing is written into the working directory.
    """
    logger, trainer = config.trainer.logger, config.trainer
    group = group_name(class_name(config.model.class_path), config.model.init_args.backbone)
    options: Any = getattr(logger, "init_args", {})
    if "save_dir" in options and options.save_dir in (None, "", "."):
        options.save_dir = trainer.default_root_dir or str(root)
    if "name" in options and options.name == "":
        options.name = group
    numbered = logger and str(getattr(logger, "class_path", "")).endswith(("CSVLogger", "TensorBoardLogger"))
    if command != "fit" and numbered and options.version is None:
        options.version = _new_folder(Path(options.save_dir, options.name or ""), command, config.ckpt_path).name
    if not trainer.default_root_dir and (trainer.fast_dev_run or "save_dir" not in options):
        trainer.default_root_dir = str(_new_folder(root / group, command, config.ckpt_path))


def _new_folder(runs: Path, command: str, checkpoint: str | None) -> Path:
    """A new folder in `runs` for a command on a checkpoint."""
    source = Path(checkpoint or "").parent
    of_run = command != "fit" and source.name == "checkpoints"
    name = f"{source.parent.name}-{command}" if of_run else command
    return next(path for i in count(1) if not (path := runs / (name if i == 1 else f"{name}-{i}")).exists())


def run_folder(trainer: Trainer) -> Path:
    """Output folder of the run. A collective call: every process must make it."""
    logger = trainer.logger
    if isinstance(logger, WandbLogger):  # all its runs share `log_dir`, and only the first process knows the version
        model: Any = trainer.lightning_module
        group = group_name(model.head_name, str(model.hparams.get("backbone", "")))
        return Path(trainer.strategy.broadcast(f"{logger.save_dir}/{group}/{logger.version}"))
    return Path(trainer.log_dir or trainer.default_root_dir)
