"""The layers of docs/design.md: a module imports modules of lower layers only, so there are no cycles."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "corrzoo"

LAYERS = [
    {"errors", "precision", "losses", "version"},
    {"files", "types", "geometry", "optimizers"},
    {"tables", "registry", "images", "commands"},
    {"ops", "backbones", "data", "visualize", "leaderboard", "recipes"},
    {"scoring", "inference"},
    {"callbacks"},
    {"matcher"},
    {"heads"},
    {"store", "parser"},
    {"__init__", "apps"},
    {"cli"},
    {"__main__"},
]
"""From bottom to top. Modules of one layer do not import each other."""

LAYER = {area: k for k, areas in enumerate(LAYERS) for area in areas}
FILES = sorted(SRC.rglob("*.py"))


def area_of(path: Path) -> str:
    """Package or module directly under `corrzoo` that contains a file."""
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Areas that a file imports at the top, in functions, or for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            members = [alias.name for alias in node.names]
            inside = node.module == "corrzoo" and all((SRC / m).exists() or (SRC / f"{m}.py").exists() for m in members)
            names = [f"corrzoo.{m}" for m in members] if inside else [node.module or ""]
        for name in names:
            parts = name.split(".")
            if parts[0] == "corrzoo":
                found.add(parts[1] if len(parts) > 1 else "__init__")
    return found - {area_of(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_go_down_the_layers(path):
    area = area_of(path)
    assert area in LAYER, f"{area} is new: give it a layer in docs/design.md and here"
    upward = {other for other in imports_of(path) if LAYER[other] >= LAYER[area]}
    assert not upward, f"{path.relative_to(SRC)} imports {upward}, which no lower layer holds"


def test_every_layer_exists():
    assert {area_of(path) for path in FILES} == LAYER.keys()


def test_a_head_never_imports_another_head():
    common = {"tokens", "levels", "guidance", "update"}
    for path in (SRC / "heads").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if path.stem != "__init__" and isinstance(node, ast.ImportFrom):
                parts = (node.module or "").split(".")
                assert parts[:2] != ["corrzoo", "heads"] or parts[2] in common, f"{path.name} imports {node.module}"


def test_ops_need_torch_only():
    """In a new process, `import corrzoo.ops` imports none of the other dependencies."""
    code = (
        "import sys, corrzoo.ops; "
        "print([m for m in ('lightning', 'timm', 'torchmetrics', 'einops', 'scipy', 'wandb', 'triton', 'matplotlib', "
        "'jsonargparse') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_no_file_is_longer_than_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400
