"""Load checkpoints that the authors of ACTR and LPMFlow released. Only tensors and plain values are read."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from corrzoo.backbones.weights import key_faults, read_state
from corrzoo.heads import HEADS
from corrzoo.matcher import Matcher
from corrzoo.registry import nearest
from corrzoo.types import ZooError

Names: TypeAlias = "dict[str, str | tuple[str, Names]]"
"""Prefixes of our keys and the authors' prefixes, optionally with the same mapping for the rest of the key."""


class Layout(NamedTuple):
    """Mapping from the keys of our head to those of a released model."""

    head: str
    names: Names
    unused: str
    """Pattern of their keys that we do not load: no output depends on them, or they are tables that we compute."""


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

LAYOUTS = {
    "actr": Layout(
        "ACTR",
        _COMMON
        | {f"blocks.{i}.": (f"decoder.blocks.{i}.", _BLOCK) for i in range(5)}
        | {
            "blocks.5.": ("decoder.last_block.0.", _BLOCK),
            "super_resolution.project.": "refine_proj_query_feat.",
            "super_resolution.head.": "refine2.",
        }
        | {
            f"super_resolution.stages.{stage}.{branch}.": (
                f"refine_swin_decoder_{branch + 1}_{stage + 1}.",
                _REFINEMENT,
            )
            for stage in range(2)
            for branch in range(2)
        },
        r"learn_parm|decoder\.pos_embed_[xy]|decoder\.(proj|norm)\..*|.*\.(norm[34]|mlp2\.fc[12])\..*"
        r"|decoder\.last_block\.0\.spatial_attention\.weight|.*\.relative_position_index",
    ),
    "lpmflow": Layout(
        "LPMFlow",
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
}


def load_official(
    name: str, source: str | Path | Mapping[str, Any], as_tested: bool = False, **options: Any
) -> Matcher:
    """Load a released checkpoint of ACTR or LPMFlow, in evaluation mode, on the CPU.

    Args:
        name: `actr` or `lpmflow`.
        source: Path of a file such as `model_best.pth`, or its content: a state dict, also inside the training
            dictionary and with the prefix `module.`. `args.pkl` is not needed.
        as_tested: Load LPMFlow as the released test script does. There, two pairs of embeddings share their memory
            until the model is moved to a GPU, so that two embeddings of the checkpoint overwrite the other two.
            Otherwise, load the weights as they were trained.
        **options: Options of the head, such as `finetune`.

    Raises:
        ZooError: if the name is unknown, the file cannot be read safely, or keys or shapes do not fit.
    """
    if name not in LAYOUTS:
        raise ZooError(f"unknown checkpoint {name!r}{nearest(name, LAYOUTS) or f': expected one of {list(LAYOUTS)}'}")
    layout = LAYOUTS[name]
    theirs = _state_of(source)
    papers: dict[str, Any] = {"backbone": "ibot_b16", "weights": "random", "backbone_size": 256}
    matcher = HEADS[layout.head](**papers | options)
    ours = {key: official_key(key, layout.names) for key in matcher.state_dict()}
    expected = {ours[key]: value for key, value in matcher.state_dict().items()}
    used = {k: v for k, v in theirs.items() if k in expected or not re.fullmatch(layout.unused, k)}
    if faults := key_faults(used, expected):
        raise ZooError(f"the checkpoint does not fit the released {layout.head}: {faults}")
    if as_tested:
        theirs = _as_tested(theirs, name)
    matcher.load_state_dict({key: theirs[official] for key, official in ours.items()})
    return matcher.eval()


def official_key(key: str, names: Names) -> str:
    """Translate a key of ours to the authors' key."""
    for ours, theirs in names.items():
        if key.startswith(ours):
            prefix, following = theirs if isinstance(theirs, tuple) else (theirs, {})
            return prefix + official_key(key.removeprefix(ours), following)
    return key


def _state_of(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """State dict of a file or a dictionary."""
    state: Mapping[str, Any]
    if isinstance(source, Mapping):
        state = source
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise ZooError(f"no checkpoint at {path}: expected the authors' model_best.pth or epoch_<n>.pth")
        # The best score in the training dictionary is a NumPy scalar, pickled under an old module name.
        scalar: Any = np.float64().__reduce__()[0]
        with torch.serialization.safe_globals(
            [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]
        ):
            state = read_state(path)
    if isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    return {
        key.removeprefix("module."): value
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }


def _as_tested(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Weights that the released test script evaluates: of two embeddings in one memory, the one loaded last."""
    if name != "lpmflow":
        raise ZooError(
            f"as_tested=True with {name!r}: expected 'lpmflow', as only LPMFlow's test script changes weights"
        )
    return state | {
        "encoder.pos_embed_trg": state["encoder.pos_embed_src"],
        "encoder.cls_pos_embed_src": state["encoder.cls_pos_embed_trg"],
    }
