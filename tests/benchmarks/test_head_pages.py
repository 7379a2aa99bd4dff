"""The pages of docs/heads: what they collect is what the files say, and all of it."""

import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest
import yaml

from corrzoo.cli import main
from corrzoo.heads import HEADS, list_heads
from corrzoo.matcher import Matcher

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "heads"
spec = importlib.util.spec_from_file_location("head_pages", ROOT / "benchmarks" / "head_pages.py")
head_pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(head_pages)

TOY = '''"""Toy. Our choice: a module may have some.

This paragraph is the paper's.
"""

SIDE = 3
"""our choice: three."""


class Toy:
    """A toy.

    Args:
        width: Of it. our
            choice: four.
        depth: As the paper has it. What is open says `our choice`.
    """

    def run(self):
        # the paper's
        x = 1
        # our reading: not
        # two
        return x  # our choice: one
'''


def test_every_choice_is_found_with_its_owner(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    assert list(head_pages.choices_in(path)) == [
        ("", "Toy. Our choice: a module may have some."),
        ("SIDE", "our choice: three."),
        ("Toy.width", "Of it. our choice: four."),
        ("Toy.run", "our reading: not two"),
        ("Toy.run", "our choice: one"),
    ]


@pytest.mark.parametrize("head", list_heads())
def test_a_page_has_all_that_its_head_says(head):
    page = (FOLDER / f"{head.lower()}.md").read_text()
    source = Path(inspect.getfile(HEADS[head])).read_text()
    ours = re.findall(r"(?<!`)\bour\s+(?:choice|reading)\b", source, re.I)
    section = page.partition("## Our choice")[2].partition("## Options")[0]
    assert len(re.findall(r"\bour (?:choice|reading)\b", section, re.I)) >= len(ours)
    told = page.partition("## Options")[2].partition("## Recipe")[0]
    for cls in HEADS[head].__mro__[: HEADS[head].__mro__.index(Matcher)]:
        for name in inspect.signature(cls.__init__).parameters.keys() - {"self", "options"}:
            assert f"| `{name}` | `" in told, name
    ablations = page.partition("## Ablations")[2].partition("## Measured")[0].partition("<!-- by hand")[0]
    files = {path.stem for path in (ROOT / "zoo_configs" / "ablation" / head.lower()).glob("*.yaml")}
    assert set(re.findall(r"^\| \[(\w+)\]", ablations, re.M)) == files
    published = page.partition("## Published")[2]
    assert published.strip() == "Nothing." if head == "MirrorGuided" else "| 1 | " in published  # the zoo's own


def test_every_option_of_every_head_has_its_default():
    index = (FOLDER / "README.md").read_text()
    for name, parameter in inspect.signature(Matcher.__init__).parameters.items():
        assert name == "self" or f"| `{name}` | `{head_pages.shown(parameter.default)}` |" in index


VALUES = [
    (head, *row)
    for head in list_heads()
    for row in re.findall(r"^\| (\w+) \| `(--model[^`]*)`", (FOLDER / f"{head.lower()}.md").read_text(), re.M)
]


@pytest.mark.parametrize(("head", "label", "option"), VALUES, ids=[label for _, label, _ in VALUES])
def test_a_value_of_the_table_changes_the_recipe(head, label, option, capsys):
    name, value = shlex.split(option)
    with pytest.raises(SystemExit) as leaving:
        main(["fit", f"--config={head.lower()}", name, value, "--print_config"])
    assert leaving.value.code in (0, None) and label.startswith(f"{head.lower()}_")
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    recipe = yaml.safe_load((ROOT / "zoo_configs" / f"{head.lower()}.yaml").read_text())["model"]["init_args"]
    assert {k: v for k, v in printed.items() if k in recipe and v != recipe[k]} == {
        name.removeprefix("--model."): yaml.safe_load(value)
    }


def test_the_part_by_hand_is_kept(tmp_path):
    page = tmp_path / "page.md"
    assert head_pages.by_hand(page) == ""
    page.write_text("# a\n\n<!-- by hand -->\n| b |\n<!-- /by hand -->\n\nc\n")
    assert head_pages.by_hand(page) == "<!-- by hand -->\n| b |\n<!-- /by hand -->"


def test_links_lead_somewhere():
    for page in FOLDER.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert (FOLDER / target).exists(), f"{page.name}: {target}"
