"""A folder that one run at a time writes into."""

import fcntl
from contextlib import suppress
from pathlib import Path
from typing import IO

from lightning.fabric.utilities.rank_zero import rank_zero_only

from corrzoo.types import ZooError


class FolderLock:
    """A lock on a folder, which the first process of a run holds. The lock of a killed run is free."""

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    @rank_zero_only
    def claim(self, folder: str | Path, refusal: str) -> None:
        """Lock a folder, which is created if it is missing.

        Raises:
            ZooError: with the text `refusal`, if another run holds the lock.
        """
        if self._file:
            return
        path = Path(folder, ".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "w")
        try:
            # not flock: workers inherit its locks, and outlive a killed run
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file = None
            raise ZooError(refusal) from error
        except OSError:
            pass  # a network file system without locks

    def release(self) -> None:
        """Free the folder."""
        if self._file:
            with suppress(OSError):  # a folder that has become unwritable
                Path(self._file.name).unlink()
            self._file.close()
        self._file = None
