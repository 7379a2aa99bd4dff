"""Datasets of image pairs with keypoints, by name."""

from pathlib import Path
from typing import Any

from corrzoo.data import readers, synthetic  # noqa: F401 - registers the datasets
from corrzoo.data.pairs import DATASETS, Augment, FolderDataset, PairDataset
from corrzoo.geometry import Size

__all__ = ["DATASETS", "Augment", "FolderDataset", "PairDataset", "create_dataset", "list_datasets"]


def create_dataset(name: str, root: str | Path, split: str, size: int | Size = 224, **options: Any) -> PairDataset:
    """A dataset by name.

    Args:
        name: A name of `list_datasets()`.
        root: Folder that contains the datasets' own folders (`SPair-71k/`, `PF-PASCAL/`, ...).
        split: `trn` (or `train`), `val` or `test`.
        size: Side of the square network image, or its (H, W).
        **options: Options of the dataset and its base classes, such as `augment` and `refresh`.

    Raises:
        ZooError: if a name, split or option is unknown, or files are missing or damaged.
    """
    return DATASETS.create(name, root, split, size, **options)


def list_datasets() -> list[str]:
    """Names of the datasets for `create_dataset`."""
    return DATASETS.names()
