"""The command `corrzoo leaderboard`: result files and published numbers as a page, a CSV file and Markdown tables."""

import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from corrzoo.errors import Parser, ZooError
from corrzoo.files import whole_file
from corrzoo.leaderboard.papers import PAPERS, rank_papers, read_papers
from corrzoo.leaderboard.render import to_csv, to_html, to_markdown
from corrzoo.leaderboard.results import find_results, rank, read_results

START, END = "<!-- leaderboard -->\n", "<!-- /leaderboard -->"
CHECKOUT, TABLES = Path("benchmarks/results"), "docs/leaderboard.md"
"""Where a checkout of corrzoo keeps its result files and their tables."""


def main(args: Sequence[str]) -> None:
    """Run `corrzoo leaderboard` with these arguments.

    Raises:
        ZooError: if there are no results, results contradict each other, or the file of the tables has no
            markers.
    """
    parser = Parser(prog="corrzoo leaderboard", description="Write the leaderboard of result files and papers.")
    parser.add_argument("paths", nargs="*", type=Path, help="result files or folders (benchmarks/results, else runs)")
    parser.add_argument("--papers", default=PAPERS, help="CSV file of published numbers, '' for none (corrzoo's own)")
    parser.add_argument("--readme", help=f"file with the two markers to write tables into ({TABLES} in a checkout)")
    parser.add_argument("--out", default="docs", type=Path, help="folder for leaderboard.html and .csv (docs)")
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a file is out of date")
    options = parser.parse_args(args)
    in_checkout = not options.paths and CHECKOUT.is_dir()
    paths = options.paths or [CHECKOUT if in_checkout else Path("runs")]
    warnings: list[str] = []
    results = read_results(find_results(paths), warnings.append)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if not results:
        folders = ", ".join(map(str, paths))
        raise ZooError(f"no result files under {folders}: `lightning test` writes results/<dataset>.json for each run")
    papers = read_papers(Path(options.papers)) if options.papers else []
    measured = rank(results, papers)
    texts = {
        options.out / "leaderboard.html": to_html([*measured, *rank_papers(papers)]),
        options.out / "leaderboard.csv": to_csv(measured),
    }
    if readme := options.readme or (TABLES if in_checkout else ""):
        texts[Path(readme)] = _filled(Path(readme), to_markdown(measured))
    if options.check:
        stale = [str(path) for path, text in texts.items() if not path.is_file() or path.read_bytes() != text.encode()]
        if stale:
            raise ZooError(f"{', '.join(stale)}: out of date, run `corrzoo leaderboard`")
        sys.exit(1 if warnings else 0)
    with ExitStack() as stack:  # the files are renamed into place together, after the last one is complete
        for path, text in texts.items():
            stack.enter_context(whole_file(path)).write_bytes(text.encode())
    print(*texts, sep="\n")


def _filled(path: Path, tables: str) -> str:
    """The content of a file with the tables between its markers."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    filled, found = re.subn(f"{START}.*?{END}", lambda _: f"{START}{tables}{END}", text, flags=re.DOTALL)
    if not found:
        raise ZooError(f"{path} has no lines {START.strip()} and {END} for the leaderboard: add them, or give --readme")
    return filled
