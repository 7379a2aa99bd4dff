"""PairsDataModule: batches, epochs and workers; packed images and annotations where the options say."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from fixtures import write_spair
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningModule, Trainer

from corrzoo.data.module import PairsDataModule, interleaved
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
        (dict(options={"synthetic": {"size": 64}}), "'size' of synthetic .*data.image_size"),
        (dict(options={"synthetic": {"augment": "cats"}}), "'augment' of synthetic .*data.augment"),
    ],
)
def test_invalid_options_are_an_error_before_anything_is_fetched(options, expected):
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
def test_each_process_evaluates_a_contiguous_part_of_the_order(count, processes):
    order, seen = list(range(100, 100 + count)), []
    for rank in range(processes):  # Lightning wraps a loader's sampler so
        sampler = DistributedSamplerWrapper(
            interleaved(order, processes), num_replicas=processes, rank=rank, shuffle=False, drop_last=False
        )
        mine = list(sampler)
        part = mine[:-1] if mine[-1] in seen else mine  # the last may repeat another's, so that all have as many
        assert part == list(range(part[0], part[0] + len(part))) if part else mine[0] in order
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
def test_processes_share_the_batches_of_one_process(processes):
    def batches(rank, count):
        data = module()
        data.setup("fit")
        data.trainer = SimpleNamespace(world_size=count, global_rank=rank, training=False)
        return [pair.index for pair in data.train_dataloader()]

    shared = zip(*(batches(rank, processes) for rank in range(processes)), strict=True)
    for part, alone in zip(shared, batches(0, 1), strict=True):
        assert torch.cat(part).sort().values.tolist() == alone.sort().values.tolist()
    with pytest.raises(
        ZooError, match="batch_size 4 is not divisible by the number of processes, 3: choose a multiple"
    ):
        batches(0, 3)


class Watch(LightningModule):
    """Keeps the images of each training batch, and saves a checkpoint after batch number `saved`."""

    def __init__(self, saved, path):
        super().__init__()
        self.weight, self.saved, self.path, self.seen = torch.nn.Parameter(torch.zeros(())), saved, path, []

    def training_step(self, pair, batch_idx):
        self.seen.append((self.current_epoch, pair.index.tolist(), pair.src_img))
        return self.weight

    def on_train_batch_end(self, *_):
        if len(self.seen) == self.saved:
            self.trainer.save_checkpoint(self.path)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def watch(folder, workers=0, saved=None, start=None, batch_size=2, kind=Watch, epochs=3, **options):
    data = PairsDataModule(
        train="synthetic", image_size=48, batch_size=batch_size, num_workers=workers, augment="cats", options=FEW
    )
    trainer = Trainer(
        max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", devices=1, enable_checkpointing=False, limit_val_batches=0, **options,
    )  # fmt: skip
    model = kind(saved, folder / "saved.ckpt")
    trainer.fit(model, data, ckpt_path=start)
    return model.seen, data


def assert_batches(found, expected):
    assert [(epoch, index) for epoch, index, _ in found] == [(epoch, index) for epoch, index, _ in expected]
    assert all(torch.equal(image, other) for (*_, image), (*_, other) in zip(found, expected, strict=True))


def test_lightning_sets_the_epoch_of_order_rendering_and_augmentation(tmp_path):
    seen, data = watch(tmp_path)
    assert [epoch for epoch, *_ in seen] == [0] * 4 + [1] * 4 + [2] * 4
    dataset, orders = data.datasets["synthetic", "trn"], []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        batches = [(index, images) for e, index, images in seen if e == epoch]
        orders.append([i for index, _ in batches for i in index])
        assert sorted(orders[-1]) == list(range(8))
        for index, images in batches:
            assert all(torch.equal(dataset[i].src_img, image) for i, image in zip(index, images, strict=True))
    assert len({tuple(order) for order in orders}) == 3
    assert_batches(watch(tmp_path, workers=2)[0], seen)  # workers read ahead for the right epoch, too


@pytest.mark.filterwarnings("error:.*dataloader is not resumable")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("saved", [2, 4, 7])
def test_a_run_resumes_with_the_next_batch(tmp_path, saved, workers):
    whole, _ = watch(tmp_path, saved=saved)
    rest, _ = watch(tmp_path, workers, start=tmp_path / "saved.ckpt")
    assert_batches(rest, whole[saved:])


def test_a_run_that_overfits_a_few_batches_saves_checkpoints_and_resumes(tmp_path):
    """Lightning replaces the sampler by one that does not shuffle, and knows neither processes nor a place."""
    whole, _ = watch(tmp_path, saved=3, overfit_batches=2)
    assert [(epoch, index) for epoch, index, _ in whole] == [(e, i) for e in range(3) for i in ([0, 1], [2, 3])]
    rest, _ = watch(tmp_path, start=tmp_path / "saved.ckpt", overfit_batches=2)
    assert [epoch for epoch, *_ in rest] == [1, 2, 2]


def test_within_an_epoch_a_run_does_not_resume_with_another_batch_size(tmp_path):
    watch(tmp_path, saved=2)
    with pytest.raises(ZooError, match=r"within an epoch with data\.batch_size 2, not 4: give --data\.batch_size 2"):
        watch(tmp_path, start=tmp_path / "saved.ckpt", batch_size=4)
    old = torch.load(tmp_path / "saved.ckpt")
    old["loops"]["fit_loop"]["combined_loader"] = [{}]  # as in checkpoints of 0.1.0
    torch.save(old, tmp_path / "old.ckpt")
    assert len(watch(tmp_path, start=tmp_path / "old.ckpt")[0]) == 10


def test_after_an_epoch_a_run_resumes_with_another_batch_size(tmp_path):
    class AtTheEnd(Watch):
        def on_train_epoch_end(self):
            self.trainer.save_checkpoint(self.path)

    watch(tmp_path, kind=AtTheEnd, epochs=1)
    seen, _ = watch(tmp_path, start=tmp_path / "saved.ckpt", batch_size=4)
    assert [(epoch, len(index)) for epoch, index, _ in seen] == [(1, 4), (1, 4), (2, 4), (2, 4)]


def test_a_loader_begins_at_the_first_batch_outside_of_training(tmp_path):
    _, data = watch(tmp_path)
    assert sorted(i for pair in data.train_dataloader() for i in pair.index.tolist()) == list(range(8))


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system who sent a signal")
def test_workers_outlive_a_stop_signal_to_all_processes_but_not_their_parents():
    data = module()
    data.hparams.num_workers = 2
    data.setup("fit")
    batches = iter(data.val_dataloader())
    pids = [str(worker.pid) for worker in batches._workers]
    seen = [next(batches), next(batches)]  # one of each worker: both have set up their signals
    for kind in ("-TERM", "-INT"):
        subprocess.run(["kill", kind, *pids], check=True)  # by another process, as kill -- -pgid does
    seen += batches
    assert [i for pair in seen for i in pair.index.tolist()] == list(range(5))
    for worker in batches._workers:
        assert worker.is_alive()
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0


def test_refresh_parses_annotations_again(tmp_path):
    write_spair(tmp_path)
    (path,) = (tmp_path / "SPair-71k/PairAnnotation/test").glob("000001*")

    def first(refresh):
        data = PairsDataModule(root=str(tmp_path), test=["spair71k", "synthetic"], packed=False, refresh=refresh)
        data.setup("test")
        return data.datasets["spair71k", "test"].record(0).src_kps[0].tolist()

    old = first(False)
    state = path.stat()
    path.write_text(path.read_text().replace('"src_kps": [[8, 8]', '"src_kps": [[9, 8]'))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (old, first(False), first(True), first(False)) == ([8, 8], [8, 8], [9, 8], [9, 8])


def test_image_numbers_stay_on_the_cpu_and_the_rest_of_a_batch_moves():
    data = module()
    data.setup("test")
    pair = next(iter(data.test_dataloader()[0]))
    moved = data.transfer_batch_to_device(pair, torch.device("meta"), 0)
    assert {name for name in pair._fields if getattr(moved, name).device.type == "cpu"} == {"src_id", "trg_id"}
