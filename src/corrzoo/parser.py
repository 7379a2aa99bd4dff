"""Parser of the command line: `--plugins`, and one-line errors with a remedy."""

import re
import sys
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from corrzoo.commands import COMMANDS
from corrzoo.errors import ZooError, one_line
from corrzoo.heads import HEADS, list_heads
from corrzoo.registry import import_plugins, nearest

TYPES = {"float": "a number", "int": "a whole number", "bool": "true or false", "NoneType": "null", "str": "text"}
TYPES |= {"list": "a list such as [1, 2]", "dict": "a mapping"}


class Modules:
    """Type of `--plugins`. Modules from YAMLs and from the command line are combined."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}

    def __call__(self, names: str | list[str]) -> str:
        self.names |= dict.fromkeys(import_plugins(names))
        return ", ".join(self.names)

    def __repr__(self) -> str:  # shown by --help
        return "modules"


class ZooParser(LightningArgumentParser):
    """Parser whose errors are one line with the nearest valid name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print a one-line error and exit with status 2. argparse wraps a ZooError in an error of its own."""
        sys.stderr.write(f"error: {_zoo_error(ex) or explain(message, self)}\n")
        sys.exit(2)


def explain(message: str, parser: LightningArgumentParser) -> str:
    """Rewrite a message of argparse or jsonargparse in one line, with the nearest option or head if it is known."""
    heads = list_heads()
    if found := re.search(r"Option '(\S+?)' is not accepted|unrecognized arguments: (--[^\s=]+)", message):
        name = found[1] or found[2]
        options = [*parser.get_defaults().keys(branches=True), *(f"model.{o}" for h in heads for o in HEADS.options(h))]
        known = [option.rpartition(".")[2] for option in options] if found[1] else [f"--{o}" for o in options]
        return f"unknown option {name!r}{nearest(name, known) or '; --help lists the options'}"
    if found := re.search(r"invalid choice: '(\S+)' \(choose from ", message):
        return f"unknown command {found[1]!r}{nearest(found[1], COMMANDS) or '; --help lists them'}"
    if "arguments are required" in message and "model" in message:
        return f"no head given: add --config zoo_configs/<head>.yaml, or --model <head>; heads: {', '.join(heads)}"
    if found := re.search(r"(?:key \"(?:\w+\.)?model\"|--model\.help)(.*)", message, re.DOTALL):
        named = re.search(r"'class_path': '([^']+)'|Given value: (\S+)|string: (\S+)", found[1])
        name = str(next(filter(None, named.groups()))) if named else ""
        others = f": choose one of {', '.join(heads)}, or give --plugins <your module> first"
        return f"unknown head {name!r}{nearest(name, heads) or others}"
    value = r'key "([\w.]+)":\s+(?:Expected a (.*?)\. Got value|.*?Subtypes: \[(.*?)\]\n.*Given value): (.*)'
    if (found := re.search(value, message, re.DOTALL)) and (expected := _in_words(found[2] or found[3])):
        owner = "model." if any(found[1] in HEADS.options(head) for head in heads) else ""
        return f"{owner}{found[1]} {found[4].strip()!r}: expected {expected}"
    return one_line(message)


def message_of(error: Exception) -> str:
    """Message of an error that a user can fix, in one line.

    Raises:
        Exception: the error itself, if it is a bug.
    """
    if cause := _zoo_error(error):
        # The error of a worker process contains its traceback; the last line is the message.
        return str(cause).rsplit("ZooError: ", 1)[-1].strip()
    if isinstance(error, MisconfigurationException):
        return one_line(error)
    if isinstance(error, OSError):  # a read-only folder, a full disk; that of a worker process ends in its message
        last = str(error).strip().rpartition("\n")[2]
        return f"{error.strerror or last}: {error.filename or ''}".rstrip(": ")
    if type(error).__module__.startswith("wandb"):
        remedy = "--trainer.logger.offline true keeps the run on this machine"
        return f"wandb: {one_line(error).rstrip('.')}; {remedy}"
    if re.match(r"DataLoader worker \(pid", str(error)):  # killed; an error in a worker begins with "Caught"
        remedy = "give fewer --data.num_workers, and resume with --ckpt_path last"
        return f"{str(error).splitlines()[0]} The usual reason is too little memory: {remedy}"
    raise error


def _zoo_error(error: BaseException | None) -> ZooError | None:
    """First ZooError in a chain of causes: jsonargparse wraps errors of constructors."""
    while error is not None and not isinstance(error, ZooError):
        error = error.__cause__ or error.__context__
    return error


def _in_words(types: str) -> str:
    """Describe types such as `<class 'int'>` in words; empty if one of them is not in TYPES."""
    found = re.findall(r"<class '([\w.]+)'>|Literal\[(.*?)\]|\b(list|dict)\[", types)
    if any(cls and cls not in TYPES for cls, _, _ in found):
        return ""
    words = [TYPES[cls or kind] if cls or kind else literal.replace("'", "") for cls, literal, kind in found]
    return " or ".join(dict.fromkeys(words))
