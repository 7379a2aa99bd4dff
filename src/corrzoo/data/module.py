"""PairsDataModule: any dataset of the zoo for training, validation and test."""

import os
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, DistributedSampler

from corrzoo.data import create_dataset
from corrzoo.data import download as downloads
from corrzoo.data.augment import create_augment
from corrzoo.data.pairs import DATASETS, PairDataset
from corrzoo.types import Pair, ZooError


class Shuffled(DistributedSampler[int]):
    """Training pairs in an order that depends on seed and epoch alone: not on who else draws random numbers, and so not
    on the number of workers. Several processes share the batches that one process has.

    Attributes:
        had: How many pairs of the coming epoch a resumed run has had in this process.
    """

    had = 0

    def set_epoch(self, epoch: int) -> None:
        """Also of the pairs, whose augmentation and rendering depend on it."""
        super().set_epoch(epoch)
        self.dataset.set_epoch(epoch)  # type: ignore[attr-defined]  # a PairDataset

    def __iter__(self) -> Iterator[int]:
        had, self.had = self.had, 0
        return islice(super().__iter__(), had, None)


class PairsDataModule(LightningDataModule):
    """Pairs for training, validation and test, by the names of their datasets.

    Args:
        train: Dataset whose training split is learnt from, a name of `list_datasets()`.
        val: Dataset whose validation split is scored while training; the training dataset when not given.
        test: Datasets whose test splits are scored by `lightning test` and matched by `lightning predict`.
        root: Folder that holds `SPair-71k/`, `PF-PASCAL/`, `PF-WILLOW/`, `Caltech-101/`, `ap-10k/`, `CUB_200_2011/`, as
            far as needed.
        image_size: Side of the square network image in pixels, or [H, W].
        batch_size: Pairs in a step, over all processes together.
        num_workers: Processes that read images, for each training process.
        augment: What is done to training pairs, a name of `list_augments()`.
        download: Fetch a dataset that is not under root.
        packed: Decode and resize the images of a dataset once, into a file that all processes map and later runs find;
            true keeps it in the user's cache, a path in that folder, 3 bytes a pixel of each network image and 20 GB in
            all at most. our choice: true, for an epoch decodes them all anyway. False decodes them in each epoch.
        cache_mb: Memory for decoded images, for each reading process, where they are not packed.
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
        cache_mb: int = 256,
        options: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name in [train, val or train, *test]:
            DATASETS[name]
        for name in options or {}:
            DATASETS[name]
        if repeated := {name for name in test if test.count(name) > 1}:
            raise ZooError(f"data.test names {', '.join(sorted(repeated))} more than once")
        create_augment(augment)
        if isinstance(image_size, list) and len(image_size) != 2:
            raise ZooError(f"data.image_size {image_size}: expected one side, or [H, W]")
        if batch_size < 1:
            raise ZooError(f"data.batch_size {batch_size}: expected at least one pair")

    def prepare_data(self) -> None:
        """Fetch the datasets that the coming stage reads and that are not there."""
        for name, _ in self._wanted(None):
            folder = DATASETS[name].folder
            if self.hparams.download and name in downloads.SOURCES and not (Path(self.hparams.root) / folder).exists():
                downloads.download(name, self.hparams.root)

    def setup(self, stage: str) -> None:
        """Read the annotations of what the stage needs: bad data stops the run before it starts."""
        self.datasets = {(name, split): self._create(name, split) for name, split in self._wanted(stage)}
        for dataset in self.datasets.values():
            if self.hparams.packed and dataset.images:  # empty where images are rendered
                dataset.pack(None if self.hparams.packed is True else self.hparams.packed)

    def train_dataloader(self) -> DataLoader:
        loader = self._loader(self.hparams.train, "trn")
        if self.trainer:
            epoch, batches = _place(self.trainer)
            sampler: Any = loader.sampler
            sampler.set_epoch(epoch)
            sampler.had = batches * (loader.batch_size or 1)
            # Lightning cannot see that the sampler goes on where it was.
            warnings.filterwarnings("ignore", ".*ended before the epoch ended and your dataloader is not resumable")
        return loader

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.hparams.val or self.hparams.train, "val")

    def test_dataloader(self) -> list[DataLoader]:
        if not self.hparams.test:
            raise ZooError("data.test names no dataset: give --data.test [pfwillow], for one")
        return [self._loader(name, "test") for name in self.hparams.test]

    def predict_dataloader(self) -> list[DataLoader]:
        return self.test_dataloader()

    def _wanted(self, stage: str | None) -> list[tuple[str, str]]:
        if stage is None:  # prepare_data is not told the stage
            stage = self.trainer.state.fn if self.trainer else "fit"
        val = (self.hparams.val or self.hparams.train, "val")
        return {
            "fit": [(self.hparams.train, "trn"), val],
            "validate": [val],
            "test": [(name, "test") for name in self.hparams.test],
            "predict": [(name, "test") for name in self.hparams.test],
        }[str(getattr(stage, "value", stage))]

    def _create(self, name: str, split: str) -> PairDataset:
        augment = create_augment(self.hparams.augment) if split == "trn" else None
        size = self.hparams.image_size
        return create_dataset(
            name,
            self.hparams.root,
            split,
            size=size if isinstance(size, int) else (size[0], size[1]),
            augment=augment,
            cache_mb=self.hparams.cache_mb,
            **(self.hparams.options or {}).get(name, {}),
        )

    def _loader(self, name: str, split: str) -> DataLoader[Pair]:
        processes, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        if self.hparams.batch_size % processes:
            raise ZooError(
                f"data.batch_size {self.hparams.batch_size} is shared by {processes} processes and does not divide: "
                f"choose a multiple of {processes}"
            )
        dataset = self.datasets[name, split]
        if split == "trn" and len(dataset) < self.hparams.batch_size:  # Lightning would train on nothing
            raise ZooError(
                f"{name} has {len(dataset)} training pairs, fewer than data.batch_size {self.hparams.batch_size}: "
                "choose a smaller one"
            )
        seed, train = int(os.environ.get("PL_GLOBAL_SEED", 0)), split == "trn"
        shuffled = Shuffled(dataset, processes, rank, seed=seed, drop_last=True)
        return DataLoader(
            dataset,
            batch_size=self.hparams.batch_size // processes,
            sampler=shuffled if train else dealt(dataset.order(), processes),
            drop_last=train,
            generator=torch.Generator(),  # its own, for what the model draws must not depend on how often loaders begin
            num_workers=self.hparams.num_workers,
            persistent_workers=self.hparams.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=PairDataset.collate,
        )


def _place(trainer: Trainer) -> tuple[int, int]:
    """The epoch in which training begins or goes on, and how many of its batches are done.

    Lightning says it to loaders too late: workers read ahead as soon as they are there.
    """
    epoch: Any = trainer.fit_loop.epoch_progress.current
    batches = trainer.fit_loop.epoch_loop.batch_progress
    if epoch.ready == epoch.processed:  # not within an epoch
        return epoch.processed, 0
    return (epoch.processed + 1, 0) if batches.is_last_batch else (epoch.processed, batches.current.ready)


def dealt(order: list[int], processes: int) -> list[int]:
    """The order that gives each process a stretch of `order`, when places are dealt to processes one by one.

    Lightning deals so. Neighbours in `order` share images, which should be seen by one process alone.
    """
    stretches = np.array_split(order, processes)
    return [int(part[k]) for k in range(len(stretches[0])) for part in stretches if k < len(part)]
