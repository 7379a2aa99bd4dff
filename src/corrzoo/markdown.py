"""Tables in Markdown: of the leaderboard, the model cards and the pages in docs/."""

from collections.abc import Collection, Iterable, Sequence


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """A table, without a line's end behind it.

    Args:
        titles: Of the columns.
        rows: Their cells; a bar in them is escaped.
        numbers: Which columns, counted from 0, stand to the right.
    """
    rule = "|".join("--:" if k in numbers else "---" for k in range(len(titles)))
    cells = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows)
    return "\n".join([f"| {' | '.join(titles)} |", f"|{rule}|", *(f"| {line} |" for line in cells)])
