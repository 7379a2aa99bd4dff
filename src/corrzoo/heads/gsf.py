"""GSF: sparse confident matches guide all others ("Guided Semantic Flow", ECCV 2020; sections and equations are its).

A network prunes a volume of cosines to confident matches. Moving least squares spread their displacements over the
image. A Gaussian around each displacement modulates the volume, from which the flow is read. Training is weakly
supervised: the loss reads images, masks and boxes, never a keypoint.

docs/heads/gsf.md explains where the code deviates from a printed equation: eq. 6 (softmax over the kept targets only),
eq. 8 (the Gaussian is at i + G'_i), eq. 9 (`start`) and eq. 11 (weighted by the confidence).
"""

from functools import reduce
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from corrzoo import ops
from corrzoo.geometry import Size, cell_centres, cells_to_pixels, sample, size_of
from corrzoo.heads.guidance import displacements, modulate, moving_least_squares, mutual_confidence, truncate
from corrzoo.heads.levels import resize
from corrzoo.losses import Term, weighted_means
from corrzoo.matcher import HEADS, Matcher
from corrzoo.optimizers import total_steps
from corrzoo.precision import full, full_precision
from corrzoo.types import Features, Match, Pair, ZooError

OBJECT = 0.1
"""Share of a cell that the object must cover for the cell to count (SFNet's threshold on its resized masks)."""
TRUST = 4.0
"""our choice: offset of the pruning network's logits. Without it, the confidence starts at 0.5, below rho."""
GROUPS = 8


class Guidance(NamedTuple):
    """Results of eqs. 1 to 7 for a batch of pairs; N = h * w cells in either image."""

    src: Tensor  # (B, N, C) unit features F^s
    trg: Tensor  # (B, N, C) unit features F^t
    scores: Tensor  # (B, N, N) correlation C
    initial: Tensor  # (B, N, N) mutual consistency Q
    logits: Tensor  # (B, N, N) output of the pruning network before the sigmoid
    kept: Tensor  # (B, N, N) pruned confidences Q'
    confident: Tensor  # (B, N) bool, the set S
    field: Tensor  # (B, N, 2) guidance displacements G' in cells


@HEADS.register
class GSF(Matcher):
    """Guided semantic flow: pruning, propagation and matching (section 4.1), trained in two stages (4.3).

    Args:
        grid: Cells per side of the matching grid, or [h, w]; levels of another size are resized to it, as 5.1 does with
            conv5-3. The U-Nets fit this grid only. our choice: 20, stride 16 at SFNet's 320 pixels.
        width: Channels of the U-Nets. our choice.
        adaptation: Add a residual layer to each level, as SFNet has them (5.1, "Ours w/SFNet").
        remove_mean: Subtract each level's mean over the image, as `Baseline` can. Helps untrained CNN features.
        fusion: `concat` joins the normalised levels to one feature; `product` multiplies their correlations (SFNet).
        pruning: Use the pruning network. Without it, Q itself is truncated (Table 3a).
        mls: Use the propagation. Without it, only confident cells are modulated (Table 3a, footnote 1). our choice:
            G' of the other cells is then the soft-argmax of C.
        matching: Use the matching module, eqs. 8 and 9. Without it, tau is G' (Table 3a).
        start: What eq. 9 adds the residual to: `refined`, the soft-argmax of C', or, as printed, `guidance`, G'.
        readout_radius: Take the soft-argmax of C' over this many cells around its maximum (2: a 5 x 5 window), not all.
        rho: Threshold of a confident match (5.1). Above 0.98, set `pruning` to false: its sigmoid starts at 0.982.
            our choice: if no match of a pair passes, the best matches of its 8 most confident cells do; eq. 7 would be
            0 / 0.
        c_p: Width of the propagation's Gaussian in cells. our choice, made on validation pairs (docs/heads/gsf.md): 5.1
            gives 7 and calls it a variance, but eq. 7 squares it.
        c_m: Width of the modulation's Gaussian in cells. our choice, made like `c_p`: 5.1 gives 5.
        beta: Inverse temperature of both soft-argmaxes (SFNet).
        window: Radius of the window N_i in eq. 11 in cells. our choice.
        radius: Radius of the window M_i in eq. 14 in cells (5.1).
        temperature: Temperature of the softmax in eq. 14 (as printed: 1). our choice: 0.1 in short runs.
        weight_geo: lambda of eq. 10. our choice.
        weight_sil: Weight of L_sil in eq. 10; 0 turns it off (Table 3b).
        weight_p: lambda_P of eq. 15. our choice.
        weight_m: lambda_M of eq. 15. our choice.
        weight_sm: lambda_sm of eq. 15. our choice: SFNet's 0.5 relative to the 16 of its flow term.
        stage1: Share of the steps in which L_P trains the pruning network alone (4.3); 0 and 1 are rows of Table 3b.
        **options: Options of `Matcher`.
    """

    evaluation_options: ClassVar[frozenset[str]] = Matcher.evaluation_options | {"start", "readout_radius"}
    stage2_from = 0.0  # the training step at which stage 2 begins
    cells: Tensor

    def __init__(
        self,
        grid: int | list[int] = 20,
        width: int = 128,
        adaptation: bool = False,
        remove_mean: bool = False,
        fusion: Literal["concat", "product"] = "concat",
        pruning: bool = True,
        mls: bool = True,
        matching: bool = True,
        start: Literal["refined", "guidance"] = "refined",
        readout_radius: int | None = None,
        rho: float = 0.9,
        c_p: float = 1.5,
        c_m: float = 7.0,
        beta: float = 50.0,
        window: int = 2,
        radius: int = 5,
        temperature: float = 1.0,
        weight_geo: float = 1.0,
        weight_sil: float = 1.0,
        weight_p: float = 1.0,
        weight_m: float = 1.0,
        weight_sm: float = 0.03,
        stage1: float = 0.25,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if width % GROUPS:
            raise ZooError(f"width {width}: expected a multiple of {GROUPS}")
        if stage1 and not pruning:
            raise ZooError(f"stage1 {stage1} trains the pruning network, which pruning=False removes: set stage1=0")
        self.grid: Size = (grid, grid) if isinstance(grid, int) else (grid[0], grid[1])
        self.remove_mean, self.fusion, self.mls = remove_mean, fusion, mls
        self.start, self.readout_radius = start, readout_radius
        self.rho, self.c_p, self.c_m, self.beta = rho, c_p, c_m, beta
        sil, geo = weight_p * weight_sil, weight_p * weight_geo
        self.term_weights = {"sil": sil, "geo": geo, "match": weight_m, "smooth": weight_sm}
        self.adaptation = nn.ModuleList(
            Adaptation(channels, 3 if k else 5) if adaptation else nn.Identity()
            for k, channels in enumerate(self.backbone.channels)
        )
        self.register_buffer("cells", cell_centres(self.grid, self.grid), persistent=False)  # (N, 2)
        self.pruning = UNet(len(self.cells), len(self.cells), width) if pruning else None
        self.matching = UNet(len(self.cells), 2, width) if matching else None

    def prepare(self, features: Features) -> Features:
        """Adapt the levels, resize them to the grid and normalise each cell: (B, C, h, w) per level."""
        maps = []
        for adapt, level in zip(self.adaptation, features.maps, strict=True):
            level = full(adapt(level))
            if self.remove_mean:
                level = level - level.mean((2, 3), keepdim=True)
            maps.append(F.normalize(resize(level, self.grid), dim=1))
        return features.with_maps(maps)

    def match(self, src: Features, trg: Features) -> Match:
        """Eqs. 1 to 9; the extras hold what the losses read."""
        guidance = self.guide(src, trg)
        tau = self.refine(guidance)  # (B, N, 2)
        pixels = cells_to_pixels(tau, self.grid, size_of(src.image))
        flow = rearrange(pixels, "b (h w) xy -> b xy h w", h=self.grid[0])
        return Match(flow, guidance.scores, guidance._asdict() | {"tau": tau})

    def guide(self, src: Features, trg: Features) -> Guidance:
        """Eqs. 1 to 7: correlation, pruning and propagation."""
        f, g = (rearrange(torch.cat(x.maps, 1), "b c h w -> b (h w) c") for x in (src, trg))  # (B, N, C)
        with full_precision(f):
            f, g = F.normalize(f, dim=2), F.normalize(g, dim=2)
            scores = self.correlate(f, g, [level.shape[1] for level in src.maps])  # (B, N, N)
            initial = mutual_confidence(scores)
        logits = self.pruning(initial, self.grid) + TRUST if self.pruning else torch.full_like(initial, torch.inf)
        with full_precision(f):
            kept, confident = truncate(initial * logits.sigmoid(), self.rho)  # (B, N, N), (B, N)
            field = displacements(kept, self.cells, self.cells, self.beta)  # (B, N, 2)
            if self.mls:
                field = moving_least_squares(field, confident, self.cells, self.c_p)
            else:
                field = torch.where(confident.unsqueeze(2), field, self.read(scores))
        return Guidance(f, g, scores, initial, logits, kept, confident, field)

    def correlate(self, f: Tensor, g: Tensor, levels: list[int]) -> Tensor:
        """Eq. 1 for features (B, N, C), whose C are those of all `levels`: (B, N, N).

        our choice, as SFNet: negative cosines become 0, since the square in eq. 4 would make opposites similar.
        """
        if self.fusion == "concat":
            return ops.correlation(f, g).relu()
        parts = zip(f.split(levels, 2), g.split(levels, 2), strict=True)
        # Not `prod`, whose gradient waits for the device to count zeros.
        return F.normalize(reduce(torch.mul, [ops.correlation(a, b).relu() for a, b in parts]), dim=2)

    def refine(self, guidance: Guidance) -> Tensor:
        """Eqs. 8 and 9: tau (B, N, 2) in cells."""
        field = guidance.field
        if self.matching is None:
            return field
        with full_precision(field):
            likely = modulate(guidance.scores, self.cells + field, self.cells, self.c_m)  # C' (B, N, N)
            if not self.mls:  # footnote 1
                likely = torch.where(guidance.confident.unsqueeze(2), likely, guidance.scores)
            start = self.read(likely, self.readout_radius) if self.start == "refined" else field  # (B, N, 2)
        return start + self.matching(likely, self.grid)

    def read(self, scores: Tensor, radius: int | None = None) -> Tensor:
        """Soft-argmax of scores (B, N, N), over a window around the maximum or all cells: displacements (B, N, 2)."""
        window: Literal["none", "crop"] = "none" if radius is None else "crop"
        return ops.readout(scores, self.grid, 1 / self.beta, window, radius=radius).xy - self.cells

    def loss(self, match: Match, pair: Pair) -> dict[str, Tensor]:
        """L_final of stage 2, eq. 15. our choice: means, as with the paper's sums weights depend on grid and batch."""
        guidance, tau = Guidance(*(match.extras[name] for name in Guidance._fields)), match.extras["tau"]
        inside, o = on_object(pair, self.grid), self.hparams
        where = (inside, self.cells, self.grid, o.radius, o.temperature)
        with full_precision(tau):
            terms = self.pruning_terms(guidance, inside) if self.pruning else {}
            terms["match"] = matching_loss(guidance.src, guidance.trg, tau, *where)
            terms["smooth"] = smoothness_loss(tau, inside, self.grid)
            return weighted_means(terms, self.term_weights)

    def pruning_terms(self, guidance: Guidance, inside: Tensor) -> dict[str, Term]:
        """L_P, eq. 10: values and where they count."""
        # Detached, because features that could move would become equal everywhere.
        f, g, counted = guidance.src.detach(), guidance.trg.detach(), guidance.confident & inside
        weight, where = guidance.kept.amax(2), (self.cells, self.grid, self.hparams.window)
        sil = silhouette_loss(guidance.logits, guidance.initial, self.rho, inside)
        return {"sil": sil, "geo": geometry_loss(f, g, guidance.field, weight, counted, *where)}

    @property
    def stage(self) -> Literal[1, 2]:
        """Training stage (4.3) of the current step."""
        return 1 if self.global_step < self.stage2_from else 2

    def on_train_start(self) -> None:
        """Find the step at which stage 2 begins."""
        super().on_train_start()
        share = self.hparams.stage1
        self.stage2_from = share * total_steps(self.trainer, f"stage1 {share}") if share else 0.0

    def training_losses(self, pair: Pair) -> Tensor | dict[str, Tensor]:
        """Eq. 15, or in stage 1 eq. 10 with frozen features and without the matching module."""
        self.adaptation.train(self.stage == 2)  # freezes the statistics of batch normalisation, too
        if self.stage == 2:
            return super().training_losses(pair)
        with torch.no_grad():
            src, trg = self.training_features(pair)
        guidance = self.guide(src, trg)
        with full_precision(guidance.field):
            terms = weighted_means(self.pruning_terms(guidance, on_object(pair, self.grid)), self.term_weights)
        # Distributed training waits for a gradient of every parameter.
        terms["loss"] = terms["loss"] + sum(0 * p.sum() for p in self._frozen_in_stage1())
        return terms

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the optimiser from moments and decay of what stage 1 freezes: it skips parameters without gradient."""
        if self.stage == 1:
            for p in self._frozen_in_stage1():
                p.grad = None

    def _frozen_in_stage1(self) -> list[nn.Parameter]:  # W_F and W_M
        return [p for name, p in self.named_parameters() if p.requires_grad and not name.startswith("pruning.")]


class Adaptation(nn.Module):
    """SFNet's residual layer on one level of the backbone: x + ReLU(BN(conv(x)))."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
        self.layers = nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return x + self.layers(x)


class UNet(nn.Module):
    """Encoder and decoder over the source grid; the channels of a cell are its scores against all target cells.

    our choice, as the paper says "encoder-decoder" only: two strides, skips, and group normalisation, so that a batch
    may have one pair and stage 1 leaves no statistics. The last layer starts at zero: untrained, it has no effect.
    """

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        self.enter = _block(inputs, width)
        self.down = _block(width, width, stride=2)
        self.bottom = _block(width, 2 * width, stride=2)
        self.up = _block(3 * width, width)
        self.top = _block(2 * width, width)
        self.leave = nn.Conv2d(width, outputs, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(self, rows: Tensor, grid: Size) -> Tensor:
        """(B, N, inputs) -> (B, N, outputs) in full precision."""
        whole = self.enter(rearrange(rows, "b (h w) m -> b m h w", h=grid[0]))  # (B, width, h, w)
        half = self.down(whole)  # (B, width, h/2, w/2)
        x = resize(self.bottom(half), size_of(half))  # (B, 2 width, h/2, w/2)
        x = resize(self.up(torch.cat([half, x], 1)), grid)  # (B, width, h, w)
        x = self.leave(self.top(torch.cat([whole, x], 1)))  # (B, outputs, h, w)
        return full(rearrange(x, "b m h w -> b (h w) m"))


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(GROUPS, outputs), nn.ReLU())


def silhouette_loss(logits: Tensor, initial: Tensor, rho: float, inside: Tensor) -> Term:
    """L_sil, eq. 12: |log(Q'_ij / Q_ij)| = -log sigma(logits_ij) (B, N, M) over S* = {i, j | Q_ij > rho}, i inside."""
    return F.softplus(-logits), (initial > rho) & inside.unsqueeze(2)


def geometry_loss(
    src: Tensor, trg: Tensor, field: Tensor, weight: Tensor, counted: Tensor, cells: Tensor, grid: Size, radius: int
) -> Term:
    """L_geo, eq. 11: weight_i (B, N) * mean over l in N_i of |F^s_l - [G' o F^t]_l|^2, for counted cells (B, N) bool.

    Unit features (B, N, C), G' (B, N, 2) in cells. N_i reaches `radius` cells and is cut off at the border.
    """
    error = (src - warp(trg, field, cells, grid)).square().sum(2).unflatten(1, grid)  # (B, h, w)
    around = F.avg_pool2d(error, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False).flatten(1)
    return weight * around, counted


def matching_loss(
    src: Tensor, trg: Tensor, tau: Tensor, inside: Tensor, cells: Tensor, grid: Size, radius: int, temperature: float
) -> Term:
    """L_M, eqs. 13 and 14: -log softmax_{l in M_i}(<F^s_i, [tau o F^t]_l> / temperature) at l = i, i inside.

    Unit features (B, N, C), tau (B, N, 2) in cells. M_i reaches `radius` cells and is cut off at the border.
    """
    scores = src @ warp(trg, tau, cells, grid).mT / temperature  # (B, N, N)
    near = (cells.unsqueeze(1) - cells).abs().amax(-1) <= radius  # (N, N)
    log_p = scores.masked_fill(~near, torch.finfo(scores.dtype).min).log_softmax(2)
    return -log_p.diagonal(dim1=1, dim2=2), inside


def smoothness_loss(tau: Tensor, inside: Tensor, grid: Size) -> Term:
    """L_sm: L1 norm of the forward differences (our choice) of tau (B, N, 2) between adjacent cells that are inside."""
    flow, mask = tau.unflatten(1, grid), inside.unflatten(1, grid)  # (B, h, w, 2), (B, h, w)
    down, right = (flow.diff(dim=d).abs().sum(-1).flatten(1) for d in (1, 2))
    both = torch.cat([(mask[:, 1:] & mask[:, :-1]).flatten(1), (mask[..., 1:] & mask[..., :-1]).flatten(1)], 1)
    return torch.cat([down, right], 1), both


def warp(features: Tensor, flow: Tensor, cells: Tensor, grid: Size) -> Tensor:
    """Features (B, N, C) read at cell + flow (B, N, 2), bilinearly; border values outside the grid."""
    return sample(features.mT.unflatten(2, grid), cells + flow, grid)


def on_object(pair: Pair, grid: Size) -> Tensor:
    """Source cells (B, N) bool that the mask covers and whose centres lie in the box; NaN boxes are ignored.

    our choice: the source's mask alone, as the losses are sums over source cells. Section 4.2 names both masks.
    """
    covered = F.interpolate(pair.src_mask.float().unsqueeze(1), grid, mode="area").flatten(1) > OBJECT
    at = cell_centres(grid, (1, 1), pair.src_box.device, pair.src_box.dtype)  # (N, 2)
    low, high = ((corner / pair.src_size).unsqueeze(1) for corner in pair.src_box.split(2, dim=1))  # (B, 1, 2) each
    boxed = ((at >= low) & (at <= high)).all(2) | pair.src_box.isnan().any(1, keepdim=True)
    return covered & boxed
