"""Exact resume after an interruption, with the work-arounds for Lightning that it needs."""

import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed import ReduceOp

from corrzoo.callbacks.finite import HostCopy
from corrzoo.callbacks.folder import run_folder
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


class ExactResume(Callback):
    """Continue a run exactly where it ended, also within an epoch.

    Saves and restores torch's random state; data need none, as their randomness depends on (seed, epoch, pair). Works
    around three faults of Lightning 2.6: an epoch without steps after a resume with max_steps (`setup`), an unfinished
    epoch that counts as done (`on_save_checkpoint`), and a due validation that is left out (`on_train_start`).
    Gradients of an accumulation that had no step yet are lost.
    """

    def __init__(self) -> None:
        self._saved: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # With max_steps, Lightning 2.6 resumes a checkpoint of an epoch's end with an epoch of no steps.
        trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["random"] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            checkpoint["random"]["cuda"] = torch.cuda.get_rng_state()
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        ends = progress["current"]["ready"] == progress["current"]["processed"]
        if ends and trainer.fit_loop.epoch_loop.batch_progress.current.ready and not trainer.is_last_batch:
            for counts in progress.values():  # Lightning counts the epoch as done
                counts["processed"] = counts["completed"] = counts["started"] - 1

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved = {name: state.cpu() for name, state in checkpoint.get("random", {}).items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved:
            torch.set_rng_state(self._saved["cpu"])
            if torch.cuda.is_available() and "cuda" in self._saved:
                torch.cuda.set_rng_state(self._saved["cuda"])
        self._saved = {}
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        within = loop.restarted_on_train_batch_end and not trainer.is_last_batch
        if within and fetcher and loop._should_check_val_fx(fetcher):
            # Lightning would leave out the validation that was due after the checkpoint's step
            loop.val_loop.restarting = False
            loop.val_loop._restart_stage = "restarted_mid_evaluation"
            loop._batches_that_stepped -= 1  # Lightning counts this step twice


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
        self._lock: IO[str] | None = None

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
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._release()

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

    @rank_zero_only
    def _claim(self) -> None:
        """Lock the folder until the end of training; a folder that another process trains into is an error."""
        if self._lock or "://" in str(self.dirpath):
            return
        path = Path(str(self.dirpath), ".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = open(path, "w")
        try:
            # not flock: workers inherit its locks, and outlive a killed run
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock = None
            remedy = "wait for its end, or choose another --checkpoint.dirpath"
            raise ZooError(f"another run writes its checkpoints into {self.dirpath}: {remedy}") from error
        except OSError:
            pass  # a network file system without locks

    def _release(self) -> None:
        if self._lock:
            with suppress(OSError):  # a folder that has become unwritable
                Path(self._lock.name).unlink()
            self._lock.close()
        self._lock = None


def can_resume_from(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a checkpoint written now can be resumed.

    Not during gradient accumulation, as gradients are not saved. Not after an epoch's last batch, as Lightning would
    skip that epoch's validation.
    """
    return not trainer.is_last_batch and (batch_idx + 1) % trainer.accumulate_grad_batches == 0


@rank_zero_only
def _copy(old: Path, new: Path) -> None:
    with whole_file(new) as partial:
        shutil.copyfile(old, partial)


class Stopped(Exception):
    """A signal ended training. The message is for the user."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class StopSignals(Callback):
    """Handle SIGTERM and Ctrl-C: finish the current training step, save `last.ckpt`, and end.

    The same signal again ends training at once. Another one does not: launchers send SIGTERM to processes that Ctrl-C
    has reached already. An evaluation, which has nothing to save, ends at the first signal. SLURM's
    requeue signal waits for the end of the step, too: during a step, weights and optimiser state do not fit together.
    """

    def __init__(self) -> None:
        self._received, self._handled, self._prints = 0, 0, False
        self._sent: HostCopy | None = None
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._received, self._handled, self._sent = 0, 0, None  # an earlier training may have ended by a signal
        self._prints = trainer.is_global_zero
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if callable(signal.getsignal(signal.SIGUSR1)):  # Lightning's handler under SLURM
                numbers.append(signal.SIGUSR1)
            self._before = {number: signal.signal(number, self._note) for number in numbers}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if can_resume_from(trainer, batch_idx):
            self._stop_if_asked(self._agree(trainer, pl_module, wait=False), trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        number = self._agree(trainer, pl_module, wait=True)
        self._stop_if_asked(number, trainer, pl_module, trainer.checkpoint_callbacks)

    def _agree(self, trainer: Trainer, pl_module: LightningModule, wait: bool) -> int:
        """The signal that any process received, or 0: all processes must stop after the same step.

        Without `wait`, it is what was received until the step before, so that no process waits for its device.
        """
        if trainer.world_size == 1:
            return self._received
        received = torch.full((), self._received, device=pl_module.device)
        torch.distributed.all_reduce(received, ReduceOp.MAX)
        before, self._sent = self._sent, HostCopy(received)
        if wait:
            return int(self._sent.read())
        return 0 if before is None else int(before.read())

    def _stop_if_asked(
        self, number: int, trainer: Trainer, pl_module: LightningModule, first: Sequence[Callback] = ()
    ) -> None:
        """Save and stop if there was a signal. The callbacks `first` would run after this one: run them before."""
        if not number or number == self._handled:
            return
        self._handled = number
        if number == signal.SIGUSR1 and callable(handler := self._before.get(number)):
            return handler(number, None)
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        where = "no checkpoint was saved"
        for callback in first:
            callback.on_train_epoch_end(trainer, pl_module)
        if folder:
            trainer.save_checkpoint(f"{folder}/last.ckpt", weights_only=False)
            where = "resume with --ckpt_path last"
        self._restore()
        if not self._prints:
            raise SystemExit(0)
        name = signal.Signals(number).name
        raise Stopped(f"interrupted ({name}) after step {trainer.global_step}; {where}", number)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Lightning's handler would not stop

    on_predict_start = on_test_start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._before:  # `corrzoo validate`, or the validation before training
            self.on_test_start(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received == number and number != signal.SIGUSR1:
            self._restore()
            raise KeyboardInterrupt
        self._received = number
        if self._prints and number != signal.SIGUSR1:
            os.write(2, b"\nfinishing this step or validation, then saving; send the signal again to stop now\n")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
