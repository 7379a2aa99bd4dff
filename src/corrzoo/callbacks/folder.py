"""Where a run keeps its files."""

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger


def run_folder(trainer: Trainer) -> Path:
    """Where a run leaves its files, as every process must ask; `log_dir` is one for all of wandb's runs."""
    logger = trainer.logger
    if isinstance(logger, WandbLogger):  # beside its checkpoints; the first process alone knows the run's name
        return Path(trainer.strategy.broadcast(f"{logger.save_dir}/{logger.name}/{logger.version}"))
    return Path(trainer.log_dir or trainer.default_root_dir)
