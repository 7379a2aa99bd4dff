"""Datasets of annotated image pairs: records in original pixels, samples at network size."""

import hashlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from corrzoo.data.index import BORDER, build_index, cached_index
from corrzoo.data.packed import PackedImages, pack_images
from corrzoo.geometry import Size, mirror_points, resize_points
from corrzoo.images import read_rgb, to_tensor
from corrzoo.registry import Registry
from corrzoo.types import DIFFICULTIES, Pair, Record, ZooError

DATASETS: Registry[type["PairDataset"]] = Registry("dataset")

Augment = Callable[[Pair, torch.Generator], Pair]
"""An augmentation of one sample. All of its randomness comes from the generator."""
Groups = Mapping[str, Sequence[tuple[int, ...]]]
"""Groups of keypoint ids by category."""


OPTIONS_OF_ALL = frozenset({"root", "split", "size", "augment"})
"""Options that all datasets of a command have in common, so that none has its own."""


class PairDataset(Dataset[Pair], ABC):
    """Pairs of images with keypoints. `dataset[i]` is a sample, `dataset.record(i)` its annotation.

    Args:
        root: Folder that contains the datasets' own folders. Rendered datasets do not use it.
        split: "trn" (or "train"), "val" or "test"; not every dataset has all three.
        size: Side of the square network image, or its (H, W). Images are resized to it without keeping their aspect.
        augment: Augmentation of every sample, for training.
        seed: Seed of the augmentation, which also depends on the epoch and the pair, but not on the number of workers.

    Raises:
        ZooError: if the dataset lacks the split, or the size is invalid.
    """

    name: ClassVar[str]
    folder: ClassVar[str] = ""  # the dataset's own folder under root; empty if it has no files
    splits: ClassVar[tuple[str, ...]]
    threshold: ClassVar[str] = "bbox"  # the kind of PCK threshold that is customary for the dataset
    outlines: ClassVar[bool] = False  # records have outlines, which label transfer scores, instead of keypoints
    mirror_pairs: ClassVar[Groups] = {}
    """Pairs of keypoint ids that a horizontal mirror swaps, by category; "*" for all other categories."""
    groups: ClassVar[Groups] = {}
    """Groups of keypoint ids of parts that look alike, such as the four wheels of a bus, by category as above."""
    categories: list[str]
    images: list[Path]  # the image files by number; empty if images are rendered

    def __init__(
        self, root: str | Path, split: str, size: int | Size = 224, *, augment: Augment | None = None, seed: int = 0
    ) -> None:
        self.home = Path(root).expanduser() / self.folder
        self.split = "trn" if split == "train" else split
        if self.split not in self.splits:
            raise ZooError(f"{self.name} has no split {split!r}: choose from {', '.join(self.splits)}")
        self.size: Size = (size, size) if isinstance(size, int) else (size[0], size[1])
        if min(self.size) < 1:
            raise ZooError(f"image size {size!r}: expected one positive side, or (H, W)")
        self.augment, self.seed = augment, seed
        self._packed: PackedImages | None = None
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def _of_split(self, option: str, given: int | dict[str, int] | None, usual: dict[str, int]) -> int:
        """The split's value of an option that is given as one value, or by the names of splits."""
        if given is None:
            given = {}
        values = given if isinstance(given, dict) else {self.split: given}
        if unknown := values.keys() - usual.keys():
            told = f"{self.name} has no split {min(unknown)!r} to give a {option}"
            raise ZooError(f"{told}: choose from {', '.join(usual)}")
        return (usual | values)[self.split]

    def _checked(self, length: int) -> int:
        if length < 1:
            raise ZooError(f"{self.name}: length {length} of split {self.split!r}: expected at least one pair")
        return length

    @property
    def title(self) -> str:
        """Name of the dataset in tables, which tells a partial copy from the whole dataset."""
        return self.name

    def fingerprint(self) -> str:
        """Digest of the images' names and sizes, in any order of pairs. Scores of other digests are not comparable."""
        pairs = []
        for i in range(len(self)):
            r = self.record(i)
            sides = zip((r.src_path, r.trg_path), self.image_numbers(i), strict=True)
            names = [path.parts[-2:] if path else number for path, number in sides]
            pairs.append(str((names, r.src_size, r.trg_size, r.flip)))
        return _digest(sorted(pairs))

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def record(self, i: int) -> Record:
        """The annotation of pair i, in original pixels. Raises IndexError past the last pair."""

    @abstractmethod
    def image_numbers(self, i: int) -> tuple[int, int]:
        """Numbers of pair i's source and target image."""

    @abstractmethod
    def read_image(self, number: int) -> Image.Image:
        """Image `number` in RGB, at its original size."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of augmentation and rendering, also in workers that are already running."""
        self._epoch.fill_(epoch)

    def pack(self, folder: str | Path | None = None) -> None:
        """Read images from a file with all of them decoded, at network size. It is written now if it does not exist.

        Samples do not change, as augmentation follows resizing. The file is in `folder`, by default `images` in the
        cache folder.

        Raises:
            ZooError: if an image cannot be read, the file cannot be written, or images are rendered.
        """
        if not self.images:
            raise ZooError(f"{self.name} renders its images: there are none to pack")
        files = [path.resolve() for path in self.images]  # a root has one packed file, however it is written
        key, into = f"{self.name}-{self.split}-{_digest(files)}", Path(folder) if folder else None
        self._packed = pack_images(key, files, self.size, self._decode, into)

    def order(self) -> list[int]:
        """All pairs, those that share an image close to each other, so that a small feature cache suffices."""
        return list(range(len(self)))

    def __getitem__(self, i: int) -> Pair:
        record, (src, trg) = self.record(i), self.image_numbers(i)
        image = self._decode if self._packed is None else self._packed.__getitem__
        flags = [record.flags.get(name, -1) for name in DIFFICULTIES]
        # One numpy array for many numbers: making a tensor of each takes longer than reading the images.
        numbers = torch.from_numpy(np.array([i, src, trg, self.categories.index(record.category), *flags]))
        index, src_id, trg_id, category = numbers[:4].unbind()
        sizes = torch.from_numpy(np.array([record.src_size, record.trg_size], dtype=np.float32))
        src_size, trg_size = sizes.unbind()  # (w, h) each
        network = self.size[::-1]
        kps_ids, mirror_ids = torch.from_numpy(self._ids(record)).unbind()
        mask = torch.ones(len(record.src_kps), dtype=torch.bool)
        sample = Pair(
            src_img=image(src),
            trg_img=image(trg),
            src_kps=resize_points(record.src_kps, record.src_size, network).float(),
            trg_kps=resize_points(record.trg_kps, record.trg_size, network).float(),
            kps_mask=mask,
            src_size=src_size,
            trg_size=trg_size,
            src_box=torch.full((4,), torch.nan) if record.src_box is None else record.src_box.float(),
            trg_box=torch.full((4,), torch.nan) if record.trg_box is None else record.trg_box.float(),
            index=index,
            src_id=src_id,
            trg_id=trg_id,
            category=category,
            difficulty=numbers[4:],
            kps_ids=kps_ids,
            mirror_ids=mirror_ids,
            src_alike=~mask if record.src_alike is None else record.src_alike,
            trg_alike=~mask if record.trg_alike is None else record.trg_alike,
        )
        if record.flip:  # mirrored images are numbered after the images on disk
            n = len(self.images)
            sample = mirror(sample)._replace(src_id=src_id + n, trg_id=trg_id + n)
        if self.augment is not None:
            state = np.random.SeedSequence([self.seed, int(self._epoch), i]).generate_state(1, np.uint64)
            sample = self.augment(sample, torch.Generator().manual_seed(int(state[0])))
            sample = sample._replace(src_id=torch.tensor(-1), trg_id=torch.tensor(-1))  # no longer the images on disk
        return sample

    def _ids(self, record: Record) -> NDArray:
        """(2, n) int64: `Pair.kps_ids` and `Pair.mirror_ids`."""
        ids = [-1] * len(record.src_kps) if record.kps_ids is None else record.kps_ids.tolist()
        pairs = self.mirror_pairs.get(record.category, self.mirror_pairs.get("*"))
        swap = {a: b for pair in pairs or () for a, b in (pair, pair[::-1])}
        mirrored = [-1] * len(ids) if pairs is None else [swap.get(k, k) for k in ids]
        return np.array([ids, mirrored], dtype=np.int64)

    def _decode(self, number: int) -> Tensor:
        return to_tensor(self.read_image(number), self.size)

    @staticmethod
    def collate(samples: Sequence[Pair]) -> Pair:
        """Stack samples to a batch. Keypoints are padded to the largest number in a sample."""
        padding = {"kps_ids": -1, "mirror_ids": -1}
        padding |= dict.fromkeys(("src_kps", "trg_kps", "kps_mask", "src_alike", "trg_alike"), 0)
        columns = {name: [getattr(sample, name) for sample in samples] for name in Pair._fields}
        padded = {name: pad_sequence(columns.pop(name), True, value) for name, value in padding.items()}
        return Pair(**padded, **{name: torch.stack(column) for name, column in columns.items()})


def mirror(sample: Pair) -> Pair:
    """Mirror both images of a sample or a batch left to right, with their keypoints (x' = W - x), boxes and masks.

    Keypoint k still marks the same part in both images, but under another id: a left eye becomes a right eye.
    """
    mirrored = {"kps_ids": sample.mirror_ids, "mirror_ids": sample.kps_ids}
    for side in ("src", "trg"):
        image, kps, size, box, mask = (getattr(sample, f"{side}_{f}") for f in ("img", "kps", "size", "box", "mask"))
        x1, y1, x2, y2 = box.unbind(-1)
        mirrored[f"{side}_img"], mirrored[f"{side}_mask"] = image.flip(-1), mask.flip(-1)
        mirrored[f"{side}_kps"] = mirror_points(kps, image.shape[-1])
        mirrored[f"{side}_box"] = torch.stack([size[..., 0] - x2, y1, size[..., 0] - x1, y2], dim=-1)
    return sample._replace(**mirrored)


def z_order(x: NDArray, y: NDArray) -> NDArray:
    """Positions on the Z-curve (Morton, 1966): (N,) for coordinates x and y (N,), whole numbers below 2^31."""
    bits = range(int(max(x.max(), y.max())).bit_length())
    return sum((((x >> bit & 1) | (y >> bit & 1) << 1) << 2 * bit for bit in bits), np.zeros_like(x))


def _digest(parts: Iterable[object]) -> str:
    return hashlib.blake2b("|".join(map(str, parts)).encode(errors="surrogateescape"), digest_size=8).hexdigest()


class AnnotatedImage(NamedTuple):
    """Annotation of an image of a dataset whose images all have the same P parts."""

    path: Path
    size: tuple[int, int]  # (w, h)
    parts: Tensor  # (P, 2) float64, original pixels
    visible: Tensor  # (P,) bool
    box: Tensor  # (4,) float64 xyxy


class FolderDataset(PairDataset):
    """A benchmark on disk. Its annotations are parsed once and then loaded from a cache, see `index`.

    Args:
        refresh: Parse the annotations again even if they seem unchanged.

    Raises:
        ZooError: if the folder, a list, an image or an annotation is missing or invalid.
    """

    holds: ClassVar[str]  # contents of the folder, for the error if it is missing
    origin: ClassVar[str] = "fetch the dataset with download=true (--data.download true) where there is a network"
    border: ClassVar[float] = BORDER  # pixels that a keypoint or a box may lie outside its image
    pair_folder: Path | None = None
    """The one of `sources` with a file for each pair, if any. At the start only the folder's own time is checked:
    added, removed and renamed files are noticed, and `refresh` is needed after a file was edited in place."""

    def __init__(
        self, root: str | Path, split: str, size: int | Size = 224, *, refresh: bool = False, **options: Any
    ) -> None:
        super().__init__(root, split, size, **options)
        self.need(self.home)
        # Resolved: a root has one index, however it is written. (`sources` sets `pair_folder`.)
        sources, readers = [path.resolve() for path in self.sources()], self._readers()
        self._index = cached_index(
            f"{self.name}-{self.split}{self.variant()}-{_digest(sources)}",
            [*sources, *(path for path in readers if path)],
            lambda: build_index(self.read(), self.home, self.categories, self.border),
            self.pair_folder and self.pair_folder.resolve(),
            refresh or None in readers,
            str(self.categories),
        )
        self.images = [self.home / image for image in self._index.images.tolist()]

    def _readers(self) -> list[Path | None]:
        """Files of the code outside the zoo that reads the annotations; None for a class in a notebook."""
        classes = (c for c in type(self).__mro__ if issubclass(c, FolderDataset))
        outside = {c.__module__ for c in classes if c.__module__.partition(".")[0] != "corrzoo"}
        files = (getattr(sys.modules.get(name), "__file__", None) for name in sorted(outside))
        return [Path(file) if file and os.path.isfile(file) else None for file in files]

    def variant(self) -> str:
        """Part of the cache's name, for options that choose different pairs from the same files."""
        return ""

    @abstractmethod
    def sources(self) -> list[Path]:
        """The files that `read` reads. A folder stands for the files directly in it."""

    @abstractmethod
    def read(self) -> Iterator[tuple[str, Record]]:
        """All pairs in order, each after its place (a file, or a file and a line) for errors."""

    def need(self, *paths: Path) -> Path:
        """The first of these paths that exists, or a ZooError that says how to get the dataset."""
        for path in paths:
            if path.exists():
                return path
        others = f" (nor {', '.join(os.path.relpath(path, self.home) for path in paths[1:])})" if paths[1:] else ""
        remedy = f"put {self.holds} into {self.home}, or {self.origin}"
        without = "or run without data by adding --config zoo_configs/demo.yaml"
        raise ZooError(f"{self.name}: no {paths[0]}{others}: {remedy}, {without}")

    def pair_of(self, src: AnnotatedImage, trg: AnnotatedImage, category: str, first_part: int = 0) -> Record:
        """The pair of two images, whose keypoints are the parts visible in both. Parts count from `first_part`."""
        src_parts, trg_parts = (side.visible.nonzero()[:, 0] + first_part for side in (src, trg))
        both = src.visible & trg.visible
        kps_ids = both.nonzero()[:, 0] + first_part
        return Record(
            src_path=src.path,
            trg_path=trg.path,
            src_kps=src.parts[both],
            trg_kps=trg.parts[both],
            src_size=src.size,
            trg_size=trg.size,
            category=category,
            src_box=src.box,
            trg_box=trg.box,
            kps_ids=kps_ids,
            src_alike=self.alike(category, kps_ids, src_parts.tolist()),
            trg_alike=self.alike(category, kps_ids, trg_parts.tolist()),
        )

    def alike(self, category: str, kps_ids: Tensor, visible: Collection[int]) -> Tensor:
        """(n,) bool: whether another part that looks like the keypoint's, of `kps_ids` (n,), is among the `visible`."""
        groups = self.groups.get(category, self.groups.get("*", ()))
        others = {part: {*group} - {part} for group in groups for part in group}
        return torch.tensor([not others.get(k, set()).isdisjoint(visible) for k in kps_ids.tolist()], dtype=torch.bool)

    def __len__(self) -> int:
        return len(self._index.pairs)

    def order(self) -> list[int]:
        """All pairs by category, then along a Z-curve over the numbers of source and target image."""
        code = z_order(*self._index.pairs.T)
        return np.lexsort((code, self._index.category)).tolist()

    def record(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(f"pair {i} of {len(self)}")
        return self._index.record(i, self.images, self.categories)

    def image_numbers(self, i: int) -> tuple[int, int]:
        src, trg = self._index.pairs[i].tolist()
        return src, trg

    def read_image(self, number: int) -> Image.Image:
        w, h = self._index.sizes[number].tolist()
        return read_rgb(self.images[number], (w, h))
