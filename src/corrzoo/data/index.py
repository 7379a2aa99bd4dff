"""Annotation index: all pairs of a split as arrays, validated once and cached on disk.

The cache is rebuilt when the annotation files change. Starting from it takes 1/98 of the CPU time in which released
code reads SPair-71k's 53,340 files (benchmarks/results/data.csv).
"""

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corrzoo.files import cache_folder, whole_file
from corrzoo.registry import nearest
from corrzoo.types import DIFFICULTIES, Record, ZooError

FORMAT = 6
"""Version of the cache. Increase it when `AnnotationIndex` or the output of a reader changes."""

LARGEST = 1 << 20
"""our choice: upper bound of an image's side in pixels, more than any format's decoder accepts."""

BORDER = 1.0
"""Pixels that a point may lie outside its image, because some annotations count pixels from 1 and others from 0."""


class AnnotationIndex(NamedTuple):
    """The annotations of a split: N pairs of M images, and the points of all pairs in one array."""

    images: NDArray  # (M,) paths relative to the dataset's folder
    sizes: NDArray  # (M, 2) int64 (w, h)
    pairs: NDArray  # (N, 2) int64 numbers of the source and the target image
    category: NDArray  # (N,) int64
    src_points: NDArray  # (P, 2) float64 keypoints, or vertices of outlines
    trg_points: NDArray  # (Q, 2) float64
    starts: NDArray  # (N + 1, 2) int64: pair i has src_points[starts[i, 0] : starts[i + 1, 0]], trg_points likewise
    boxes: NDArray  # (N, 2, 4) float64 of source and target, NaN if there is none
    kps_ids: NDArray  # (P,) int64 of src_points, -1 if unknown; (0,) for outlines
    alike: NDArray  # (P, 2) bool, Record.src_alike and trg_alike; False if unknown; (0, 2) for outlines
    flags: NDArray  # (N, 4) int64, -1 if not annotated
    flip: NDArray  # (N,) bool
    outlines: NDArray  # () bool: whether the points are vertices of outlines

    def record(self, i: int, images: list[Path], categories: list[str]) -> Record:
        """Pair i, without what its reader did not know; `src_alike` and `trg_alike` are then False.

        `images` and `categories` are by number.
        """
        src, trg = self.pairs[i].tolist()
        (src_first, trg_first), (src_last, trg_last) = self.starts[i : i + 2].tolist()
        parts = self.src_points[src_first:src_last], self.trg_points[trg_first:trg_last]
        points = [torch.from_numpy(part.copy()) for part in parts]  # torch.tensor takes several times as long
        outlines = bool(self.outlines)
        src_kps, trg_kps = torch.zeros(2, 0, 2, dtype=torch.float64) if outlines else points
        kps_ids = self.kps_ids[src_first:src_last]
        src_alike, trg_alike = torch.from_numpy(self.alike[src_first:src_last].copy()).unbind(1)
        src_box, trg_box = (None if math.isnan(box[0]) else torch.from_numpy(box.copy()) for box in self.boxes[i])
        return Record(
            src_path=images[src],
            trg_path=images[trg],
            src_kps=src_kps,
            trg_kps=trg_kps,
            src_size=tuple(self.sizes[src].tolist()),
            trg_size=tuple(self.sizes[trg].tolist()),
            category=categories[self.category[i]],
            src_box=src_box,
            trg_box=trg_box,
            flags={name: flag for name, flag in zip(DIFFICULTIES, self.flags[i].tolist(), strict=True) if flag >= 0},
            flip=bool(self.flip[i]),
            src_polygon=points[0] if outlines else None,
            trg_polygon=points[1] if outlines else None,
            kps_ids=torch.from_numpy(kps_ids.copy()) if (kps_ids >= 0).any() else None,
            src_alike=src_alike,
            trg_alike=trg_alike,
        )


def build_index(
    rows: Iterable[tuple[str, Record]], home: Path, categories: list[str], border: float = BORDER
) -> AnnotationIndex:
    """Validate annotated pairs and store them as arrays.

    Args:
        rows: The place of each pair (a file, or a file and a line), for errors, and the pair.
        home: The dataset's folder, which must contain all images.
        categories: Names of the categories by number.
        border: See `BORDER`.

    Raises:
        ZooError: if there are no pairs, an image is missing, or an annotation is invalid; it names the first one.
    """
    records = []
    sizes: dict[Path, tuple[int, int]] = {}
    for place, record in rows:
        _check_images(record, place, home, sizes)
        _check_annotation(record, place, categories, border)
        records.append(record)
    if not records:
        raise ZooError(f"the split has no pairs in {home}: fill its list, or choose another split")
    for path in sizes:
        if not os.path.isfile(path):  # False also for names that no file can have
            raise ZooError(f"no image {path}: restore the file, or remove its pairs from the list")
    number: dict[Path | None, int] = {path: k for k, path in enumerate(sizes)}
    src_points, trg_points = zip(*map(_points, records), strict=True)
    kps_ids = [torch.full((len(r.src_kps),), -1) if r.kps_ids is None else r.kps_ids for r in records]
    no_box = torch.full((4,), torch.nan, dtype=torch.float64)
    boxes = [no_box if box is None else box for r in records for box in (r.src_box, r.trg_box)]
    return AnnotationIndex(
        images=np.array([path.relative_to(home).as_posix() for path in sizes]),
        sizes=np.array([*sizes.values()]),
        pairs=np.array([[number[r.src_path], number[r.trg_path]] for r in records]),
        category=np.array([categories.index(r.category) for r in records]),
        src_points=torch.cat(src_points).numpy(),
        trg_points=torch.cat(trg_points).numpy(),
        starts=np.cumsum([(0, 0), *((len(src), len(trg)) for src, trg in zip(src_points, trg_points, strict=True))], 0),
        boxes=torch.stack(boxes).view(-1, 2, 4).numpy(),
        kps_ids=torch.cat(kps_ids).numpy(),
        alike=torch.cat([_alike(r) for r in records]).numpy(),
        flags=np.array([[r.flags.get(name, -1) for name in DIFFICULTIES] for r in records]),
        flip=np.array([r.flip for r in records]),
        outlines=np.array(records[0].src_polygon is not None),
    )


def _alike(record: Record) -> Tensor:
    """(n, 2) bool: the record's `src_alike` and `trg_alike`, False where unknown."""
    unknown = torch.zeros(len(record.src_kps), dtype=torch.bool)
    return torch.stack([unknown if a is None else a for a in (record.src_alike, record.trg_alike)], dim=1)


def _points(record: Record) -> tuple[Tensor, Tensor]:
    """Source and target keypoints, or vertices of outlines."""
    if record.src_polygon is None or record.trg_polygon is None:
        return record.src_kps, record.trg_kps
    return record.src_polygon, record.trg_polygon


def _check_images(record: Record, place: str, home: Path, sizes: dict[Path, tuple[int, int]]) -> None:
    """Check image paths, and image sizes against those of earlier records, which are added to `sizes`."""
    for path, size in ((record.src_path, record.src_size), (record.trg_path, record.trg_size)):
        assert path  # only synthetic pairs have none
        if path not in sizes:
            if not os.path.normpath(path).startswith(os.path.normpath(home) + os.sep):
                raise ZooError(f"{place}: the image {path} is not in {home}: correct the annotation")
            if not all(isinstance(side, int) and 0 < side <= LARGEST for side in size):
                raise ZooError(f"{place}: {path} has size {size}, not a width and a height: correct the annotation")
            sizes[path] = size
        elif sizes[path] != size:
            raise ZooError(f"{place}: {path} has size {size} here and {sizes[path]} elsewhere: correct the wrong one")


def _check_annotation(record: Record, place: str, categories: list[str], border: float) -> None:
    """Check category, flags, points and boxes."""
    if record.category not in categories:
        raise ZooError(f"{place}: unknown category {record.category!r}{nearest(record.category, categories)}")
    if not all(0 <= flag <= 3 for flag in record.flags.values()):
        raise ZooError(f"{place}: difficulty flags {record.flags}: expected 0 to 3, correct the annotation")
    points, outlines = _points(record), record.src_polygon is not None
    n, m = map(len, points)
    least, fault = (3, "an outline of fewer than 3 points") if outlines else (1, "no keypoints in common")
    if min(n, m) < least:
        raise ZooError(f"{place}: {fault}: remove the pair from the list")
    if n != m and not outlines:
        raise ZooError(f"{place}: {n} source but {m} target keypoints: expected as many of each")
    if record.kps_ids is not None and len(record.kps_ids) != n:
        raise ZooError(f"{place}: {n} keypoints but {len(record.kps_ids)} ids: correct the annotation")
    # Outlines may lie outside the image (some of Caltech-101's do): their protocol clips them.
    margin = math.inf if outlines else border
    sides = (("source", record.src_size, record.src_box), ("target", record.trg_size, record.trg_box))
    for (name, (w, h), box), kps in zip(sides, points, strict=True):
        for x, y in kps.tolist():
            inside = -margin <= x <= w + margin and -margin <= y <= h + margin
            if not (inside and math.isfinite(x) and math.isfinite(y)):
                raise ZooError(f"{place}: {name} point {[x, y]} is not in its {w}x{h} image: correct or remove it")
        if box is not None:
            x1, y1, x2, y2 = box.tolist()
            if not (-border <= x1 < x2 <= w + border and -border <= y1 < y2 <= h + border):
                told = f"{place}: {name} box {[x1, y1, x2, y2]}"
                raise ZooError(f"{told} is not x1, y1, x2, y2 in its {w}x{h} image: correct it")


def cached_index(
    key: str,
    sources: list[Path],
    build: Callable[[], AnnotationIndex],
    pair_folder: Path | None = None,
    refresh: bool = False,
    salt: str = "",
) -> AnnotationIndex:
    """Load the index `<key>.npz` from the cache, or build it if its sources have changed since, or on `refresh`.

    See `files_state` for `sources`, `pair_folder` and `salt`.
    """
    path, state = cache_folder() / f"{key}.npz", files_state(sources, f"{FORMAT}{salt}", pair_folder)
    if not refresh and (cached := _load(path, state)):
        return cached
    index = build()
    _save(path, state, index)
    return index


def files_state(sources: list[Path], salt: str = "", pair_folder: Path | None = None) -> str:
    """Digest of names, sizes and times of files. It changes if one of them is edited, replaced, added or removed.

    It includes the time of the last status change, which cannot be set, unlike that of the modification.

    Args:
        sources: Files, and folders that stand for the files directly in them. Their paths count as they are written.
        salt: Further text to digest.
        pair_folder: A folder among them that counts by its own time, so that an edit of a file in it is not noticed.
            our choice: the states of SPair-71k's 53,340 annotations would take most of the start-up time.

    Raises:
        ZooError: if a source is missing.
    """
    digest = hashlib.blake2b(salt.encode(), digest_size=16)
    for source in sources:
        try:
            folder = source != pair_folder and source.is_dir()
            for path in (f"{source}/{name}" for name in sorted(os.listdir(source))) if folder else [str(source)]:
                found = os.stat(path)
                state = f"{path}/{found.st_size}/{found.st_mtime_ns}/{found.st_ctime_ns}/"
                digest.update(state.encode(errors="surrogateescape"))
        except FileNotFoundError as error:
            raise ZooError(f"no file {error.filename}: restore it, or fetch the dataset again") from None
    return digest.hexdigest()


def _load(path: Path, state: str) -> AnnotationIndex | None:
    try:
        with np.load(path, allow_pickle=False) as data:
            if str(data["state"]) != state:
                return None
            return AnnotationIndex(**{name: data[name] for name in AnnotationIndex._fields})
    except FileNotFoundError:
        return None
    except Exception as error:  # damage makes zipfile and numpy raise nearly anything
        warnings.warn(f"the annotation cache {path} is damaged ({error}) and is rebuilt", stacklevel=2)
        return None


def _save(path: Path, state: str, index: AnnotationIndex) -> None:
    try:
        with whole_file(path) as partial, open(partial, "wb") as file:
            np.savez(file, state=np.array(state), **index._asdict())
    except OSError as error:
        remedy = "set CORRZOO_CACHE to a writable folder, or annotations are parsed at every start"
        warnings.warn(f"cannot cache annotations in {path.parent} ({error}): {remedy}", stacklevel=2)
