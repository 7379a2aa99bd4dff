"""Trained matchers to and from files. Nothing but tensors and plain values is ever read."""

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
"""Options of checkpoints that version 0.1.0 wrote, and what they are called now."""
DROPPED = frozenset({"sha256", "geo_weight"})
"""Options of version 0.1.0 that are gone and did not change what a loaded model predicts."""
REMOVED = {"GSF": {"network": "unet", "soft_argmax": "kept"}}
"""Options of version 0.1.0 that are gone, by head, and the only value that can still be loaded."""
IMPLIED = {"GSF": {"start": "guidance"}}
"""Options that version 0.1.0 did not have, by head, and the value that reproduces its predictions."""


def save(matcher: Matcher, folder: str | Path, results: Sequence[str | Path | dict[str, Any]] = ()) -> Path:
    """Write a matcher as `model.safetensors` and `config.json`, for `load`, and a model card as `README.md`.

    Args:
        matcher: What to save.
        folder: Where to; `hf upload user/model <folder>` shares it.
        results: Result files of `lightning test` for this matcher, which the card quotes.

    Raises:
        ZooError: when the folder cannot be written to, and for results that are unreadable or another model's.
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
    """The matcher of a checkpoint that `lightning fit` wrote, or of a folder that `save` did; in evaluation mode.

    Args:
        path: The file or folder, or `hf://user/model` for a folder on the Hugging Face hub (`hf://user/model@revision`
            for one of its revisions), which is fetched once and found in the hub's cache when offline.

    Raises:
        ZooError: for a file that is missing, unreadable, unsafe, or no checkpoint of the zoo.
    """
    path = _fetch(path) if str(path).startswith(HUB) else Path(path)
    content = _read(path)
    head, options, weights = content["head"], content["hyper_parameters"], content.get("state_dict", {})
    known = HEADS.options(head)
    for name in options.keys() - set(known):
        hint = nearest(name, known) or ": it is of another version of corrzoo"
        raise ZooError(f"{path} has an option {name!r} that {head} does not know{hint}")
    try:
        matcher = HEADS[head](**options)
        matcher.trained = content.get("trained")
        size = content.get("image_size") or (matcher.trained or {}).get("size") or matcher.image_size
        matcher.image_size = size if isinstance(size, int) else (int(size[0]), int(size[1]))
        matcher.load_state_dict(weights)
    except Exception as error:  # numbers that are words, too large, or of tensors that are not there
        reason = " ".join(str(error).split())[:300]
        raise ZooError(f"{path}: its options or its weights do not fit {head}: {reason}") from error
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
    """Model and progress of a checkpoint that `corrzoo fit` wrote.

    Raises:
        ZooError: like `load`, and for what only `load` reads.
    """
    if path.is_dir() or str(path).startswith("hf:"):
        raise ZooError(f"{path} is for corrzoo.load() and `corrzoo match`: give --ckpt_path a .ckpt of `corrzoo fit`")
    content = _read(path)
    progress = content.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("current", {})
    steps = int(content.get("global_step", 0))
    return Stored(content["head"], content["hyper_parameters"], int(progress.get("processed", 0)), steps)


def newest_checkpoint(folder: Path, name: str, head: str, backbone: str | None = None) -> Path:
    """The newest file called `name` anywhere under `folder` that holds such a model.

    Args:
        folder: Folder of runs.
        name: `best.ckpt` or `last.ckpt`.
        head: Name of the head.
        backbone: Name of the backbone; None for any.

    Raises:
        ZooError: if there is none, or if a newer one is damaged.
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
    """The folder in the hub's cache that holds a shared model, brought there if need be."""
    repo, _, revision = str(address).removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=[WEIGHTS, CONFIG]))
    except errors.HFValidationError as error:
        raise ZooError(f"{address!r} is no address: expected hf://user/model or hf://user/model@revision") from error
    except errors.LocalEntryNotFoundError as error:
        raise ZooError(
            f"{address} is not in the hub's cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set): fetch it "
            "once with a connection, or give the path of a folder"
        ) from error
    except errors.HfHubHTTPError as error:
        raise ZooError(
            f"the hub does not give {address} ({type(error).__name__}): is it spelt right, and is it public?"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint's `head`, its options as `hyper_parameters`, its `state_dict` and what else it says."""
    content = _read_folder(path) if path.is_dir() else _read_file(path)
    head, options = content.get("head"), content.get("hyper_parameters")
    if not isinstance(head, str) or not isinstance(options, dict):
        raise ZooError(f"{path} is no checkpoint of corrzoo: it does not say which head it holds")
    module = str(content.get("module", "corrzoo"))
    if head not in HEADS and not module.startswith("corrzoo."):  # named, but not imported for a file's sake
        raise ZooError(f"{path} holds a {head} of {module!r}: import that module first (--plugins {module})")
    HEADS[head]  # an unknown head names the nearest
    return content | {"hyper_parameters": _translated(path, head, options)}


def _translated(path: Path, head: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options as this version has them."""
    removed = REMOVED.get(head, {})
    for name, value in removed.items():
        if options.get(name, value) != value:
            raise ZooError(f"{path} needs {head}'s {name}={options[name]!r}, which is gone: load it with corrzoo 0.1.0")
    gone = DROPPED | removed.keys()
    kept = {RENAMED.get(name, name): value for name, value in options.items() if name not in gone}
    return IMPLIED.get(head, {}) | kept


def _read_folder(path: Path) -> dict[str, Any]:
    for file in (path / CONFIG, path / WEIGHTS):
        if not file.is_file():
            raise ZooError(f"no {file}: a saved matcher has {WEIGHTS} and {CONFIG}, see corrzoo.save()")
    try:
        config = dict(json.loads((path / CONFIG).read_text()))
        weights = load_file(path / WEIGHTS)
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise ZooError(f"{path} is damaged: {error}") from error
    return config | {"hyper_parameters": config.get("options"), "state_dict": weights}


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ZooError(f"no checkpoint at {path}: `lightning fit` writes checkpoints/best.ckpt into the run's folder")
    return read_state(path)
