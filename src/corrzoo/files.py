"""Files written whole or not at all, and Markdown tables."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it to `path` at the end; after an exception, delete it instead.

    So a reader never sees half a file, and two processes that write `path` at once do not disturb each other.
    """
    partial = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """Format a Markdown table, without a newline at its end.

    Args:
        titles: Column titles.
        rows: Cells of each row. Vertical bars in them are escaped.
        numbers: Indices of the right-aligned columns.
    """
    rule = "|".join("--:" if k in numbers else "---" for k in range(len(titles)))
    cells = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows)
    return "\n".join([f"| {' | '.join(titles)} |", f"|{rule}|", *(f"| {line} |" for line in cells)])
