"""Write the README's tables and docs/protocols.md from the registries; --check says if they are true.

python benchmarks/readme_tables.py [--check]
"""

import argparse
import re
import sys
from pathlib import Path

from corrzoo.backbones import describe_backbones
from corrzoo.protocols import get_protocol, list_protocols

ROOT = Path(__file__).resolve().parents[1]

PROTOCOLS = """# Protocols

Written by `python benchmarks/readme_tables.py` from `corrzoo.protocols`. A keypoint is right when its error is at most
(`<=`) or less than (`<`) alpha times a length. `scores` is the image whose points are predicted; the other one's are
given. `averages` are what the authors report, the headline first. A protocol with a flaw is what a project's released
code does: it is there to compare with numbers that were published with it, and is never the default.

"""


def protocols() -> str:
    """Every protocol, what its length is, and what is wrong with it."""
    lines = [PROTOCOLS + "| protocol | scores | length | right when | averages | flaw |", "|---|---|---|---|---|---|"]
    for name in list_protocols():
        p = get_protocol(name)
        lines.append(f"| `{p}` | {p.evaluated} | {p.meaning} | {p.compare} | {', '.join(p.averages)} | {p.flaw} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 when the README is not what would be written")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text()
    table = f"<!-- backbones -->\n{describe_backbones()}\n<!-- /backbones -->"
    text = re.sub("<!-- backbones -->.*<!-- /backbones -->", lambda _: table, text, flags=re.S)
    written = {readme: text, ROOT / "docs" / "protocols.md": protocols()}
    if check:
        stale = [path.name for path, new in written.items() if not path.exists() or path.read_text() != new]
        sys.exit(f"{', '.join(stale)}: not what `python benchmarks/readme_tables.py` writes" if stale else 0)
    for path, new in written.items():
        path.write_text(new)


if __name__ == "__main__":
    main()
