"""The arrows of docs/design.md: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "corrzoo"

ALLOWED = {
    "errors": set(),
    "files": set(),
    "types": {"errors"},
    "registry": {"types"},
    "geometry": {"types"},
    "ops": {"types", "registry", "geometry"},
    "losses": {"types"},
    "protocols": {"types", "registry", "geometry"},
    "metrics": {"types", "registry", "geometry", "protocols"},
    "backbones": {"types", "registry", "geometry", "files"},
    "feature_cache": {"types"},
    "images": {"types", "geometry"},
    "data": {"types", "registry", "geometry", "images"},
    "visualize": {"types", "geometry"},
    "callbacks": {"__init__", "registry", "protocols", "ops", "types", "visualize", "metrics", "geometry"},
    "resume": {"types"},
    "imagepair": {"types", "geometry"},
    "matcher": {
        *("types", "geometry", "backbones", "protocols", "metrics", "losses", "feature_cache", "callbacks"),
        *("images", "imagepair", "resume"),
    },
    "heads": {"types", "registry", "geometry", "ops", "losses", "backbones", "matcher"},
    "modelcard": {"types", "backbones", "files"},
    "checkpoints": {"types", "registry", "backbones", "heads", "matcher", "modelcard"},
    "apps": {
        *("types", "visualize", "images", "imagepair", "data", "callbacks", "matcher", "heads", "checkpoints"),
        *("errors", "registry"),
    },
    "official": {"types", "registry", "backbones", "heads", "matcher"},
    "leaderboard": {"errors", "files"},
    "commands": {"errors", "cli"},
    "cli": {"types", "commands", "registry", "checkpoints", "data", "heads", "matcher", "resume"},
    "__init__": {"types", "backbones", "heads", "data", "metrics", "matcher", "checkpoints", "official"},
    "__main__": {"commands"},
}


def area_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """The areas of corrzoo that a file imports, wherever in the file it does so; not those for annotations alone."""
    found, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            deeper = [f"corrzoo.{alias.name}" for alias in node.names] if node.module == "corrzoo" else []
            names = deeper or [node.module or ""]
        for name in names:
            parts = name.split(".")
            if parts[0] == "corrzoo":
                found.add(parts[1] if len(parts) > 1 else "__init__")
    return found - {area_of(path)}


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda p: str(p.relative_to(SRC)))
def test_imports_follow_the_arrows(path):
    area = area_of(path)
    assert area in ALLOWED, f"{area} is new: give it its place in docs/design.md and here"
    extra = imports_of(path) - ALLOWED[area]
    assert not extra, f"{path.relative_to(SRC)} imports {extra}, but {area} may import {ALLOWED[area]} only"


def test_a_head_never_imports_another_head():
    own = {"registry", "layers", "levels"}
    for path in (SRC / "heads").glob("*.py"):
        if path.stem in ("__init__", *own):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("corrzoo.heads."):
                assert node.module.split(".")[2] in own, f"{path.name} imports {node.module}"


def test_ops_need_torch_alone():
    """In a fresh process, importing the ops brings in none of the zoo's other dependencies."""
    code = (
        "import sys, corrzoo.ops; "
        "print([m for m in ('lightning', 'timm', 'torchmetrics', 'einops', 'scipy', 'wandb', 'triton', 'matplotlib') "
        "if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_no_file_is_too_long():
    for path in SRC.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 600, f"{path} is longer than 600 lines"
