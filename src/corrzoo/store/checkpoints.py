"""Save and load trained matchers. Only tensors and plain values are read, never pickled code."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import errors, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from corrzoo.backbones.weights import key_faults, read_state
from corrzoo.errors import ZooError, one_line
from corrzoo.files import whole_file, write_text
from corrzoo.geometry import Size
from corrzoo.heads import HEADS
from corrzoo.matcher import Matcher
from corrzoo.registry import nearest
from corrzoo.store.card import model_card

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
HUB = "hf://"
MAX_SIDE = 8192
"""our choice: largest side of a network image that a file may ask for."""
RENAMED = {"resize": "backbone_size", "query": "point_query"}
"""Options of version 0.1.0 and their new names."""
DROPPED = frozenset({"sha256", "geo_weight"})
"""Options of version 0.1.0 that were removed and do not change predictions of a loaded model."""
REMOVED = {"GSF": {"network": "unet", "soft_argmax": "kept"}}
"""By head, options of version 0.1.0 that were removed, and the only value that can still be loaded."""
IMPLIED = {"GSF": {"start": "guidance"}}
"""By head, options that version 0.1.0 lacked, and the value that reproduces its predictions."""


def save(matcher: Matcher, folder: str | Path, results: Sequence[str | Path | dict[str, Any]] = ()) -> Path:
    """Save a matcher as `model.safetensors`, `config.json` and a model card, `README.md`, and return the folder.

    Args:
        matcher: The model.
        folder: Output folder. `hf upload user/model <folder>` shares it.
        results: Result files of `corrzoo test` for this model. Their scores go into the card.

    Raises:
        ZooError: if the folder cannot be written, or a result cannot be read or is of another model.
    """
    folder = Path(folder).expanduser()
    options = {name: value for name, value in dict(matcher.hparams).items() if not name.startswith("_")}
    config: dict[str, Any] = {"head": matcher.head_name, "module": type(matcher).__module__, "options": options}
    config |= {"image_size": matcher.image_size, "trained": matcher.trained}
    card = model_card(matcher, config, results)
    try:
        with whole_file(folder / WEIGHTS) as partial:
            save_file({name: value.contiguous() for name, value in matcher.state_dict().items()}, partial)
        write_text(folder / CONFIG, json.dumps(config, indent=1) + "\n")
        write_text(folder / CARD, card)
    except (OSError, SafetensorError) as error:
        raise ZooError(f"cannot save to {folder}: {getattr(error, 'strerror', error)}") from error
    return folder


def load(path: str | Path) -> Matcher:
    """Load a matcher in evaluation mode.

    Args:
        path: A checkpoint of `corrzoo fit`, a folder of `save`, or a folder on the Hugging Face hub as
            `hf://user/model` or `hf://user/model@revision`. The hub's cache is used when offline.

    Raises:
        ZooError: if the file is missing, damaged, contains pickled objects, or is not a corrzoo checkpoint.
    """
    path = _fetch(path) if str(path).startswith(HUB) else Path(path).expanduser()
    content = _read(path)
    head, options, weights = content["head"], content["hyper_parameters"], content.get("state_dict", {})
    known = HEADS.options(head)
    for name in options.keys() - set(known):
        hint = nearest(name, known) or ": another version of corrzoo wrote it"
        raise ZooError(f"{path} has an unknown option {name!r} of {head}{hint}")
    try:
        _check_weights(weights, _expected_weights(head, options))
        matcher = HEADS[head](**options)
        matcher.trained = content.get("trained")
        size = content.get("image_size") or (matcher.trained or {}).get("size") or matcher.image_size
        matcher.image_size = _checked_size(size)
        matcher.load_state_dict(weights)
    except Exception as error:  # options and weights of a stranger's file can be anything
        reason = one_line(error)[:300]
        raise ZooError(f"{path}: its options or weights do not fit {head}: {reason}") from error
    return matcher.eval()


def init_from(matcher: Matcher, path: str | Path) -> None:
    """Give a matcher the weights of a trained one, for a training that begins with them.

    Args:
        matcher: The model. Its options may differ from those of the file where the weights are the same.
        path: As in `load`.

    Raises:
        ZooError: as in `load`, and if the weights do not fit the matcher.
    """
    other = load(path)
    weights = other.state_dict()
    if faults := key_faults(weights, matcher.state_dict()):
        raise ZooError(f"{path}, {other.title}, does not fit this model: {faults}")
    matcher.load_state_dict(weights)
    matcher.trained = other.trained  # the training that follows keeps its dataset as `before`


class Stored(NamedTuple):
    """A checkpoint without its weights: head, options of the model, completed epochs and optimiser steps."""

    head: str
    options: dict[str, Any]
    epochs: int
    steps: int


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
    """Find the newest file called `name` below `folder` of a head on a backbone (None: on any).

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


def _expected_weights(head: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of a model, without memory for them: a file of 1 kB can name a backbone of gigabytes."""
    try:
        with torch.device("meta"):
            return HEADS[head](**options).state_dict()
    except RuntimeError:  # a plugin's constructor reads values of tensors
        return HEADS[head](**options).state_dict()


def _check_weights(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse weights of other names, shapes or kinds of numbers, and weights that are not finite."""
    if faults := key_faults(weights, expected):
        raise ZooError(faults)
    for name, value in weights.items():
        if value.is_floating_point() != expected[name].is_floating_point() or not value.isfinite().all():
            raise ZooError(f"{name} has {value.dtype} values that are not finite or not {expected[name].dtype}")


def _checked_size(size: Any) -> int | Size:
    sides = size if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
        raise ZooError(f"image_size {size!r}: expected 1 to {MAX_SIDE} pixels, or [H, W]")
    return size if isinstance(size, int) else (sides[0], sides[1])


def _fetch(address: str | Path) -> Path:
    """Download a shared model, unless it is in the hub's cache, and return its folder."""
    repo, _, revision = str(address).removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=[WEIGHTS, CONFIG]))
    except errors.HFValidationError as error:
        raise ZooError(f"{address!r}: expected hf://user/model or hf://user/model@revision") from error
    except errors.LocalEntryNotFoundError as error:
        told = f"{address} is not in the hub's cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set)"
        raise ZooError(f"{told}: download it once while online, or give the path of a folder") from error
    except errors.HfHubHTTPError as error:
        told = f"cannot download {address} ({type(error).__name__})"
        raise ZooError(f"{told}: check the spelling, and that the model is public") from error


def _read(path: Path) -> dict[str, Any]:
    """Content of a checkpoint, with `head`, `hyper_parameters` (the options) and `state_dict`."""
    if not (path.is_dir() or path.is_file()):
        raise ZooError(f"no checkpoint at {path}: `corrzoo fit` writes checkpoints/best.ckpt in the run's folder")
    content = _read_folder(path) if path.is_dir() else read_state(path)
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
            told = f"{path} needs {head}'s {name}={options[name]!r}, which was removed"
            raise ZooError(f"{told}: load it with corrzoo 0.1.0")
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
