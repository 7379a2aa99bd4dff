"""Atomic writing of text, bytes and JSON, file locks, digests, and the cache folder."""

import fcntl
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corrzoo.errors import ZooError


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, which replaces `path` if the block ends without an error."""
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
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a binary file atomically."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    writable(path.parent)
    write_text(path, json.dumps(content, indent=1) + "\n")


def writable(folder: Path) -> Path:
    """Create a folder if it is missing, and return it.

    Raises:
        ZooError: if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ZooError(f"cannot write results into {folder}: {error.strerror}; choose another folder") from error
    return folder


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
