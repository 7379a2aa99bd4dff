"""Save and load trained matchers. Only tensors and plain values are read, never pickled code."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import errors, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from corrzoo.backbones.weights import read_state
from corrzoo.files import whole_file, write_text
from corrzoo.heads import HEADS
from corrzoo.matcher import Matcher
from corrzoo.registry import nearest
from corrzoo.store.card import model_card
from corrzoo.types import ZooError

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
HUB = "hf://"
RENAMED = {"resize": "backbone_size", "query": "point_query"}
"""Options of version 0.1.0 and their new names."""
DROPPED = frozenset({"sha256", "geo_weight"})
"""Options of version 0.1.0 that were removed and do not change predictions of a loaded model."""
REMOVED = {"GSF": {"network": "unet", "soft_argmax": "kept"}}
"""By head, options of version 0.1.0 that were removed, and the only value that can still be loaded."""
IMPLIED = {"GSF": {"start": "guidance"}}
"""By head, options that version 0.1.0 lacked, and the value that reproduces its predictions."""


def save(matcher: Matcher, folder: str | Path, results: Sequence[str | Path | dict[str, Any]] = ()) -> Path:
    """Save a matcher as `model.safetensors`, `config.json` and a model card, `README.md`.

    Args:
        matcher: The model.
        folder: Output folder. `hf upload user/model <folder>` shares it.
        results: Result files of `corrzoo test` for this model. Their scores go into the card.

    Returns:
        The folder, for `load`.

    Raises:
        ZooError: if the folder cannot be written, or a result cannot be read or is of another model.
    """
    folder = Path(folder)
    options = {name: value for name, value in dict(matcher.hparams).items() if not name.startswith("_")}
    config: dict[str, Any] = {"head": type(matcher).__name__, "module": type(matcher).__module__, "options": options}
    config |= {"image_size": matcher.image_size, "trained": matcher.trained}
    card = model_card(matcher, config, results)
    try:
        with whole_file(folder / WEIGHTS) as partial:
            save_file({name: value.contiguous() for name, value in matcher.state_dict().items()}, partial)
        write_text(folder / CONFIG, json.dumps(config, indent=1) + "\n")
        write_text(folder / CARD, card)
    except OSError as error:
        raise ZooError(f"cannot save to {folder}: {error.strerror}") from error
    return folder


def load(path: str | Path) -> Matcher:
    """Load a matcher in evaluation mode.

    Args:
        path: A checkpoint of `corrzoo fit`, a folder of `save`, or a folder on the Hugging Face hub as
            `hf://user/model` or `hf://user/model@revision`. The hub's cache is used when offline.

    Raises:
        ZooError: if the file is missing, damaged, contains pickled objects, or is not a corrzoo checkpoint.
    """
    path = _fetch(path) if str(path).startswith(HUB) else Path(path)
    content = _read(path)
    head, options, weights = content["head"], content["hyper_parameters"], content.get("state_dict", {})
    known = HEADS.options(head)
    for name in options.keys() - set(known):
        hint = nearest(name, known) or ": another version of corrzoo wrote it"
        raise ZooError(f"{path} has an unknown option {name!r} of {head}{hint}")
    try:
        matcher = HEADS[head](**options)
        matcher.trained = content.get("trained")
        size = content.get("image_size") or (matcher.trained or {}).get("size") or matcher.image_size
        matcher.image_size = size if isinstance(size, int) else (int(size[0]), int(size[1]))
        matcher.load_state_dict(weights)
    except Exception as error:  # options and weights of a stranger's file can be anything
        reason = " ".join(str(error).split())[:300]
        raise ZooError(f"{path}: its options or weights do not fit {head}: {reason}") from error
    return matcher.eval()


class Stored(NamedTuple):
    """A checkpoint without its weights."""

    head: str
    options: dict[str, Any]
    """Options of the model."""
    epochs: int
    """Completed training epochs."""
    steps: int
    """Completed optimiser steps."""


def read_checkpoint(path: Path) -> Stored:
    """Read the options and the progress of a checkpoint of `corrzoo fit`.

    Raises:
        ZooError: as in `load`, and if the path is a folder.
    """
    if path.is_dir() or str(path).startswith("hf:"):
        raise ZooError(f"{path} is for corrzoo.load() and `corrzoo match`: give --ckpt_path a .ckpt of `corrzoo fit`")
    content = _read(path)
    progress = content.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("current", {})
    steps = int(content.get("global_step", 0))
    return Stored(content["head"], content["hyper_parameters"], int(progress.get("processed", 0)), steps)


def newest_checkpoint(folder: Path, name: str, head: str, backbone: str | None = None) -> Path:
    """Find the newest checkpoint of a model.

    Args:
        folder: Folder of runs, searched recursively.
        name: `best.ckpt` or `last.ckpt`.
        head: Name of the head.
        backbone: Name of the backbone; None for any.

    Raises:
        ZooError: if there is none, or a newer file is damaged.
    """
    others = []
    for path in sorted(folder.rglob(name), key=lambda path: path.stat().st_mtime, reverse=True):
        content = read_state(path)
        other = content.get("head"), content.get("hyper_parameters", {}).get("backbone")
        if other[0] == head and backbone in (None, other[1]):
            return path
        others.append(f"{other[0]} on {other[1]}")
    wanted = f"{head} on {backbone}" if backbone else head
    listed = f" (only of {', '.join(dict.fromkeys(others))})" if others else ""
    raise ZooError(f"no {name} of {wanted} found under {folder}{listed}: give --ckpt_path a file, or leave it out")


def _fetch(address: str | Path) -> Path:
    """Download a shared model, unless it is in the hub's cache, and return its folder."""
    repo, _, revision = str(address).removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=[WEIGHTS, CONFIG]))
    except errors.HFValidationError as error:
        raise ZooError(f"{address!r}: expected hf://user/model or hf://user/model@revision") from error
    except errors.LocalEntryNotFoundError as error:
        raise ZooError(
            f"{address} is not in the hub's cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set): download "
            "it once while online, or give the path of a folder"
        ) from error
    except errors.HfHubHTTPError as error:
        told = f"cannot download {address} ({type(error).__name__})"
        raise ZooError(f"{told}: check the spelling, and that the model is public") from error


def _read(path: Path) -> dict[str, Any]:
    """Content of a checkpoint, with `head`, `hyper_parameters` (the options) and `state_dict`."""
    content = _read_folder(path) if path.is_dir() else _read_file(path)
    head, options = content.get("head"), content.get("hyper_parameters")
    if not isinstance(head, str) or not isinstance(options, dict):
        raise ZooError(f"{path} is not a corrzoo checkpoint: it names no head")
    module = str(content.get("module", "corrzoo"))
    if head not in HEADS and not module.startswith("corrzoo."):  # loading a file must not import code
        raise ZooError(f"{path} is a {head} model of {module!r}: import that module first (--plugins {module})")
    HEADS[head]  # raises for an unknown head
    return content | {"hyper_parameters": _translated(path, head, options)}


def _translated(path: Path, head: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a checkpoint under the names of this version."""
    removed = REMOVED.get(head, {})
    for name, value in removed.items():
        if options.get(name, value) != value:
            raise ZooError(
                f"{path} needs {head}'s {name}={options[name]!r}, which was removed: load it with corrzoo 0.1.0"
            )
    gone = DROPPED | removed.keys()
    kept = {RENAMED.get(name, name): value for name, value in options.items() if name not in gone}
    return IMPLIED.get(head, {}) | kept


def _read_folder(path: Path) -> dict[str, Any]:
    for file in (path / CONFIG, path / WEIGHTS):
        if not file.is_file():
            raise ZooError(f"no {file}: expected {WEIGHTS} and {CONFIG} of corrzoo.save()")
    try:
        config = dict(json.loads((path / CONFIG).read_text()))
        weights = load_file(path / WEIGHTS)
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise ZooError(f"{path} is damaged: {error}") from error
    return config | {"hyper_parameters": config.get("options"), "state_dict": weights}


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ZooError(f"no checkpoint at {path}: `corrzoo fit` writes checkpoints/best.ckpt in the run's folder")
    return read_state(path)
