"""The Backbone module: an image in, feature maps out, whatever timm model is inside."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from corrzoo.backbones.position import resize_pos_embed
from corrzoo.backbones.specs import build_model, get_spec
from corrzoo.backbones.weights import load_weights
from corrzoo.registry import nearest
from corrzoo.types import Features, ZooError


class Tap:
    """A forward hook that keeps what its module answered."""

    output: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.output = output.clone()  # the next layer may write into it (in-place ReLU, residual sums)


class Trunk(nn.Module):
    """A timm model (as `build_model` makes it) as a function of the image: maps of the chosen levels, class token.

    `levels` are numbers of timm's `forward_intermediates`, or dotted names of modules; `key` is for errors.
    """

    def __init__(self, model: Any, levels: list[int | str], key: str) -> None:
        super().__init__()
        self.model, self.depth = model, len(model.feature_info)
        modules, self.taps = dict(model.named_modules()), {}
        for level in levels:
            if isinstance(level, int) and not -self.depth <= level < self.depth:
                raise ZooError(f"level {level} of {key}: expected {-self.depth} to {self.depth - 1}, or a module")
            if isinstance(level, str):
                if level not in modules:
                    raise ZooError(f"{key} has no module {level!r} to read features from{nearest(level, modules)}")
                self.taps[level] = Tap()
                modules[level].register_forward_hook(self.taps[level])
        self.levels = [level % self.depth if isinstance(level, int) else level for level in levels]
        self.numbers = {level for level in self.levels if isinstance(level, int)}
        self.stop = max(self.numbers, default=0)  # what lies behind this level of timm's is not computed

    def forward(self, image: Tensor) -> tuple[list[Any], Tensor | None]:
        """(B, 3, H, W) -> (B, C, h, w) for each level, None where the module was not reached; (B, C) class token."""
        numbers = sorted(self.numbers | {self.stop})
        prefixed = getattr(self.model, "num_prefix_tokens", 0) > 0
        options = {"return_prefix_tokens": True} if prefixed else {}
        found = self.model.forward_intermediates(
            image, numbers, norm=True, stop_early=True, output_fmt="NCHW", intermediates_only=True, **options
        )
        cls = found[-1][1][:, 0] if prefixed and self.model.cls_token is not None else None
        maps: dict[int | str, Any] = dict(zip(numbers, [maps for maps, _ in found] if prefixed else found, strict=True))
        for level, tap in self.taps.items():
            maps[level], tap.output = tap.output, None
        return [maps[level] for level in self.levels], cls


class Backbone(nn.Module):
    """A registered backbone. Building it does no I/O: its weights are random until `load()` or `load_state_dict()`.

    Args:
        name: A key of `list_backbones()`, or `timm/<name>` for any plain ViT or CNN of timm's.
        weights: `pretrained`, `random`, or the path of a weights file in timm's or the authors' layout.
        levels: Which maps to return: numbers of timm's `forward_intermediates` (ViT: blocks; ResNet: stem and four
            stages; negative from the end), or names of modules such as `layer3.22` (CNN hyperpixels). Default: the
            last. A ViT's final norm is applied to every level. Stages behind the deepest level are not computed.
        finetune: `all`; `none` (frozen, and in eval mode even under `train()`); or n, the last n transformer blocks
            that the levels reach, with the final norm (our choice: it is what those blocks' outputs pass through).
            BatchNorm keeps its pretrained statistics in every mode: a batch of a few pairs has none worth learning.
            Parameters that no level depends on are frozen, so that distributed training finds none unused.
        pos_interp: How a plain ViT's position embedding is resized: `official` (the code of DINO, iBOT and DINOv2;
            their default) or `timm` (the default of the rest). With registers the official way is timm's.
        backbone_size: What to do with an image whose size the patch does not divide: False refuses it; True resizes it
            to the nearest size that fits; n makes every image n x n pixels (ACTR and LPMFlow: 512 -> 256). Bilinear,
            without antialiasing, as those do.

    Attributes:
        spec: The `BackboneSpec`.
        channels: Channels of each level.
        strides: Pixels of the trunk's input for each cell of each level.
        patch: Side of a ViT's patch; 1 for a CNN, which takes any size from one cell on.
        num_params: Parameters of the model without its classifier, trained or not.
        pending: Whether the weights are still to be loaded.

    Raises:
        ZooError: for an unknown name, level or option.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        name: str,
        weights: str = "pretrained",
        levels: list[int | str] | None = None,
        finetune: int | str = "all",
        pos_interp: str | None = None,
        backbone_size: bool | int = False,
    ) -> None:
        super().__init__()
        self.spec = get_spec(name)
        self.weights, self.pending = weights, weights != "random"
        model = build_model(self.spec)
        self.trunk = Trunk(model, levels or [-1], name)
        self.patch: int = model.patch_embed.patch_size[0] if hasattr(model, "patch_embed") else 1
        self.num_params = sum(parameter.numel() for parameter in model.parameters())
        self._embeds = isinstance(model, VisionTransformer) and model.pos_embed is not None
        if pos_interp and not (self._embeds and pos_interp in ("official", "timm")):
            wanted = "official or timm" if self._embeds else "none, as it has no embedding that is resized here"
            raise ZooError(f"pos_interp {pos_interp!r} of {name}: expected {wanted}")
        self.pos_interp = pos_interp or self.spec.pos_interp
        if backbone_size is not True and backbone_size % self.patch:
            raise ZooError(f"backbone_size={backbone_size} is no multiple of {name}'s patch of {self.patch} pixels")
        self.backbone_size, self.finetune = backbone_size, finetune
        self.register_buffer("_mean", torch.tensor(self.spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.spec.std).view(3, 1, 1), persistent=False)
        self._freeze(self._survey())
        self.train()
        self.register_load_state_dict_post_hook(_note_loaded)

    def load(self) -> "Backbone":
        """Load the weights that were asked for, unless they are there; returns itself.

        Raises:
            ZooError: when they cannot be found, fetched or read, or do not fit.
        """
        if self.pending:
            load_weights(self.trunk.model, self.spec, self.weights)
            self.pending = False
        return self

    def normalise(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> float by the backbone's mean and std; a float image is taken as normalised already."""
        if image.dtype != torch.uint8:
            return image
        return (image.to(self._mean.dtype) / 255 - self._mean) / self._std

    def forward(self, image: Tensor) -> Features:
        """Features of images (B, 3, H, W), uint8 or normalised float.

        Raises:
            ZooError: when the weights are not loaded, or the size does not suit.
        """
        if self.pending:
            remedy = "call load(), or build with weights='random'"
            raise ZooError(f"weights {self.weights!r} of {self.spec.key} are not loaded: {remedy}")
        image = self.normalise(image)
        return Features(image, *self._run(self._fit(image)))

    def train(self, mode: bool = True) -> "Backbone":
        """Training mode for what is trained; BatchNorm and a frozen backbone stay in eval mode."""
        super().train(mode)
        for module in self.trunk.modules():
            if isinstance(module, _BatchNorm) or self.finetune == "none":
                module.eval()
        return self

    def _run(self, image: Tensor) -> tuple[list[Any], Tensor | None]:
        """The trunk on an image that fits, with a position embedding for that size."""
        model, resized = self.trunk.model, {}
        if self._embeds:
            grid = (image.shape[-2] // self.patch, image.shape[-1] // self.patch)
            prefix = 0 if model.no_embed_class else model.num_prefix_tokens
            # DINOv2 with registers came later, and its authors resize as timm does.
            official = self.pos_interp == "official" and model.reg_token is None
            embed = resize_pos_embed(model.pos_embed, model.patch_embed.grid_size, grid, prefix, official)
            resized = {"model.pos_embed": embed}
        return torch.func.functional_call(self.trunk, resized, (image,))

    def _fit(self, image: Tensor) -> Tensor:
        """The image at a size that the trunk takes."""
        size = list(image.shape[-2:])
        if self.backbone_size:
            multiples = [max(int(side / self.patch + 0.5), 1) * self.patch for side in size]
            size = multiples if self.backbone_size is True else [self.backbone_size] * 2
        if min(size) < max(self.strides):
            raise ZooError(f"{self.spec.key} needs sides of at least {max(self.strides)} pixels, got {_hxw(size)}")
        if any(side % self.patch for side in size):
            low, high = ([f(side / self.patch) * self.patch for side in size] for f in (math.floor, math.ceil))
            remedy = f"the nearest are {_hxw(low)} and {_hxw(high)}, or set backbone_size=True"
            raise ZooError(f"{self.spec.key} needs multiples of its patch of {self.patch}, got {_hxw(size)}: {remedy}")
        if size == list(image.shape[-2:]):
            return image
        return F.interpolate(image, size, mode="bilinear", align_corners=False)

    def _survey(self) -> set[str]:
        """Find channels, strides and where the trunk may stop; return the parameters that the levels depend on.

        One pass over a few cells: parameters are found in the autograd graph, so that nothing runs backward.
        """
        side = 2 * self.patch if self.patch > 1 else 128
        like = next(self.parameters())
        image = torch.zeros(1, 3, side, side, device=like.device, dtype=like.dtype)
        self.trunk.eval()
        with torch.enable_grad():
            maps, _ = self._run(image)
            while any(map_ is None for map_ in maps) and self.trunk.stop + 1 < self.trunk.depth:
                self.trunk.stop += 1
                maps, _ = self._run(image)
        for level, map_ in zip(self.trunk.levels, maps, strict=True):
            if map_ is None or map_.ndim != 4:
                raise ZooError(f"module {level!r} of {self.spec.key} gives no (B, C, h, w) map, name another one")
        self.channels: list[int] = [map_.shape[1] for map_ in maps]
        self.strides: list[int] = [round(side / map_.shape[2]) for map_ in maps]
        leaves = _leaves([map_.grad_fn for map_ in maps])
        return {key for key, parameter in self.trunk.named_parameters() if id(parameter) in leaves}

    def _freeze(self, reached: set[str]) -> None:
        """Let only those parameters be trained that `finetune` asks for, among those that the levels depend on."""
        depth = self.trunk.stop + 1 if self.patch > 1 else 0
        if self.finetune in ("all", "none"):
            trained = reached if self.finetune == "all" else set()
        elif isinstance(self.finetune, int) and 0 < self.finetune <= depth:
            last = tuple(f"model.blocks.{i}." for i in range(depth - self.finetune, depth))
            trained = {key for key in reached if key.startswith((*last, "model.norm."))}
        else:
            blocks = f", or its last 1 to {depth} blocks" if depth else " (it has no transformer blocks)"
            raise ZooError(f"finetune {self.finetune!r} of {self.spec.key}: expected all, none{blocks}")
        for key, parameter in self.trunk.named_parameters():
            parameter.requires_grad_(key in trained)


def _hxw(size: list[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _note_loaded(backbone: Backbone, keys: Any) -> None:
    """A checkpoint brought the weights: nothing is pending, unless the checkpoint lacks some of them."""
    if not any("trunk." in key for key in keys.missing_keys):
        backbone.pending = False


def _leaves(nodes: list[Any]) -> set[int]:
    """The ids of the tensors that the autograd graph behind these nodes would give a gradient to."""
    seen, leaves = set(), set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves.add(id(getattr(node, "variable", None)))
            nodes += [following for following, _ in node.next_functions]
    return leaves
