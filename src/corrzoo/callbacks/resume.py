"""Exact resume after an interruption, with the work-arounds for Lightning that it needs."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


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


def can_resume_from(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a checkpoint written now can be resumed.

    Not during gradient accumulation, as gradients are not saved. Not after an epoch's last batch, as Lightning would
    skip that epoch's validation.
    """
    return not trainer.is_last_batch and (batch_idx + 1) % trainer.accumulate_grad_batches == 0
