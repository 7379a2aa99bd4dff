"""Matching heads: one paper a file."""

import inspect
from typing import Any, NamedTuple

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
    known = options_of(head).names
    for name in options.keys() - known:
        raise ZooError(f"{head} has no option {name!r}{nearest(name, known)} see `lightning fit --model.help {head}`")
    return HEADS[head](backbone=backbone, weights=weights, **options).load_weights()


class Options(NamedTuple):
    """What may be said of a head."""

    names: frozenset[str]
    """Every option: the head's own, and those of Matcher."""
    evaluation_options: frozenset[str]
    """Those that may differ between training and evaluation."""


def options_of(head: str) -> Options:
    """The options of a head, by its name."""
    cls = HEADS[head]
    signatures = [inspect.signature(base.__init__) for base in cls.__mro__ if issubclass(base, Matcher)]
    names = {p.name for s in signatures for p in s.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD}
    return Options(frozenset(names - {"self"}), cls.evaluation_options)
