"""The leaderboard: `corrzoo leaderboard` writes it from result files and published numbers, or checks that it is so."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from corrzoo.errors import Parser, ZooError
from corrzoo.leaderboard.render import to_csv, to_html, to_latex, to_markdown
from corrzoo.leaderboard.results import find_results, rank, rank_papers, read_papers, read_results

START, END = "<!-- leaderboard -->\n", "<!-- /leaderboard -->"


def main(args: Sequence[str]) -> None:
    """The command `corrzoo leaderboard`.

    Args:
        args: What follows its name on the command line.

    Raises:
        ZooError: for no results, for results that contradict each other, and for a README without the two markers.
    """
    parser = Parser(prog="corrzoo leaderboard", description="Write the leaderboard, or check it.")
    parser.add_argument("paths", nargs="*", type=Path, help="result files, or folders of them (benchmarks/results)")
    parser.add_argument("--papers", default="benchmarks/papers.csv", help="published numbers; '' for none")
    parser.add_argument("--readme", help="file with the leaderboard's markers (README.md when no paths are given)")
    parser.add_argument("--out", default="docs", type=Path, help="folder for leaderboard.html, .csv and .tex (docs)")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 when a file is not as it would be"
    )
    said = parser.parse_args(args)
    warnings: list[str] = []
    results = read_results(find_results(said.paths or [Path("benchmarks/results")]), warnings.append)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if not results:
        raise ZooError(
            "none of the files is a result file: `lightning test` leaves results/<dataset>.json in a run's folder"
        )
    papers = read_papers(Path(said.papers)) if said.papers else []
    measured = rank(results, papers)
    texts = {
        said.out / "leaderboard.html": to_html([*measured, *rank_papers(papers)]),
        said.out / "leaderboard.csv": to_csv(measured),
        said.out / "leaderboard.tex": to_latex(measured),
    }
    if readme := said.readme or ("" if said.paths else "README.md"):
        texts[Path(readme)] = _filled(Path(readme), to_markdown(measured))
    if said.check:
        stale = [str(path) for path, text in texts.items() if not path.is_file() or path.read_text() != text]
        if stale:
            raise ZooError(f"{', '.join(stale)}: not what the result files say, run `corrzoo leaderboard`")
        sys.exit(1 if warnings else 0)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path)


def _filled(path: Path, table: str) -> str:
    """A text file with the table between its markers."""
    text = path.read_text() if path.is_file() else ""
    if START not in text or END not in text:
        raise ZooError(f"{path} has no lines {START.strip()} and {END} for the leaderboard: add them, or give --readme")
    return re.sub(f"{START}.*?{END}", lambda _: f"{START}{table}{END}", text, flags=re.S)
