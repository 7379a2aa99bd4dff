"""MATLAB files: scipy writes them, and every damage is an error or a value, never the end of the process."""

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from corrzoo.data.readers.matlab import read_mat
from corrzoo.types import ZooError

POINTS = np.array([[1.5, 2.0, np.nan], [-4.0, 1e300, 6.25]])


def saved(compressed: bool = False, **variables: object) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, variables, do_compression=compressed)
    return file.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", "f8 f4 i1 u1 i2 u2 i4 u4 i8 u8".split())
def test_matrices_of_every_type_are_read(tmp_path: Path, dtype: str, compressed: bool) -> None:
    points = np.arange(14).reshape(2, 7).astype(dtype)
    others = {"a": "text", "s": {"kps": np.eye(2)}, "none": np.zeros((0, 2)), "one": np.array([[3]], dtype=np.uint16)}
    (tmp_path / "a.mat").write_bytes(saved(compressed, **others, kps=points, z=np.eye(9)))
    found = read_mat(tmp_path / "a.mat", "kps")
    assert found.dtype == np.float64 and np.array_equal(found, points)
    assert read_mat(tmp_path / "a.mat", "one").tolist() == [[3]]
    assert read_mat(tmp_path / "a.mat", "none").shape == (0, 2)
    assert np.array_equal(read_mat(tmp_path / "a.mat", "z"), np.eye(9))


def test_a_big_endian_file(tmp_path: Path) -> None:
    """By hand: header, tag, flags, dimensions, a name and two 16-bit numbers in small elements."""
    body = struct.pack(">IIII", 6, 8, 6, 0) + struct.pack(">IIii", 5, 8, 1, 2)
    body += struct.pack(">HH4s", 3, 1, b"kps") + struct.pack(">HHhh", 4, 3, -7, 300)
    (tmp_path / "a.mat").write_bytes(bytes(124) + b"\1\0MI" + struct.pack(">II", 14, len(body)) + body)
    assert read_mat(tmp_path / "a.mat", "kps").tolist() == [[-7, 300]]


@pytest.mark.parametrize("value", ["text", {"a": 1}, 1j, np.array([{}], dtype=object), scipy.sparse.eye(3)])
def test_other_values_are_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "a.mat").write_bytes(saved(kps=value))
    with pytest.raises(ZooError, match=r"a\.mat: 'kps' is not a matrix of real numbers"):
        read_mat(tmp_path / "a.mat", "kps")


def test_a_small_file_does_not_unpack_to_gigabytes(tmp_path: Path) -> None:
    packer = zlib.compressobj()
    packed = packer.compress(struct.pack("<II", 14, 2**30)) + packer.compress(bytes(2**27)) + packer.flush()
    (tmp_path / "a.mat").write_bytes(bytes(124) + b"\0\1IM" + struct.pack("<II", 15, len(packed)) + packed)
    assert len(packed) < 200_000
    with pytest.raises(ZooError, match=r"cannot read the annotation .*a\.mat \(it is cut off\)"):
        read_mat(tmp_path / "a.mat", "kps")


@pytest.mark.parametrize("compressed", [False, True])
def test_every_wrong_byte_is_a_value_or_an_error_in_one_line(tmp_path: Path, compressed: bool) -> None:
    content, path, refused = saved(compressed, kps=POINTS), tmp_path / "a.mat", 0
    damaged = [content[:n] for n in range(len(content))]
    for at in range(len(content)):
        damaged += [content[:at] + bytes([value]) + content[at + 1 :] for value in (0, 1, 15, 0x7F, 0x80, 0xFF)]
    for case in damaged:
        path.write_bytes(case)
        started = time.process_time()
        try:
            assert read_mat(path, "kps").dtype == np.float64
        except ZooError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        assert time.process_time() - started < 1
    assert refused > len(content)
