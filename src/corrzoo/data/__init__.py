"""Annotated image pairs: datasets by name, and what they have in common."""

import inspect
from pathlib import Path
from typing import Any

from corrzoo.data import ap10k, caltech, cub, pfpascal, pfwillow, spair, synthetic, warps  # noqa: F401 - registers them
from corrzoo.data.pairs import DATASETS, Augment, FolderDataset, PairDataset
from corrzoo.geometry import Size
from corrzoo.registry import nearest
from corrzoo.types import ZooError

__all__ = ["Augment", "FolderDataset", "PairDataset", "create_dataset", "list_datasets", "register_dataset"]

register_dataset = DATASETS.register


def create_dataset(name: str, root: str | Path, split: str, size: int | Size = 224, **options: Any) -> PairDataset:
    """A dataset by its name.

    Args:
        name: One of `list_datasets()`.
        root: The folder that holds `SPair-71k/`, `PF-PASCAL/`, `PF-WILLOW/`, `Caltech-101/`, `ap-10k/`,
            `CUB_200_2011/`, as far as needed.
        split: "trn" (or "train"), "val" or "test".
        size: Side of the square network image, or its (H, W).
        options: `augment`, `seed` and `cache_mb` (see `PairDataset`), and the dataset's own.

    Raises:
        ZooError: for an unknown name, split or option, and for missing or wrong files.
    """
    dataset = DATASETS[name]
    known = {
        option.name
        for base in dataset.__mro__
        if "__init__" in vars(base)
        for option in inspect.signature(vars(base)["__init__"]).parameters.values()
        if option.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for option in options.keys() - known:
        hint = nearest(option, known) or f": choose from {', '.join(sorted(known))}"
        raise ZooError(f"dataset {name!r} has no option {option!r}{hint}")
    return dataset(root, split, size, **options)


def list_datasets() -> list[str]:
    """The names that `create_dataset` knows."""
    return DATASETS.names()
