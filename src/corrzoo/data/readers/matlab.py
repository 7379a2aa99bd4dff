"""Reader of real matrices in MATLAB annotations (.mat, versions 5 to 7).

Not scipy's: a wrong byte in a file can end the process there (a segmentation fault in scipy 1.17), and a small file can
unpack to gigabytes. Names of the format are those of MathWorks' "MAT-File Format".
"""

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from corrzoo.types import ZooError

MATRIX, COMPRESSED = 14, 15
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
"""Data types of elements, as numpy names them."""
NUMERIC = range(6, 16)
"""Array types: double, single, and the integers."""
COMPLEX = 0x800
LIMIT = 2**24
"""our choice: bytes that a compressed variable may have. An annotation has less than 10 kB."""


def read_mat(path: Path, key: str) -> NDArray:
    """Read a real matrix, float64, from a .mat file.

    Raises:
        ZooError: if the file is missing or unreadable, or the variable is missing or not a real matrix.
    """
    try:
        found = _find(path.read_bytes(), key)
    except FileNotFoundError:
        raise ZooError(f"no annotation {path}: restore the file, or remove its pairs from the list") from None
    except (OSError, ValueError, struct.error, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise ZooError(f"cannot read the annotation {path} ({reason}): fetch it again, or save it with -v7") from error
    if found is None:
        raise ZooError(f"{path}: no variable {key!r}: fetch the dataset's own annotation")
    flags, shape, values = found
    if flags & 0xFF not in NUMERIC or flags & COMPLEX or values is None:
        raise ZooError(f"{path}: {key!r} is not a matrix of real numbers: fetch the dataset's own annotation")
    if math.prod(shape) != len(values) or min(shape, default=-1) < 0:
        raise ZooError(f"{path}: {key!r} has {len(values)} numbers, expected {shape}: fetch the file again")
    return values.reshape(shape, order="F").astype(np.float64)


def _find(content: bytes, key: str) -> tuple[int, list[int], NDArray | None] | None:
    """Array flags, dimensions and numbers of a variable. None for numbers that have no type of NUMBERS."""
    order = {b"\0\1IM": "<", b"\1\0MI": ">"}.get(content[124:128])
    if order is None:
        raise ValueError("its version is not 5 to 7; HDF is version 7.3")
    for kind, data in _elements(content[128:], order):
        if kind == COMPRESSED:
            kind, data = next(_elements(zlib.decompressobj().decompress(data, LIMIT), order), (0, b""))
        parts = _elements(data, order) if kind == MATRIX else iter(())
        flags, shape, name, values = (next(parts, (0, b"")) for _ in range(4))
        if name[1].decode("latin-1") == key:
            numbers = np.frombuffer(values[1], order + NUMBERS[values[0]]) if values[0] in NUMBERS else None
            return struct.unpack_from(f"{order}I", flags[1])[0], np.frombuffer(shape[1], f"{order}i4").tolist(), numbers
    return None


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Data type and content of each element."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        small = kind >> 16  # then this is the size, and the content is in the tag
        if small:
            kind, size = kind & 0xFFFF, small
        start = at + (4 if small else 8)
        if start + size > len(data):
            raise ValueError("it is cut off")
        yield kind, data[start : start + size]
        padding = 0 if kind == COMPRESSED else -size % 8
        at = at + 8 if small else start + size + padding
