"""A loss that is not finite ends training, a step later at most, and leaves no checkpoint with the weights after it."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from corrzoo.callbacks.finite import FiniteLoss
from corrzoo.data.module import PairsDataModule
from corrzoo.heads import Baseline
from corrzoo.types import ZooError

STEPS = 3


class Breaks(Baseline):
    """Its loss is not a number at one step."""

    at = 0

    def loss(self, match, pair):
        return super().loss(match, pair) * (float("nan") if self.global_step == self.at else 1.0)


def pairs():
    return PairsDataModule(
        "synthetic", test=["synthetic"], image_size=64, batch_size=2, num_workers=0, packed=False,
        options={"synthetic": {"length": {"trn": 2 * STEPS, "val": 2, "test": 2}}},
    )  # fmt: skip


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("at", range(STEPS))
def test_training_ends_and_no_later_checkpoint_is_written(tmp_path, at, weights_only):
    model = Breaks(backbone="timm/test_vit.r160_in1k", weights="random")
    model.at = at
    every_step = ModelCheckpoint(
        tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}", save_weights_only=weights_only
    )
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=1, logger=False, accelerator="cpu", callbacks=[every_step],
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    with pytest.raises(ZooError, match=rf"the loss is nan at step {at} on the pairs \[\d+, \d+\]: lower --model.lr"):
        trainer.fit(model, pairs())
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [f"step={step}.ckpt" for step in range(1, at + 1)]
    for path in tmp_path.glob("*.ckpt"):
        weights = torch.load(path, weights_only=True)["state_dict"].values()
        assert all(w.isfinite().all() for w in weights if w.is_floating_point())


@pytest.mark.parametrize(("batch", "step"), [(0, 0), (1, 0), (2, 1)])
def test_the_step_is_that_of_the_batch_while_gradients_accumulate(tmp_path, batch, step):
    class BreaksAt(Baseline):
        def training_step(self, pair, batch_idx):
            return super().training_step(pair, batch_idx) * (float("nan") if batch_idx == batch else 1)

    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=1, logger=False, accelerator="cpu", accumulate_grad_batches=2,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    with pytest.raises(ZooError, match=f"the loss is nan at step {step} on"):
        trainer.fit(BreaksAt(backbone="timm/test_vit.r160_in1k", weights="random"), pairs())


def test_a_training_does_not_end_by_a_loss_of_an_earlier_one():
    """As in a notebook: the first training is interrupted before its last loss is read."""
    callback, trainer, batch = FiniteLoss(), SimpleNamespace(global_step=1), SimpleNamespace(index=torch.zeros(1))
    callback.on_train_batch_start(trainer, None, batch, 0)
    callback.on_train_batch_end(trainer, None, {"loss": torch.tensor(float("nan"))}, batch, 0)
    callback.on_train_start(trainer, None)
    callback.on_train_epoch_end(trainer, None)


class Seen(Callback):
    """Loss of each step, and what the progress bar shows after it."""

    def __init__(self):
        self.losses, self.shown = [], []

    def on_train_batch_start(self, trainer, *_):
        self.note(trainer)

    def on_train_epoch_end(self, trainer, *_):
        self.note(trainer)

    def note(self, trainer):
        self.losses.append(trainer.callback_metrics.get("train/loss"))
        self.shown.append(dict(trainer.progress_bar_metrics))


def test_progress_bar_shows_the_loss_of_the_step_before(tmp_path):
    """The bar reads its values in every step: it would wait for a GPU to finish the step."""
    seen, model = Seen(), Baseline(backbone="timm/test_vit.r160_in1k", weights="random")
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=1, logger=False, accelerator="cpu", callbacks=[seen],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, pairs())
    assert seen.shown == [{}, {}] + [{"loss": pytest.approx(loss.item())} for loss in seen.losses[1:-1]]
    assert len({loss.item() for loss in seen.losses[1:]}) == STEPS
