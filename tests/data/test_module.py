from types import SimpleNamespace

import pytest
import torch
from fixtures import write_spair
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Trainer

from corrzoo.data.module import PairsDataModule, dealt
from corrzoo.types import ZooError

FEW = {"synthetic": {"length": {"trn": 8, "val": 5, "test": 7}}}


def module(**options):
    return PairsDataModule(
        train="synthetic", test=["synthetic"], image_size=48, batch_size=4, num_workers=0, options=FEW, **options
    )


def test_batches_of_every_split():
    data = module()
    data.setup("fit")
    data.setup("fit")
    train = list(data.train_dataloader())
    assert [len(p.index) for p in train] == [4, 4] and train[0].src_img.shape == (4, 3, 48, 48)
    assert [len(p.index) for p in data.val_dataloader()] == [4, 1]
    data.setup("test")
    (loader,) = data.test_dataloader()
    assert [i for p in loader for i in p.index.tolist()] == list(range(7))


def test_training_pairs_are_shuffled_and_test_pairs_are_not():
    data = module()
    data.setup("fit")
    seen = [i for p in data.train_dataloader() for i in p.index.tolist()]
    assert sorted(seen) == list(range(8))


def test_a_size_of_two_numbers_is_height_and_width():
    data = PairsDataModule(train="synthetic", image_size=[48, 64], num_workers=0, batch_size=2, options=FEW)
    data.setup("validate")
    assert next(iter(data.val_dataloader())).trg_img.shape == (2, 3, 48, 64)


def test_a_misspelt_dataset_is_an_error_at_once():
    with pytest.raises(ZooError, match="did you mean 'pfwillow'"):
        PairsDataModule(test=["pfwilow"])
    with pytest.raises(ZooError, match="did you mean 'synthetic'"):
        PairsDataModule(options={"synthetics": {}})


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(augment="catz"), "did you mean 'cats'"),
        (dict(image_size=[64]), "one side, or \\[H, W\\]"),
        (dict(image_size=[64, 64, 3]), "one side, or \\[H, W\\]"),
        (dict(batch_size=0), "at least one pair"),
    ],
)
def test_what_cannot_be_is_an_error_before_anything_is_fetched(options, expected):
    with pytest.raises(ZooError, match=expected):
        PairsDataModule(**options)


def test_a_misspelt_option_of_a_dataset_names_the_nearest():
    data = PairsDataModule(train="synthetic", options={"synthetic": {"lenght": 8}})
    with pytest.raises(ZooError, match="did you mean 'length'"):
        data.setup("fit")


def test_fewer_training_pairs_than_a_batch_are_an_error():
    data = PairsDataModule(train="synthetic", batch_size=16, image_size=48, options=FEW)
    data.setup("fit")
    with pytest.raises(ZooError, match="8 training pairs, fewer than"):
        data.train_dataloader()


def test_no_test_dataset_is_an_error():
    data = PairsDataModule(test=[])
    data.setup("test")
    with pytest.raises(ZooError, match="names no dataset"):
        data.test_dataloader()


@pytest.mark.parametrize("count, processes", [(7, 1), (7, 2), (8, 2), (10, 4), (2, 4)])
def test_each_process_evaluates_a_stretch_of_the_order(count, processes):
    order, seen = list(range(100, 100 + count)), []
    for rank in range(processes):  # what Lightning makes of a loader's sampler
        sampler = DistributedSamplerWrapper(
            dealt(order, processes), num_replicas=processes, rank=rank, shuffle=False, drop_last=False
        )
        mine = list(sampler)
        stretch = (
            mine[:-1] if mine[-1] in seen else mine
        )  # the last one may repeat another's, so that all are alike many
        assert stretch == list(range(stretch[0], stretch[0] + len(stretch))) if stretch else mine[0] in order
        seen += mine
    assert set(seen) == set(order)


@pytest.mark.parametrize("packed", [True, False, "elsewhere"])
def test_images_are_packed_where_the_option_says(tmp_path, cache, monkeypatch, packed):
    monkeypatch.chdir(tmp_path)
    write_spair(tmp_path)
    data = PairsDataModule(root=str(tmp_path), image_size=32, batch_size=2, num_workers=0, packed=packed)
    data.setup("fit")
    found = [path.parent for folder in (cache, tmp_path / "elsewhere") for path in folder.rglob("*.u8")]
    assert {*found} == {True: {cache / "images"}, False: set(), "elsewhere": {tmp_path / "elsewhere"}}[packed]
    assert len(found) == 2 * bool(packed)  # trn and val
    images = [
        torch.equal(p.src_img[0], data.datasets["spair71k", "val"][int(p.index[0])].src_img)
        for p in data.val_dataloader()
    ]
    assert images == [True]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_batches_that_one_has(processes):
    def batches(rank, count):
        data = module()
        data.setup("fit")
        loop = Trainer(accelerator="cpu", devices=1, barebones=True).fit_loop
        data.trainer = SimpleNamespace(world_size=count, global_rank=rank, fit_loop=loop)
        return [pair.index for pair in data.train_dataloader()]

    shared = zip(*(batches(rank, processes) for rank in range(processes)), strict=True)
    for part, alone in zip(shared, batches(0, 1), strict=True):
        assert torch.cat(part).sort().values.tolist() == alone.sort().values.tolist()
    with pytest.raises(ZooError, match="batch_size 4 is shared by 3 processes and does not divide"):
        batches(0, 3)
