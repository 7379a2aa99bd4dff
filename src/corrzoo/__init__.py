"""corrzoo: matching heads for semantic correspondence on any backbone, with one evaluation.

Names are imported on first use, so that `import corrzoo.ops` needs torch only.
"""

import importlib
from typing import TYPE_CHECKING, Any

from corrzoo.version import __version__ as __version__

__all__ = [
    "PCK", "Features", "Match", "Matcher", "Pair", "Record", "ZooError", "create_backbone", "create_dataset",
    "create_matcher", "list_backbones", "list_datasets", "list_heads", "list_protocols", "load", "load_official",
    "match_batch", "match_images", "open_pair", "save", "score",
]  # fmt: skip

_MODULES = {
    "corrzoo.types": "Features Match Pair Record ZooError",
    "corrzoo.matcher": "Matcher",
    "corrzoo.inference": "match_batch match_images open_pair",
    "corrzoo.scoring.pck": "PCK score",
    "corrzoo.scoring.protocols": "list_protocols",
    "corrzoo.heads": "create_matcher list_heads",
    "corrzoo.backbones": "create_backbone list_backbones",
    "corrzoo.data": "create_dataset list_datasets",
    "corrzoo.store.checkpoints": "load save",
    "corrzoo.store.official": "load_official",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

if TYPE_CHECKING:
    from corrzoo.backbones import create_backbone, list_backbones
    from corrzoo.data import create_dataset, list_datasets
    from corrzoo.heads import create_matcher, list_heads
    from corrzoo.inference import match_batch, match_images, open_pair
    from corrzoo.matcher import Matcher
    from corrzoo.scoring.pck import PCK, score
    from corrzoo.scoring.protocols import list_protocols
    from corrzoo.store.checkpoints import load, save
    from corrzoo.store.official import load_official
    from corrzoo.types import Features, Match, Pair, Record, ZooError


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'corrzoo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
