"""Write the tables of README.md and docs/study.md, the study's picture, docs/backbones.md and docs/protocols.md.

--check compares the texts instead.

python benchmarks/readme_tables.py [--check]
"""

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch

import study_tables
from corrzoo.backbones import Backbone, get_spec, list_backbones
from corrzoo.data.download import TERMS
from corrzoo.scoring.protocols import get_protocol, list_protocols
from corrzoo.tables import markdown

ROOT = Path(__file__).resolve().parents[1]

BACKBONES = """# Backbones

Written by `python benchmarks/readme_tables.py` from `corrzoo.backbones`. Licences are those of the weights. Any other
plain ViT or CNN of timm is `timm/<name>`. [extending.md](extending.md) shows how to add a backbone that timm lacks.
Weights are `pretrained`, `random`, or the path of a local file in timm's or the authors' layout.

"""
PROTOCOLS = """# Protocols

Written by `python benchmarks/readme_tables.py` from `corrzoo.scoring.protocols`. A keypoint is correct if its error is
at most (`<=`) or less than (`<`) alpha times a length. `scores` is the image whose points are predicted; points of the
other image are given. `averages` are those that the authors report, the headline first. A protocol with a flaw follows
released code, to compare with numbers that were published with it. It is never the default.

"""
DATA = {
    "SPair-71k and SPair-U, PF-PASCAL, PF-WILLOW": "for research, under their authors' terms",
    "AP-10K, Caltech-101": "cc-by-4.0",
    "CUB-200-2011 (`cub`)": TERMS["cub"],
    "synthetic pairs (`synthetic`)": "apache-2.0, as the code",
}


def backbones() -> str:
    """Table of all registered backbones, which are built on the meta device."""
    rows = []
    for key in list_backbones():
        with torch.device("meta"):
            backbone = Backbone(key, weights="random")
        patch = str(backbone.patch) if backbone.patch > 1 else f"stride {backbone.strides[0]}"
        size, spec = f"{backbone.num_params / 1e6:.1f} M", backbone.spec
        rows.append([f"`{key}`", f"`{spec.timm}`", patch, str(backbone.channels[0]), size, spec.licence, spec.note])
    titles = ["key", "timm name", "patch", "width", "parameters", "licence", "notes"]
    return BACKBONES + markdown(titles, rows, numbers=(2, 3, 4)) + "\n"


def protocols() -> str:
    """Table of all protocols."""
    rows = []
    for name in list_protocols():
        p = get_protocol(name)
        rows.append([f"`{p}`", p.evaluated, p.meaning, p.compare, ", ".join(p.averages), p.flaw])
    return PROTOCOLS + markdown(["protocol", "scores", "length", "correct if", "averages", "flaw"], rows) + "\n"


def licences() -> str:
    """Table of the licences of weights and datasets."""
    weights: dict[str, list[str]] = defaultdict(list)
    for key in list_backbones():
        weights[get_spec(key).licence].append(f"`{key}`")
    rows = [[f"weights of {', '.join(keys)}", licence] for licence, keys in weights.items()]
    return markdown(["what", "licence"], [*rows, *map(list, DATA.items())])


def marked(text: str, tables: dict[str, str]) -> str:
    """Replace the tables between their markers in a text."""
    for name, content in tables.items():
        new = f"<!-- {name} -->\n{content}\n<!-- /{name} -->"
        text = re.sub(f"<!-- {name} -->.*<!-- /{name} -->", lambda _, new=new: new, text, flags=re.S)
    return text


def main() -> None:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a file is out of date")
    check = parser.parse_args().check
    written = {
        ROOT / "README.md": {"licences": licences()} | study_tables.both(),
        ROOT / "docs" / "study.md": study_tables.both() | study_tables.page(),
    }
    docs = {"backbones.md": backbones(), "protocols.md": protocols()}
    texts = {path: marked(path.read_text(), tables) for path, tables in written.items()}
    texts |= {ROOT / "docs" / name: content for name, content in docs.items()}
    if check:
        stale = [path.name for path, new in texts.items() if not path.exists() or path.read_text() != new]
        sys.exit(f"{', '.join(stale)}: out of date, run `python benchmarks/readme_tables.py`" if stale else 0)
    for path, new in texts.items():
        path.write_text(new)
    study_tables.picture().savefig(ROOT / "docs" / "study.png", dpi=100)


if __name__ == "__main__":
    main()
