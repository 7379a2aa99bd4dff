"""The package as pip installs it, from a wheel, contains its recipes."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "src" / "corrzoo" / "zoo_configs"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel and a source distribution, built from a copy of the sources without a network."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "sources"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src" / "corrzoo", copy / "src" / "corrzoo", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "zoo_configs").symlink_to("src/corrzoo/zoo_configs")
    build = "from setuptools import build_meta as b; print(b.build_wheel('..')); print(b.build_sdist('..'))"
    ran = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


def test_wheel_and_source_distribution_contain_every_recipe(built: tuple[Path, Path]) -> None:
    expected = {f"corrzoo/zoo_configs/{p.relative_to(RECIPES)}" for p in RECIPES.rglob("*") if p.is_file()}
    assert len(expected) > 70 and "corrzoo/zoo_configs/README.md" in expected
    wheel = set(zipfile.ZipFile(built[0]).namelist())
    with tarfile.open(built[1]) as archive:
        source = {name.partition("/src/")[2] for name in archive.getnames()}
    assert expected <= wheel and expected <= source


def test_an_installed_wheel_finds_its_recipes_from_an_empty_folder(built: tuple[Path, Path], tmp_path: Path) -> None:
    zipfile.ZipFile(built[0]).extractall(tmp_path / "site")
    here = tmp_path / "here"
    here.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    for name in ("lpmflow", "zoo_configs/lpmflow.yaml"):
        command = [sys.executable, "-m", "corrzoo", "fit", "--config", name, "--config", "demo", "--print_config"]
        ran = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0 and "class_path: corrzoo.heads.LPMFlow" in ran.stdout, ran.stderr


def test_zoo_configs_at_the_top_links_to_the_package() -> None:
    link = ROOT / "zoo_configs"
    assert link.is_symlink() and os.readlink(link) == "src/corrzoo/zoo_configs" and link.resolve() == RECIPES
