"""The folder of a run: `runs/<head>-<backbone>/<run>`, with its configuration, checkpoints, results and pictures."""

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger


def group_name(head: str, backbone: str) -> str:
    """Name of the folder of all runs of a head on a backbone."""
    return f"{head}-{backbone.replace('/', '-')}"


def run_folder(trainer: Trainer) -> Path:
    """Output folder of the run. A collective call: every process must make it."""
    logger, model = trainer.logger, trainer.lightning_module
    if isinstance(logger, WandbLogger):  # all runs share its `log_dir`; only the first process knows its version
        group = group_name(type(model).__name__, str(model.hparams.get("backbone", "")))
        return Path(trainer.strategy.broadcast(f"{logger.save_dir}/{group}/{logger.version}"))
    return Path(trainer.log_dir or trainer.default_root_dir)
