"""ViTSC: features of both images perceive each other, and low-level correlation guides the flow to full resolution.

"Bridging the Gap between Semantic Correspondence and Robust Visual Representation", sections 4 and 5.2. There is no
released code: what the paper leaves open says `our choice:`. Widths are chosen so that the matching module has the
3.9 / 3.9 / 4.0 M parameters of Table 10 with DINOv2 S / B / L.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from corrzoo import ops
from corrzoo.backbones import Backbone, BackboneSpec
from corrzoo.geometry import Size, cell_centres, cells_to_pixels, cosine_maps, points_to_flow, sample, size_of
from corrzoo.heads.levels import resize, stack_levels
from corrzoo.losses import mean_where
from corrzoo.matcher import HEADS, Matcher
from corrzoo.precision import full
from corrzoo.types import Features, Match, Pair, ZooError

STRIDE = 8
"""Pixels to a cell of the grid that is matched on (3.1)."""
WIDTH, ATTENTION_HEADS = 256, 8
"""Channels and heads of the cross-perception. our choice: the natural width among those that Table 10 allows."""
PE_CELLS = 28
"""our choice: positions are encoded as if every image had the cells of the training size, 224 / 8, on a side."""


@HEADS.register
class ViTSC(Matcher):
    """Cross-perception, kernel soft-argmax, correlation-guided upsampler; EPE at full resolution and a triplet loss.

    The same weights serve any image size (ViTSC_h of Table 3 is trained at 224 and tested at 448).

    Args:
        enhancement: How the images' features perceive each other (Table 4): `interleaved` (eq. 7), `symmetric` (both
            at once, with the same weights, as GMFlow), `asymmetric` (the source alone, as ACTR), or `none`: the
            backbone's own features are matched, without a projection.
        layers: Layers of the cross-perception (Table 5: 1); 0 is `none`.
        attend_at: On which grid. our choice: `stride8`, as 3.1 upsamples before all else; `native` is the
            backbone's own grid, which is faster.
        upsampler: How the flow gets to full resolution (Table 6): guided by the correlation of `low`- or
            `high`-level features (eq. 8), by a CNN without guidance (`unguided`), or `bilinear`.
        radius: r of eq. 8 in cells of the guiding features. our choice: RAFT's 4, 16 pixels on the L-encoder's grid.
        head_resolution: Share of the image's resolution that the upsampler's CNNs run at (4.2: 1); what they answer is
            enlarged to the rest. 0.5 costs a quarter.
        low_stages: Stages of ResNet-18 that the L-encoder has (5.2: 3).
        low_weights: The L-encoder's `pretrained` ImageNet weights (5.2), `random`, or the path of a file. When not
            given, `random` where `weights` is, else `pretrained`.
        temperature: T of eq. 2, learnt (3.1: 0.03).
        sigma: Width of the soft-argmax kernel in cells. our choice, as Baseline's: a quarter of the grid's longer side.
        epe_weight: Lambda 1 of eq. 11 (5.2: 1).
        triplet_weight: Lambda 2 of eq. 11 (5.2: 10); 0 leaves the triplet loss out.
        margin: m of eq. 9 (5.2: 0.3).
        **options: What every head takes, see Matcher.
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
        for name, value in {"temperature": temperature, "sigma": sigma, "head_resolution": head_resolution}.items():
            if value is not None and value <= 0:
                raise ZooError(f"{name} {value}: expected a number above 0")
        self.attend_at, self.sigma = attend_at, sigma
        self.epe_weight, self.triplet_weight, self.margin = epe_weight, triplet_weight, margin
        perceive = enhancement != "none" and layers > 0
        self.project = nn.Conv2d(sum(self.backbone.channels), WIDTH, 1) if perceive else nn.Identity()
        self.perception = CrossPerception(layers, enhancement) if perceive else None
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.low, self.radius = None, radius
        if upsampler == "low":
            low_weights = low_weights or ("random" if self.backbone.weights == "random" else "pretrained")
            self.low = LowEncoder(low_weights, low_stages, self.backbone.spec)
        self.guided = upsampler in ("low", "high")
        guides = (2 * radius + 1) ** 2 if self.guided else 0
        self.upsampler = None if upsampler == "bilinear" else FlowUpsampler(guides, head_resolution)

    def prepare(self, features: Features) -> Features:
        """The map that is matched, (B, C, h, w), and behind it the L-encoder's, (B, 256, H/4, W/4)."""
        grid = stride_grid(size_of(features.image)) if self.attend_at == "stride8" else size_of(features.maps[-1])
        maps = [full(self.project(stack_levels(features.maps, grid)))]
        return features._replace(maps=maps if self.low is None else [*maps, self.low(features.image).maps[0]])

    def match(self, src: Features, trg: Features) -> Match:
        """Flow of every source pixel; the enhanced features go to the triplet loss."""
        image, trg_image = size_of(src.image), size_of(trg.image)
        a, b = src.maps[0], trg.maps[0]
        if self.perception is not None:
            a, b = self.perception(a, b)
        a, b = resize(a, stride_grid(image)), resize(b, stride_grid(trg_image))
        flow = self.initial_flow(a, b, image, trg_image)
        local = self.look_up(flow, src, trg) if self.guided else None
        flow = resize(flow, image) if self.upsampler is None else self.upsampler(flow, local, image)
        return Match(flow, extras={"src": a, "trg": b})

    def heat_maps(self, src: Features, trg: Features, points: Tensor) -> Tensor:
        """Cosines of the enhanced features, which the initial flow is read from."""
        enhanced = self.match(src, trg).extras
        return cosine_maps(enhanced["src"], enhanced["trg"], points, size_of(src.image))

    def initial_flow(self, a: Tensor, b: Tensor, src_image: Size, trg_image: Size) -> Tensor:
        """M of eq. 4: from features (B, C, h, w) of source and target, (B, 2, h, w) in pixels."""
        h, w = size_of(b)
        rows, columns = (rearrange(x, "b c h w -> b (h w) c") for x in (a, b))
        sigma, temperature = self.sigma or 0.25 * max(h, w), self.temperature.clamp(min=1e-3)
        cells = ops.match(rows, columns, (h, w), temperature, "argmax", sigma, backend=self.backend).xy
        return points_to_flow(cells_to_pixels(cells, (h, w), trg_image), size_of(a), src_image)

    def look_up(self, flow: Tensor, src: Features, trg: Features) -> Tensor:
        """C_local of eq. 8: (B, (2r + 1)^2, h, w), the correlation around where the flow (B, 2, h, w) leads."""
        grid, image, (H, W) = size_of(flow), size_of(src.image), size_of(trg.image)
        if self.low is None:
            source, target = resize(src.maps[0], grid), resize(trg.maps[0], stride_grid((H, W)))
        else:
            source, target = F.adaptive_avg_pool2d(src.maps[1], grid), trg.maps[1]
        h, w = size_of(target)
        # As in RAFT, the place is given: what is read there trains no flow but by the upsampler.
        points = cell_centres(grid, image, flow.device, flow.dtype) + rearrange(flow.detach(), "b xy h w -> b (h w) xy")
        rows, centre = rearrange(source, "b c h w -> b (h w) c"), points * points.new_tensor([w / W, h / H])
        local = ops.local_correlation(rows, target, centre, self.radius)
        return local.mT.unflatten(2, grid)

    def loss(self, match: Match, pair: Pair) -> dict[str, Tensor]:
        """Eq. 11: EPE over the pixels around the keypoints, in pixels, and the triplet loss over the keypoints."""
        epe = super().loss(match, pair)
        assert isinstance(epe, Tensor)
        terms = {"loss": self.epe_weight * epe, "epe": epe}
        if self.triplet_weight:
            src = sample(match.extras["src"], pair.src_kps, size_of(pair.src_img))
            trg = sample(match.extras["trg"], pair.trg_kps, size_of(pair.trg_img))
            triplet = triplet_loss(F.normalize(src, dim=-1), F.normalize(trg, dim=-1), pair.kps_mask, self.margin)
            terms |= {"loss": terms["loss"] + self.triplet_weight * triplet, "triplet": triplet}
        return terms


def triplet_loss(src: Tensor, trg: Tensor, mask: Tensor, margin: float) -> Tensor:
    """Eqs. 9 and 10: every keypoint is nearer to its own partner than to the partner of any other, by a margin.

    Args:
        src: (B, K, C) source features at the keypoints, the anchors. our choice: of length one, as a cosine sees them.
        trg: (B, K, C) target features; i is anchor i's positive, every j != i a negative.
        mask: (B, K) bool, which keypoints count.
        margin: m.

    Returns:
        Scalar: the mean over a pair's N (N - 1) triplets, and over the pairs that have two keypoints or more.
    """
    distance = torch.cdist(src, trg, compute_mode="donot_use_mm_for_euclid_dist")  # exact, also where it is small
    positive = distance.diagonal(dim1=1, dim2=2).unsqueeze(2)
    triplets = mask.unsqueeze(2) & mask.unsqueeze(1) & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    count = triplets.sum((1, 2))
    each = ((positive - distance + margin).relu() * triplets).sum((1, 2)) / count.clamp(min=1)
    return mean_where(each, count > 0)


def stride_grid(image: Size) -> Size:
    """The (h, w) that stride 8 comes nearest to on a (H, W) image."""
    return max(round(image[0] / STRIDE), 1), max(round(image[1] / STRIDE), 1)


# ---------------------------------------------------------------------- 4.1: cross-perception


class CrossPerception(nn.Module):
    """Stacked layers in which each image's features take up the other's.

    Args:
        layers: How many.
        order: Who is updated when: see the option `enhancement` of ViTSC. our choice: the rows of Table 4 use the
            same attention block, two a layer where source and target are updated by turns, else one.
    """

    def __init__(self, layers: int, order: str) -> None:
        super().__init__()
        self.order = order
        self.blocks = nn.ModuleList(AttentionBlock() for _ in range(2 * layers if order == "interleaved" else layers))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, 256, h, w) of source and target -> the same."""
        (grid_a, pos_a), (grid_b, pos_b) = ((size_of(x), position_encoding(x)) for x in (a, b))
        # our choice: whatever a backbone's scale is, what the blocks add must not drown it when training begins
        a, b = (F.layer_norm(rearrange(x, "b c h w -> b (h w) c"), (WIDTH,)) for x in (a, b))
        for i, block in enumerate(self.blocks):
            if self.order == "symmetric":
                a, b = block(a, b, pos_a, pos_b), block(b, a, pos_b, pos_a)
            elif self.order == "interleaved" and i % 2:
                b = block(b, a, pos_b, pos_a)  # perceives the new a
            else:
                a = block(a, b, pos_a, pos_b)
        return a.mT.unflatten(2, grid_a), b.mT.unflatten(2, grid_b)


class AttentionBlock(nn.Module):
    """Cross-attention, self-attention and feed-forward network, each with a LayerNorm before and a residual around it.

    our choice: positions go to queries and keys alone, so that the features that are matched hold none; and each
    branch begins at zero, so that training begins with the backbone's own representation.
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
        """Tokens x (B, N, 256) that ask, context (B, M, 256) that answers, and where they are -> (B, N, 256)."""
        query, context = self.norm_query(x) + pos, self.norm_context(context)
        x = x + self.cross(query, context + context_pos, context, need_weights=False)[0]
        value = self.norm_self(x)
        x = x + self.self_attention(value + pos, value + pos, value, need_weights=False)[0]
        return x + self.ffn(self.norm_ffn(x))


def position_encoding(maps: Tensor) -> Tensor:
    """(h*w, C) sines and cosines of where the cells of maps (B, C, h, w) are in their image, half for each axis."""
    at = cell_centres(size_of(maps), (PE_CELLS, PE_CELLS), maps.device, maps.dtype)
    frequency = 10_000 ** -torch.linspace(0, 1, maps.shape[1] // 4 + 1, device=maps.device, dtype=maps.dtype)[:-1]
    angle = at.unsqueeze(-1) * frequency  # (h*w, 2, C/4)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)


# ---------------------------------------------------------------------- 4.2: the correlation-guided upsampler


class LowEncoder(Backbone):
    """The L-encoder: ResNet-18 without its last stage, stages 2 and 3 without stride, at a quarter of the resolution.

    Args:
        weights: `pretrained`, `random`, or the path of a whole ResNet-18's weights.
        stages: How many of its stages stay.
        seen: The backbone whose normalisation the images come with.
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
        """What it keeps of the whole network's weights."""
        if self.pending:
            try:
                whole = Backbone("resnet18", self.weights).load().state_dict()
            except ZooError as error:
                raise ZooError(str(error).replace("--model.weights", "--model.low_weights")) from error
            self.load_state_dict({key: whole[key] for key in self.state_dict()})
        return self

    def forward(self, image: Tensor) -> Features:
        """Images (B, 3, H, W) as the other backbone normalised them -> one map (B, 256, H/4, W/4)."""
        return super().forward(image * self._scale + self._shift)


class FlowUpsampler(nn.Module):
    """Flow and local correlation, enlarged and encoded separately, become a full-resolution flow.

    our choice: what is learnt is added to the bilinearly enlarged flow and begins at zero; flows go in and come out in
    cells of 8 pixels, which keeps the network's numbers small and the same at every image size.

    Args:
        guides: Channels of the local correlation; 0 for an upsampler without guidance.
        resolution: Share of the image's resolution that the CNNs run at.
    """

    def __init__(self, guides: int, resolution: float) -> None:
        super().__init__()
        self.resolution = resolution
        self.guide = nn.Sequential(*cnn((guides, 128, 1), (128, 192, 3))) if guides else None
        self.flow = nn.Sequential(*cnn((2, 64, 7), (64, 128, 3)))
        last = zeroed(nn.Conv2d(256, 2, 3, padding=1))
        self.head = nn.Sequential(*cnn((320 if guides else 128, 256, 3), (256, 256, 3)), last)

    def forward(self, flow: Tensor, local: Tensor | None, image: Size) -> Tensor:
        """Flow (B, 2, h, w) in pixels and local correlation (B, guides, h, w) -> flow (B, 2, H, W)."""
        size = max(round(image[0] * self.resolution), 1), max(round(image[1] * self.resolution), 1)
        x = self.flow(resize(flow / STRIDE, size))
        if self.guide is not None and local is not None:
            x = torch.cat([self.guide(resize(local, size)), x], dim=1)
        return resize(flow, image) + resize(full(self.head(x)) * STRIDE, image)


def zeroed(layer: nn.Module) -> nn.Module:
    """A layer that answers zero until it has learnt."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def cnn(*convolutions: tuple[int, int, int]) -> list[nn.Module]:
    """Convolutions (channels in, channels out, side of the kernel), each with a ReLU behind it."""
    pairs = ([nn.Conv2d(i, o, k, padding=k // 2), nn.ReLU(inplace=True)] for i, o, k in convolutions)
    return [module for pair in pairs for module in pair]
