"""corrzoo: matching heads for semantic correspondence on any backbone, with one evaluation.

Names are imported on first use, so that `import corrzoo.ops` needs torch only.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Pair": "corrzoo.types",
    "Features": "corrzoo.types",
    "Match": "corrzoo.types",
    "Record": "corrzoo.types",
    "ZooError": "corrzoo.types",
    "Matcher": "corrzoo.matcher",
    "open_pair": "corrzoo.inference",
    "match_images": "corrzoo.inference",
    "PCK": "corrzoo.scoring.pck",
    "score": "corrzoo.scoring.pck",
    "create_matcher": "corrzoo.heads",
    "list_heads": "corrzoo.heads",
    "create_backbone": "corrzoo.backbones",
    "list_backbones": "corrzoo.backbones",
    "create_dataset": "corrzoo.data",
    "list_datasets": "corrzoo.data",
    "load": "corrzoo.store.checkpoints",
    "save": "corrzoo.store.checkpoints",
    "load_official": "corrzoo.store.official",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from corrzoo.backbones import create_backbone as create_backbone
    from corrzoo.backbones import list_backbones as list_backbones
    from corrzoo.data import create_dataset as create_dataset
    from corrzoo.data import list_datasets as list_datasets
    from corrzoo.heads import create_matcher as create_matcher
    from corrzoo.heads import list_heads as list_heads
    from corrzoo.matcher import Matcher as Matcher
    from corrzoo.scoring.pck import PCK as PCK
    from corrzoo.scoring.pck import score as score
    from corrzoo.store.official import load_official as load_official
    from corrzoo.types import Features as Features
    from corrzoo.types import Match as Match
    from corrzoo.types import Pair as Pair
    from corrzoo.types import Record as Record
    from corrzoo.types import ZooError as ZooError


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'corrzoo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
