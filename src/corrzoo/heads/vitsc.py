"""ViTSC: the features of two images attend to each other, and low-level correlation guides the flow's upsampling.

"Bridging the Gap between Semantic Correspondence and Robust Visual Representation", sections 4 and 5.2. There is no
released code. The widths give the matching module the 3.9 / 3.9 / 4.0 M parameters of Table 10 with DINOv2 S / B / L.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from corrzoo import ops
from corrzoo.backbones import Backbone, BackboneSpec
from corrzoo.errors import check_above_zero
from corrzoo.geometry import (
    Size,
    cell_centres,
    cells_to_pixels,
    cosine_maps,
    pixels_to_cells,
    points_to_flow,
    sample,
    size_of,
)
from corrzoo.heads.levels import COLDEST, resize, stack_levels, stride_grid
from corrzoo.losses import Term, pair_means, weighted_means
from corrzoo.matcher import HEADS, Matcher
from corrzoo.precision import full
from corrzoo.types import Features, Match, Pair, ZooError

STRIDE = 8
"""Stride of the grid that is matched (3.1)."""
WIDTH, ATTENTION_HEADS = 256, 8
"""Channels and heads of the cross-perception. our choice: 256 is the usual width that fits Table 10."""
PE_CELLS = 28
"""our choice: positions are encoded as if every image had the cells of the training size, 224 / 8, on a side."""


@HEADS.register
class ViTSC(Matcher):
    """Cross-perception, kernel soft-argmax, correlation-guided upsampler; full-resolution EPE and a triplet loss.

    The same weights serve any image size (ViTSC_h of Table 3 is trained at 224 and tested at 448).

    Args:
        enhancement: How the features attend to each other (Table 4): `interleaved` (eq. 7), `symmetric` (both at
            once, with the same weights, as GMFlow), `asymmetric` (only the source, as ACTR), or `none`: the
            backbone's features are matched, without a projection.
        layers: Layers of the cross-perception (Table 5: 1); 0 is `none`.
        attend_at: Grid of the cross-perception. our choice: `stride8`, as 3.1 upsamples first; `native` is faster.
        upsampler: How the flow gets its full resolution (Table 6): guided by the correlation of `low`- or
            `high`-level features (eq. 8), by a CNN without guidance (`unguided`), or `bilinear`.
        radius: r of eq. 8 in cells of the guiding features. our choice: 4 as in RAFT, 16 pixels for the L-encoder.
        head_resolution: Resolution of the upsampler's CNNs as a share of the image's (4.2: 1). 0.5 costs a quarter.
        low_stages: Stages of ResNet-18 in the L-encoder (5.2: 3).
        low_weights: Weights of the L-encoder: `pretrained` on ImageNet (5.2), `random` (trained at `lr`), or the path
            of a file. None is `random` if `weights` is, otherwise `pretrained`.
        temperature: Initial T of eq. 2, which is trained (3.1: 0.03).
        sigma: Width of the soft-argmax kernel in cells. our choice, as for Baseline: a quarter of the longer side.
        epe_weight: Lambda 1 of eq. 11 (5.2: 1).
        triplet_weight: Lambda 2 of eq. 11 (5.2: 10); 0 turns the triplet loss off.
        margin: m of eq. 9 (5.2: 0.3).
        **options: Options of `Matcher`.
    """

    evaluation_options: ClassVar[frozenset[str]] = Matcher.evaluation_options | {"sigma"}

    def __init__(
        self,
        enhancement: Literal["interleaved", "symmetric", "asymmetric", "none"] = "interleaved",
        layers: int = 1,
        attend_at: Literal["stride8", "native"] = "stride8",
        upsampler: Literal["low", "high", "unguided", "bilinear"] = "low",
        radius: int = 4,
        head_resolution: float = 1.0,
        low_stages: Literal[1, 2, 3] = 3,
        low_weights: str | None = None,
        temperature: float = 0.03,
        sigma: float | None = None,
        epe_weight: float = 1.0,
        triplet_weight: float = 10.0,
        margin: float = 0.3,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_above_zero(temperature=temperature, sigma=sigma, head_resolution=head_resolution)
        self.attend_at, self.sigma = attend_at, sigma
        self.epe_weight, self.triplet_weight, self.margin = epe_weight, triplet_weight, margin
        perceive = enhancement != "none" and layers > 0
        self.project = projection(sum(self.backbone.channels)) if perceive else nn.Identity()
        self.perception = CrossPerception(layers, enhancement) if perceive else None
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.low, self.radius = None, radius
        if upsampler == "low":
            low_weights = low_weights or ("random" if self.backbone.weights == "random" else "pretrained")
            self.low = LowEncoder(low_weights, low_stages, self.backbone.spec)
        self.guided = upsampler in ("low", "high")
        guides = (2 * radius + 1) ** 2 if self.guided else 0
        self.upsampler = None if upsampler == "bilinear" else FlowUpsampler(guides, head_resolution)

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups as in `Matcher`.

        our choice: an L-encoder with random weights trains at the head's rate; the backbone's keeps pretrained weights.
        """
        groups = super().param_groups()
        if self.low is None or self.low.weights != "random":
            return groups
        guide = {id(parameter) for parameter in self.low.parameters()}
        head, backbone = groups[0], groups[-1]
        head["params"] += [p for p in backbone["params"] if id(p) in guide]
        backbone["params"] = [p for p in backbone["params"] if id(p) not in guide]
        return [group for group in groups if group["params"]]

    def prepare(self, features: Features) -> Features:
        """The map to match (B, C, h, w), then the L-encoder's (B, 256, H/4, W/4) if there is one."""
        native = size_of(features.maps[-1])
        grid = native if self.attend_at == "native" else stride_grid(size_of(features.image), STRIDE)
        maps = [full(self.project(stack_levels(features.maps, grid)))]
        return features.with_maps(maps if self.low is None else [*maps, self.low(features.image).maps[0]])

    def match(self, src: Features, trg: Features) -> Match:
        """Flow (B, 2, H, W) of every source pixel; `extras` has the enhanced features for the triplet loss."""
        image, trg_image = size_of(src.image), size_of(trg.image)
        a, b = self.enhance(src, trg)  # (B, C, H/8, W/8) each
        flow = self.initial_flow(a, b, image, trg_image)  # (B, 2, H/8, W/8)
        local = self.look_up(flow, src, trg) if self.guided else None  # (B, (2r + 1)^2, H/8, W/8)
        flow = resize(flow, image) if self.upsampler is None else self.upsampler(flow, local, image)
        return Match(flow, extras={"src": a, "trg": b})

    def enhance(self, src: Features, trg: Features) -> tuple[Tensor, Tensor]:
        """F^A' and F^B' of eq. 7 on the grid that is matched, (B, C, H/8, W/8) each."""
        a, b = src.maps[0], trg.maps[0]
        if self.perception is not None:
            a, b = self.perception(a, b)
        return resize(a, stride_grid(size_of(src.image), STRIDE)), resize(b, stride_grid(size_of(trg.image), STRIDE))

    def heat_maps(self, src: Features, trg: Features, points: Tensor) -> Tensor:
        """Cosines of the enhanced features, from which the initial flow is read."""
        return cosine_maps(*self.enhance(src, trg), points, size_of(src.image))

    def initial_flow(self, a: Tensor, b: Tensor, src_image: Size, trg_image: Size) -> Tensor:
        """M of eq. 4: features (B, C, h, w) of source and target -> flow (B, 2, h, w) in pixels."""
        rows, columns = (rearrange(x, "b c h w -> b (h w) c") for x in (a, b))
        grid, temperature = size_of(b), self.temperature.clamp(min=COLDEST)
        sigma = self.sigma or 0.25 * max(grid)
        cells = ops.match(rows, columns, grid, temperature, "argmax", sigma, backend=self.backend).xy  # (B, h*w, 2)
        return points_to_flow(cells_to_pixels(cells, grid, trg_image), size_of(a), src_image)

    def look_up(self, flow: Tensor, src: Features, trg: Features) -> Tensor:
        """C_local of eq. 8: the correlation around the cells that the flow (B, 2, h, w) leads to."""
        grid, image, trg_image = size_of(flow), size_of(src.image), size_of(trg.image)
        if self.low is None:
            source, target = resize(src.maps[0], grid), resize(trg.maps[0], stride_grid(trg_image, STRIDE))
        else:
            source, target = F.adaptive_avg_pool2d(src.maps[1], grid), trg.maps[1]
        # Detached as in RAFT: where the correlation is read does not train the flow.
        points = cell_centres(grid, image, flow.device, flow.dtype) + rearrange(flow.detach(), "b xy h w -> b (h w) xy")
        rows, centre = rearrange(source, "b c h w -> b (h w) c"), pixels_to_cells(points, size_of(target), trg_image)
        local = ops.local_correlation(rows, target, centre, self.radius)  # (B, h*w, (2r + 1)^2)
        return local.mT.unflatten(2, grid)

    def loss(self, match: Match, pair: Pair) -> dict[str, Tensor]:
        """Eq. 11: EPE in pixels around the keypoints, and the triplet loss at the keypoints.

        our choice: the triplet loss (eq. 10, of features F) reads the enhanced features.
        """
        terms = {"epe": self.keypoint_errors(match, pair)}
        if self.triplet_weight:
            src = sample(match.extras["src"], pair.src_kps, size_of(pair.src_img))
            trg = sample(match.extras["trg"], pair.trg_kps, size_of(pair.trg_img))
            src, trg = F.normalize(src, dim=-1), F.normalize(trg, dim=-1)
            terms["triplet"] = triplet_losses(src, trg, pair.kps_mask, self.margin)
        return weighted_means(terms, {"epe": self.epe_weight, "triplet": self.triplet_weight})


# ---------------------------------------------------------------------- 4.1: cross-perception


def projection(channels: int) -> nn.Conv2d:
    """The backbone's channels to WIDTH.

    our choice: an orthogonal weight and a zero bias at the start nearly keep the cosines of the backbone's features.
    """
    layer = nn.Conv2d(channels, WIDTH, 1)
    nn.init.orthogonal_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class CrossPerception(nn.Module):
    """Stacked layers in which the features of each image attend to the other's.

    Args:
        layers: How many.
        order: The option `enhancement` of ViTSC. our choice: all rows of Table 4 use the same attention block, two per
            layer if source and target are updated in turn, otherwise one.
    """

    def __init__(self, layers: int, order: str) -> None:
        super().__init__()
        self.order = order
        self.blocks = nn.ModuleList(AttentionBlock() for _ in range(2 * layers if order == "interleaved" else layers))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, 256, h, w) of source and target -> enhanced maps of the same shapes."""
        (grid_a, pos_a), (grid_b, pos_b) = ((size_of(x), position_encoding(x)) for x in (a, b))
        # our choice: LayerNorm, as the blocks' output would dominate features of small norm early in training
        a, b = (F.layer_norm(rearrange(x, "b c h w -> b (h w) c"), (WIDTH,)) for x in (a, b))
        for i, block in enumerate(self.blocks):
            if self.order == "symmetric":
                a, b = block(a, b, pos_a, pos_b), block(b, a, pos_b, pos_a)
            elif self.order == "interleaved" and i % 2:
                b = block(b, a, pos_b, pos_a)  # attends to the updated a
            else:
                a = block(a, b, pos_a, pos_b)
        return a.mT.unflatten(2, grid_a), b.mT.unflatten(2, grid_b)


class AttentionBlock(nn.Module):
    """Cross-attention, self-attention and feed-forward network, each pre-normalised and residual.

    our choice: positions are added to queries and keys only, so that the matched features contain none. Each branch
    starts at zero, so that training starts from the backbone's representation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm_query, self.norm_context, self.norm_self, self.norm_ffn = (nn.LayerNorm(WIDTH) for _ in range(4))
        self.cross = nn.MultiheadAttention(WIDTH, ATTENTION_HEADS, batch_first=True)
        self.self_attention = nn.MultiheadAttention(WIDTH, ATTENTION_HEADS, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), zeroed(nn.Linear(4 * WIDTH, WIDTH)))
        zeroed(self.cross.out_proj)
        zeroed(self.self_attention.out_proj)

    def forward(self, x: Tensor, context: Tensor, pos: Tensor, context_pos: Tensor) -> Tensor:
        """Tokens x (B, N, 256) that attend to context (B, M, 256), and the positions (N or M, 256) of both."""
        query, context = self.norm_query(x) + pos, self.norm_context(context)
        x = x + self.cross(query, context + context_pos, context, need_weights=False)[0]
        value = self.norm_self(x)
        x = x + self.self_attention(value + pos, value + pos, value, need_weights=False)[0]
        return x + self.ffn(self.norm_ffn(x))


def position_encoding(maps: Tensor) -> Tensor:
    """(h*w, C) sines and cosines of the relative positions of the cells of maps (B, C, h, w), half for each axis."""
    at = cell_centres(size_of(maps), (PE_CELLS, PE_CELLS), maps.device, maps.dtype)  # (h*w, 2)
    frequency = 10_000 ** -torch.linspace(0, 1, maps.shape[1] // 4 + 1, device=maps.device, dtype=maps.dtype)[:-1]
    angle = at.unsqueeze(-1) * frequency  # (h*w, 2, C/4)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)


# ---------------------------------------------------------------------- 4.2: the correlation-guided upsampler


class LowEncoder(Backbone):
    """The L-encoder: ResNet-18 without its last stage, stages 2 and 3 without stride: a quarter of the resolution.

    Args:
        weights: `pretrained`, `random`, or the path of the weights of a whole ResNet-18.
        stages: How many stages to keep.
        seen: The spec of the backbone that the images are normalised for.
    """

    _scale: Tensor
    _shift: Tensor

    def __init__(self, weights: str, stages: int, seen: BackboneSpec) -> None:
        super().__init__("resnet18", weights, levels=[stages])
        model = self.trunk.model
        for stage in range(2, 5):
            if stage > stages:
                setattr(model, f"layer{stage}", nn.Identity())
            for module in getattr(model, f"layer{stage}").modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)
        self.strides, self.num_params = [4], sum(p.numel() for p in model.parameters())
        mean, std = torch.tensor(seen.mean).view(3, 1, 1), torch.tensor(seen.std).view(3, 1, 1)
        self.register_buffer("_scale", std / self._std, persistent=False)
        self.register_buffer("_shift", (mean - self._mean) / self._std, persistent=False)

    def load(self) -> "LowEncoder":
        """Load the weights of the kept stages from those of a whole ResNet-18."""
        if self.pending:
            try:
                whole = Backbone("resnet18", self.weights).load().state_dict()
            except ZooError as error:
                raise ZooError(str(error).replace("--model.weights", "--model.low_weights")) from error
            self.load_state_dict({key: whole[key] for key in self.state_dict()})
        return self

    def forward(self, image: Tensor) -> Features:
        """Images (B, 3, H, W) normalised for the other backbone -> one map (B, 256, H/4, W/4)."""
        return super().forward(image * self._scale + self._shift)


class FlowUpsampler(nn.Module):
    """A full-resolution flow from resized flow and local correlation, which are encoded separately.

    our choice: the CNNs' output is added to the bilinearly resized flow and starts at zero. Flows are in cells of 8
    pixels inside, so that the network's numbers are small and do not depend on the image size.

    Args:
        guides: Channels of the local correlation; 0 for an upsampler without guidance.
        resolution: Resolution of the CNNs as a share of the image's.
    """

    def __init__(self, guides: int, resolution: float) -> None:
        super().__init__()
        self.resolution = resolution
        self.guide = cnn((guides, 128, 1), (128, 192, 3)) if guides else None
        self.flow = cnn((2, 64, 7), (64, 128, 3))
        last = zeroed(nn.Conv2d(256, 2, 3, padding=1))
        self.head = cnn((320 if guides else 128, 256, 3), (256, 256, 3)).append(last)

    def forward(self, flow: Tensor, local: Tensor | None, image: Size) -> Tensor:
        """Flow (B, 2, h, w) in pixels and local correlation (B, guides, h, w) -> flow (B, 2, H, W)."""
        size = max(round(image[0] * self.resolution), 1), max(round(image[1] * self.resolution), 1)
        x = self.flow(resize(flow / STRIDE, size))  # (B, 128, *size)
        if self.guide is not None and local is not None:
            x = torch.cat([self.guide(resize(local, size)), x], dim=1)  # (B, 320, *size)
        return resize(flow, image) + resize(full(self.head(x)) * STRIDE, image)


# ---------------------------------------------------------------------- 4.3: the triplet loss


def triplet_losses(src: Tensor, trg: Tensor, mask: Tensor, margin: float) -> Term:
    """Eqs. 9 and 10: each keypoint's feature is nearer to its match than to any other keypoint's, by a margin.

    Args:
        src: (B, K, C) source features at the keypoints, the anchors. our choice: of unit length, as for a cosine.
        trg: (B, K, C) target features; i is the positive of anchor i, and every j != i a negative.
        mask: (B, K) bool, which rows are keypoints.
        margin: m.

    Returns:
        (B,) mean over each pair's N (N - 1) triplets, and which pairs count: those with two keypoints or more.
    """
    distance = torch.cdist(src, trg, compute_mode="donot_use_mm_for_euclid_dist")  # (B, K, K), exact if small, too
    positive = distance.diagonal(dim1=1, dim2=2).unsqueeze(2)
    triplets = mask.unsqueeze(2) & mask.unsqueeze(1) & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return pair_means((positive - distance + margin).relu(), triplets)


# ---------------------------------------------------------------------- helpers


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all parameters zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def cnn(*convolutions: tuple[int, int, int]) -> nn.Sequential:
    """Convolutions of (channels in, channels out, kernel side), each followed by a ReLU."""
    layers = nn.Sequential()
    for inputs, outputs, side in convolutions:
        layers.append(nn.Conv2d(inputs, outputs, side, padding=side // 2)).append(nn.ReLU(inplace=True))
    return layers
