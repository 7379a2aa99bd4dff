"""Tables as CSV and as Markdown."""

import csv
import io
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from corrzoo.errors import ZooError
from corrzoo.files import writable, write_text


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file, by the titles in its first line.

    Raises:
        ZooError: if the file is missing, is not text, has no row, or lacks one of `columns`.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, restval="", skipinitialspace=True))
    except FileNotFoundError:
        raise ZooError(f"no such file: {path}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ZooError(f"{path} is not a CSV file: {error}") from error
    expected = f"expected a CSV file with a header line and the columns {', '.join(columns)}"
    if not rows:
        raise ZooError(f"{path} has no rows: {expected}")
    if missing := [name for name in columns if name not in rows[0]]:
        raise ZooError(f"{path} has no column {missing[0]!r}: {expected}")
    return rows


def csv_text(rows: Sequence[dict[str, Any]], columns: Sequence[str] = ()) -> str:
    """Rows as CSV text. The columns are `columns`, or the keys of the first row."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns or list(rows[0] if rows else ()), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write a CSV file atomically. Its columns are `columns`, or the keys of the first row."""
    writable(path.parent)
    write_text(path, csv_text(rows, columns))


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """A Markdown table, without a final line break. `numbers` are the right-aligned columns, counted from 0."""
    rule = "|".join("--:" if k in numbers else "---" for k in range(len(titles)))
    cells = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows)
    return "\n".join([f"| {' | '.join(titles)} |", f"|{rule}|", *(f"| {line} |" for line in cells)])
