"""Images decoded and resized once, for every epoch and process: a file of uint8 pixels that all of them map."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor

from corrzoo.data.index import fingerprint
from corrzoo.files import cache_folder, whole_file
from corrzoo.geometry import Size
from corrzoo.types import ZooError

LIMIT = 20 * 2**30
"""our choice: bytes of all packed images in a folder; SPair-71k's at 512 pixels are 1.4 GB. The files that were made
first leave first, and all may be deleted at any time."""
READERS = min(os.cpu_count() or 1, 8)
"""Threads that decode while a file is made."""


class PackedImages:
    """Images by number, read from a file of `pack`. Processes share its pages, which the system may take back.

    Args:
        path: The file.
        count: How many images it holds.
        size: Their (H, W).
    """

    def __init__(self, path: Path, count: int, size: Size) -> None:
        self.path, self.count, self.size = path, count, size
        # np.asarray: a memmap's own indexing takes longer than to copy an image
        self._pixels = np.asarray(np.memmap(path, np.uint8, "r", shape=(count, 3, *size)))

    def __getitem__(self, number: int) -> Tensor:
        """A copy of image `number`, (3, H, W) uint8."""
        return torch.from_numpy(self._pixels[number].copy())

    def __reduce__(self) -> tuple[object, ...]:
        """A worker that is started with a copy of the dataset maps the file, and is not sent the pixels."""
        return PackedImages, (self.path, self.count, self.size)


def pack(key: str, files: list[Path], size: Size, read: Callable[[int], Tensor], folder: Path | None) -> PackedImages:
    """The packed images of these files, which are decoded now unless that has been done since they changed.

    Of several processes that ask at the same time one decodes, and the others wait for it. The file appears whole or
    not at all, and takes the place of the one that was made of an earlier state of the files.

    Args:
        key: What the images are, the beginning of the file's name.
        files: The image files.
        size: (H, W) of the packed images.
        read: Image `number` of the files, (3, H, W) uint8.
        folder: Where the file is; `images` in the folder of the annotation cache when not given.

    Raises:
        ZooError: when an image cannot be read, or the folder cannot be written to or has no room.
    """
    folder = cache_folder() / "images" if folder is None else folder.expanduser()
    H, W = size
    key = f"{key}-{H}x{W}"
    # The version of Pillow belongs to the state: another one may decode or resize a level differently.
    path = folder / f"{key}-{fingerprint(files, PIL.__version__)}.u8"
    need = len(files) * 3 * H * W
    try:
        if not _whole(path, need):
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"{key}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the process ends, however it ends
                if not _whole(path, need):
                    print(
                        f"packing {len(files):,} images at {H}x{W} into {path} ({need / 1e6:.0f} MB), once", flush=True
                    )
                    _make_room(folder, key, need)
                    _write(path, len(files), read)
        return PackedImages(path, len(files), size)
    except OSError as error:
        raise ZooError(
            f"cannot keep {need / 1e6:.0f} MB of packed images in {folder} ({error.strerror}): name another folder "
            "with --data.packed FOLDER, or decode images anew each time with --data.packed false"
        ) from error


def _whole(path: Path, need: int) -> bool:
    return path.exists() and path.stat().st_size == need


def _make_room(folder: Path, key: str, need: int) -> None:
    """Remove what other states of the same files and killed processes left, and the oldest files beyond the limit."""
    for stale in [*folder.glob(f"{key}-*"), *folder.glob(f".{key}-*.part")]:
        stale.unlink(missing_ok=True)
    kept = sorted(folder.glob("*.u8"), key=lambda path: path.stat().st_mtime)
    while kept and sum(path.stat().st_size for path in kept) + need > LIMIT:
        kept.pop(0).unlink(missing_ok=True)
    room = min(LIMIT, shutil.disk_usage(folder).free)
    if need > room:
        raise OSError(errno.ENOSPC, f"{room / 1e6:.0f} MB are free or allowed")


def _write(path: Path, count: int, read: Callable[[int], Tensor]) -> None:
    """By ordinary writes: on a full disk these are an error, where writing to a map kills the process."""
    with whole_file(path) as partial, open(partial, "wb") as file, ThreadPoolExecutor(READERS) as readers:
        for image in readers.map(read, range(count)):
            file.write(image.numpy().data)
        file.flush()
        os.fsync(file.fileno())
