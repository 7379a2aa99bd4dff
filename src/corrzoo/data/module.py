"""PairsDataModule: any dataset of the zoo for training, validation and test."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, DistributedSampler

from corrzoo.data import create_dataset
from corrzoo.data import download as downloads
from corrzoo.data.augment import create_augment
from corrzoo.data.pairs import DATASETS, OPTIONS_OF_ALL, FolderDataset, PairDataset
from corrzoo.types import Pair, ZooError


class Shuffled(DistributedSampler[int]):
    """Shuffle training pairs by (seed, epoch) only, so that the order is independent of workers and of other random
    draws. With N processes, each takes 1/N of every global batch.
    """

    skip = 0
    """Number of pairs to leave out at the beginning of the next pass."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the order, and of the dataset's augmentation and rendering."""
        super().set_epoch(epoch)
        self.dataset.set_epoch(epoch)  # type: ignore[attr-defined]  # a PairDataset

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        return islice(super().__iter__(), skip, None)


class TrainLoader(DataLoader[Pair]):
    """A DataLoader that starts where Lightning's progress stands, so that a run can resume within an epoch.

    As a generator it reads nothing before the first batch: Lightning creates it before it sets the sampler's epoch.
    With Trainer(overfit_batches=N), Lightning replaces the sampler by one of its own, which always starts anew.
    """

    trainer: Trainer | None = None

    def __iter__(self) -> Iterator[Pair]:  # type: ignore[override]
        if self.trainer and self.trainer.training and isinstance(self.sampler, Shuffled):
            done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
            self.sampler.skip = done * (self.batch_size or 1)
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """The number of pairs in a batch of all processes: Lightning's own progress has the position, in batches."""
        processes = getattr(self.sampler, "num_replicas", 1)  # a SequentialSampler of Lightning's has none
        return {"batch_size": (self.batch_size or 1) * processes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check the batch size of a run that resumes within an epoch. Lightning calls this only then.

        Raises:
            ZooError: if it was another one: other pairs than those of the first steps would be left out.
        """
        before, now = state.get("batch_size"), self.state_dict()["batch_size"]
        if before not in (None, now):  # None: a checkpoint of 0.1.0
            told = f"the checkpoint lies within an epoch with data.batch_size {before}, not {now}"
            raise ZooError(f"{told}: give --data.batch_size {before} until the epoch ends")


class PairsDataModule(LightningDataModule):
    """Pairs for training, validation and test, by the names of their datasets.

    Args:
        train: Dataset to train on, a name of `list_datasets()`.
        val: Dataset whose validation split is scored during training; the training dataset by default.
        test: Datasets that `lightning test` scores and `lightning predict` predicts.
        root: Folder that contains `SPair-71k/`, `PF-PASCAL/`, `PF-WILLOW/`, `Caltech-101/`, `ap-10k/`,
            `CUB_200_2011/`, `VOC2012/`, `SPair-U/`, as far as needed.
        image_size: Side of the square network image in pixels, or [H, W].
        batch_size: Pairs in a step, over all processes together.
        num_workers: Worker processes that read images, for each training process.
        augment: Augmentation of training pairs, a name of `list_augments()`.
        download: Fetch a dataset that is not under root.
        packed: Decode and resize all images of a dataset once, into a file that all processes and later runs map: true
            keeps it in the cache folder, a path in that folder. It has 3 bytes for each pixel of the network images;
            all such files together are limited to 20 GB. False decodes images in every epoch. our choice: true.
        refresh: Parse the annotations again even if they seem unchanged. Needed after a pair annotation of SPair-71k or
            AP-10K was edited in place; other changes are noticed.
        options: Further options of a dataset by its name, such as `{"synthetic": {"length": 2000}}`.
    """

    hparams: Any  # what save_hyperparameters() keeps: the options above, by name

    def __init__(
        self,
        train: str = "spair71k",
        val: str | None = None,
        test: list[str] = ["spair71k"],  # noqa: B006 - never written to; a plain default is what --help shows
        root: str = "data",
        image_size: int | list[int] = 224,
        batch_size: int = 16,
        num_workers: int = 2,
        augment: str = "none",
        download: bool = True,
        packed: bool | str = True,
        refresh: bool = False,
        options: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name in [train, val or train, *test, *(options or {})]:
            DATASETS[name]
        if repeated := {name for name in test if test.count(name) > 1}:
            raise ZooError(f"data.test names {', '.join(sorted(repeated))} more than once")
        create_augment(augment)
        for name, given in (options or {}).items():
            for option in given.keys() & OPTIONS_OF_ALL:
                told = f"data.options: {option!r} of {name} is no option of one dataset"
                raise ZooError(f"{told}: data.root, data.image_size and data.augment hold for all")
        if isinstance(image_size, list) and len(image_size) != 2:
            raise ZooError(f"data.image_size {image_size}: expected one side, or [H, W]")
        if batch_size < 1:
            raise ZooError(f"data.batch_size {batch_size}: expected at least one pair")

    def prepare_data(self) -> None:
        """Fetch the datasets of the coming stage that are not there yet."""
        for name, _ in self._wanted(None):
            if self.hparams.download and name in downloads.SOURCES:
                downloads.download(name, self.hparams.root)

    def setup(self, stage: str) -> None:
        """Read the annotations of the stage, so that invalid data stops the run before it starts."""
        self.datasets = {(name, split): self._create(name, split) for name, split in self._wanted(stage)}
        for dataset in self.datasets.values():
            if self.hparams.packed and dataset.images:  # empty if images are rendered
                dataset.pack(None if self.hparams.packed is True else self.hparams.packed)

    def train_dataloader(self) -> DataLoader[Pair]:
        name, batch_size = self.hparams.train, self.hparams.batch_size
        dataset = self.datasets[name, "trn"]
        if len(dataset) < batch_size:  # Lightning would train on nothing
            told = f"{name} has {len(dataset)} training pairs, fewer than data.batch_size {batch_size}"
            raise ZooError(f"{told}: choose a smaller batch_size")
        processes, rank = self._processes()
        sampler = Shuffled(dataset, processes, rank, seed=int(os.environ.get("PL_GLOBAL_SEED", 0)), drop_last=True)
        loader = TrainLoader(dataset, sampler=sampler, drop_last=True, **self._loader_options())
        loader.trainer = self.trainer
        return loader

    def val_dataloader(self) -> DataLoader[Pair]:
        return self._eval_loader(self.hparams.val or self.hparams.train, "val")

    def test_dataloader(self) -> list[DataLoader[Pair]]:
        if not self.hparams.test:
            raise ZooError("data.test names no dataset: give --data.test [pfwillow], for one")
        return [self._eval_loader(name, "test") for name in self.hparams.test]

    def predict_dataloader(self) -> list[DataLoader[Pair]]:
        return self.test_dataloader()

    def transfer_batch_to_device(self, batch: Pair, device: torch.device, dataloader_idx: int) -> Pair:
        """Move a batch, less the image numbers: the feature cache reads them, and must not wait for the device."""
        moved: Pair = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved._replace(src_id=batch.src_id, trg_id=batch.trg_id)

    def _wanted(self, stage: str | None) -> list[tuple[str, str]]:
        # Lightning does not pass the stage, a string, to prepare_data
        stage = stage or (self.trainer and self.trainer.state.fn) or "fit"
        val = (self.hparams.val or self.hparams.train, "val")
        tests = [(name, "test") for name in self.hparams.test]
        wanted = {"fit": [(self.hparams.train, "trn"), val], "validate": [val], "test": tests, "predict": tests}
        return wanted[stage]

    def _create(self, name: str, split: str) -> PairDataset:
        options = dict((self.hparams.options or {}).get(name, {}))
        if self.hparams.refresh and issubclass(DATASETS[name], FolderDataset):
            options["refresh"] = True
        size = self.hparams.image_size
        return create_dataset(
            name,
            self.hparams.root,
            split,
            size=size if isinstance(size, int) else tuple(size),
            augment=create_augment(self.hparams.augment) if split == "trn" else None,
            **options,
        )

    def _eval_loader(self, name: str, split: str) -> DataLoader[Pair]:
        dataset, (processes, _) = self.datasets[name, split], self._processes()
        return DataLoader(dataset, sampler=interleaved(dataset.order(), processes), **self._loader_options())

    def _processes(self) -> tuple[int, int]:
        """Number of training processes, and the rank of this one."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader_options(self) -> dict[str, Any]:
        batch_size, (processes, _) = self.hparams.batch_size, self._processes()
        if batch_size % processes:
            told = f"data.batch_size {batch_size} is not divisible by the number of processes, {processes}"
            raise ZooError(f"{told}: choose a multiple of {processes}")
        return {
            "batch_size": batch_size // processes,
            "generator": torch.Generator(),  # its own, so that loaders draw nothing from the model's random numbers
            "num_workers": self.hparams.num_workers,
            "worker_init_fn": ignore_stop_signals,
            "persistent_workers": self.hparams.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": PairDataset.collate,
        }


def interleaved(order: list[int], processes: int) -> list[int]:
    """Reorder pairs so that each process gets a contiguous part of `order`. (Neighbours in it share images.)

    Lightning assigns places of the returned order to processes in turn: 0, 1, ..., N - 1, 0, 1, ...
    """
    parts = np.array_split(order, processes)
    return [int(part[k]) for k in range(len(parts[0])) for part in parts if k < len(part)]


def ignore_stop_signals(worker: int) -> None:
    """Keep a worker running when SIGINT or SIGTERM is sent to the whole process group (Ctrl-C, systemd, scancel).

    The main process finishes its step and then ends the workers. So SIGTERM from the main process still ends a worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
