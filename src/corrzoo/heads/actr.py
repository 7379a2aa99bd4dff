"""ACTR: asymmetric alignment of the two images' tokens, then super-resolution of several flows.

"Correspondence Transformers with Asymmetric Feature Learning and Matching Flow Super-Resolution", CVPR 2023, and its
released code, which decides where the two differ.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from corrzoo.geometry import size_of
from corrzoo.heads.tokens import (
    REFINED_CHANNELS,
    UPSCALE,
    Attention,
    CrossAttention,
    FeatureProjection,
    FlowHead,
    SoftArgmax,
    TokenMatcher,
    WindowRefinement,
    arf,
    as_map,
    check_windows,
    init_linear,
    mlp,
    to_pixels,
    upscale,
)
from corrzoo.matcher import HEADS
from corrzoo.types import Features, Match


@HEADS.register
class ACTR(TokenMatcher):
    """Asymmetric alignment blocks, a flow from each block's correlation, and multi-path flow super-resolution.

    With iBOT-B at 256 it has 144,245,888 parameters and equals the released model, which has 172,810,369. The other
    28,564,481 never influence its output: `learn_parm`, and in `decoder` `pos_embed_x`, `pos_embed_y`, `proj`,
    `norm`, `norm3`, `norm4` and `mlp2` of each block, and `spatial_attention` of the last block.

    Args:
        depth: Number of alignment blocks (released code: 6).
        windows: Window sides of the flow refinement: parallel branches in each of two stages (released code).
        source_pe: Ablation: position embeddings in the source branch.
        reweight: Ablation: re-weighting of the target tokens.
        cross_attention: Ablation: it updates the source. our reading: without, its weights still are the correlation.
        multi_path: Ablation: refine the flow of every block and average. Without it, the last block's flow alone.
        super_resolution: Ablation: the flow is refined. Without it, each fine cell moves as its coarse one does.
        **options: Options of TokenMatcher and Matcher.
    """

    def __init__(
        self,
        depth: int = 6,
        windows: list[int] = [4, 8],  # noqa: B006 - never written to; a plain default is what --help shows
        source_pe: bool = True,
        reweight: bool = True,
        cross_attention: bool = True,
        multi_path: bool = True,
        super_resolution: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.paths = depth if multi_path else 1
        self.blocks = nn.ModuleList(
            AsymmetricAlignment(self.width, 1 + self.grid**2, source_pe, reweight and i + 1 < depth, cross_attention)
            for i in range(depth)
        )
        self.soft_argmax = SoftArgmax(self.grid)
        self.super_resolution = None
        if super_resolution:
            check_windows(windows, UPSCALE * self.grid, self.grid)
            self.super_resolution = FlowSuperResolution(self.width, self.grid, windows)
        else:  # nothing reads the source's last update, and distributed training waits for all that trains
            self.blocks[-1].get_submodule("cross_attention.proj").requires_grad_(False)
        self.apply_options()

    def match(self, src: Features, trg: Features) -> Match:
        """The mean of the refined flows of all blocks."""
        s, t, correlations = self.tokens(src), self.tokens(trg), []  # (B, 1 + g*g, C)
        for block in self.blocks:
            s, t, correlation = block(s, t)
            correlations.append(correlation[:, 1:, 1:])  # (B, g*g, g*g)
        flows = upscale(self.soft_argmax(torch.cat(correlations[-self.paths :])))  # (P*B, 2, 4g, 4g), path by path
        if self.super_resolution is not None:
            flows = self.super_resolution(flows, as_map(s))
        flow = flows.unflatten(0, (self.paths, -1)).mean(0)  # (B, 2, 4g, 4g)
        return Match(to_pixels(flow, size_of(src.image)), correlations[-1])


class AsymmetricAlignment(nn.Module):
    """One block: self-attention in both images, cross-attention for the source, re-weighting for the target.

    `source_pe` gives the source a position embedding in every block; `tokens` counts the class token. `reweight` scales
    target tokens by the attention that they received; not in the last block.
    """

    def __init__(self, dim: int, tokens: int, source_pe: bool, reweight: bool, cross_attention: bool) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim)) if source_pe else None
        self.self_attention = Attention(dim)
        self.cross_attention = CrossAttention(dim, update=cross_attention)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim)
        self.target_weight = nn.Parameter(torch.ones(1, 1, dim)) if reweight else None
        self.apply(init_linear)

    def forward(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, C) of source and target -> the same, and their correlation (B, N, N)."""
        if self.pos_embed is not None:
            s = s + self.pos_embed
        both = torch.cat([s, t])  # (2B, N, C): the same layers for both images
        s, t = self._add(both, self.self_attention(self.norm1(both))).chunk(2)
        update, correlation = self.cross_attention(self.norm1(s), self.norm1(t))
        if update is not None:
            s = self._add(s, arf(update))
        if self.target_weight is not None:
            attended = correlation.detach().mean(1).unsqueeze(-1)  # (B, N, 1)
            t = t + t * self.target_weight * attended.sigmoid()
        return s, t, correlation

    def _add(self, x: Tensor, update: Tensor) -> Tensor:
        """Add the update and its MLP; as released, the MLP sees the update, not the sum."""
        return x + update + self.mlp(self.norm2(update))


class FlowSuperResolution(nn.Module):
    """Multi-path flow super-resolution: every flow is refined together with source features, by the same weights.

    Each of the `windows` is the window side of one branch.
    """

    def __init__(self, dim: int, grid: int, windows: list[int]) -> None:
        super().__init__()
        self.project = FeatureProjection(dim, REFINED_CHANNELS - 2, UPSCALE * grid)
        self.stages = nn.ModuleList(
            nn.ModuleList(WindowRefinement(REFINED_CHANNELS, window) for window in windows) for _ in range(2)
        )
        self.head = FlowHead()

    def forward(self, flows: Tensor, features: Tensor) -> Tensor:
        """Flows (P*B, 2, 4g, 4g), path by path, and features (B, C, g, g) -> refined flows (P*B, 2, 4g, 4g)."""
        features = self.project(features)  # (B, 94, 4g, 4g)
        paths = flows.split(len(features))  # one by one: all together exceed a CPU's caches
        return torch.cat([flow + self.head(self.refine(torch.cat([flow, features], dim=1))) for flow in paths])

    def refine(self, x: Tensor) -> Tensor:
        """(B, 96, 4g, 4g) -> the same: in each stage the sum of the windows' branches."""
        for branches in self.stages:
            x = reduce(torch.add, [branch(x) for branch in branches.children()])
        return x
