"""Matching heads: one paper a file."""

import inspect
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from corrzoo.heads.actr import ACTR
from corrzoo.heads.baseline import Baseline
from corrzoo.heads.gsf import GSF
from corrzoo.heads.lpmflow import LPMFlow
from corrzoo.heads.registry import HEADS, register_head
from corrzoo.heads.vitsc import ViTSC
from corrzoo.matcher import Matcher
from corrzoo.registry import nearest
from corrzoo.types import ZooError

__all__ = [
    "ACTR",
    "GSF",
    "HEADS",
    "Baseline",
    "LPMFlow",
    "ViTSC",
    "create_matcher",
    "list_heads",
    "options_of",
    "register_head",
]


def list_heads() -> list[str]:
    """Names of the heads that `create_matcher` and `--model` take."""
    return HEADS.names()


def create_matcher(head: str, backbone: str = "dinov2_b14", weights: str = "pretrained", **options: Any) -> Matcher:
    """A matching head on a backbone, with the backbone's weights loaded: what `--model <head>` builds.

    Args:
        head: A name of `list_heads()`.
        backbone: A name of `list_backbones()`, or `timm/<name>`.
        weights: `pretrained`, `random`, or the path of a local file.
        **options: The head's own, and those of `Matcher`.

    Raises:
        ZooError: for an unknown head, backbone or option, naming the nearest; for weights that cannot be had.
    """
    known = options_of(head)
    for name in options.keys() - known.names:
        hint = nearest(name, known.names)
        raise ZooError(f"{head} has no option {name!r}{hint} see `lightning fit --model.help {head}`")
    for name, value in options.items():  # the command line checks types; here a typo would choose the last `else`
        if isinstance(value, str) and value not in known.choices.get(name, {value}):
            listed = ", ".join(sorted(known.choices[name]))
            raise ZooError(f"{name} {value!r}{nearest(value, known.choices[name]) or ':'} expected one of {listed}")
    return HEADS[head](backbone=backbone, weights=weights, **options).load_weights()


class Options(NamedTuple):
    """What may be said of a head."""

    names: frozenset[str]
    """Every option: the head's own, and those of Matcher."""
    evaluation_options: frozenset[str]
    """Those that may differ between training and evaluation."""
    choices: dict[str, frozenset[str]]
    """The words that an option takes, where it takes no others."""


def options_of(head: str) -> Options:
    """The options of a head, by its name."""
    cls = HEADS[head]
    makers = [base.__init__ for base in cls.__mro__ if issubclass(base, Matcher)]
    parameters = [p for maker in makers for p in inspect.signature(maker).parameters.values()]
    names = frozenset(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD) - {"self"}
    hints = {name: hint for maker in makers for name, hint in get_type_hints(maker).items()}
    choices = {name: _words(hint) for name, hint in hints.items() if name in names}
    return Options(names, cls.evaluation_options, {name: words for name, words in choices.items() if words})


def _words(hint: Any) -> frozenset[str]:
    """The words of a `Literal`, alone or in a union that takes no other string."""
    kinds = get_args(hint) if get_origin(hint) is not Literal else (hint,)
    words = {word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)}
    return frozenset(word for word in words if isinstance(word, str)) if str not in kinds else frozenset()
