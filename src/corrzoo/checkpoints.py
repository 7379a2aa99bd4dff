"""Trained matchers to and from files. Nothing but tensors and plain values is ever read."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from corrzoo.heads import HEADS
from corrzoo.matcher import Matcher
from corrzoo.types import ZooError

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save(matcher: Matcher, folder: str | Path) -> Path:
    """Write a matcher as `model.safetensors` and `config.json`, for `load`.

    Raises:
        ZooError: when the folder cannot be written to.
    """
    folder = Path(folder)
    options = {name: value for name, value in dict(matcher.hparams).items() if not name.startswith("_")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in matcher.state_dict().items()}, folder / WEIGHTS)
        config = {"head": type(matcher).__name__, "options": options}
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    except OSError as error:
        raise ZooError(f"cannot save to {folder}: {error.strerror}") from error
    return folder


def load(path: str | Path) -> Matcher:
    """The matcher of a checkpoint that `lightning fit` wrote, or of a folder that `save` did; in evaluation mode.

    Raises:
        ZooError: for a file that is missing, unreadable, unsafe, or no checkpoint of the zoo.
    """
    path = Path(path)
    head, options, weights = _parts(path)
    matcher = HEADS[head](**options)
    try:
        matcher.load_state_dict(weights)
    except RuntimeError as error:
        raise ZooError(
            f"{path}: its weights do not fit {head} with its own options: {error}".splitlines()[0]
        ) from error
    return matcher.eval()


def read_checkpoint(path: Path) -> tuple[str, dict[str, Any]]:
    """A checkpoint's head and the options that it was made with.

    Raises:
        ZooError: like `load`.
    """
    return _parts(path)[:2]


def _parts(path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Head, options and weights."""
    content = _read_folder(path) if path.is_dir() else _read_file(path)
    head, options = content.get("head"), content.get("hyper_parameters")
    if head is None or options is None:
        raise ZooError(f"{path} is no checkpoint of corrzoo: it does not say which head it holds")
    HEADS[head]  # an unknown head names the nearest
    return head, dict(options), content.get("state_dict", {})


def _read_folder(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / CONFIG).read_text())
        weights = load_file(path / WEIGHTS)
    except FileNotFoundError as error:
        raise ZooError(
            f"no {error.filename}: a saved matcher has {WEIGHTS} and {CONFIG}, see corrzoo.save()"
        ) from error
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ZooError(f"{path} is damaged: {error}") from error
    return {"head": config.get("head"), "hyper_parameters": config.get("options"), "state_dict": weights}


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ZooError(f"no checkpoint at {path}: `lightning fit` writes checkpoints/best.ckpt into the run's folder")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ZooError(f"{path} is refused: it holds more than tensors and plain values, or is damaged") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ZooError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ZooError(f"{path} is no checkpoint of corrzoo: it holds a {type(content).__name__}")
    return content
