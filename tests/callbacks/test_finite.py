"""A loss that is not finite ends training, a step later at most, and leaves no checkpoint with the weights after it."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from corrzoo.data.module import PairsDataModule
from corrzoo.heads import Baseline
from corrzoo.types import ZooError

STEPS = 3


class Breaks(Baseline):
    """Its loss is not a number at one step."""

    at = 0

    def loss(self, match, pair):
        return super().loss(match, pair) * (float("nan") if self.global_step == self.at else 1.0)


@pytest.mark.parametrize("at", range(STEPS))
def test_training_ends_and_no_later_checkpoint_is_written(tmp_path, at):
    model = Breaks(backbone="timm/test_vit.r160_in1k", weights="random")
    model.at = at
    data = PairsDataModule(
        "synthetic", test=["synthetic"], image_size=64, batch_size=2, num_workers=0, packed=False,
        options={"synthetic": {"length": {"trn": 2 * STEPS, "val": 2, "test": 2}}},
    )  # fmt: skip
    every_step = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=1, logger=False, accelerator="cpu", callbacks=[every_step],
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    with pytest.raises(ZooError, match=rf"the loss is nan at step {at} on the pairs \[\d+, \d+\]: lower --model.lr"):
        trainer.fit(model, data)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [f"step={step}.ckpt" for step in range(1, at + 1)]
    for path in tmp_path.glob("*.ckpt"):
        weights = torch.load(path, weights_only=True)["state_dict"].values()
        assert all(w.isfinite().all() for w in weights if w.is_floating_point())
