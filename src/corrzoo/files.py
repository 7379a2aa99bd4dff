"""Atomic writing, file locks, digests, the cache folder, an LRU cache, and Markdown tables."""

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
    """Write a file atomically: yield a temporary path, which replaces `path` if the block ends without an error.

    A missing folder is created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # a name per writer
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Let one process at a time enter the block. `path` is a lock file, which is released if the process is killed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sha256(path: str | Path) -> str:
    """SHA-256 digest of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Folder of cached annotations and images: $CORRZOO_CACHE, or corrzoo in $XDG_CACHE_HOME or ~/.cache."""
    if given := os.environ.get("CORRZOO_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "corrzoo"


class LRU(Generic[K, V]):
    """Cache of bounded size that drops the least recently used items.

    Args:
        max_bytes: Largest total size in bytes.
        size: Returns the size of an item in bytes.
    """

    def __init__(self, max_bytes: int, size: Callable[[V], int]) -> None:
        self.max_bytes, self.size, self.used = max_bytes, size, 0
        self._items: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        """Return the item of `key` and mark it as used; None if it is not cached."""
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def put(self, key: K, item: V) -> None:
        """Add an item, and drop others until the total size is within the bound."""
        if key not in self._items:
            self._items[key] = item
            self.used += self.size(item)
        self._items.move_to_end(key)
        while self.used > self.max_bytes:
            self.used -= self.size(self._items.popitem(last=False)[1])


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """Write a Markdown table, without a final line break.

    Args:
        titles: Titles of the columns.
        rows: Cells of each row; bars are escaped.
        numbers: Right-aligned columns, counted from 0.
    """
    rule = "|".join("--:" if k in numbers else "---" for k in range(len(titles)))
    cells = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows)
    return "\n".join([f"| {' | '.join(titles)} |", f"|{rule}|", *(f"| {line} |" for line in cells)])
