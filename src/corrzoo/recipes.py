"""Recipes: configurations in the package, found by name from any folder."""

from collections.abc import Iterator, Sequence
from os.path import isfile  # unlike Path.is_file, it takes text that is too long for a path
from pathlib import Path
from typing import Any

import yaml

from corrzoo.errors import ZooError
from corrzoo.registry import nearest

FOLDER = Path(__file__).parent / "zoo_configs"


def find(name: str) -> str:
    """Find the file of `--config <name>`: a file of that name, else a recipe of the package.

    Names of recipes are `lpmflow`, `lpmflow.yaml` or `zoo_configs/data/pfwillow.yaml`. YAML text and URLs are returned
    unchanged.

    Raises:
        ZooError: if there is no such file.
    """
    if isfile(name) or not name or any(sign in name for sign in "{\n:"):
        return name
    prefix = "zoo_configs/" if name.startswith("zoo_configs/") else ""
    suffix = Path(name).suffix
    recipe = FOLDER / f"{name.removeprefix(prefix)}{'' if suffix else '.yaml'}"
    if recipe.is_file():
        return str(recipe)
    here = [str(path) for path in Path(name).parent.glob("*.yaml")] if suffix else []
    ending = ".yaml" if suffix else ""
    names = [f"{prefix}{path.relative_to(FOLDER).with_suffix(ending)}" for path in sorted(FOLDER.rglob("*.yaml"))]
    hint = nearest(name, [*here, *names]) or f": give the path of a file, or a recipe of {FOLDER}"
    raise ZooError(f"--config {name}: no such file here or among corrzoo's recipes{hint}")


def resolve(args: Sequence[str]) -> list[str]:
    """Replace the value of every `--config` by the path of a file.

    Raises:
        ZooError: if a file is missing; if it has options of a head, but no head is named before; or if it changes the
            head, and no `--model` follows.
    """
    resolved: list[str] = []
    head, changed = "", ""
    for option, value in _options(args):
        if option == "--model":
            head, changed = class_name(value), ""
        elif option:
            given, value = value, find(value)
            model = _model_in(value)
            new = class_name(str(model.get("class_path", "") if isinstance(model, dict) else model))
            path = Path(value)
            family = path.parent.name if path.parent.parent.name == "ablation" else ""
            if not (head or new) and (model or family):
                raise _no_head(given, family or "<head>")
            if head and new and new != head:
                changed = f"{given} changes the head from {head} to {new}: leave it out, or end with --model {new}"
            head = new or head
        elif value.startswith("--model.") and not head and not value.startswith("--model.help"):
            raise _no_head(value)
        resolved += [option, value] if option else [value]
    if changed:
        raise ZooError(changed)
    return resolved


def _no_head(given: str, recipe: str = "<head>") -> ZooError:
    remedy = f"put --config zoo_configs/{recipe}.yaml (or --model <head>) before it"
    return ZooError(f"{given} has options of a head, but no head: {remedy}")


def _options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield `--config` and `--model` with their values, and every other word with an empty option."""
    words = iter(args)
    for word in words:
        option, equals, value = word.partition("=")
        if option in ("-c", "--config", "--model") and (equals or (value := next(words, ""))):
            yield "--model" if option == "--model" else "--config", value
        else:
            yield "", word


def _model_in(config: str) -> Any:
    """Entry `model` of a configuration; empty if there is none, or if it is not YAML, which the parser reports."""
    try:
        content = yaml.safe_load(Path(config).read_text() if isfile(config) else config)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return (content.get("model") or {}) if isinstance(content, dict) else {}


def class_name(class_path: str) -> str:
    """The class of a `class_path`, without its module."""
    return class_path.rpartition(".")[2]
