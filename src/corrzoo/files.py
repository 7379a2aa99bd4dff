"""Files: atomic writing, locks, digests, caches, and tables in Markdown. The standard library alone."""

import fcntl
import hashlib
import os
import uuid
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, which it replaces when the block ends without an error.

    So a reader finds the old file or the new one, but no half-written one. The folder is made if it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # several processes may write at once
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Let one process at a time into the block. The lock is a file, whose folder is created if missing.

    The lock ends with the process, also if it is killed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sha256(path: str | Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """The folder of cached annotations and images: $CORRZOO_CACHE, else corrzoo under $XDG_CACHE_HOME or ~/.cache."""
    if given := os.environ.get("CORRZOO_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "corrzoo"


class LRU(Generic[K, V]):
    """A dict of bounded size in bytes; the least recently used items are dropped first.

    Args:
        max_bytes: Upper bound of the sum of the items' sizes.
        size: The size of an item in bytes.
    """

    def __init__(self, max_bytes: int, size: Callable[[V], int]) -> None:
        self.max_bytes, self.size, self.used = max_bytes, size, 0
        self._items: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        """The item of `key`, which counts as used now; None if it is not there."""
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def put(self, key: K, item: V) -> None:
        """Add an item that is not there yet, and drop others until the bound holds."""
        if key not in self._items:
            self._items[key] = item
            self.used += self.size(item)
        self._items.move_to_end(key)
        while self.used > self.max_bytes:
            self.used -= self.size(self._items.popitem(last=False)[1])


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """A table in Markdown, without a final line break.

    Args:
        titles: Titles of the columns.
        rows: Cells, row by row; a bar in a cell is escaped.
        numbers: Columns that are aligned right, counted from 0.
    """
    rule = "|".join("--:" if k in numbers else "---" for k in range(len(titles)))
    cells = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows)
    return "\n".join([f"| {' | '.join(titles)} |", f"|{rule}|", *(f"| {line} |" for line in cells)])
