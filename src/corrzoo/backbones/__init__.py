"""Backbones: a registry of timm models, their weights, and the module that reads features from them."""

from typing import Any

from corrzoo.backbones.backbone import Backbone
from corrzoo.backbones.specs import BACKBONES, BackboneSpec, get_spec, list_backbones, register_backbone

__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneSpec",
    "create_backbone",
    "get_spec",
    "list_backbones",
    "register_backbone",
]


def create_backbone(name: str, weights: str = "pretrained", **options: Any) -> Backbone:
    """Build a backbone and load its weights; the options are those of `Backbone`."""
    return Backbone(name, weights, **options).load()
