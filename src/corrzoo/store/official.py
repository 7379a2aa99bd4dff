"""Load checkpoints that the authors of heads released. Only tensors and plain values are read."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from corrzoo.backbones.weights import key_faults, read_state
from corrzoo.heads import HEADS
from corrzoo.matcher import Matcher
from corrzoo.registry import suggestion
from corrzoo.types import ZooError

Names: TypeAlias = "dict[str, str | tuple[str, Names]]"
"""Prefixes of our keys and the authors' prefixes, optionally with the same mapping for the rest of the key."""


class Layout(NamedTuple):
    """Mapping from the keys of our head to those of a released model."""

    head: str
    image_size: int
    """Network image of the recipe: neither shapes nor files tell it."""
    names: Names
    unused: str
    """Pattern of their keys that we do not load: no output depends on them, or they are tables that we compute."""
    options: "Callable[[dict[str, Tensor]], dict[str, Any]]" = lambda state: _IBOT
    """Options of the head, some of them from the shapes in the authors' state dict."""
    convert: "Callable[[dict[str, Tensor]], dict[str, Tensor]]" = lambda state: state
    """Change the authors' state dict so that each of its tensors is one of ours."""
    absent: str = ""
    """Pattern of our keys that the authors' file lacks, such as stages that no level depends on."""


_IBOT: dict[str, Any] = {"backbone": "ibot_b16", "weights": "random", "backbone_size": 256}
_COMMON: Names = {"backbone.trunk.model.": "feature_extraction.backbone.", "soft_argmax.": ""}
_SWIN = "0.transformer.layers.0.blocks.0."
_REFINEMENT: Names = {
    "attention.bias_table": f"{_SWIN}attn.relative_position_bias_table",
    "attention.": f"{_SWIN}attn.",
    "norm1.": f"{_SWIN}norm1.",
    "norm2.": f"{_SWIN}norm2.",
    "mlp.": f"{_SWIN}mlp.",
    "norm.": "0.transformer.norm.",
    "channels.": "1.",
}
_BLOCK: Names = {
    "self_attention.": "sattn.",
    "cross_attention.": "cattn.",
    "target_weight": "spatial_attention.weight",
}
_DECODER = _BLOCK | {
    f"pos_embed_{side}.{scale}": f"pos_embed_{side}{suffix}"
    for side in ("src", "trg")
    for scale, suffix in (("coarse", ""), ("fine", "_up"))
}
_ENCODER: Names = {
    "cls_embed_": "cls_pos_embed_",
    "segment_src": "src_segment_pos_embed",
    "segment_trg": "trg_segment_pos_embed",
} | {
    f"blocks.{i}.": (f"blocks.{i}.", {"bias.table": "attn.relative_position_bias_table", "attention.": "attn."})
    for i in range(6)
}

_HYPERPIXELS = ["maxpool", *(f"layer3.{i}:pre" for i in (0, 12, 13, 18, 20, 21, 22))]
"""CATs' levels for SPair-71k."""
_MATCH_TO_MATCH: Names = {
    "norm_attention.": "0.norm.",
    "attention.qkv.": "0.fn.to_qkv.",
    "attention.query_score.": "0.fn.to_q_attn_logits.",
    "attention.key_score.": "0.fn.to_k_attn_logits.",
    "attention.value.": "0.fn.to_r.",
    "attention.out.": "0.fn.to_out.",
    "norm_ffn.": "1.norm.",
    "ffn.": "1.fn.",
}
_INTRA: Names = {"norm1.": "norm1.", "attention.": "attn.", "norm2.": "norm4.", "mlp.": "mlp2."}
_INTER: Names = {"norm1.": "norm3.", "attention.": "attn_multiscale.", "norm2.": "norm2.", "mlp.": "mlp."}
_RESNET: Names = {
    f"backbone.trunk.model.{ours}.": f"FeatureExtraction.model.{theirs}."
    for ours, theirs in {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6}.items()
}


def _cats_options(state: dict[str, Tensor]) -> dict[str, Any]:
    """What the shapes tell of a CATs: neither which levels it reads nor its number of heads."""
    *_, grid, half = _cats_embedding(state)
    blocks = {key.split(".")[2] for key in state if key.startswith("decoder.blocks.")}
    sizes = {"grid": grid, "width": 2 * half - grid**2, "depth": len(blocks) or 1}
    return {"backbone": "resnet101", "weights": "random", "levels": _HYPERPIXELS, **sizes}


def _cats_convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With one level, the released block has its only MLP where others have the one of the attention across levels."""
    if _cats_embedding(state)[1] > 1:
        return state
    across = r"\.(attn_multiscale|norm3|norm4|mlp2)\."
    kept = {key: value for key, value in state.items() if not re.search(across, key)}
    return {key.replace(".norm2.", ".norm4.").replace(".mlp.", ".mlp2."): value for key, value in kept.items()}


def _cats_embedding(state: dict[str, Tensor]) -> torch.Size:
    """(1, levels, 1, grid, channels / 2); the published model's for a state dict of something else, refused later."""
    published = torch.Size([1, len(_HYPERPIXELS), 1, 16, 192])
    embedding = state.get("decoder.pos_embed_x")
    return published if embedding is None or "proj.0.weight" not in state else embedding.shape


def _transformatcher_options(state: dict[str, Tensor]) -> dict[str, Any]:
    """Two streams if the halves of the authors' backbone, which are equal until they are trained, differ."""
    source = {key.removeprefix("source."): value for key, value in state.items() if key.startswith("source.")}
    different = any(not torch.equal(value, state.get(f"target.{key}", value)) for key, value in source.items())
    layers = {key.split(".")[2] for key in state if key.startswith("match2match.trans_nc.")}
    levels = [f"layer{stage}.{i}" for stage, count in ((3, 23), (4, 3)) for i in range(count)]
    sizes = {"layers": len(layers) or 6, "two_streams": different}
    return {"backbone": "resnet101", "weights": "random", "levels": levels, **sizes}


def _transformatcher_convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' backbone of double width as two: the first half of each tensor is the source's."""
    out = {}
    for key, value in state.items():
        name = key.removeprefix("backbone.")
        if name == key or name.startswith("fc."):
            out[key] = value
        else:
            halves = value.chunk(2) if value.ndim and len(value) > 1 else (value, value)
            out |= {f"{stream}.{name}": half for stream, half in zip(("source", "target"), halves, strict=True)}
    return out


def _ncnet_options(state: dict[str, Tensor]) -> dict[str, Any]:
    """What the shapes tell of an NCNet."""
    keys = sorted((key for key in state if re.fullmatch(r"NeighConsensus\.conv\.\d+\.weight", key)), key=len)
    shapes = [state[key].shape for key in keys if state[key].ndim == 6]  # (D, C, k, k, k, k) each
    sizes = {"kernel_sizes": [shape[2] for shape in shapes], "channels": [shape[0] for shape in shapes]}
    return {"backbone": "resnet101", "weights": "random", "levels": [3]} | (sizes if shapes else {})


def _ncnet_convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released kernels have their first axis in front; older files say `vgg` and may lack counts of batches."""
    out = {key.replace("FeatureExtraction.vgg.", "FeatureExtraction.model."): value for key, value in state.items()}
    for key, value in list(out.items()):
        if key.startswith("NeighConsensus.") and value.ndim == 6:
            out[key] = value.movedim(0, 2)  # (k, D, C, k, k, k) -> (D, C, k, k, k, k)
        if key.endswith(".running_var"):
            out.setdefault(key.replace("running_var", "num_batches_tracked"), torch.zeros((), dtype=torch.int64))
    return out


LAYOUTS = {
    "actr": Layout(
        "ACTR",
        512,
        _COMMON
        | {f"blocks.{i}.": (f"decoder.blocks.{i}.", _BLOCK) for i in range(5)}
        | {
            "blocks.5.": ("decoder.last_block.0.", _BLOCK),
            "super_resolution.project.": "refine_proj_query_feat.",
            "super_resolution.head.": "refine2.",
        }
        | {
            f"super_resolution.stages.{i}.{branch}.": (f"refine_swin_decoder_{branch + 1}_{i + 1}.", _REFINEMENT)
            for i in range(2)
            for branch in range(2)
        },
        r"learn_parm|decoder\.pos_embed_[xy]|decoder\.(proj|norm)\..*|.*\.(norm[34]|mlp2\.fc[12])\..*"
        r"|decoder\.last_block\.0\.spatial_attention\.weight|.*\.relative_position_index",
    ),
    "lpmflow": Layout(
        "LPMFlow",
        512,
        _COMMON
        | {
            "encoder.": ("encoder.", _ENCODER),
            "pos_embed_masked": "pos_embed_src",
            "integration.project.": "refine_proj_query_feat.",
            "integration.head.": "SRBranches.refine2.",
        }
        | {f"pyramid.decoder{i}.": (f"decoder_s{i}.last_block.0.", _DECODER) for i in (1, 2, 3)}
        | {f"pyramid.up.refine.{i}.": (f"SRBranch_feat.refine_swin_decoder_1_{i + 1}.", _REFINEMENT) for i in range(2)}
        | {
            f"integration.refine.{i}.": (f"SRBranches.refine_swin_decoder_{window}.", _REFINEMENT)
            for i, window in enumerate((16, 8, 4))
        },
        r"masked_tokens|encoder\.(cls_token|pos_embed|patch_embed\..*|blocks\.\d\.spatial_attention\.weight)"
        r"|.*\.norm[34]\..*|decoder_s1\..*\.pos_embed_(src|trg)_up|decoder_s3\..*\.pos_embed_(src|trg)"
        r"|.*\.relative_position_index",
    ),
    "cats": Layout(
        "CATs",
        256,
        _COMMON
        | {
            "pos_embed_": "decoder.pos_embed_",
            "to_scores.": "decoder.proj.",
            "project.": "proj.",
            "blocks.": ("decoder.blocks.", {"intra.": ("", _INTRA), "inter.": ("", _INTER)}),
        },
        r"decoder\.norm\..*|feature_extraction\.backbone\.fc\..*",
        _cats_options,
        _cats_convert,
    ),
    "ncnet": Layout(
        "NCNet",
        400,
        _RESNET | {"consensus.": "NeighConsensus.conv."},
        r"FeatureExtraction\.model\.7\..*",  # layer4, if it was kept
        _ncnet_options,
        _ncnet_convert,
        r"backbone\.trunk\.model\.layer4\..*",
    ),
    "geoaware": Layout(
        "GeoAware",
        840,
        {"bottlenecks.": ("bottleneck_layers.", {name: f"0.{name}" for name in ("conv", "shortcut")})},
        r"self_logit_scale",
        lambda state: {"width": len(state.get("bottleneck_layers.0.0.conv3.norm.bias", range(768)))},
        absent=r"backbone\..*|[xy]_normal",
    ),
    "transformatcher": Layout(
        "TransforMatcher",
        240,
        {
            "backbone.trunk.model.": "source.",
            "target_backbone.trunk.model.": "target.",
            "embed.": "match2match.to_embedding.1.",
            "to_score.": "match2match.to_original.0.",
            "layers.": ("match2match.trans_nc.", _MATCH_TO_MATCH),
        },
        r"target\..*|backbone\.fc\..*|match2match\.posenc|.*\.pos_emb\.freqs",
        _transformatcher_options,
        _transformatcher_convert,
    ),
}


def load_official(
    name: str, source: str | Path | Mapping[str, Any], as_tested: bool = False, **options: Any
) -> Matcher:
    """Load a released checkpoint, in evaluation mode, on the CPU.

    Args:
        name: `actr`, `cats`, `geoaware`, `lpmflow`, `ncnet` or `transformatcher`.
        source: Path of a file such as `model_best.pth`, or its content: a state dict, also inside the training
            dictionary and with the prefix `module.`. `args.pkl` is not needed.
        as_tested: Load LPMFlow as the released test script does. There, two pairs of embeddings share their memory
            until the model is moved to a GPU, so that two embeddings of the checkpoint overwrite the other two.
            Otherwise, load the weights as they were trained.
        **options: Options of the head, such as `finetune`. Checkpoints of CATs do not contain their `levels` (default:
            those for SPair-71k) and `attention_heads`, those of GeoAware not the weights of the backbone, nor its name
            and `levels`: call `load_weights()`.

    Raises:
        ZooError: if the name is unknown, the file cannot be read safely, or keys or shapes do not fit.
    """
    if name not in LAYOUTS:
        raise ZooError(f"unknown checkpoint {name!r}{suggestion(name, LAYOUTS)}")
    if as_tested and name != "lpmflow":
        raise ZooError(f"as_tested=True with {name!r}: expected 'lpmflow', as only its test script changes weights")
    layout = LAYOUTS[name]
    theirs = layout.convert(_state_of(source))
    matcher = HEADS[layout.head](**layout.options(theirs) | options)
    wanted = {key: value for key, value in matcher.state_dict().items() if not re.fullmatch(layout.absent, key)}
    ours = {key: official_key(key, layout.names) for key in wanted}
    expected = {ours[key]: value for key, value in wanted.items()}
    used = {k: v for k, v in theirs.items() if k in expected or not re.fullmatch(layout.unused, k)}
    if faults := key_faults(used, expected):
        raise ZooError(f"the checkpoint does not fit the released {layout.head}: {faults}")
    if as_tested:  # of two embeddings in one memory, the one loaded last
        theirs["encoder.pos_embed_trg"] = theirs["encoder.pos_embed_src"]
        theirs["encoder.cls_pos_embed_src"] = theirs["encoder.cls_pos_embed_trg"]
    matcher.load_state_dict({key: theirs[official] for key, official in ours.items()}, strict=not layout.absent)
    matcher.image_size = layout.image_size
    origin = "state dict" if isinstance(source, Mapping) else Path(source).name
    # without it, results would be ranked as training-free; the file does not tell the dataset
    matcher.trained = {"dataset": None, "size": layout.image_size, "source": origin}
    return matcher.eval()


def official_key(key: str, names: Names) -> str:
    """Translate a key of ours to the authors' key."""
    if index := re.match(r"\d+\.", key):  # of a list of blocks
        return index[0] + official_key(key.removeprefix(index[0]), names)
    for ours, theirs in names.items():
        if key.startswith(ours):
            prefix, following = theirs if isinstance(theirs, tuple) else (theirs, {})
            return prefix + official_key(key.removeprefix(ours), following)
    return key


def _state_of(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """State dict of a file or a dictionary."""
    state: Any = source
    if not isinstance(source, Mapping):
        path = Path(source).expanduser()
        if not path.is_file():
            raise ZooError(f"no checkpoint at {path}: expected the authors' model_best.pth or epoch_<n>.pth")
        # The best score in the training dictionary is a NumPy scalar, pickled under an old module name.
        scalar: Any = np.float64().__reduce__()[0]
        plain = [np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]
        with torch.serialization.safe_globals([scalar, (scalar, "numpy.core.multiarray.scalar"), *plain]):
            state = read_state(path)
    if isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    tensors = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return {key.removeprefix("module."): value for key, value in tensors.items()}
