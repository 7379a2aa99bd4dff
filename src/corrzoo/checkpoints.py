"""Trained matchers to and from files. Nothing but tensors and plain values is ever read."""

import pickle
from pathlib import Path
from typing import Any

import torch

from corrzoo.heads import HEADS
from corrzoo.matcher import Matcher
from corrzoo.types import ZooError


def load(path: str | Path) -> Matcher:
    """The matcher of a checkpoint that `lightning fit` wrote, in evaluation mode, on the CPU.

    Raises:
        ZooError: for a file that is missing, unreadable, unsafe, or no checkpoint of the zoo.
    """
    path = Path(path)
    head, options = read_checkpoint(path)
    matcher = HEADS[head](**options)
    matcher.load_state_dict(_read(path)["state_dict"])
    return matcher.eval()


def read_checkpoint(path: Path) -> tuple[str, dict[str, Any]]:
    """A checkpoint's head and the options that it was made with.

    Raises:
        ZooError: like `load`.
    """
    content = _read(path)
    head, options = content.get("head"), content.get("hyper_parameters")
    if head is None or options is None:
        raise ZooError(f"{path} is no checkpoint of corrzoo: it does not say which head it holds")
    HEADS[head]  # an unknown head names the nearest
    return head, dict(options)


def _read(path: Path) -> dict[str, Any]:
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
