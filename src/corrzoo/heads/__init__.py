"""Matching heads, one a file."""

from typing import Any

from corrzoo.heads.actr import ACTR
from corrzoo.heads.baseline import Baseline
from corrzoo.heads.cats import CATs
from corrzoo.heads.geoaware import GeoAware
from corrzoo.heads.gsf import GSF
from corrzoo.heads.lpmflow import LPMFlow
from corrzoo.heads.mirrorguided import MirrorGuided
from corrzoo.heads.ncnet import NCNet
from corrzoo.heads.transformatcher import TransforMatcher
from corrzoo.heads.vitsc import ViTSC
from corrzoo.matcher import HEADS, Matcher

__all__ = [
    "ACTR", "GSF", "HEADS", "Baseline", "CATs", "GeoAware", "LPMFlow", "MirrorGuided", "NCNet", "TransforMatcher",
    "ViTSC", "create_matcher", "list_heads",
]  # fmt: skip


def list_heads() -> list[str]:
    """Names of the heads for `create_matcher` and `--model`."""
    return HEADS.names()


def create_matcher(head: str, backbone: str = "dinov2_b14", weights: str = "pretrained", **options: Any) -> Matcher:
    """A matching head on a backbone whose weights are loaded.

    Args:
        head: A name of `list_heads()`.
        backbone: A name of `list_backbones()`, or `timm/<name>`.
        weights: `pretrained`, `random`, or the path of a local file.
        **options: Options of the head and of `Matcher`.

    Raises:
        ZooError: if a name or an option is unknown, a value has the wrong type, or the weights cannot be loaded.
    """
    return HEADS.create(head, backbone=backbone, weights=weights, **options).load_weights()
