"""Save the configuration of a run in its folder."""

import re
import shutil
from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from corrzoo.callbacks.folder import run_folder
from corrzoo.files import whole_file

ALWAYS = re.compile(r"(config|hparams)\.yaml|events\.")
"""Files that every run writes before it starts."""


class SaveConfig(SaveConfigCallback):
    """Save `config.yaml` in the run's folder: `saved`, which can be run again, as it does not name that folder."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, saved: Namespace) -> None:
        super().__init__(parser, saved, save_to_log_dir=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = run_folder(trainer)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        with whole_file(self.folder / "config.yaml") as partial:
            self.parser.save(self.config, partial, skip_unset=False, multifile=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the folder of a run that failed before it wrote results."""
        folder = getattr(trainer.logger, "log_dir", None)
        if folder and trainer.is_global_zero and all(ALWAYS.match(path.name) for path in Path(folder).glob("*")):
            trainer.loggers = []  # they would write the folder again
            shutil.rmtree(folder, ignore_errors=True)
