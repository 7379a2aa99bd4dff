"""Signals in one process; test_ddp_signals.py and test_crashes.py have those of several and of killed ones."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer

from corrzoo.callbacks.signals import Stopped, StopSignals
from corrzoo.data.module import PairsDataModule
from corrzoo.heads import Baseline

VIT = "timm/test_vit.r160_in1k"


def test_a_signal_ends_evaluation_and_sanity_check_at_once(tmp_path: Path) -> None:
    found: list[bool] = []

    class Asking(Baseline):
        def validation_step(self, *args: object) -> None:
            found.append(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
            super().validation_step(*args)

    trainer = Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        devices=1, enable_checkpointing=False, num_sanity_val_steps=1, default_root_dir=tmp_path,
    )  # fmt: skip
    lengths = {"synthetic": {"length": {"trn": 4, "val": 1}}}
    data = PairsDataModule(train="synthetic", image_size=64, batch_size=4, num_workers=0, options=lengths)
    model = Asking(backbone=VIT, weights="random")
    trainer.fit(model, data)
    trainer.validate(model, data, verbose=False)
    assert found == [True, False, True]  # the second is the validation of an epoch: training has something to save


def test_a_second_training_by_the_same_trainer_stops_like_the_first() -> None:
    """As in a notebook: Ctrl-C ends the step, and the next training begins without a signal."""
    callback, before = StopSignals(), signal.getsignal(signal.SIGINT)
    trainer: Any = SimpleNamespace(
        is_global_zero=True, is_last_batch=False, accumulate_grad_batches=1, world_size=1, global_step=1,
        checkpoint_callback=None,
    )  # fmt: skip
    for _ in range(2):
        callback.on_train_start(trainer, trainer)
        callback.on_train_batch_end(trainer, trainer, None, None, 0)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped, match="SIGINT"):
            callback.on_train_batch_end(trainer, trainer, None, None, 0)
    assert signal.getsignal(signal.SIGINT) is before
