"""What a model says of its training and of earlier ones."""

import pytest
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

import corrzoo
from corrzoo.data import PairDataset
from corrzoo.data.module import PairsDataModule
from corrzoo.store.checkpoints import init_from

TINY = dict(backbone="timm/test_vit.r160_in1k", weights="random")


def trainer(folder, **options):
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False, accelerator="cpu", devices=1)
    return Trainer(default_root_dir=folder, limit_val_batches=0, **{"max_epochs": 1} | quiet | options)


def data(name):
    options = {name: {"length": 4}}
    return PairsDataModule(train=name, test=[name], image_size=64, batch_size=4, num_workers=0, options=options)


@pytest.fixture
def trained(tmp_path):
    """A model that was trained on synthetic pairs, its trainer, and its checkpoint."""
    model, run = corrzoo.create_matcher("Baseline", **TINY), trainer(tmp_path)
    run.fit(model, data("synthetic"))
    run.save_checkpoint(path := tmp_path / "one.ckpt")
    assert model.trained["dataset"] == "synthetic" and "before" not in model.trained
    return model, path


@pytest.mark.parametrize("how", ["loaded", "the same model", "init_from"])
def test_an_earlier_training_is_recorded(tmp_path, trained, how):
    model, path = trained
    if how == "loaded":
        model = corrzoo.load(path)
    elif how == "init_from":
        init_from(model := corrzoo.create_matcher("Baseline", **TINY), path)
        assert model.trained["dataset"] == "synthetic"  # it is not training-free before it is trained further
    dataset = corrzoo.create_dataset("synthetic", "", "trn", size=64, length=4)
    trainer(tmp_path).fit(model, DataLoader(dataset, 4, collate_fn=PairDataset.collate))
    assert (model.trained["dataset"], model.trained["before"]) == (None, "synthetic")
    trainer(tmp_path).fit(model, data("synthetic"))
    assert (model.trained["dataset"], model.trained["before"]) == ("synthetic", "unknown data")


def test_a_resumed_training_is_none_of_before(tmp_path, trained):
    model, path = trained
    for one in (model, corrzoo.load(path), corrzoo.create_matcher("Baseline", **TINY)):
        trainer(tmp_path, max_epochs=2).fit(one, data("synthetic"), ckpt_path=path)
        assert one.trained["steps"] == 2 and "before" not in one.trained
