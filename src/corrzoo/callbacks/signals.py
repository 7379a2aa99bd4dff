"""SIGTERM, Ctrl-C and SLURM's requeue signal: training ends after a step, with a checkpoint."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed import ReduceOp

from corrzoo.callbacks.finite import HostCopy
from corrzoo.callbacks.resume import can_resume_from


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
