"""Read pair lists (.csv) and annotations (.json, .mat), and convert their values."""

import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from corrzoo.errors import ZooError, one_line

BROKEN = (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError)
"""Exceptions that a malformed JSON annotation causes."""


def read_list(path: Path, columns: int) -> Iterator[tuple[str, list[str]]]:
    """Read the rows of a pair list. Its first line is a header, which differs between copies and is not used.

    Yields:
        File and line, for errors, and the row's cells, `columns` or more.

    Raises:
        ZooError: if the header is missing, a row has too few columns, or a quotation mark is not closed.
    """
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.reader(file)
        try:
            first_cell = "".join(next(rows, [])[:1]).strip()
            if Path(first_cell).suffix.lower() in Image.registered_extensions():
                raise ZooError(f"{path}: its first line is a pair: add a header line above it")
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if len(row) >= columns:
                    yield where, [cell.strip() for cell in row]
                elif row:
                    raise ZooError(f"{where}: expected {columns} columns or more, found {len(row)}: correct the list")
        except csv.Error as error:
            raise ZooError(f"{path}:{rows.line_num}: {error}: correct the list") from error


@contextmanager
def read_json(path: Path, what: str, remedy: str) -> Iterator[Any]:
    """Read an annotation. What its values cause in the block is an error that says that the file is not `what`."""
    try:
        yield json.loads(path.read_bytes())
    except ZooError:
        raise
    except OSError as error:
        raise ZooError(f"no annotation {path}, named by a pair ({error.strerror}): restore it, or {remedy}") from None
    except BROKEN as error:
        raise ZooError(f"{path}: not {what} ({error!r}): {remedy}") from error


def read_mat(path: Path, key: str) -> NDArray:
    """Read one variable of a .mat file.

    Raises:
        ZooError: if the file is missing or unreadable, or the variable is missing or not a real matrix.
    """
    try:
        with open(path, "rb") as file:
            found = scipy.io.loadmat(file, variable_names=[key])[key]
    except FileNotFoundError:
        raise ZooError(f"no annotation {path}: restore the file, or remove its pairs from the list") from None
    except KeyError:
        raise ZooError(f"{path}: no variable {key!r}: fetch the dataset's own annotation") from None
    except Exception as error:  # a damaged file makes scipy raise nearly anything
        told = f"cannot read the annotation {path} ({one_line(error)})"
        raise ZooError(f"{told}: fetch it again, or save it with -v7") from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "biuf":
        raise ZooError(f"{path}: {key!r} is not a matrix of real numbers: fetch the dataset's own annotation")
    return found


def read_points(points: Iterable, where: str) -> Tensor:
    """Convert annotated points, such as `zip(x, y, strict=True)`, to (n, 2) float64. `where` is for errors.

    Raises:
        ZooError: if they are not n points of two numbers.
    """
    array = _to_array(points, np.float64, "keypoints", where)
    if not array.size:
        array = array.reshape(0, 2)
    if array.ndim != 2 or array.shape[1] != 2:
        raise ZooError(f"{where}: expected keypoints of shape (n, 2), found {array.shape}: correct the annotation")
    return torch.from_numpy(array)


def read_ids(ids: Iterable, where: str) -> Tensor:
    """Convert annotated keypoint ids, numbers or their texts, to (n,) int64. Raises ZooError, as `read_points`."""
    array = _to_array(ids, np.int64, "keypoint ids", where)
    if array.ndim != 1 or (array < 0).any():
        raise ZooError(f"{where}: keypoint ids {ids}: expected a list of 0, 1, 2, ..., correct the annotation")
    return torch.from_numpy(array)


def read_box(box: Iterable, where: str) -> Tensor:
    """Convert an annotated box to (4,) float64. Raises ZooError, as `read_points`."""
    array = _to_array(box, np.float64, "a box x1, y1, x2, y2", where)  # also because unsigned integers would wrap
    if array.shape != (4,) or not np.isfinite(array).all():
        raise ZooError(f"{where}: expected a box x1, y1, x2, y2, found {box}: correct the annotation")
    return torch.from_numpy(array)


def _to_array(values: Iterable, dtype: type, what: str, where: str) -> NDArray:
    try:
        return np.array(list(values), dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise ZooError(f"{where}: expected {what} ({error}): correct the annotation") from error


def category_of(number: str, categories: list[str], where: str) -> str:
    """Name of the category that a list numbers from 1."""
    if not number.isdecimal() or not 1 <= int(number) <= len(categories):
        raise ZooError(f"{where}: unknown category {number!r}: expected a number from 1 to {len(categories)}")
    return categories[int(number) - 1]
