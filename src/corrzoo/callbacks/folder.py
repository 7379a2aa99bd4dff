"""The folder of a run: `runs/<head>-<backbone>/<run>`, with its configuration, checkpoints, results and pictures."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger


def group_name(head: str, backbone: str) -> str:
    """Name of the folder of all runs of a head on a backbone."""
    return f"{head}-{backbone.replace('/', '-')}"


def name_run(config: Namespace, command: str, root: Path) -> None:
    """Give the logger `<root>/<head>-<backbone>`, and an evaluation the name of the run that it evaluates.

    Lightning's loggers count on, `version_0`, `version_1`; `version_0-test` is a test of `version_0`'s checkpoint.

    Args:
        config: Options of the command, completed in place. What the user has named stays.
        command: fit, validate, test or predict.
        root: The folder of all runs, unless `trainer.default_root_dir` is given.
    """
    logger, head = config.trainer.logger, config.model.class_path.rpartition(".")[2]
    options: Any = getattr(logger, "init_args", {})
    if "save_dir" in options and options.save_dir in (None, "", "."):
        options.save_dir = config.trainer.default_root_dir or str(root)
    if "name" in options and options.name == "":
        options.name = group_name(head, config.model.init_args.backbone)
    counts = logger and str(getattr(logger, "class_path", "")).endswith(("CSVLogger", "TensorBoardLogger"))
    if command != "fit" and counts and options.version is None:
        source = Path(config.ckpt_path or "").parent
        name = f"{source.parent.name}-" * (source.name == "checkpoints") + command
        taken = {path.name for path in Path(options.save_dir, options.name).glob(f"{name}*")}
        options.version = next(n for n in (name, *(f"{name}-{i}" for i in range(2, 10**6))) if n not in taken)


def run_folder(trainer: Trainer) -> Path:
    """Output folder of the run. A collective call: every process must make it."""
    logger, model = trainer.logger, trainer.lightning_module
    if isinstance(logger, WandbLogger):  # all runs share its `log_dir`; only the first process knows its version
        group = group_name(type(model).__name__, str(model.hparams.get("backbone", "")))
        return Path(trainer.strategy.broadcast(f"{logger.save_dir}/{group}/{logger.version}"))
    return Path(trainer.log_dir or trainer.default_root_dir)
