"""Packed images: all images of a split in one file, decoded and at network size, mapped by every process."""

import errno
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor

from corrzoo.data.index import files_state
from corrzoo.files import cache_folder, locked, whole_file
from corrzoo.geometry import Size
from corrzoo.types import ZooError

LIMIT = 20 * 2**30
"""our choice: bytes of all packed images in a folder. SPair-71k's at 512 pixels take 1.4 GB. The oldest files are
removed first, and any of them may be deleted at any time."""
READERS = min(os.cpu_count() or 1, 8)
"""Threads that decode images."""
AHEAD = 64
"""our choice: images that are decoded and wait to be written. At 512 pixels they take 50 MB."""


class PackedImages:
    """Images of size (H, W) by number, read from a file of `pack_images`. All processes share the mapped pages."""

    def __init__(self, path: Path, count: int, size: Size) -> None:
        self.path, self.count, self.size = path, count, size
        # np.asarray, because indexing a memmap takes longer than copying an image
        self._pixels = np.asarray(np.memmap(path, np.uint8, "r", shape=(count, 3, *size)))

    def __getitem__(self, number: int) -> Tensor:
        """A copy of image `number`, (3, H, W) uint8."""
        return torch.from_numpy(self._pixels[number].copy())

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the path instead of the pixels: a worker maps the file itself."""
        return PackedImages, (self.path, self.count, self.size)


def pack_images(
    key: str, files: list[Path], size: Size, read: Callable[[int], Tensor], folder: Path | None
) -> PackedImages:
    """Map the packed images of these files, decoded now unless that was done since the files last changed.

    If several processes call this at the same time, one decodes and the others wait.

    Args:
        key: Beginning of the packed file's name. Files of earlier states with this name are removed.
        files: The image files.
        size: (H, W) of the packed images.
        read: Decodes image `number` to (3, H, W) uint8.
        folder: Folder of the packed file; `images` in the cache folder if None.

    Raises:
        ZooError: if an image cannot be read, or the folder is not writable or full.
    """
    folder = cache_folder() / "images" if folder is None else folder.expanduser()
    H, W = size
    key = f"{key}-{H}x{W}"
    # With Pillow's version: another one may decode or resize to slightly different values.
    path = folder / f"{key}-{files_state(files, PIL.__version__)}.u8"
    need = len(files) * 3 * H * W
    try:
        if not _is_complete(path, need):
            with locked(folder / f"{key}.lock"):
                if not _is_complete(path, need):
                    print(f"packing {len(files):,} images at {H}x{W} into {path} ({need / 1e6:.0f} MB)", flush=True)
                    _make_room(folder, key, need)
                    _write(path, len(files), read)
        return PackedImages(path, len(files), size)
    except OSError as error:
        told = f"cannot keep {need / 1e6:.0f} MB of packed images in {folder} ({error.strerror})"
        remedy = "name another folder with --data.packed FOLDER, or decode in every epoch with --data.packed false"
        raise ZooError(f"{told}: {remedy}") from error


def _is_complete(path: Path, need: int) -> bool:
    return path.exists() and path.stat().st_size == need


def _make_room(folder: Path, key: str, need: int) -> None:
    """Remove files of earlier states and of killed processes, and the oldest files beyond the limit."""
    for stale in [*folder.glob(f"{key}-*"), *folder.glob(f".{key}-*")]:
        stale.unlink(missing_ok=True)
    kept = []
    for path in folder.glob("[!.]*.u8"):
        with suppress(FileNotFoundError):  # another process makes room, too
            found = path.stat()
            kept.append((found.st_mtime, found.st_size, path))
    kept.sort()
    while kept and sum(size for _, size, _ in kept) + need > LIMIT:
        _, _, oldest = kept.pop(0)
        oldest.unlink(missing_ok=True)
    room = min(LIMIT, shutil.disk_usage(folder).free)
    if need > room:
        raise OSError(errno.ENOSPC, f"{room / 1e6:.0f} MB are free or allowed")


def _write(path: Path, count: int, read: Callable[[int], Tensor]) -> None:
    """Write the file by ordinary writes. On a full disk they are an error; writing to a map kills the process."""
    with whole_file(path) as partial, open(partial, "wb") as file, ThreadPoolExecutor(READERS) as readers:
        for start in range(0, count, AHEAD):  # `map` decodes all that it is given, however slow the disk
            for image in readers.map(read, range(start, min(start + AHEAD, count))):
                file.write(image.numpy().data)
        file.flush()
        os.fsync(file.fileno())
