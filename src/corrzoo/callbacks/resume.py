"""What lets a run go on after a crash: checkpoints that are whole, signals that wait for a step's end."""

import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed import ReduceOp

from corrzoo.callbacks.folder import run_folder
from corrzoo.files import whole_file
from corrzoo.types import ZooError


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all, and that run no code. Lightning's own pass through the system's
    folder for temporary files, from which they are copied: a run that is killed meanwhile leaves half a `last.ckpt`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write beside the file, then take its place.

        Raises:
            ZooError: when it cannot be written; the file of before is still there.
        """
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        try:
            for stale in path.parent.glob(f".{path.name}.*.part"):  # of a run that was killed while it wrote
                stale.unlink(missing_ok=True)
            with whole_file(path) as partial, open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch's writer hides a full disk behind its own error
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            kept = f"{path} of before is whole" if path.is_file() else "nothing was kept here"
            raise ZooError(
                f"cannot write the checkpoint {path} ({getattr(cause, 'strerror', None) or cause}; {kept}): make room, "
                "or choose another --checkpoint.dirpath, and resume with --ckpt_path last"
            ) from error

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        """Tensors and plain values alone, also from the addresses that Lightning would trust.

        Raises:
            ZooError: for a file that holds more.
        """
        try:
            return super().load_checkpoint(path, *args, **options | {"weights_only": True})
        except pickle.UnpicklingError as error:
            raise ZooError(f"{path} is refused: it holds more than tensors and plain values, or is damaged") from error


class RandomState(Callback):
    """Random numbers of the model go on in a resumed run; those of the data depend on seed, epoch and pair alone."""

    def __init__(self) -> None:
        self._saved: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning 2.6 resumes a run with max_steps behind its epoch's end by an epoch without steps.
        trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["random"] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            checkpoint["random"]["cuda"] = torch.cuda.get_rng_state()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved = {name: state.cpu() for name, state in checkpoint.get("random", {}).items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved:
            torch.set_rng_state(self._saved["cpu"])
            if torch.cuda.is_available() and "cuda" in self._saved:
                torch.cuda.set_rng_state(self._saved["cuda"])
        self._saved = {}


class Checkpoints(ModelCheckpoint):
    """The best checkpoint by validation PCK, and the last: at every epoch's end, where Lightning's own keeps no other
    than the best. A resumed run has a folder of its own, which begins with the best so far.

    Args:
        save_last: Keep `last.ckpt`, from which `--ckpt_path last` goes on.
        last_every_n_steps: Write it in the middle of long epochs, too.
        **options: Those of Lightning's ModelCheckpoint, for the best.
    """

    def __init__(self, save_last: bool = True, last_every_n_steps: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._keeps_last, self._every, self._trains = save_last, last_every_n_steps, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        scores = [f"val/pck@{alpha:g}" for alpha in getattr(pl_module.hparams, "alphas", ())]
        if stage == "fit" and str(self.monitor).startswith("val/pck@") and self.monitor not in scores:
            # Lightning would find this after an epoch of training
            raise ZooError(f"{self.monitor} is not among the logged metrics: give --checkpoint.monitor one of {scores}")
        self.dirpath = self.dirpath or str(run_folder(trainer) / "checkpoints")
        super().setup(trainer, pl_module, stage)
        self._trains = stage == "fit"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        ends = trainer.global_step == trainer.max_steps
        if (ends or (self._every and trainer.global_step % self._every == 0)) and may_go_on_from(trainer, batch_idx):
            self._write_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that max_steps ends before its first validation has no best checkpoint, and needs no warning of it.
        logged = trainer.callback_metrics
        if self.monitor in (None, *logged) or any(name.startswith("val/") for name in logged):
            super().on_train_epoch_end(trainer, pl_module)
        if trainer.is_last_batch or trainer.global_step != trainer.max_steps:
            self._write_last(trainer)

    def _write_last(self, trainer: Trainer) -> None:
        if self._keeps_last and self.dirpath and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt", weights_only=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Bring along the best checkpoints of the run that is resumed."""
        best, folder = state_dict["best_k_models"], str(self.dirpath)
        if self._trains and folder != state_dict["dirpath"] and all(Path(path).is_file() for path in best):
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


def may_go_on_from(trainer: Trainer, batch_idx: int) -> bool:
    """Not between two optimiser steps, for gradients are in no checkpoint; nor behind an epoch's last: Lightning would
    go on with the next epoch, and leave the validation out.
    """
    return not trainer.is_last_batch and (batch_idx + 1) % trainer.accumulate_grad_batches == 0


@rank_zero_only
def _copy(old: Path, new: Path) -> None:
    with whole_file(new) as partial:
        shutil.copyfile(old, partial)


class Stopped(Exception):
    """A signal ended training; what it says is for the user."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class StopSignals(Callback):
    """SIGTERM and Ctrl-C end training behind the running step, with a `last.ckpt` that goes on from there; a second one
    ends it at once, and the first does an evaluation, which has nothing to save. SLURM's signal to requeue waits for
    the step, too: in its middle, weights and optimiser disagree.
    """

    def __init__(self) -> None:
        self._asked, self._done, self._speaks = 0, 0, False
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._speaks = trainer.is_global_zero  # one process for all
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if callable(signal.getsignal(signal.SIGUSR1)):  # Lightning's, under SLURM
                numbers.append(signal.SIGUSR1)
            self._before = {number: signal.signal(number, self._note) for number in numbers}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if may_go_on_from(trainer, batch_idx):
            self._heed(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._heed(trainer, pl_module, trainer.checkpoint_callbacks)  # whose turn would be behind this

    def _heed(self, trainer: Trainer, pl_module: LightningModule, first: Sequence[Callback] = ()) -> None:
        asked = self._asked
        if trainer.world_size > 1:  # a signal reaches one process first, and all must leave behind the same step
            torch.distributed.all_reduce(heard := torch.tensor(asked, device=pl_module.device), ReduceOp.MAX)
            asked = int(heard)
        if not asked or asked == self._done:
            return
        self._done = asked
        if asked == signal.SIGUSR1 and callable(handler := self._before.get(asked)):
            return handler(asked, None)
        name = signal.Signals(asked).name
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        where = "no checkpoint was saved"
        for callback in first:
            callback.on_train_epoch_end(trainer, pl_module)
        if folder:
            trainer.save_checkpoint(Path(folder) / "last.ckpt", weights_only=False)
            where = "resume with --ckpt_path last"
        self._restore()
        if not self._speaks:
            raise SystemExit(0)
        raise Stopped(f"interrupted ({name}) after step {trainer.global_step}; {where}", asked)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Lightning's handler would note it and go on

    on_predict_start = on_test_start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._before:  # `lightning validate`, or the check before training
            self.on_test_start(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked == number and number != signal.SIGUSR1:
            self._restore()
            raise KeyboardInterrupt
        self._asked = number
        if self._speaks and number != signal.SIGUSR1:
            os.write(2, b"\nfinishing this step or validation, then saving; send the signal again to stop now\n")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
