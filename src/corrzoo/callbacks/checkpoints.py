"""Checkpoints that are whole, and a `last.ckpt` to resume from."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from corrzoo.callbacks.folder import run_folder
from corrzoo.callbacks.lock import FolderLock
from corrzoo.callbacks.resume import can_resume_from
from corrzoo.files import whole_file
from corrzoo.types import ZooError


class WholeFiles(TorchCheckpointIO):
    """Write checkpoints atomically, and load only tensors and plain values.

    Lightning copies checkpoints from the folder for temporary files. A run that is killed during the copy leaves half a
    `last.ckpt`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint atomically.

        Raises:
            ZooError: if it cannot be written. A previous checkpoint stays.
        """
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        try:
            for stale in path.parent.glob(f".{path.name}.*.part"):  # left by a run that was killed
                stale.unlink(missing_ok=True)
            with whole_file(path) as partial, open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            kept = "the previous checkpoint is intact" if path.is_file() else "there is no previous checkpoint"
            raise ZooError(
                f"cannot write the checkpoint {path} ({getattr(cause, 'strerror', None) or cause}; {kept}): free disk "
                "space, or choose another --checkpoint.dirpath, and resume with --ckpt_path last"
            ) from error

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        """Load tensors and plain values only, also from URLs, which Lightning would trust.

        Raises:
            ZooError: if the file contains pickled objects or is damaged.
        """
        try:
            return super().load_checkpoint(path, *args, **options | {"weights_only": True})
        except (OSError, ImportError):  # it is not there, or out of reach
            raise
        except Exception as error:  # bytes that are not a pickle can raise anything
            told = f"{path} is refused: it is damaged, or contains pickled objects ({type(error).__name__})"
            raise ZooError(f"{told}: fetch it again, or give an earlier checkpoint") from error


class Checkpoints(ModelCheckpoint):
    """Save the best checkpoint by validation PCK, and `last.ckpt` after every epoch.

    Lightning writes its `last.ckpt` only together with a new best checkpoint. A resumed run copies the best checkpoint
    so far into its own folder.

    Args:
        save_last: Write `last.ckpt`, which `--ckpt_path last` resumes.
        last_every_n_steps: Write it every so many steps, too.
        **options: Options of Lightning's ModelCheckpoint for the best checkpoint.

    Raises:
        ZooError: in `setup`, if the monitored score is not logged, or several checkpoints would have one filename.
    """

    def __init__(self, save_last: bool = True, last_every_n_steps: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._keeps_last, self._every, self._trains = save_last, last_every_n_steps, False
        self._counts = options.get("enable_version_counter", True)
        self._lock = FolderLock()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        scores = [f"val/pck@{alpha:g}" for alpha in getattr(pl_module.hparams, "alphas", ())]
        if stage == "fit" and str(self.monitor).startswith("val/pck@") and self.monitor not in scores:
            # Lightning would notice after an epoch of training
            raise ZooError(f"{self.monitor} is not among the logged metrics: give --checkpoint.monitor one of {scores}")
        numbered = self._counts or "{" in (self.filename or "{epoch}")
        if stage == "fit" and self.save_top_k not in (0, 1) and not numbered:
            told = f"checkpoint.save_top_k={self.save_top_k} would write every checkpoint to {self.filename}.ckpt"
            raise ZooError(f"{told}: give --checkpoint.filename 'best-{{epoch}}-{{step}}'")
        self.dirpath = self.dirpath or str(run_folder(trainer) / "checkpoints")
        super().setup(trainer, pl_module, stage)
        self._trains = stage == "fit"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._claim()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._lock.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._lock.release()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._every and trainer.global_step % self._every == 0 and can_resume_from(trainer, batch_idx):
            self._write_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning would warn if max_steps ends a run before its first validation: there is no best checkpoint yet.
        logged = trainer.callback_metrics
        if self.monitor in (None, *logged) or any(name.startswith("val/") for name in logged):
            super().on_train_epoch_end(trainer, pl_module)
        self._write_last(trainer)

    def _write_last(self, trainer: Trainer) -> None:
        if self._keeps_last and self.dirpath and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(f"{self.dirpath}/last.ckpt", weights_only=False)  # it may be a URL

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy the best checkpoints of the resumed run into the folder of this run."""
        best, folder = state_dict["best_k_models"], str(self.dirpath)
        if self._trains and folder != state_dict["dirpath"] and all(Path(path).is_file() for path in best):
            self._claim()
            here = {path: str(Path(folder) / Path(path).name) for path in best}
            for old, new in here.items():
                _copy(Path(old), Path(new))
            state_dict = state_dict | {
                "dirpath": folder,
                "best_k_models": {here[path]: score for path, score in best.items()},
                "best_model_path": here.get(state_dict["best_model_path"], ""),
                "kth_best_model_path": here.get(state_dict["kth_best_model_path"], ""),
                "last_model_path": "",
            }
        super().load_state_dict(state_dict)

    def _claim(self) -> None:
        """Lock the folder until the end of training; a folder that another process trains into is an error."""
        if "://" not in str(self.dirpath):
            told = f"another run writes its checkpoints into {self.dirpath}"
            self._lock.claim(str(self.dirpath), f"{told}: wait for its end, or choose another --checkpoint.dirpath")


@rank_zero_only
def _copy(old: Path, new: Path) -> None:
    with whole_file(new) as partial:
        shutil.copyfile(old, partial)
