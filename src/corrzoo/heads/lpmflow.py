"""LPMFlow: layout-aware representations (LARL), progressive super-resolution (PFSR), multi-scale integration (MMFI).

"Pixel-level Semantic Correspondence through Layout-aware Representation Learning and Multi-scale Matching
Integration", CVPR 2024, its supplement, and its released code, which decides where they differ.
"""

from functools import partial, reduce
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from corrzoo.geometry import size_of
from corrzoo.heads.levels import nearly_unit
from corrzoo.heads.tokens import (
    ATTENTION_HEADS,
    REFINED_CHANNELS,
    UPSCALE,
    Attention,
    CrossAttention,
    FeatureProjection,
    FlowHead,
    Recomputed,
    SelfAttention,
    SoftArgmax,
    TokenMatcher,
    WindowRefinement,
    arf,
    as_map,
    check_windows,
    init_linear,
    mlp,
    offsets,
    to_pixels,
    upscale,
)
from corrzoo.losses import weighted_means
from corrzoo.matcher import HEADS
from corrzoo.precision import full, full_precision
from corrzoo.types import Features, Match, Pair, ZooError

MASKED_SHARE = 0.25
"""P: share of the top-K tokens that are replaced."""
CONTRAST = 0.1
"""Temperature of the self-contrastive loss (released code)."""
SCALES = ("11", "12", "21", "22")
"""Pairs of scales that are matched: source, then target; 1 is coarse, 2 is fine."""
FINE = 2
"""Ratio of the fine grid's side to the coarse grid's."""


@HEADS.register
class LPMFlow(TokenMatcher):
    """LARL encodes both images' tokens together, PFSR matches them on four pairs of scales, MMFI refines the flows.

    With iBOT-B at 256 it has 176,167,106 parameters and equals the released model, which has 179,136,194. The other
    2,969,088 never influence its output: `masked_tokens`; in `encoder` `cls_token`, `pos_embed`, `patch_embed` and
    `spatial_attention`; `norm3` and `norm4` of each decoder; and the position embeddings of 1,025 tokens in decoder_s1,
    257 in decoder_s3.

    Args:
        depth: Number of blocks of the layout encoder (released code: 6).
        dropout: Dropout of embeddings, attention outputs and MLPs (released code: 0.1).
        top_k: Number of foreground source tokens that may be replaced (supplement 2.3: 64). 0 turns replacement and
            the self-contrastive loss off.
        foreground: What a source token is compared with (supplement 1.2): `both` adds its cosines with the two class
            tokens (released code), `mean` takes the cosine with their mean (paper).
        rptc_weight: Lambda, the initial weight of the self-contrastive loss (supplement 2.3: 0.2).
        rptc_decline: Share of lambda by which the weight falls each epoch, to zero (supplement 2.3: 0.1). Default: the
            released code's schedule, lambda / epoch, and a tenth of lambda after epoch 10.
        windows: Window sides of the flow refinement, applied one after the other (coarse to fine).
        larl: Ablation: tokens attend to both images (`joint`), to their own (`isolated`), or to the other (`cross`).
            With `off`, the backbone's tokens are matched.
        region_pe: Ablation: attention of the encoder has a bias by region pair and offset.
        pfsr: Ablation: `full`; `no_interactive`, without matching across scales (our reading); `no_internal`, fine
            tokens come from the cross-scale decoder alone (our reading); `no_feature_block`, tokens are enlarged
            bilinearly only; `off`, the coarse scale alone.
        flows: Ablation: flows that are integrated, by the scales of source and target. The last one is refined.
        mmfi: Ablation: integrate and refine the flows. Without it, the last flow, enlarged.
        **options: Options of TokenMatcher and Matcher.
    """

    neighbours: Tensor

    def __init__(
        self,
        depth: int = 6,
        dropout: float = 0.1,
        top_k: int = 64,
        foreground: Literal["both", "mean"] = "both",
        rptc_weight: float = 0.2,
        rptc_decline: float | None = None,
        windows: list[int] = [16, 8, 4],  # noqa: B006 - never written to; a plain default is what --help shows
        larl: Literal["joint", "isolated", "cross", "off"] = "joint",
        region_pe: bool = True,
        pfsr: Literal["full", "no_interactive", "no_internal", "no_feature_block", "off"] = "full",
        flows: list[str] = ["11", "12", "21", "22"],  # noqa: B006
        mmfi: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        C, g = self.width, self.grid
        self.foreground, self.rptc_weight, self.rptc_decline = foreground, rptc_weight, rptc_decline
        self.top_k = 0 if larl == "off" else min(top_k, g * g)
        self.masked = round(MASKED_SHARE * self.top_k)
        if self.masked:
            self.pos_embed_masked = nn.Parameter(torch.zeros(1, 1 + g * g, C))
            self.register_buffer("neighbours", grid_neighbours(g), persistent=False)
        self.encoder = None if larl == "off" else LayoutEncoder(C, g, depth, dropout, region_pe, larl)
        self.pyramid = FeatureSuperResolution(C, g, dropout, pfsr)
        self.flows = [s for s in flows if s in self.pyramid.scales] if mmfi else self.pyramid.scales[-1:]
        if not flows or not set(flows) <= set(SCALES) or not self.flows:
            raise ZooError(f"flows {flows}: expected some of {', '.join(self.pyramid.scales)} (scales of both images)")
        self.soft_argmax = SoftArgmax(FINE * g)
        self.integration = FlowIntegration(C, FINE * g, len(self.flows), windows) if mmfi else None
        if not mmfi:  # nothing reads the last decoder's tokens, and distributed training waits for all that trains
            self.pyramid.last.cross_attention.proj.requires_grad_(False)
        self.apply_options()

    def match(self, src: Features, trg: Features) -> Match:
        """Encode, match at every scale, integrate; during training, replace some source tokens first."""
        s, t, extras = self.tokens(src), self.tokens(trg), {}  # (B, 1 + g*g, C)
        if self.training and self.masked:
            s, extras["masked"] = self.hide_tokens(s, t)
        if self.encoder is not None:
            s, t = self.encoder(s, t)
            extras["tokens"] = s
        correlations, features = self.pyramid(s, t)
        fine = torch.cat([to_fine(correlations[scales], self.grid) for scales in self.flows])  # (F*B, 4*g*g, 4*g*g)
        flows = list(upscale(self.soft_argmax(fine)).chunk(len(self.flows)))  # (B, 2, 8g, 8g) each
        flow = flows[-1]
        if self.integration is not None:
            flow = flow + self.integration(flows, as_map(features))
        return Match(to_pixels(flow, size_of(src.image)), correlations[self.flows[-1]], extras)

    def loss(self, match: Match, pair: Pair) -> dict[str, Tensor]:
        """EPE and, where tokens were replaced, the self-contrastive loss of the pairs that have keypoints."""
        terms = {"epe": self.keypoint_errors(match, pair)}
        if "masked" in match.extras:
            rptc = self_contrast(match.extras["tokens"], match.extras["masked"], self.neighbours)
            terms["rptc"] = rptc, pair.kps_mask.any(1)
        return weighted_means(terms, {"epe": 1.0, "rptc": self.rptc_rate(self.current_epoch)})

    def hide_tokens(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Replace some foreground source tokens (B, 1 + g*g, C) by the sum of the two class tokens; their positions.

        As released, a position embedding is added to all source tokens here, and so in training alone.
        """
        with torch.no_grad(), full_precision(s):
            heat = self.foreground_heat(full(s[:, 1:]), full(s[:, :1]), full(t[:, :1]))  # (B, g*g)
            best = 1 + heat.topk(self.top_k).indices  # (B, K)
            masked = best.gather(1, self.draw_ranks(len(s), s.device))
            hidden = torch.zeros_like(s[..., 0], dtype=torch.bool).scatter(1, masked, True)  # (B, 1 + g*g)
            mixed = s[:, :1] + t[:, :1]  # (B, 1, C)
        return torch.where(hidden.unsqueeze(-1), mixed, s) + self.pos_embed_masked, masked

    def foreground_heat(self, tokens: Tensor, src_cls: Tensor, trg_cls: Tensor) -> Tensor:
        """(B, N) similarity of the tokens (B, N, C) to the class tokens (B, 1, C) of both images."""

        unit = partial(nearly_unit, dim=-1)
        shared = unit(src_cls) + unit(trg_cls) if self.foreground == "both" else unit((src_cls + trg_cls) / 2)
        return (unit(tokens) * shared).sum(-1)

    def draw_ranks(self, count: int, device: torch.device) -> Tensor:
        """Draw (count, masked) different numbers below top_k in each row."""
        return torch.rand(count, self.top_k, device=device).argsort(1)[:, : self.masked]

    def rptc_rate(self, epoch: int) -> float:
        """Weight of the self-contrastive loss: the guidance is gradual."""
        if self.rptc_decline is not None:
            return self.rptc_weight * max(1 - self.rptc_decline * epoch, 0)
        return self.rptc_weight * (0.1 if epoch > 10 else 1 / max(epoch, 1))


class LayoutEncoder(nn.Module):
    """LARL: ViT blocks over the tokens of both images, with a region-based position embedding."""

    def __init__(self, dim: int, grid: int, depth: int, dropout: float, region_pe: bool, larl: str) -> None:
        super().__init__()
        cells, one = torch.empty(1, grid * grid, dim), torch.empty(1, 1, dim)
        for embed in (cells, one):
            nn.init.trunc_normal_(embed, std=0.02)
        self.cls_embed_src, self.cls_embed_trg = nn.Parameter(one), nn.Parameter(one.clone())
        self.pos_embed_src, self.pos_embed_trg = nn.Parameter(cells), nn.Parameter(cells.clone())  # equal, as released
        self.segment_src, self.segment_trg = (
            nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02)) for _ in range(2)
        )
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(SelfAttention(dim, dropout, bias=RegionBias(grid, region_pe, larl)) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_linear)

    def forward(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, 1 + g*g, C) of source and target -> the same."""
        s_cls, s = s[:, :1] + self.cls_embed_src, s[:, 1:] + self.pos_embed_src + self.segment_src
        t_cls, t = t[:, :1] + self.cls_embed_trg, t[:, 1:] + self.pos_embed_trg + self.segment_trg
        x = self.drop(torch.cat([s_cls, s, t_cls, t], dim=1))  # (B, 2 + 2*g*g, C)
        s, t = self.norm(self.blocks(x)).chunk(2, dim=1)
        return s, t


class RegionBias(nn.Module):
    """Bias of the attention's logits: a learned number for each offset in each of the four regions.

    Regions are source to source, source to target and so on (supplement 1.1). Class tokens have no bias.
    `larl: isolated` masks the regions that join the images, `larl: cross` the others.
    """

    index: Tensor
    barred: Tensor

    def __init__(self, grid: int, region_pe: bool, larl: str) -> None:
        super().__init__()
        tokens, span = 1 + grid * grid, 2 * grid - 1
        self.table = None
        if region_pe:
            self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(ATTENTION_HEADS, 4 * span**2), std=0.02))
            row, column = (offsets(grid) + grid - 1).unbind(-1)  # from 0
            index = torch.full((2, tokens, 2, tokens), 4 * span**2)  # class tokens: the zero after the table's end
            region = torch.arange(4).view(2, 1, 2, 1)  # 2 * query's image + key's
            index[:, 1:, :, 1:] = 4 * (row * span + column).unsqueeze(1) + region
            self.register_buffer("index", index.flatten(0, 1).flatten(1), persistent=False)
        if larl != "joint":
            image = torch.arange(2).repeat_interleave(tokens)
            same = image.unsqueeze(1) == image
            self.register_buffer("barred", ~same if larl == "isolated" else same, persistent=False)
        self.larl = larl

    def forward(self) -> Tensor | None:
        """(heads, 2 + 2*g*g, 2 + 2*g*g); None when there is nothing to add."""
        bias = None
        if self.table is not None:
            bias = F.pad(self.table, (0, 1)).index_select(1, self.index.flatten()).unflatten(1, self.index.shape)
        if self.larl != "joint":
            none = torch.zeros(ATTENTION_HEADS, 1, 1, device=self.barred.device) if bias is None else bias
            bias = none.masked_fill(self.barred, -torch.inf)
        return bias


class FeatureSuperResolution(nn.Module):
    """PFSR: match coarse, across the scales, and fine; `12` is source coarse, target fine."""

    def __init__(self, dim: int, grid: int, dropout: float, pfsr: str) -> None:
        super().__init__()
        coarse, fine = {"coarse": 1 + grid**2}, {"fine": 1 + (FINE * grid) ** 2}
        self.interactive, self.internal = pfsr not in ("no_interactive", "off"), pfsr != "no_internal"
        self.scales = ["11"] if pfsr == "off" else list(SCALES) if self.interactive else ["11", "22"]
        self.decoder1 = MatchingDecoder(dim, coarse, dropout)
        if pfsr != "off":
            self.up = TokenUpsampling(dim, grid, pfsr != "no_feature_block")
            self.decoder3 = MatchingDecoder(dim, fine, dropout)
        if self.interactive:
            self.decoder2 = MatchingDecoder(dim, coarse | fine, dropout)

    @property
    def last(self) -> "MatchingDecoder":
        """The decoder at the finest scale."""
        return self.decoder1 if self.scales == ["11"] else self.decoder3

    def forward(self, s: Tensor, t: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Coarse tokens -> correlations by their scales, and source tokens at the finest one."""
        s1, t1, m11 = self.decoder1(s, t)
        if self.scales == ["11"]:
            return {"11": m11}, s1
        s2, t2 = self.up(torch.cat([s1, t1])).chunk(2)  # (B, 1 + 4*g*g, C)
        m = {"11": m11}
        if self.interactive:
            s12, t12, m["12"] = self.decoder2(s1, t2)  # the same decoder both ways
            s21, t21, m["21"] = self.decoder2(s2, t1)
            s2, t2 = s21, t12
            if self.internal:
                s12, t21 = self.up(torch.cat([s12, t21])).chunk(2)
                s2, t2 = s12 + s21, t12 + t21
        s2, _, m["22"] = self.decoder3(s2, t2)
        return m, s2


class MatchingDecoder(Recomputed):
    """One block that matches source and target tokens, which may have different scales.

    `tokens` is the number of tokens at each scale that occurs, by its name.
    """

    def __init__(self, dim: int, tokens: dict[str, int], dropout: float) -> None:
        super().__init__()
        self.scales = {count: name for name, count in tokens.items()}
        self.pos_embed_src, self.pos_embed_trg = (
            nn.ParameterDict({name: torch.zeros(1, count, dim) for name, count in tokens.items()}) for _ in range(2)
        )
        self.self_attention = Attention(dim, dropout)
        self.cross_attention = CrossAttention(dim, dropout)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim, dropout)

    def compute(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, 1 + N, C) and (B, 1 + M, C) -> the same, and the correlation of their cells (B, N, M).

        As released, the source has no MLP after its self-attention.
        """
        s = s + self.pos_embed_src[self.scales[s.shape[1]]]
        t = t + self.pos_embed_trg[self.scales[t.shape[1]]]
        s = s + arf(self.self_attention(self.norm1(s)))
        s = s + self.norm2(s)
        t = t + arf(self.self_attention(self.norm1(t)))
        t = t + self.mlp(self.norm2(t))
        update, correlation = self.cross_attention(self.norm1(s), self.norm1(t))
        s = s + arf(update)
        s = s + self.mlp(self.norm2(s))
        return s, t, correlation[:, 1:, 1:]


class TokenUpsampling(nn.Module):
    """Feature super-resolution block: cells doubled on each axis, then refined in windows; the class token stays."""

    def __init__(self, dim: int, grid: int, refine: bool) -> None:
        super().__init__()
        if refine:
            check_windows([4], FINE * grid, grid)
        self.refine = nn.Sequential(*[WindowRefinement(dim, 4) for _ in range(2 if refine else 0)])

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 1 + g*g, C) -> (B, 1 + 4*g*g, C)."""
        fine = F.interpolate(as_map(tokens), scale_factor=float(FINE), mode="bilinear", align_corners=False)
        return torch.cat([tokens[:, :1], rearrange(self.refine(fine), "b c h w -> b (h w) c")], dim=1)


class FlowIntegration(nn.Module):
    """MMFI: `flows` flows and the source's features are refined together, from wide windows to narrow ones.

    `grid` is the side of the fine grid.
    """

    def __init__(self, dim: int, grid: int, flows: int, windows: list[int]) -> None:
        super().__init__()
        check_windows(windows, UPSCALE * grid, grid // FINE)
        self.project = FeatureProjection(dim, REFINED_CHANNELS - 2 * flows, UPSCALE * grid)
        self.refine = nn.ModuleList(WindowRefinement(REFINED_CHANNELS, window) for window in windows)
        self.head = FlowHead()

    def forward(self, flows: list[Tensor], features: Tensor) -> Tensor:
        """Flows (B, 2, 8g, 8g) each and features (B, C, h, w) -> the last flow's update (B, 2, 8g, 8g)."""
        x = torch.cat([flows[0], self.project(features), *flows[1:]], dim=1)  # (B, 96, 8g, 8g)
        refined = []
        for refine in self.refine:
            x = refine(x)
            refined.append(x)
        return self.head(reduce(torch.add, refined))


def to_fine(correlation: Tensor, grid: int) -> Tensor:
    """(B, N, M) with the source, the target or both on the g x g grid -> (B, 4*g*g, 4*g*g), both on the fine one."""
    for _ in range(2):  # the target's cells, then the source's
        if correlation.shape[2] == grid * grid:
            maps = rearrange(correlation, "b n (h w) -> b n h w", h=grid)
            maps = F.interpolate(maps, scale_factor=float(FINE), mode="bilinear", align_corners=True)
            correlation = maps.flatten(2)
        correlation = correlation.mT
    return correlation


def self_contrast(tokens: Tensor, masked: Tensor, neighbours: Tensor) -> Tensor:
    """L_c (B,): InfoNCE of each replaced token between its neighbours' mean and the sample's other replaced tokens.

    Source tokens (B, 1 + g*g, C) after the encoder, positions `masked` (B, m) of the replaced ones, and the weights of
    `grid_neighbours`. The neighbours carry no gradient.
    """
    with full_precision(tokens):
        tokens = full(tokens)
        query = F.normalize(tokens.take_along_dim(masked.unsqueeze(-1), 1), dim=-1)  # (B, m, C)
        around = F.normalize(neighbours.to(tokens.dtype)[masked - 1] @ tokens[:, 1:].detach(), dim=-1)  # (B, m, C)
        positive = (query * around).sum(-1, keepdim=True)  # (B, m, 1)
        own = torch.eye(masked.shape[1], dtype=torch.bool, device=tokens.device)
        logits = torch.where(own, positive, query @ query.mT) / CONTRAST  # (B, m, m), negatives off the diagonal
        return (logits.logsumexp(-1) - logits.diagonal(dim1=1, dim2=2)).mean(1)


def grid_neighbours(grid: int) -> Tensor:
    """(g*g, g*g) weights that average each cell's up to eight neighbours."""
    adjacent = (offsets(grid).abs().amax(-1) == 1).float()
    return adjacent / adjacent.sum(1, keepdim=True)
