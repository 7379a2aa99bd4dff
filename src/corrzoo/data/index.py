"""Annotations packed into arrays, checked, and kept in a cache that notices when their files change.

A reader yields each pair as a `Record`; `pack` turns them into a `Table` of arrays, which gives single records
back. So SPair-71k's 53,340 annotation files are opened once, and not at every start; whether one has changed since is
asked when its pair is read.
"""

import hashlib
import math
import os
import stat
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

FORMAT = 4
"""To be raised whenever `Table` or what a reader makes of its files changes, so that older caches are made anew."""

LARGEST = 1 << 20
"""our choice: pixels that an image's side may have, more than any format's decoder takes."""

BROKEN = (KeyError, TypeError, ValueError, OverflowError, RecursionError)
"""What comes of reading the wrong thing out of a JSON file."""

BORDER = 1.0
"""Pixels that a point may lie outside its image, because annotations count pixels from 1 as well as from 0."""


class Table(NamedTuple):
    """A split's annotations: N pairs of M images, the points of all pairs one after the other."""

    images: NDArray  # (M,) paths relative to the dataset's folder
    sizes: NDArray  # (M, 2) int64 (w, h)
    pairs: NDArray  # (N, 2) int64 numbers of the source and the target image
    category: NDArray  # (N,) int64
    src_points: NDArray  # (P, 2) float64 keypoints, or vertices of outlines
    trg_points: NDArray  # (Q, 2) float64
    starts: NDArray  # (N + 1, 2) int64: pair i owns src_points[starts[i, 0] : starts[i + 1, 0]], trg_points likewise
    boxes: NDArray  # (N, 2, 4) float64 of source and target, NaN where there is none
    kps_ids: NDArray  # (P,) int64 of src_points, -1 where unknown; (0,) for outlines
    flags: NDArray  # (N, 4) int64, -1 where not annotated
    flip: NDArray  # (N,) bool
    outlines: NDArray  # () bool: whether the points are vertices of outlines
    files: NDArray  # (N,) bytes, the name of each pair's file; (0,) where pairs have none of their own
    states: NDArray  # (N, 2) int64 size and time of modification that these files had before they were parsed

    def changed(self, i: int, pair_files: Path) -> Path | None:
        """Pair i's file, which is in the folder `pair_files`, if it has changed since it was parsed.

        Raises:
            ZooError: when it is gone.
        """
        path = f"{pair_files}/{os.fsdecode(self.files[i])}"
        try:
            found = os.stat(path)
        except OSError as error:
            raise ZooError(f"no annotation {path} ({error.strerror}): restore it, or fetch the dataset again") from None
        return None if [found.st_size, found.st_mtime_ns] == self.states[i].tolist() else Path(path)

    def record(self, i: int, images: list[Path], categories: list[str]) -> Record:
        """Pair i as its reader gave it to `pack`."""
        src, trg = self.pairs[i].tolist()
        (src_first, trg_first), (src_last, trg_last) = self.starts[i : i + 2].tolist()
        parts = self.src_points[src_first:src_last], self.trg_points[trg_first:trg_last]
        points = [torch.from_numpy(part.copy()) for part in parts]  # torch.tensor takes several times as long
        outlines = bool(self.outlines)
        src_kps, trg_kps = torch.zeros(2, 0, 2, dtype=torch.float64) if outlines else points
        kps_ids = self.kps_ids[src_first:src_last]
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
        )


def pack(
    rows: Iterable[tuple[str, Record]],
    home: Path,
    categories: list[str],
    pair_files: Path | None = None,
    border: float = BORDER,
) -> Table:
    """Pack and check annotated pairs.

    Args:
        rows: Where each pair stands (a file, or a file and its line), and the pair.
        home: The dataset's folder, which all image paths lie under.
        categories: Their names in order.
        pair_files: The folder of the files in `rows`, if each pair has one of its own.
        border: Pixels that a point or a box may lie outside its image.

    Raises:
        ZooError: for no pairs at all, an unknown category, a missing image, and whatever `check` refuses.
    """
    states = dict(zip(*_states(pair_files), strict=True)) if pair_files else {}  # before the rows are read
    numbers: dict[Path | None, int] = {}
    sizes: list[tuple[int, int]] = []
    where, pairs, category, src_points, trg_points, kps_ids, boxes, flags, flip = [], [], [], [], [], [], [], [], []
    known = {name: number for number, name in enumerate(categories)}
    no_box, unknown = torch.full((4,), torch.nan, dtype=torch.float64), torch.tensor([-1])
    for place, r in rows:
        if r.category not in known:
            raise ZooError(f"{place}: unknown category {r.category!r}{nearest(r.category, categories)}")
        for path, size in ((r.src_path, r.src_size), (r.trg_path, r.trg_size)):
            number = numbers.setdefault(path, len(sizes))
            if number == len(sizes):
                if path and not os.path.normpath(path).startswith(os.path.normpath(home) + os.sep):
                    raise ZooError(f"{place}: the image {path} is not in {home}: correct the annotation")
                if not all(isinstance(side, int) and 0 < side <= LARGEST for side in size):
                    raise ZooError(f"{place}: {path} has size {size}, not a width and a height: correct the annotation")
                sizes.append(size)
            elif sizes[number] != size:
                raise ZooError(
                    f"{place}: {path} has size {size} here and {sizes[number]} elsewhere: correct the wrong one"
                )
        if not all(0 <= flag <= 3 for flag in r.flags.values()):
            raise ZooError(f"{place}: difficulty flags {r.flags}: expected numbers from 0 to 3, correct the annotation")
        where.append(place)
        pairs.append([numbers[r.src_path], numbers[r.trg_path]])
        category.append(known[r.category])
        src_points.append(r.src_kps if r.src_polygon is None else r.src_polygon)
        trg_points.append(r.trg_kps if r.trg_polygon is None else r.trg_polygon)
        kps_ids.append(unknown.expand(len(r.src_kps)) if r.kps_ids is None else r.kps_ids)
        boxes += [no_box if box is None else box for box in (r.src_box, r.trg_box)]
        flags.append([r.flags.get(name, -1) for name in DIFFICULTIES])
        flip.append(r.flip)
    if not where:
        raise ZooError(f"the split has no pairs in {home}: fill its list, or choose another split")
    images = [path for path in numbers if path is not None]
    for path in images:
        if not os.path.isfile(path):  # also of names that no file can have
            raise ZooError(f"no image {path}: restore the file, or take its pairs off the list")
    names = [os.path.basename(place) for place in where] if pair_files else []
    table = Table(
        images=np.array([path.relative_to(home).as_posix() for path in images]),
        sizes=np.array(sizes),
        pairs=np.array(pairs),
        category=np.array(category),
        src_points=torch.cat(src_points).numpy(),
        trg_points=torch.cat(trg_points).numpy(),
        starts=np.cumsum([(0, 0), *((len(src), len(trg)) for src, trg in zip(src_points, trg_points, strict=True))], 0),
        kps_ids=torch.cat(kps_ids).numpy(),
        boxes=torch.stack(boxes).view(-1, 2, 4).numpy(),
        flags=np.array(flags),
        flip=np.array(flip),
        outlines=np.array(r.src_polygon is not None),
        files=np.array([os.fsencode(name) for name in names]),
        states=np.array([states.get(name, (-1, -1)) for name in names]),
    )
    check(table, where, border)
    for place, points, ids in zip(where, src_points, kps_ids, strict=True):
        if not table.outlines and len(points) != len(ids):
            raise ZooError(f"{place}: {len(points)} keypoints but {len(ids)} ids: each keypoint needs its id")
    return table


def check(table: Table, where: list[str], border: float = BORDER) -> None:
    """Refuse pairs without points, with unequal numbers of keypoints, and with points or boxes outside the image.

    Only outlines may leave the image (some of Caltech-101's do): their protocol clips them.

    Raises:
        ZooError: naming the first such annotation by `where`.
    """
    counts = np.diff(table.starts, axis=0)
    least, lack = (3, "an outline of less than three points") if table.outlines else (1, "no keypoint that both have")
    for i in np.flatnonzero(counts.min(1) < least)[:1]:
        raise ZooError(f"{where[i]}: {lack}: take the pair off the list")
    if not table.outlines:
        for i in np.flatnonzero(counts[:, 0] != counts[:, 1])[:1]:
            raise ZooError(
                f"{where[i]}: {counts[i, 0]} source but {counts[i, 1]} target keypoints: each needs its partner"
            )
    for side, (name, points) in enumerate((("source", table.src_points), ("target", table.trg_points))):
        owner = np.repeat(np.arange(len(where)), counts[:, side])
        limit = table.sizes[table.pairs[:, side]]  # (N, 2)
        bad = ~np.isfinite(points)
        if not table.outlines:
            bad |= (points < -border) | (points > limit[owner] + border)
        for p in np.flatnonzero(bad.any(1))[:1]:
            size = "x".join(map(str, limit[owner[p]]))
            raise ZooError(
                f"{where[owner[p]]}: {name} point {points[p].tolist()} is not in its {size} image: correct or remove it"
            )
        low, high = table.boxes[:, side, :2], table.boxes[:, side, 2:]  # NaN compares false: no box is no bad box
        bad = (low >= high) | (low < -border) | (high > limit + border)
        for i in np.flatnonzero(bad.any(1))[:1]:
            size, box = "x".join(map(str, limit[i])), table.boxes[i, side].tolist()
            raise ZooError(f"{where[i]}: {name} box {box} is not x1, y1, x2, y2 in its {size} image: correct it")


def read_points(points: Iterable, where: str) -> Tensor:
    """(n, 2) float64 points from what an annotation holds: sequences, or `zip(x, y, strict=True)`.

    Raises:
        ZooError: when they are not such points.
    """
    try:
        array = np.array(list(points), dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ZooError(f"{where}: these are no keypoints ({error}): correct the annotation") from error
    if not array.size:
        array = array.reshape(0, 2)
    if array.ndim != 2 or array.shape[1] != 2:
        raise ZooError(f"{where}: expected keypoints of shape (n, 2), found {array.shape}: correct the annotation")
    return torch.from_numpy(array)


def read_ids(ids: Iterable, where: str) -> Tensor:
    """(n,) int64 keypoint ids from numbers or their texts.

    Raises:
        ZooError: if they are not such ids.
    """
    try:
        array = np.array(list(ids), dtype=np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ZooError(f"{where}: these are not keypoint ids ({error}): correct the annotation") from error
    if array.ndim != 1 or (array < 0).any():
        raise ZooError(f"{where}: keypoint ids {ids}: expected a list of 0, 1, 2, ..., correct the annotation")
    return torch.from_numpy(array)


def read_box(box: Iterable, where: str) -> Tensor:
    """(4,) float64 box; unsigned integers become floats before anybody subtracts them."""
    try:
        array = np.array(box, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        array = np.empty(0)
    if array.shape != (4,) or not np.isfinite(array).all():
        raise ZooError(f"{where}: expected a box x1, y1, x2, y2, found {box}: correct the annotation")
    return torch.from_numpy(array)


def cached(key: str, sources: list[Path], make: Callable[[], Table], pair_files: Path | None = None) -> Table:
    """The table that `make` gives, made only when the files it comes from have changed since the last time.

    Args:
        key: File name of the cache, without its ending.
        sources: Files, and folders that stand for the files directly in them. Any change of a name, size or time of
            modification makes the table anew.
        make: Reads the files.
        pair_files: One of these folders, of whose files only the names count: see `Table.changed`.
    """
    path, state = cache_folder() / f"{key}.npz", fingerprint(sources, pair_files=pair_files)
    table = _load(path, state)
    if table is None:
        table = make()
        _save(path, state, table)
    return table


def forget(key: str) -> None:
    """Have `cached` make a table anew the next time."""
    path = cache_folder() / f"{key}.npz"
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"cannot remove the stale {path} ({error}): name another folder in CORRZOO_CACHE", stacklevel=2)


def fingerprint(sources: list[Path], salt: str = "", pair_files: Path | None = None) -> str:
    """Digest of the names, sizes and modification times of files, and of the files directly in folders.

    Of those in the folder `pair_files` only the names: to ask for 53,340 states takes four times as long.

    Raises:
        ZooError: when one of them is gone.
    """
    digest = hashlib.blake2b(f"{FORMAT}{salt}".encode(), digest_size=16)
    for source in sources:
        try:
            names, states = (sorted(os.listdir(source)), []) if source == pair_files else _states(source)
        except FileNotFoundError as error:
            raise ZooError(
                f"no file {error.filename} in {source.parent}: restore it, or fetch the dataset again"
            ) from None
        digest.update("/".join([str(source), *names]).encode(errors="surrogateescape"))
        digest.update(np.array(states, dtype=np.int64).tobytes())
    return digest.hexdigest()


def _states(source: Path) -> tuple[list[str], list[tuple[int, int]]]:
    """Names, and sizes and times of modification, of a file or of the files in a folder.

    Those in a folder are asked relative to it, once opened: for SPair-71k's 53,340 annotations in half the time.
    """
    if not source.is_dir():
        state = source.stat()
        return [], [(state.st_size, state.st_mtime_ns)]
    names, states = [], []
    opened = os.open(source, os.O_RDONLY)
    try:
        for name in sorted(os.listdir(opened)):
            try:
                state = os.stat(name, dir_fd=opened)
            except FileNotFoundError:  # a link to nowhere, such as editors leave, is not a file
                continue
            if stat.S_ISREG(state.st_mode):
                names.append(name)
                states.append((state.st_size, state.st_mtime_ns))
    finally:
        os.close(opened)
    return names, states


def _load(path: Path, state: str) -> Table | None:
    try:
        with np.load(path, allow_pickle=False) as data:
            return Table(**{name: data[name] for name in Table._fields}) if str(data["state"]) == state else None
    except FileNotFoundError:
        return None
    except Exception as error:  # damage makes zipfile and numpy raise nearly anything
        warnings.warn(f"the annotation cache {path} is damaged ({error}) and is made anew", stacklevel=2)
        return None


def _save(path: Path, state: str, table: Table) -> None:
    """Keep the table for the next start."""
    try:
        with whole_file(path) as partial, open(partial, "wb") as file:
            np.savez(file, state=np.array(state), **table._asdict())
    except OSError as error:
        remedy = "name a folder that can be written in CORRZOO_CACHE, or they are read again at every start"
        warnings.warn(f"cannot keep annotations in {path.parent} ({error}): {remedy}", stacklevel=2)
