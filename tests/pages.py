"""Code blocks of README.md and the pages of docs/, for the tests that run them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str, language: str) -> list[str]:
    """Code of a page in one language, in the order of the page."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)
