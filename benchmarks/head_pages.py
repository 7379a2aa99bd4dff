"""Write docs/heads/, a page for each head, and docs/api.md, from docstrings, configurations and results.

--check compares them instead.

python benchmarks/head_pages.py [--check]
"""

import argparse
import ast
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

import corrzoo
from corrzoo.heads import HEADS, list_heads
from corrzoo.leaderboard.papers import rank_papers, read_papers
from corrzoo.leaderboard.render import to_markdown
from corrzoo.leaderboard.results import find_results, rank, read_results
from corrzoo.leaderboard.rows import Ranking
from corrzoo.matcher import Matcher
from corrzoo.tables import markdown

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "src" / "corrzoo" / "zoo_configs"
PAGES = ROOT / "docs" / "heads"
OURS = re.compile(r"(?<!`)\bour (choice|reading)\b", re.I)
EMPTY = inspect.Parameter.empty


class Entry(NamedTuple):
    """An option in a docstring's Args."""

    name: str
    text: str


def one_line(text: str) -> str:
    return " ".join(text.split())


def split_docstring(text: str | None) -> tuple[list[str], list[Entry]]:
    """A docstring's paragraphs before its sections, and the entries of its Args."""
    prose, *sections = re.split(
        r"^(Args|Returns|Raises|Attributes|Yields):\n", inspect.cleandoc(text or ""), flags=re.M
    )
    args = dict(zip(sections[::2], sections[1::2], strict=True)).get("Args", "")
    entries = [Entry(*map(one_line, m)) for m in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", args, flags=re.M)]
    return [paragraph for paragraph in prose.strip().split("\n\n") if paragraph], entries


def family(head: type[Matcher]) -> list[type[Matcher]]:
    """The head and its base classes up to Matcher."""
    return [cls for cls in head.__mro__ if issubclass(cls, Matcher)]


def options(cls: type[Matcher]) -> str:
    """Options of a class, without those of its bases: name, default and description."""
    told = dict(split_docstring(cls.__doc__)[1])
    parameters = inspect.signature(cls.__init__).parameters.values()
    rows = [(p.name, p.default, told[p.name]) for p in parameters if p.name in told and p.default is not EMPTY]
    return (
        markdown(["option", "default", "what it says"], [[f"`{n}`", f"`{shown(d)}`", text] for n, d, text in rows])
        + "\n"
    )


def shown(value: Any) -> str:
    """A value in YAML."""
    return yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True).split("\n")[0]


def choices(head: type[Matcher]) -> list[str]:
    """Choices of ours that are documented in the files of a head, of its base classes, and of the parts it imports."""
    file, bases = Path(inspect.getfile(head)), family(head)[1:]
    found, source = list(choices_in(file)), file.read_text()
    for base in bases:
        for owner, text in choices_in(Path(inspect.getfile(base))):
            cls, _, member = owner.partition(".")
            overridden = getattr(getattr(head, member, None), "__qualname__", owner) != owner
            unused = member == "keypoint_errors" and "loss" in vars(head) and member not in source
            if cls == base.__name__ and not overridden and not unused:
                found.append((owner, text))
    used = vars(inspect.getmodule(head))
    names = {inspect.getmodule(thing).__name__ for thing in used.values() if callable(thing)}
    for name in sorted(names - {cls.__module__ for cls in (head, *bases)}):
        if name.startswith("corrzoo.heads."):
            parts = choices_in(Path(inspect.getfile(sys.modules[name])))
            found += [(owner, text) for owner, text in parts if owner.split(".")[0] in used]
    return [f"- `{owner}`: {text}" if owner else f"- {text}" for owner, text in found]


def choices_in(path: Path) -> Iterator[tuple[str, str]]:
    """Docstrings and comments of a file that are marked `our choice`: owner, and paragraph or option."""
    text = path.read_text()
    tree, owners = ast.parse(text), {}
    for owner, node in named(tree):
        owners |= dict.fromkeys(range(node.lineno, (node.end_lineno or node.lineno) + 1), owner)
    said: list[tuple[int, str, str]] = []
    for owner, line, docstring in docstrings(tree):
        prose, entries = split_docstring(docstring)
        said += [(line, owner, one_line(paragraph)) for paragraph in prose]
        said += [(line, f"{owner}.{entry.name}", entry.text) for entry in entries]
    said += [(line, owners.get(line, ""), comment) for line, comment in comments(text)]
    for _, owner, what in sorted(said, key=lambda item: item[0]):
        if OURS.search(what):
            yield owner, what


def named(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """All classes and functions by qualified name, outer ones first."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield inside + node.name, node
            yield from named(node, f"{inside}{node.name}.")


def docstrings(tree: ast.Module) -> Iterator[tuple[str, int, str]]:
    """Owner, line and text of every docstring, also of those below constants."""
    for owner, node in [("", tree), *named(tree)]:
        for before, statement in zip([None, *node.body], node.body, strict=False):  # type: ignore[attr-defined]
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                target = ast.unparse(before).partition(" =")[0].partition(":")[0] if before else ""
                yield ".".join(filter(None, [owner, target])), statement.lineno, str(statement.value.value)


def comments(text: str) -> Iterator[tuple[int, str]]:
    """Line and text of every comment; consecutive lines are joined."""
    block: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            block.append((token.start[0], token.string.lstrip("# ")))
        elif token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")
        elif token.type != tokenize.NL and block:
            yield block[0][0], one_line(" ".join(line for _, line in block))
            block = []


def recipes(head: str) -> list[Path]:
    """Configurations of a head; the one with its name comes first."""
    paths = [p for p in sorted(CONFIGS.glob("*.yaml")) if f"class_path: {head}\n" in p.read_text()]
    return sorted(paths, key=lambda path: path.stem != head.lower())


def about(path: Path) -> str:
    """Comment at the top of a configuration."""
    lines = path.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return one_line(" ".join(line.lstrip("#") for line in lines[:end]))


def settings(path: Path) -> str:
    """Values of a configuration, and their sources, which are the comments after them."""
    rows = []
    for line in path.read_text().splitlines():
        if found := re.fullmatch(r" +([\w.]+): ([^#]+?)(?: +# (.*))?", line):
            name, value, source = found.groups(default="")
            rows.append([f"`{name}`", f"`{value}`", source])
    return markdown(["option", "value", "source"], rows) + "\n"


def parameters(head: str) -> str:
    """Number of parameters of each recipe's model, which is built on the meta device."""
    rows = []
    for path in recipes(head):
        said = yaml.safe_load(path.read_text())["model"]["init_args"]
        with torch.device("meta"):
            matcher = HEADS[head](**said)
        own, inside = matcher.count_parameters()
        names = ", ".join(f"`{backbone.spec.key}`" for backbone in matcher.backbones())
        rows.append([link(path), names, f"{own / 1e6:,.2f} M", f"{inside / 1e6:,.1f} M"])
    return markdown(["recipe", "backbone", "head", "backbone"], rows) + "\n"


def link(path: Path) -> str:
    return f"[{path.stem}](../../{path.relative_to(ROOT)})"


def by_hand(page: Path) -> str:
    """The part of a page that is written by hand, and kept: between two comments."""
    found = re.search(r"<!-- by hand -->.*?<!-- /by hand -->", page.read_text() if page.is_file() else "", re.S)
    return found[0] if found else ""


def of_head(rankings: list[Ranking], head: str) -> list[Ranking]:
    """The rankings of one head's rows, with new places."""
    out = []
    for ranking in rankings:
        rows = [row for row in ranking.rows if row.head == head]
        if rows:
            out.append(ranking._replace(rows=[replace(row, place=place) for place, row in enumerate(rows, 1)]))
    return out


def page(head: str, measured: list[Ranking], published: list[Ranking]) -> str:
    """A head's page."""
    cls = HEADS[head]
    module = inspect.getmodule(cls)
    assert module is not None
    source = Path(inspect.getfile(cls)).relative_to(ROOT)
    ablations = [[link(path), about(path)] for path in sorted(CONFIGS.glob(f"ablation/{head.lower()}/*.yaml"))]
    bases = [f"As of [`{base.__name__}`](../../{source_of(base)}):\n\n{options(base)}" for base in family(cls)[1:-1]]
    first, *others = recipes(head)
    hand = by_hand(PAGES / f"{head.lower()}.md")
    parts = [
        f"# {head}",
        HAND if hand else WRITTEN,
        inspect.cleandoc(module.__doc__ or ""),
        f"## What is implemented\n\n[`{source}`](../../{source})",
        *split_docstring(cls.__doc__)[0],
        "## Our choice\n\nChoices that the papers leave open, as the code states them.\n",
        "\n".join(choices(cls)) or "Nothing.",
        f"## Options\n\nAnd [those of every head](README.md#options-of-every-head).\n\n{options(cls)}",
        *bases,
        f"## Recipe: {link(first)}\n\n{about(first)}\n\n{settings(first)}",
        *(f"Another, {link(path)}: {about(path)}" for path in others),
        f"## Parameters\n\n{parameters(head)}",
        *(
            [
                f"## Ablations\n\nEach stacks on the recipe: `--config {first.stem} --config "
                f"ablation/{head.lower()}/<file>`.\n\n{markdown(['file', 'what it is'], ablations)}\n"
            ]
            if ablations
            else []
        ),
        hand,
        "## Measured\n",
        to_markdown(measured) or "Nothing yet.",
        "## Published\n",
        to_markdown(published) or "Nothing.",
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


WRITTEN = "*Written by `python benchmarks/head_pages.py` from docstrings, configurations and result files.*"
HAND = WRITTEN[:-1] + " Sections between the ablations and `Measured` are written by hand.*"


def source_of(cls: type) -> Path:
    return Path(inspect.getfile(cls)).relative_to(ROOT)


def index() -> str:
    """The list of pages, and what every head takes."""
    heads = [[f"[{name}]({name.lower()}.md)", split_docstring(HEADS[name].__doc__)[0][0]] for name in list_heads()]
    return (
        f"# Heads\n\n{WRITTEN}\n\n{markdown(['head', 'what it is'], [[a, one_line(b)] for a, b in heads])}\n\n"
        f"## Options of every head\n\n{options(Matcher)}"
    )


def api() -> str:
    """docs/api.md: every public name with its signature and docstring."""
    parts = [f"# Python API\n\n{WRITTEN}\n"]
    for name in sorted(corrzoo.__all__):
        thing = getattr(corrzoo, name)
        text, *sections = re.split(r"^(Args|Returns|Raises):\n", inspect.cleandoc(thing.__doc__), flags=re.M)
        signature = str(inspect.signature(thing)) if inspect.isfunction(thing) or name == "PCK" else ""
        parts.append(f"## `{name}`\n\n```python\n{name}{plain(signature)}\n```\n\n{text.strip()}\n")
        for title, body in zip(sections[::2], sections[1::2], strict=True):
            rows = re.findall(r"^    ([*\w]+): (.*(?:\n {8}.*)*)", body, flags=re.M)
            listed = markdown([title, ""], [[f"`{a}`", one_line(b)] for a, b in rows])
            parts.append(f"{listed if rows else f'{title}: {one_line(body)}'}\n")
        if isinstance(thing, type) and (rows := members(thing)):
            parts.append(f"{markdown(['member', ''], rows)}\n")
    return "\n".join(parts)


def plain(signature: str) -> str:
    """A signature without the modules of its types."""
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Z])", "", signature)


def members(cls: type) -> list[list[str]]:
    """Documented fields and methods of a class, without those of its bases: name, and first sentence."""
    found, body = [], next(iter(ast.parse(inspect.getsource(cls)).body)).body
    for field, text in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.FunctionDef) and not field.name.startswith("_") and ast.get_docstring(field):
            found.append([f"`{field.name}({', '.join(a.arg for a in field.args.args[1:])})`", ast.get_docstring(field)])
        elif isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found.append([f"`{ast.unparse(field.target)}`", text.value.value])
    return [[name, one_line(text.split("\n\n")[0])] for name, text in found]


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page is out of date")
    check = parser.parse_args().check
    papers = read_papers()
    measured = rank(read_results(find_results([ROOT / "benchmarks" / "results"]), sys.exit), papers)
    published = rank_papers(papers)
    pages = {
        f"{name.lower()}.md": page(name, of_head(measured, name), of_head(published, name)) for name in list_heads()
    }
    stale = []
    for name, text in (pages | {"README.md": index(), "../api.md": api()}).items():
        path = PAGES / name
        if check and (not path.is_file() or path.read_text() != text):
            stale.append(name)
        elif not check:
            PAGES.mkdir(exist_ok=True)
            path.write_text(text)
    sys.exit(f"{', '.join(stale)}: not what `python benchmarks/head_pages.py` writes" if stale else 0)


if __name__ == "__main__":
    main()
