"""The training loss on the host: a check that it is finite, and the progress bar. No step waits for the device."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from corrzoo.types import Pair, ZooError


class HostCopy:
    """A copy of a tensor on the CPU that is made while the device works on."""

    def __init__(self, x: Tensor) -> None:
        self._copy, self._made = x.to("cpu", non_blocking=True), None
        if x.device.type != "cpu":
            self._made = torch.Event(x.device)
            self._made.record()

    def read(self) -> Tensor:
        """The copy; waits until it is made."""
        if self._made is not None:
            self._made.synchronize()
        return self._copy


class FiniteLoss(Callback):
    """End training when a loss is not finite, before a checkpoint is written after it.

    The loss is read a step later, and the progress bar shows it then. Each process checks the loss of its own pairs.
    The first that stops ends the others through their launcher.
    """

    def __init__(self) -> None:
        self._last: tuple[int, HostCopy, HostCopy] | None = None
        """Number, loss and pairs of the last step."""
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = None  # an earlier training may have been interrupted

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Pair, batch_idx: int) -> None:
        self._step = trainer.global_step  # after the batch it is one more, unless gradients accumulate

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Pair, batch_idx: int
    ) -> None:
        loss = self.check()
        if loss is not None:
            pl_module.log("loss", loss, prog_bar=True, logger=False)
        self._last = self._step, HostCopy(outputs["loss"]), HostCopy(batch.index)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check()

    def check(self) -> Tensor | None:
        """The loss of the last step, if it was not checked before. The model calls this when it is saved.

        Raises:
            ZooError: if the loss is not finite.
        """
        if self._last is None:
            return None
        (step, loss, pairs), self._last = self._last, None
        if not loss.read().isfinite():
            raise ZooError(
                f"the loss is {loss.read().item()} at step {step} on the pairs {pairs.read().tolist()}: "
                "lower --model.lr and --model.backbone_lr, or look at these pairs with dataset.record(i)"
            )
        return loss.read()
