"""GSF: sparse confident matches guide all others ("Guided Semantic Flow", ECCV 2020, whose sections these are).

A volume of cosines is pruned to the matches that a network trusts, their displacements are spread over the image by
moving least squares, and a second network refines what is left of the volume around them. Weakly supervised: the loss
reads images, masks and boxes, and never a keypoint.

Three printed equations cannot be run literally; what runs here, and why:

- Eq. 6 takes the softmax of Q' over all targets. Q' is 0 or in (0.9, 1], so one kept match has e^0.95 against 399 times
  e^0, and every displacement points at the middle of the map. Here the softmax is over the kept targets alone, and
  sharp (`beta`); `soft_argmax: literal` is eq. 6 to the letter.
- Eq. 8 and its footnote centre the Gaussian at G'_i, which eqs. 6 and 9 have as a displacement: here at i + G'_i.
- Eq. 11 sums over the confident cells and is to empty them of bad matches, but membership in a set has no gradient.
  Here a cell's term is weighted by its confidence max_j Q'_ij, whose gradient lowers the confidence of cells with dear
  surroundings: against L_sil, a confidence falls where the term exceeds 1 / lambda. `geo_weight: none` is the letter.

our choice: where the losses are printed as sums, means keep their weights free of the size of grid, batch and object.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from corrzoo import ops
from corrzoo.geometry import Size, cell_centres, cells_to_pixels, sample, size_of
from corrzoo.heads.levels import resize
from corrzoo.losses import mean_where
from corrzoo.matcher import HEADS, Matcher
from corrzoo.precision import full, full_precision
from corrzoo.types import Features, Match, Pair, ZooError

EPS = 1e-5
"""The least product of maxima in eq. 4 (NCNet)."""
FALLBACK = 8
"""our choice: rows that count as confident where no match passes the threshold; eq. 7 would be 0 / 0 without any."""
OBJECT = 0.1
"""Share of a cell from which on it belongs to the object (SFNet's threshold on its resized masks)."""
TRUST = 4.0
"""our choice: added to the pruning network's logits, which begin near 0. At sigma(0) = 0.5 no match would pass rho."""
GROUPS = 8


def mutual_confidence(scores: Tensor) -> Tensor:
    """Eq. 4: 1 where a score (B, N, M) is the best of its row and of its column, less elsewhere."""
    return scores**2 / (scores.amax(1, keepdim=True) * scores.amax(2, keepdim=True)).clamp(min=EPS)


def truncate(confidence: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """T of eq. 5: what exceeds rho stays, with its gradient, and the rest is 0.

    Args:
        confidence: (B, N, M) in [0, 1].
        rho: The threshold.

    Returns:
        Q' (B, N, M), and the confident cells S (B, N) bool. Where nothing passes, the best matches of the rows with
        the highest maxima do: S is never empty.
    """
    kept = confidence > rho
    best = confidence.amax(2)  # (B, N)
    few = best.topk(min(FALLBACK, best.shape[1])).indices
    chosen = torch.zeros_like(kept[..., 0]).scatter(1, few, True).unsqueeze(2)
    kept = torch.where(kept.any((1, 2), keepdim=True), kept, chosen & (confidence >= best.unsqueeze(2)))
    return confidence * kept, kept.any(2)


def displacements(kept: Tensor, cells: Tensor, beta: float, literal: bool = False) -> Tensor:
    """Eq. 6: where the kept matches of each source cell lead, in cells; without meaning for cells outside S.

    Args:
        kept: (B, N, M) Q'.
        cells: (N, 2) centres of the grid, which source and target share.
        beta: Inverse temperature of the softmax over the kept targets.
        literal: The softmax of Q' over all targets, as printed.

    Returns:
        (B, N, 2).
    """
    logits = kept if literal else (beta * kept).masked_fill(kept == 0, torch.finfo(kept.dtype).min)
    return logits.softmax(2) @ cells - cells


def moving_least_squares(values: Tensor, known: Tensor, cells: Tensor, c: float) -> Tensor:
    """Eq. 7: values known in some cells, spread over all of them by Gaussian weights of width c.

    The weights are normalised as logarithms, so that cells any number of widths away from S still follow the nearest.

    Args:
        values: (B, N, K), finite; those of unknown cells do not count. Gradients go to the known ones.
        known: (B, N) bool, S.
        cells: (N, 2) where the values are.
        c: c_P, in the unit of `cells`.

    Returns:
        (B, N, K); zero where S is empty.
    """
    known = known.unsqueeze(1)
    logits = -(cells.unsqueeze(1) - cells).square().sum(-1) / (2 * c**2)  # (N, N)
    logits = logits.masked_fill(~known, torch.finfo(logits.dtype).min)
    return (logits.softmax(2) * known) @ values


def modulate(scores: Tensor, centre: Tensor, cells: Tensor, c: float) -> Tensor:
    """Eq. 8: scores (B, N, M) under a Gaussian of width c around a centre (B, N, 2), both in cells."""
    return scores * torch.exp(-(cells - centre.unsqueeze(2)).square().sum(-1) / (2 * c**2))


def silhouette_loss(logits: Tensor, initial: Tensor, rho: float, inside: Tensor) -> Tensor:
    """L_sil, eq. 12: |log sigma| of the matches that mutual consistency alone would keep (S*).

    Args:
        logits: (B, N, M) of the pruning network, before the sigmoid.
        initial: (B, N, M) Q.
        rho: The threshold.
        inside: (B, N) bool, source cells on the object.
    """
    return mean_where(F.softplus(-logits), (initial > rho) & inside.unsqueeze(2))


def geometry_loss(
    src: Tensor, trg: Tensor, guidance: Tensor, weight: Tensor, counted: Tensor, cells: Tensor, grid: Size, radius: int
) -> Tensor:
    """L_geo, eq. 11: around a confident cell, the guidance leads to features like its own.

    Args:
        src: (B, N, C) unit features.
        trg: (B, N, C) unit features.
        guidance: (B, N, 2) G' in cells.
        weight: (B, N) what each cell's term is multiplied by.
        counted: (B, N) bool, the confident cells on the object.
        cells: (N, 2).
        grid: (h, w).
        radius: N_i reaches this far; at the border, what lies in the grid counts.
    """
    error = (src - warp(trg, guidance, cells, grid)).square().sum(2).unflatten(1, grid)
    around = F.avg_pool2d(error, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False).flatten(1)
    return mean_where(weight * around, counted)


def matching_loss(
    src: Tensor, trg: Tensor, tau: Tensor, inside: Tensor, cells: Tensor, grid: Size, radius: int, temperature: float
) -> Tensor:
    """L_M, eqs. 13 and 14: of the features that tau brings to a cell's neighbourhood, its own is the most alike.

    Args:
        src: (B, N, C) unit features.
        trg: (B, N, C) unit features.
        tau: (B, N, 2) in cells.
        inside: (B, N) bool, source cells on the object.
        cells: (N, 2).
        grid: (h, w).
        radius: M_i reaches this far, and ends at the border.
        temperature: Of the softmax.
    """
    scores = src @ warp(trg, tau, cells, grid).mT / temperature  # (B, N, N)
    near = (cells.unsqueeze(1) - cells).abs().amax(-1) <= radius
    log_p = scores.masked_fill(~near, torch.finfo(scores.dtype).min).log_softmax(2)
    return mean_where(-log_p.diagonal(dim1=1, dim2=2), inside)


def smoothness_loss(tau: Tensor, inside: Tensor, grid: Size) -> Tensor:
    """L_sm: L1 of the differences of tau (B, N, 2) between neighbours of which both are on the object.

    our choice: forward differences; the paper says L1.
    """
    flow, mask = tau.unflatten(1, grid), inside.unflatten(1, grid)
    down, right = (flow.diff(dim=d).abs().sum(-1).flatten(1) for d in (1, 2))
    both = torch.cat([(mask[:, 1:] & mask[:, :-1]).flatten(1), (mask[..., 1:] & mask[..., :-1]).flatten(1)], 1)
    return mean_where(torch.cat([down, right], 1), both)


def warp(features: Tensor, flow: Tensor, cells: Tensor, grid: Size) -> Tensor:
    """Features (B, N, C) read at cell + flow (B, N, 2), bilinearly; the border's outside the grid."""
    return sample(features.mT.unflatten(2, grid), cells + flow, grid)


def on_object(mask: Tensor, box: Tensor, size: Tensor, grid: Size) -> Tensor:
    """The cells that are on the object (B, N): within its mask, and their centres in its box where there is one.

    Args:
        mask: (B, H, W) of any size.
        box: (B, 4) xyxy in original pixels, NaN when not known.
        size: (B, 2) original (w, h).
        grid: (h, w).
    """
    covered = F.interpolate(mask.float().unsqueeze(1), grid, mode="area").flatten(1) > OBJECT
    at = cell_centres(grid, (1, 1), box.device, box.dtype)
    low, high = (box.unflatten(1, (2, 2)) / size.unsqueeze(1)).unsqueeze(2).unbind(1)  # (B, 1, 2)
    boxed = ((at >= low) & (at <= high)).all(2) | box.isnan().any(1, keepdim=True)
    return covered & boxed


class UNet(nn.Module):
    """Encoder and decoder over the source grid; a cell's channels are its scores against every target cell.

    our choice, as the paper says "encoder-decoder" alone: two strides, skips, and group instead of batch
    normalisation, so that one pair is a batch and nothing of stage 1 is left behind in running statistics.
    """

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        self.enter = _block(inputs, width)
        self.down = _block(width, width, stride=2)
        self.bottom = _block(width, 2 * width, stride=2)
        self.up = _block(3 * width, width)
        self.top = _block(2 * width, width)
        self.leave = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, rows: Tensor, grid: Size) -> Tensor:
        """(B, N, inputs) -> (B, N, outputs) in full precision."""
        whole = self.enter(rearrange(rows, "b (h w) m -> b m h w", h=grid[0]))
        half = self.down(whole)
        x = self.up(torch.cat([half, resize(self.bottom(half), size_of(half))], 1))
        x = self.leave(self.top(torch.cat([whole, resize(x, grid)], 1)))
        return full(rearrange(x, "b m h w -> b (h w) m"))


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(GROUPS, outputs), nn.ReLU())


class Conv4d(nn.Module):
    """A convolution over source and target grid at once: a sum of 3-D ones, one for each row of the kernel."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 5) -> None:
        super().__init__()
        self.reach = kernel // 2
        self.rows = nn.ModuleList(
            nn.Conv3d(inputs, outputs, kernel, padding=self.reach, bias=k == self.reach) for k in range(kernel)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w, h', w') -> (B, outputs, h, w, h', w')."""
        h = x.shape[2]
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, self.reach, self.reach))
        slices = (rearrange(padded[:, :, k : k + h], "b c h w u v -> (b h) c w u v") for k in range(len(self.rows)))
        total = sum(conv(part) for conv, part in zip(self.rows, slices, strict=True))
        return rearrange(total, "(b h) c w u v -> b c h w u v", h=h)


class Consensus(nn.Module):
    """NCNet's neighbourhood consensus (kernels 5-5-5, channels 16-16-1), which fits any grid, and both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Conv4d(1, 16), nn.ReLU(), Conv4d(16, 16), nn.ReLU(), Conv4d(16, 1))

    def forward(self, rows: Tensor, grid: Size) -> Tensor:
        """(B, N, M) -> (B, N, M) in full precision: on CPUs, gradients of 3-D convolutions in bfloat16 are NaN."""
        volume = rows.unflatten(2, grid).unflatten(1, grid).unsqueeze(1)
        turned = rearrange(volume, "b c h w u v -> b c u v h w")
        with full_precision(rows):
            out = self.layers(volume) + rearrange(self.layers(turned), "b c u v h w -> b c h w u v")
        return out.squeeze(1).flatten(3).flatten(1, 2)


class Adaptation(nn.Module):
    """SFNet's residual layer on one level of the backbone: x + ReLU(BN(conv(x)))."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
        self.layers = nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        return x + self.layers(x)


@HEADS.register
class GSF(Matcher):
    """Guided semantic flow: pruning, propagation and matching (section 4.1), trained in two stages (4.3).

    Args:
        grid: Cells on a side of the grid that is matched on, or [h, w]; levels of another size are resized to it, as
            5.1 does with conv5-3. The networks' channels are the target's cells: a U-Net is built for one grid. our
            choice: 20, stride 16 at SFNet's 320 pixels. Without one (network conv4d), that of the finest level.
        network: `unet`, or `conv4d`: NCNet's consensus prunes, and the matching network sees the scores within
            `radius` of the guidance; any grid will do.
        width: Channels of the U-Nets. our choice.
        adaptation: A residual layer on each level, as SFNet has them (5.1, "Ours w/SFNet").
        fusion: Several levels are one unit feature, the levels weighing the same (`concat`), or their correlations
            are multiplied (`product`: SFNet's).
        pruning: The pruning network; without it Q alone is truncated (Table 3a).
        mls: The propagation; without it confident cells alone are modulated (Table 3a, footnote 1), and, our choice,
            the others' guidance is their own soft-argmax of the correlation.
        matching: The matching network; without it tau is G' (Table 3a).
        rho: Threshold of a confident match (5.1).
        c_p: Width of the propagation in cells (5.1, which calls it a variance; eq. 7 squares it).
        c_m: Width of the modulation in cells (5.1, like c_p).
        soft_argmax: Over the `kept` matches, or `literal`: see this file's beginning.
        beta: Inverse temperature of that over the kept ones (SFNet's).
        geo_weight: Weight of a cell in L_geo, its `confidence` or `none`: see this file's beginning.
        window: N_i of eq. 11 reaches this many cells to each side. our choice.
        radius: M_i of eq. 14 reaches this many cells to each side (5.1).
        temperature: Of the softmax in eq. 14 (literally 1).
        weight_geo: lambda of eq. 10. our choice.
        weight_sil: Weight of L_sil in eq. 10; 0 turns it off (Table 3b).
        weight_p: lambda_P of eq. 15. our choice.
        weight_m: lambda_M of eq. 15. our choice.
        weight_sm: lambda_sm of eq. 15. our choice: SFNet's 0.5 beside 16 for its flow term.
        stage1: Share of the run's steps in which L_P trains the pruning network alone (4.3). 0: end to end from the
            start; 1: never (Table 3b).
        **options: What every head takes, see Matcher.
    """

    def __init__(
        self,
        grid: int | list[int] | None = 20,
        network: Literal["unet", "conv4d"] = "unet",
        width: int = 128,
        adaptation: bool = False,
        fusion: Literal["concat", "product"] = "concat",
        pruning: bool = True,
        mls: bool = True,
        matching: bool = True,
        rho: float = 0.9,
        c_p: float = 7.0,
        c_m: float = 5.0,
        soft_argmax: Literal["kept", "literal"] = "kept",
        beta: float = 50.0,
        geo_weight: Literal["confidence", "none"] = "confidence",
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
        if network == "unet" and grid is None:
            raise ZooError("network 'unet' is built for one grid: set --model.grid 20, or --model.network conv4d")
        if width % GROUPS:
            raise ZooError(f"width {width}: expected a multiple of {GROUPS}")
        if stage1 and not pruning:
            raise ZooError(f"stage1 {stage1} trains the pruning network, which pruning=False removes: set stage1=0")
        self.grid: Size | None = (grid, grid) if isinstance(grid, int) else (grid[0], grid[1]) if grid else None
        self.fusion, self.mls = fusion, mls
        self.rho, self.c_p, self.c_m, self.radius = rho, c_p, c_m, radius
        self.beta, self.literal = beta, soft_argmax == "literal"
        self.adaptation = nn.ModuleList(
            Adaptation(channels, 3 if k else 5) if adaptation else nn.Identity()
            for k, channels in enumerate(self.backbone.channels)
        )
        cells = self.grid[0] * self.grid[1] if self.grid else 0
        self.local = network == "conv4d"
        self.pruning = (Consensus() if self.local else UNet(cells, cells, width)) if pruning else None
        self.matching = UNet((2 * radius + 1) ** 2 if self.local else cells, 2, width) if matching else None
        if self.matching:
            for p in self.matching.leave.parameters():  # tau begins as the guidance
                nn.init.zeros_(p)
        self.pruning_only = False  # stage 1; set in every training step

    def prepare(self, features: Features) -> Features:
        """The adapted levels at one size, each cell of each level of unit length: (B, C, h, w) a level."""
        maps = [adapt(level) for adapt, level in zip(self.adaptation, features.maps, strict=True)]
        grid = self.grid or max(size_of(level) for level in maps)
        return features._replace(maps=[F.normalize(full(resize(level, grid)), dim=1) for level in maps])

    def match(self, src: Features, trg: Features) -> Match:
        """Eqs. 1 to 9; the extras hold what the losses read."""
        grid, (H, W) = size_of(src.maps[0]), size_of(src.image)
        with full_precision(src.maps[0]):
            f, g = (F.normalize(rearrange(torch.cat(x.maps, 1), "b c h w -> b (h w) c"), dim=2) for x in (src, trg))
            scores = self.correlate(f, g, [level.shape[1] for level in src.maps])
            cells = cell_centres(grid, grid, f.device, f.dtype)
            initial = mutual_confidence(scores)
        logits = self.pruning(initial, grid) + TRUST if self.pruning else torch.full_like(initial, torch.inf)
        with full_precision(f):
            kept, confident = truncate(initial * logits.sigmoid(), self.rho)
            guidance = displacements(kept, cells, self.beta, self.literal)
            if self.mls:
                guidance = moving_least_squares(guidance, confident, cells, self.c_p)
            else:
                own = ops.readout(scores, grid, 1 / self.beta).xy - cells
                guidance = torch.where(confident.unsqueeze(2), guidance, own)
        tau = guidance
        if self.matching and not (self.pruning_only and self.training):
            with full_precision(f):
                refined = modulate(scores, cells + guidance, cells, self.c_m)
                if not self.mls:
                    refined = torch.where(confident.unsqueeze(2), refined, scores)
                if self.local:
                    refined = self.look_around(refined, cells + guidance, grid)
            tau = guidance + self.matching(refined, grid)
        flow = rearrange(cells_to_pixels(tau, grid, (H, W)), "b (h w) xy -> b xy h w", h=grid[0])
        extras = {"src": f, "trg": g, "initial": initial, "logits": logits, "kept": kept, "confident": confident}
        return Match(flow, scores, extras | {"guidance": guidance, "tau": tau})

    def correlate(self, f: Tensor, g: Tensor, levels: list[int]) -> Tensor:
        """Eq. 1 of features (B, N, C) and (B, M, C), without what is negative.

        our choice, the cut (SFNet's): the square in eq. 4 would make opposites alike.
        """
        if self.fusion == "concat":
            return ops.correlation(f, g).relu()
        parts = zip(f.split(levels, 2), g.split(levels, 2), strict=True)
        product = torch.stack([ops.correlation(a, b).relu() for a, b in parts]).prod(0)
        return F.normalize(product, dim=2)

    def look_around(self, scores: Tensor, centre: Tensor, grid: Size) -> Tensor:
        """Scores (B, N, M) of the cells around a centre (B, N, 2): (B, N, (2 radius + 1)^2), zero outside the grid."""
        side = torch.arange(-self.radius, self.radius + 1, device=centre.device, dtype=centre.dtype)
        offsets = torch.cartesian_prod(side, side).flip(1)
        at = (centre.unsqueeze(2) + offsets) * centre.new_tensor([2 / grid[1], 2 / grid[0]]) - 1
        rows = rearrange(scores, "b n (u v) -> (b n) 1 u v", u=grid[0])
        found = F.grid_sample(rows, rearrange(at, "b n k xy -> (b n) 1 k xy"), align_corners=False)
        return rearrange(found, "(b n) 1 1 k -> b n k", n=scores.shape[1])

    def loss(self, match: Match, pair: Pair) -> dict[str, Tensor]:
        """Eq. 10 in stage 1, eq. 15 in stage 2: from images, masks and boxes alone."""
        o, e, grid = self.hparams, match.extras, size_of(match.flow)
        inside = on_object(pair.src_mask, pair.src_box, pair.src_size, grid)
        cells = cell_centres(grid, grid, e["src"].device, e["src"].dtype)
        terms: dict[str, Tensor] = {}
        total = match.flow.new_zeros(())
        with full_precision(e["src"]):
            if self.pruning:
                weight = e["kept"].amax(2) if o.geo_weight == "confidence" else torch.ones_like(e["kept"][..., 0])
                # Features that are free to move would become alike everywhere: this loss judges matches, not features.
                f, g, counted = e["src"].detach(), e["trg"].detach(), e["confident"] & inside
                terms["sil"] = silhouette_loss(e["logits"], e["initial"], self.rho, inside)
                terms["geo"] = geometry_loss(f, g, e["guidance"], weight, counted, cells, grid, o.window)
                total = total + o.weight_p * (o.weight_sil * terms["sil"] + o.weight_geo * terms["geo"])
            if not self.pruning_only:
                pixels = (inside, cells, grid, o.radius, o.temperature)
                terms["match"] = matching_loss(e["src"], e["trg"], e["tau"], *pixels)
                terms["smooth"] = smoothness_loss(e["tau"], inside, grid)
                total = total + o.weight_m * terms["match"] + o.weight_sm * terms["smooth"]
        return {"loss": total, **terms}

    def on_train_start(self) -> None:
        """Find the step at which stage 2 begins."""
        super().on_train_start()
        steps = self.trainer.estimated_stepping_batches
        if steps == torch.inf and self.hparams.stage1:
            raise ZooError("stage1 is a share of the run, which has no end: set --trainer.max_epochs or max_steps")
        self.stage2_from = self.hparams.stage1 * steps if self.hparams.stage1 else 0

    def training_step(self, pair: Pair, batch_idx: int) -> Tensor:
        """One step of the stage that the schedule is in."""
        self.pruning_only = self.global_step < self.stage2_from
        self.adaptation.train(not self.pruning_only)  # frozen statistics, too
        loss = super().training_step(pair, batch_idx)
        if self.pruning_only:  # distributed training waits for the gradient of every parameter
            loss = loss + sum(0 * p.sum() for p in self._frozen())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stage 1 leaves no moments and no decay in what it freezes: optimisers skip what has no gradient."""
        if self.pruning_only:
            for p in self._frozen():
                p.grad = None

    def _frozen(self) -> list[nn.Parameter]:
        """What stage 1 does not train: W_F and W_M."""
        of_pruning = {id(p) for p in self.pruning.parameters()} if self.pruning else set()
        return [p for p in self.parameters() if p.requires_grad and id(p) not in of_pruning]

    def features_of(self, src_img: Tensor, trg_img: Tensor, ids: Tensor | None = None) -> tuple[Features, Features]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.pruning_only):
            return super().features_of(src_img, trg_img, ids)
