"""Backbones: a registry on timm, the sources of their weights, and the module that reads features from them."""

from typing import Any

import torch

from corrzoo.backbones.backbone import Backbone
from corrzoo.backbones.specs import BACKBONES, BackboneSpec, get_spec, list_backbones, register_backbone
from corrzoo.files import table

__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneSpec",
    "create_backbone",
    "describe_backbones",
    "get_spec",
    "list_backbones",
    "register_backbone",
]


def create_backbone(name: str, weights: str = "pretrained", **options: Any) -> Backbone:
    """Build a backbone and load its weights: `Backbone(name, weights, **options).load()`, whose options these are."""
    return Backbone(name, weights, **options).load()


def describe_backbones() -> str:
    """A Markdown table of the registered backbones, read off the models themselves (built without memory)."""
    titles, rows = ["key", "timm name", "patch", "width", "parameters", "licence", "notes"], []
    for key in list_backbones():
        with torch.device("meta"):
            backbone = Backbone(key, weights="random")
        patch = str(backbone.patch) if backbone.patch > 1 else f"stride {backbone.strides[0]}"
        size, spec = f"{backbone.num_params / 1e6:.1f} M", backbone.spec
        rows.append([f"`{key}`", f"`{spec.timm}`", patch, str(backbone.channels[0]), size, spec.licence, spec.note])
    return table(titles, rows, numbers=(2, 3, 4))
