"""Readers of pair lists (.csv) and MATLAB annotations (.mat)."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.io
from numpy.typing import NDArray

from corrzoo.types import ZooError


def read_list(path: Path, columns: int) -> Iterator[tuple[str, list[str]]]:
    """Read the rows of a pair list. Its first line is a header, which differs between copies and is not used.

    Args:
        path: The .csv file.
        columns: Least number of columns of a row.

    Yields:
        File and line, for errors, and the row's cells.

    Raises:
        ZooError: if the header is missing, a row has too few columns, or a quotation mark is not closed.
    """
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.reader(file)
        try:
            if "".join(next(rows, [])[:1]).strip().endswith((".jpg", ".png")):
                raise ZooError(f"{path}: its first line is a pair: add a header line above it")
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if len(row) >= columns:
                    yield where, [cell.strip() for cell in row]
                elif row:
                    raise ZooError(f"{where}: expected {columns} columns or more, found {len(row)}: correct the list")
        except csv.Error as error:
            raise ZooError(f"{path}:{rows.line_num}: {error}: correct the list") from error


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
        reason = " ".join(str(error).split())
        raise ZooError(f"cannot read the annotation {path} ({reason}): fetch it again, or save it with -v7") from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "biuf":
        raise ZooError(f"{path}: {key!r} is not a matrix of real numbers: fetch the dataset's own annotation")
    return found


def category_of(number: str, categories: list[str], where: str) -> str:
    """Name of the category that a list numbers from 1."""
    if not number.isdecimal() or not 1 <= int(number) <= len(categories):
        raise ZooError(f"{where}: unknown category {number!r}: expected a number from 1 to {len(categories)}")
    return categories[int(number) - 1]
