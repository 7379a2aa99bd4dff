"""Commands, links and files that README.md and the other pages name exist."""

import re
import shlex

import pytest
from fixtures import draw, write_pfwillow

import corrzoo
from corrzoo.cli import main
from corrzoo.commands import COMMANDS
from pages import ROOT, blocks

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README, USAGE = (ROOT / "README.md").read_text(), (ROOT / "docs" / "usage.md").read_text()
LINES = [
    part.strip().removeprefix("srun ")
    for block in (*blocks("README.md", "bash"), *blocks("docs/usage.md", "bash"))
    for line in block.splitlines()
    if not line.startswith("#")
    for part in line.split("&&")
]


def test_the_readme_has_commands_of_all_kinds():
    assert {line.split()[0] for line in LINES} == {"pip", "pytest", "lightning", "corrzoo", "bash"}


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("lightning")])
def test_training_and_test_commands_parse(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as leaving:
        main([*shlex.split(line)[1:], "--print_config"])
    assert not leaving.value.code, line
    assert "class_path: corrzoo.heads." in capsys.readouterr().out


def test_the_python_examples_run(tmp_path, monkeypatch):
    """Those of usage.md with a small model, and that of the README with the same model, saved."""
    monkeypatch.chdir(tmp_path)
    write_pfwillow(tmp_path / "data")
    for name in ("a.jpg", "b.jpg"):
        draw(tmp_path / name, (150, 100))
    names = {}
    for block in blocks("docs/usage.md", "python"):
        exec(block.replace('backbone="dinov2_b14"', 'backbone="timm/test_vit.r160_in1k", weights="random"'), names)
    assert names["points"].shape == names["dataset"].record(0).trg_kps.shape
    assert names["found"].trg_points.shape == (2, 2) and [len(found.trg_points) for found in names["many"]] == [1, 2]
    corrzoo.save(names["matcher"], "saved")
    (block,) = blocks("README.md", "python")
    exec(block.replace("runs/<head>-<backbone>/<run>/checkpoints/best.ckpt", "saved"), {})


@pytest.mark.parametrize("name", re.findall(r"(?:`|^)corrzoo (\w+)", README, re.M))
def test_every_named_command_exists(name):
    assert name in COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_have_a_target(page):
    text = page.read_text()
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page.name}: {target}"
        titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles], anchor


def test_named_configurations_exist():
    for name in set(re.findall(r"zoo_configs/[\w/]+\.yaml", README + USAGE)):
        assert (ROOT / name).is_file(), name
    for head in ("actr", "vitsc", "gsf", "lpmflow", "cats", "transformatcher"):
        assert (ROOT / "zoo_configs" / "demo" / f"{head}.yaml").is_file()
