"""MirrorGuided: confident matches guide all others, in the image or in its mirror image. The zoo's own head.

It combines cosines as in `Baseline`, a residual network on the features of an image and its mirror image, the consensus
of neighbouring matches (NCNet, without its network), GSF's confident matches, guidance field and modulation (its eqs. 4
to 8, without a parameter), and a choice between the source and its mirror image (as in GeoAware). Equations are
numbered in the order of the code.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from corrzoo import ops
from corrzoo.errors import check_above_zero
from corrzoo.geometry import (
    Size,
    cell_centres,
    cells_to_pixels,
    mirror_points,
    pixels_to_cells,
    points_to_flow,
    sample,
    size_of,
)
from corrzoo.heads.guidance import EPS, confident_field, modulate, neighbour_consensus
from corrzoo.heads.levels import rows_of, stack_levels, stride_grid
from corrzoo.heads.update import FeatureUpdate, mirror_image, row_cross_entropy
from corrzoo.losses import pair_means, weighted_means
from corrzoo.matcher import HEADS, Matcher
from corrzoo.precision import full, full_precision
from corrzoo.types import Features, Match, Pair, ZooError

CHOICE = 0.05
"""our choice: temperature of eq. 10's choice; supports of good pairs differ by a few percent."""


class Guided(NamedTuple):
    """Results of eqs. 2 to 7 for B pairs; N cells of the source grid (h, w), M of the target grid."""

    scores: Tensor  # (B, N, h', w') scores C
    field: Tensor  # (B, 2, h, w) guidance displacements G' in cells
    support: Tensor  # (B,) mean best modulated score of the source's cells, plus that of the target's


class Hypotheses(NamedTuple):
    """Modulated scores of n points under both hypotheses; without `mirror`, of the first alone."""

    plain: Tensor  # (B, n, M) of the source
    mirrored: Tensor | None = None  # (B, n, M) of its mirror image
    ratio: Tensor | None = None  # (B,) support of the mirror image / support of the source


@HEADS.register
class MirrorGuided(Matcher):
    """Match the source and its mirror image, each guided by its own confident matches, and keep one of the two.

    The support of a hypothesis is the mean best score of its cells (eq. 7). The mirror image is kept if its support is
    more than `margin` times the source's (eq. 8). With `layers: 0` the head has no parameter, and a backbone that is
    fine-tuned learns through the EPE of `Matcher`. The constants are chosen on validation pairs by
    benchmarks/mirrorguided_constants.py. With layers, a network updates the features, and the weights of consensus and
    guidance are learned. Before training, it equals the head without layers.

    Args:
        stride: Resize all feature maps to this stride.
        remove_mean: Subtract each map's mean over the image before normalisation.
        mirror: Compute features of the mirror image, too. They enter eq. 1 and give the mirrored hypothesis of eq. 8.
        margin: The mirror image is matched instead if its support is more than this many times the source's (eq. 8).
        consensus: Width of the Gaussian of eq. 3 in cells; 0 leaves the cosines as they are.
        rho: Threshold of a confident match (eq. 4; GSF 5.1: 0.9). our choice: if no match of a pair passes, the best
            matches of its 8 most confident cells do.
        c_p: Width of the propagation's Gaussian in cells (eq. 5).
        c_m: Width of the modulation's Gaussian in cells (eq. 6).
        floor: Weight of a score far from the guidance (eq. 6). GSF has 0, which loses objects that bend or turn.
        rounds: How often eqs. 4 to 6 are applied. Each round reads the scores modulated by the last.
        temperature: T of the soft-argmax.
        radius: The soft-argmax reads this many cells around the maximum to each side.
        layers: Bottlenecks of the network that updates the features (eq. 1); 0 is the head without parameters.
        width: Channels of this network.
        learn_guidance: With layers and eq. 9: learn the share of consensus, `floor` and `margin` (eqs. 3, 6 and 8).
        epe_weight: Weight of the EPE in the loss.
        row_weight: Weight of the cross-entropies of eqs. 9 and 10 in the loss.
        strength: How much of what was learned counts (eq. 11). Below 1 for objects unlike those of the training data.
        **options: Options of `Matcher`.
    """

    evaluation_options: ClassVar[frozenset[str]] = Matcher.evaluation_options | {
        *("consensus", "rho", "c_p", "c_m", "rounds", "temperature", "radius", "strength"),
    }

    def __init__(
        self,
        stride: int = 16,
        remove_mean: bool = True,
        mirror: bool = True,
        margin: float = 1.08,
        consensus: float = 0.7,
        rho: float = 0.95,
        c_p: float = 1.0,
        c_m: float = 2.0,
        floor: float = 0.75,
        rounds: int = 1,
        temperature: float = 0.05,
        radius: int = 2,
        layers: int = 0,
        width: int = 256,
        learn_guidance: bool = True,
        epe_weight: float = 1.0,
        row_weight: float = 0.0,
        strength: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_above_zero(stride=stride, margin=margin, c_p=c_p, c_m=c_m, rounds=rounds, temperature=temperature)
        if not (0 <= floor <= 1 and 0 <= strength <= 1) or consensus < 0:
            raise ZooError(f"floor {floor}, strength {strength}: expected 0 to 1; consensus {consensus}: 0 or more")
        if min(epe_weight, row_weight) < 0 or not epe_weight + row_weight:
            raise ZooError(f"epe_weight {epe_weight}, row_weight {row_weight}: expected 0 or more, and one above 0")
        self.stride, self.remove_mean, self.mirror = stride, remove_mean, mirror
        self.consensus, self.rho, self.c_p, self.c_m = consensus, rho, c_p, c_m
        self.rounds, self.temperature, self.radius = rounds, temperature, radius
        self.epe_weight, self.row_weight, self.strength = epe_weight, row_weight, strength
        self.share: float | nn.Parameter = 1.0
        self.floor: float | nn.Parameter = floor
        self.margin: float | nn.Parameter = margin
        self.row_temperature: float | nn.Parameter = temperature
        self.update = FeatureUpdate(sum(self.backbone.channels), mirror, width, layers) if layers else None
        if layers and row_weight:
            self.row_temperature = nn.Parameter(torch.tensor(temperature))
        self.learns = bool(layers and row_weight and learn_guidance)
        if self.learns:
            self.share, self.floor = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(floor))
            if mirror:
                self.margin = nn.Parameter(torch.tensor(margin))

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups as in `Matcher`. our choice: learned scalars have ten times the rate and no decay."""
        numbers = [p for p in self.parameters(recurse=False) if p.requires_grad]  # not a backbone's own numbers
        own = {id(number) for number in numbers}
        groups = [g | {"params": [p for p in g["params"] if id(p) not in own]} for g in super().param_groups()]
        groups.append({"name": "numbers", "params": numbers, "lr": 10 * self.hparams.lr, "weight_decay": 0.0})
        return [group for group in groups if group["params"]]

    def prepare(self, features: Features) -> Features:
        """One map (B, C, h, w) of unit features; with `mirror` (B, 2C, h, w), the second half from the mirror image.

        The second half is flipped back, so that both describe the same cells. Flipping the map and exchanging its
        halves gives the map of the mirror image, so that eq. 8 needs the backbone no more.
        """
        grid = stride_grid(size_of(features.image), self.stride)
        maps = self.unit_map(features.maps, grid)
        if self.mirror:
            mirrored = self.unit_map(self.backbone(features.image.flip(-1)).maps, grid)
            maps = torch.cat([maps, mirrored.flip(-1)], 1)
        return features.with_maps([maps if self.update is None else self.update(maps, self.strength)])  # eq. 1

    def unit_map(self, levels: list[Tensor], grid: Size) -> Tensor:
        """Levels (B, C_i, h_i, w_i) as one map (B, C, h, w) of unit length in every cell."""
        return F.normalize(stack_levels([full(level) for level in levels], grid, self.remove_mean), dim=1)

    def guide(self, source: Tensor, target: Tensor) -> Guided:
        """Eqs. 2 to 7 for maps (B, C, h, w) of the source and (B, C, h', w') of the target."""
        grid, grid_trg = size_of(source), size_of(target)
        cells, cells_trg = (cell_centres(g, g, source.device, source.dtype) for g in (grid, grid_trg))
        rows, columns = (rearrange(x, "b c h w -> b (h w) c") for x in (source, target))
        cosines = ops.correlation(rows, columns)  # eq. 2
        agreed = neighbour_consensus(cosines, grid, grid_trg, self.consensus)
        scores = torch.lerp(cosines, agreed, self.learned("share"))  # eq. 3
        likely = scores
        for _ in range(self.rounds):
            field = confident_field(likely.relu(), cells, cells_trg, self.rho, self.c_p)  # eqs. 4 and 5, (B, N, 2)
            likely = self.modulated(scores, cells + field, cells_trg)  # eq. 6
        support = likely.amax(2).mean(1) + likely.amax(1).mean(1)  # eq. 7
        return Guided(scores.unflatten(2, grid_trg), field.mT.unflatten(2, grid), support)

    def modulated(self, scores: Tensor, centre: Tensor, cells: Tensor) -> Tensor:
        """Eq. 6: (floor + (1 - floor) exp(-|j - centre_i|^2 / 2 c_m^2)) C_ij of scores (B, n, M)."""
        floor = self.learned("floor")
        return floor * scores + (1 - floor) * modulate(scores, centre, cells, self.c_m)

    def modulated_at(self, guided: Guided, points: Tensor, image: Size) -> Tensor:
        """Modulated scores (B, n, M) of points (B, n, 2) in pixels: scores and field interpolated between cells."""
        grid, grid_trg = size_of(guided.field), size_of(guided.scores)
        cells = cell_centres(grid_trg, grid_trg, points.device, guided.field.dtype)
        volume = rearrange(guided.scores, "b (h w) hh ww -> b (hh ww) h w", h=grid[0])
        centre = pixels_to_cells(points, grid, image) + sample(guided.field, points, image)
        return self.modulated(sample(volume, points, image), centre, cells)

    def hypotheses(self, src: Features, trg: Features, points: Tensor) -> Hypotheses:
        """Match points (B, n, 2) of the source and, with `mirror`, the same points of its mirror image."""
        source, target, (height, width) = src.maps[0], trg.maps[0], size_of(src.image)
        with full_precision(source):
            if not self.mirror:
                return Hypotheses(self.modulated_at(self.guide(source, target), points, (height, width)))
            guided = self.guide(torch.cat([source, mirror_image(source)]), target.repeat(2, 1, 1, 1))
            both = torch.cat([points, mirror_points(points, width)])  # (2B, n, 2)
            plain, mirrored = self.modulated_at(guided, both, (height, width)).chunk(2)
            support, support_mirrored = guided.support.chunk(2)
            return Hypotheses(plain, mirrored, support_mirrored / support.clamp(min=EPS))

    def chosen(self, found: Hypotheses) -> Tensor:
        """Eq. 8: the scores (B, n, M) of the source or, where the ratio is above the margin, of its mirror image."""
        if found.mirrored is None or found.ratio is None:
            return found.plain
        return torch.where((found.ratio > self.learned("margin")).view(-1, 1, 1), found.mirrored, found.plain)

    def read(self, scores: Tensor, trg: Features) -> Tensor:
        """Soft-argmax of scores (B, n, M) in the window around their maximum: positions (B, n, 2) in pixels."""
        grid = size_of(trg.maps[0])
        found = ops.readout(scores, grid, self.temperature, "crop", radius=self.radius).xy
        return cells_to_pixels(found, grid, size_of(trg.image))

    def scores_at(self, src: Features, trg: Features, points: Tensor) -> Tensor:
        """Modulated scores (B, n, M) of points (B, n, 2), by the hypothesis that eq. 8 chooses."""
        return self.chosen(self.hypotheses(src, trg, points))

    def match(self, src: Features, trg: Features) -> Match:
        """The match of every cell's centre; `correlation` has the scores (B, N, M) they were read from.

        For eqs. 9 and 10, `extras` has the cosines (B, N, M) and what `hypotheses` returns. our choice: without EPE the
        features learn from the cosines alone, as consensus and guidance blur what tells neighbouring cells apart.
        """
        grid, image = size_of(src.maps[0]), size_of(src.image)
        points = cell_centres(grid, image, src.image.device, src.maps[0].dtype).expand(len(src.image), -1, -1)
        extras = {}
        if self.row_weight and torch.is_grad_enabled():
            extras["cosines"] = ops.correlation(rows_of(src), rows_of(trg))
            if not self.epe_weight:
                src, trg = (x.with_maps([x.maps[0].detach()]) for x in (src, trg))
        found = self.hypotheses(src, trg, points)
        if extras and self.learns:
            extras |= {name: x for name, x in found._asdict().items() if x is not None}
        scores = self.chosen(found)
        return Match(points_to_flow(self.read(scores, trg), grid, image), scores, extras)

    def match_points(self, src: Features, trg: Features, points: Tensor) -> Tensor:
        """Matches of points (B, n, 2), whose scores are interpolated: finer than to interpolate the flow."""
        return self.read(self.scores_at(src, trg, points), trg).to(points.dtype)

    def heat_maps(self, src: Features, trg: Features, points: Tensor) -> Tensor:
        """The modulated scores of the points (B, n, h', w')."""
        return self.scores_at(src, trg, points).unflatten(2, size_of(trg.maps[0]))

    def loss(self, match: Match, pair: Pair) -> dict[str, Tensor]:
        """EPE, eq. 9 for the cosines and, if guidance is learned, for the modulated scores, and eq. 10."""
        grid, mask, extras = size_of(match.flow), pair.kps_mask, match.extras
        terms = {"epe": self.keypoint_errors(match, pair)} if self.epe_weight else {}
        rows = {
            name: row_cross_entropy(extras[name], self.row_temperature, pair, grid)  # eq. 9, (B, K)
            for name in ("cosines", "plain", "mirrored")
            if name in extras
        }
        terms |= {name: (rows[name], mask) for name in ("cosines", "plain") if name in rows}
        if "mirrored" in rows:
            plain, mirrored = (pair_means(rows[name].detach(), mask)[0] for name in ("plain", "mirrored"))  # (B,) each
            logit = (extras["ratio"].detach().clamp(min=EPS) / self.learned("margin")).log() / CHOICE
            terms["choice"] = torch.lerp(plain, mirrored, logit.sigmoid()), mask.any(1)  # eq. 10
        return weighted_means(terms, {name: self.epe_weight if name == "epe" else self.row_weight for name in terms})

    def learned(self, name: str) -> float | Tensor:
        """Eq. 11 for `share`, `floor` or `margin`: start + strength (learned - start)."""
        value = getattr(self, name)
        if not self.learns or self.strength == 1:
            return value
        start = 1.0 if name == "share" else self.hparams[name]
        return torch.lerp(torch.full_like(value, start), value, self.strength)
