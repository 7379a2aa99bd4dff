"""The Backbone module: images in, feature maps out, for any timm ViT or CNN."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from corrzoo.backbones.position import ResizeOnce
from corrzoo.backbones.specs import build_model, get_spec
from corrzoo.backbones.weights import load_weights
from corrzoo.registry import nearest
from corrzoo.types import Features, ZooError

PRE = ":pre"
"""Ending of a level's name: the map before the last ReLU of the block."""


class Backbone(nn.Module):
    """A registered backbone. Building it does no I/O: weights are random until `load()` or `load_state_dict()`.

    Args:
        name: A name of `list_backbones()`, or `timm/<name>` for any plain ViT or CNN of timm.
        weights: `pretrained`, `random`, or the path of a weights file in timm's or the authors' layout.
        levels: Which maps to return: numbers of timm's `forward_intermediates` (ViT: blocks; ResNet: stem and four
            stages; negative from the end), or module names such as `layer3.22` (CNN hyperpixels). Default: the last.
            `layer3.22:pre` is the input of that block's last ReLU, the residual sum of a ResNet. A ViT's final norm is
            applied to every level by number, and to none by name, such as `blocks.11`. Stages after the deepest level
            are not computed.
        finetune: `all`; `none` (frozen, and in evaluation mode even under `train()`); or n, the last n transformer
            blocks up to the deepest level, with the final norm (our choice: their outputs pass through it). BatchNorm
            keeps its pretrained statistics, as a batch of a few pairs cannot estimate them. Parameters that no level
            depends on are frozen, so that distributed training finds none unused.
        pos_interp: How a plain ViT's position embedding is resized: `official` (as in the code of DINO, iBOT and
            DINOv2; their default) or `timm` (the default of the rest). With registers, the official way is timm's.
        backbone_size: For images whose size is no multiple of the patch: False raises an error, True resizes to the
            nearest multiple. n resizes every image to n x n pixels (ACTR and LPMFlow: 512 -> 256), bilinearly, without
            antialiasing, as in both papers' code.

    Attributes:
        channels: Channels of each level.
        strides: Pixels of the trunk's input per cell of each level.
        patch: Side of a ViT's patch; 1 for a CNN, which takes any size from one cell on.
        num_params: Parameters of the model without its classifier, trained or not.
        pending: Whether the weights are still to be loaded.

    Raises:
        ZooError: if the name, a level or an option is unknown.
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
        self.patch = self.trunk.patch
        self.num_params = sum(parameter.numel() for parameter in model.parameters())
        self._embeds = isinstance(model, VisionTransformer) and model.pos_embed is not None
        if pos_interp and not (self._embeds and pos_interp in ("official", "timm")):
            wanted = "official or timm" if self._embeds else "none, as it has no position embedding to resize"
            raise ZooError(f"pos_interp {pos_interp!r} of {name}: expected {wanted}")
        self.pos_interp, self._resize_pos_embed = pos_interp or self.spec.pos_interp, ResizeOnce()
        if backbone_size is not True and backbone_size % self.patch:
            raise ZooError(f"backbone_size={backbone_size} is no multiple of {name}'s patch of {self.patch} pixels")
        self.backbone_size, self.finetune = backbone_size, finetune
        self.register_buffer("_mean", torch.tensor(self.spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.spec.std).view(3, 1, 1), persistent=False)
        self._freeze(self._survey())
        self.train()
        self.register_load_state_dict_post_hook(_note_loaded)

    def load(self) -> "Backbone":
        """Load the requested weights, unless they are loaded already, and return itself. Errors: see `load_weights`."""
        if self.pending:
            load_weights(self.trunk.model, self.spec, self.weights)
            self.pending = False
        return self

    def normalise(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) normalised by the backbone's mean and std if uint8; float images are returned as is."""
        if image.dtype != torch.uint8:
            return image
        return (image.to(self._mean.dtype) / 255 - self._mean) / self._std

    def forward(self, image: Tensor) -> Features:
        """Features of images (B, 3, H, W), uint8 or normalised float.

        Raises:
            ZooError: if the weights are not loaded, or the size does not fit the model.
        """
        if self.pending:
            remedy = "call load(), or build with weights='random'"
            raise ZooError(f"weights {self.weights!r} of {self.spec.key} are not loaded: {remedy}")
        image = self.normalise(image)
        return Features(image, *self._run(self._fit(image)))

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode of the trained parts; BatchNorm and a frozen backbone stay in evaluation mode."""
        super().train(mode)
        for module in self.trunk.modules():
            if isinstance(module, _BatchNorm) or self.finetune == "none":
                module.eval()
        self._resize_pos_embed.forget()
        return self

    def _run(self, image: Tensor) -> tuple[list[Any], Tensor | None]:
        """The trunk on an image of a fitting size, with the position embedding resized to it."""
        model, resized = self.trunk.model, {}
        if self._embeds:
            grid = (image.shape[-2] // self.patch, image.shape[-1] // self.patch)
            prefix = 0 if model.no_embed_class else model.num_prefix_tokens
            # The authors of DINOv2 with registers, which is later, resize as timm does.
            official = self.pos_interp == "official" and model.reg_token is None
            embed, native = model.pos_embed, model.patch_embed.grid_size
            trained = embed.requires_grad and (self.training or torch.is_grad_enabled())
            resized = {"model.pos_embed": self._resize_pos_embed(embed, native, grid, prefix, official, trained)}
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
        """Set `channels`, `strides` and the trunk's `stop`; return the parameters that the levels depend on.

        It runs the trunk on a few cells and reads the parameters from the autograd graph, without a backward pass.
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
            if map_ is None or map_.ndim != 4 or (self.patch > 1 and map_.shape[2:] != (2, 2)):
                raise ZooError(f"module {level!r} of {self.spec.key} gives no (B, C, h, w) map: choose another one")
        self.channels: list[int] = [map_.shape[1] for map_ in maps]
        self.strides: list[int] = [round(side / map_.shape[2]) for map_ in maps]
        leaves = _leaves([map_.grad_fn for map_ in maps])
        return {key for key, parameter in self.trunk.named_parameters() if id(parameter) in leaves}

    def _freeze(self, reached: set[str]) -> None:
        """Train only the parameters of `finetune` that the levels depend on."""
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


class Trunk(nn.Module):
    """A model from `build_model` that returns the maps of `levels`, see `Backbone`, and the class token."""

    def __init__(self, model: Any, levels: list[int | str], key: str) -> None:
        super().__init__()
        self.model, self.depth = model, len(model.feature_info)
        self.patch: int = model.patch_embed.patch_size[0] if hasattr(model, "patch_embed") else 1
        modules, self.taps = dict(model.named_modules()), {}
        for level in levels:
            if isinstance(level, int) and not -self.depth <= level < self.depth:
                raise ZooError(f"level {level} of {key}: expected {-self.depth} to {self.depth - 1}, or a module")
            if isinstance(level, str):
                name = level.removesuffix(PRE)
                if name not in modules:
                    raise ZooError(f"{key} has no module {name!r} to read features from{nearest(name, modules)}")
                tap = self.taps[level] = Tap()
                if name == level:
                    modules[name].register_forward_hook(tap.keep_output)
                    continue
                relus = [module for module in modules[name].children() if isinstance(module, nn.ReLU)]
                if not relus:
                    raise ZooError(f"level {level!r} of {key}: that module has no ReLU, so leave out {PRE!r}")
                relus[-1].register_forward_pre_hook(tap.keep_input)  # the ReLU that ends a residual block
        self.levels = [level % self.depth if isinstance(level, int) else level for level in levels]
        self.numbers = {level for level in self.levels if isinstance(level, int)}
        self.stop = max(self.numbers, default=0)  # timm's later levels are not computed

    def forward(self, image: Tensor) -> tuple[list[Any], Tensor | None]:
        """Images (B, 3, H, W) -> a map (B, C, h, w) per level, None if its module was not reached; class token (B, C).

        A ViT's maps are views of its tokens, in channels-last memory.
        """
        numbers, vit = sorted(self.numbers | {self.stop}), self.patch > 1
        h, w = (side // self.patch for side in image.shape[-2:])
        prefix = getattr(self.model, "num_prefix_tokens", 0)
        options: dict[str, Any] = {"norm": True, "stop_early": True, "output_fmt": "NLC" if vit else "NCHW"}
        if prefix:
            options["return_prefix_tokens"] = True
        found = self.model.forward_intermediates(image, numbers, intermediates_only=True, **options)
        cls = found[-1][1][:, 0] if prefix and self.model.cls_token is not None else None
        outputs = [output for output, _ in found] if prefix else found  # ViT: (B, h*w, C), CNN: (B, C, h, w)
        if vit:
            outputs = [tokens.mT.unflatten(2, (h, w)) for tokens in outputs]
        maps: dict[int | str, Any] = dict(zip(numbers, outputs, strict=True))
        for level, tap in self.taps.items():
            kept, tap.kept = tap.kept, None
            if vit and kept is not None and kept.ndim == 3 and kept.shape[1] >= h * w:  # tokens, the cells' at the end
                kept = kept[:, -h * w :].mT.unflatten(2, (h, w))
            maps[level] = kept
        return [maps[level] for level in self.levels], cls


class Tap:
    """Keeps the input or the output of a module; its methods are forward hooks."""

    kept: Tensor | None = None

    def keep_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.kept = args[0].clone()  # an in-place ReLU writes into it

    def keep_output(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.kept = output.clone()  # the next layer may write into it (in-place ReLU, residual sums)


def _hxw(size: list[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _note_loaded(backbone: Backbone, keys: Any) -> None:
    """Mark the backbone as loaded if the state dict contained all of its weights."""
    if not any("trunk." in key for key in keys.missing_keys):
        backbone.pending = False


def _leaves(nodes: list[Any]) -> set[int]:
    """Ids of the tensors that the autograd graph of these nodes gives a gradient to."""
    seen, leaves = set(), set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves.add(id(getattr(node, "variable", None)))
            nodes += [following for following, _ in node.next_functions]
    return leaves
