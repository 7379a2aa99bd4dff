"""MirrorGuided against its equations in plain loops, and what mirroring must and must not change."""

from math import dist, exp, sqrt

import pytest
import torch

import corrzoo
from corrzoo.heads.guidance import BETA, neighbour_consensus
from corrzoo.types import Features, ZooError

CNN = "timm/test_resnet.r160_in1k"
GRID, STRIDE = (4, 6), 16
IMAGE = GRID[0] * STRIDE, GRID[1] * STRIDE
CELLS = [(x + 0.5, y + 0.5) for y in range(GRID[0]) for x in range(GRID[1])]


def build(**options):
    torch.manual_seed(0)
    return corrzoo.create_matcher("MirrorGuided", CNN, "random", levels=[2, 3], **options).double().eval()


def features(seed, channels=12):
    """Prepared maps of random unit features, smooth enough that neighbours match neighbours."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(2, 1, channels // 2, 3, 3, generator=generator, dtype=torch.float64)
    halves = [torch.nn.functional.interpolate(half, GRID, mode="bilinear") for half in coarse]
    maps = torch.cat([torch.nn.functional.normalize(half, dim=1) for half in halves], 1)
    return Features(torch.zeros(1, 3, *IMAGE, dtype=torch.float64), [maps], None)


def swap(map_):
    """The map of the mirror image."""
    return torch.cat([map_[:, map_.shape[1] // 2 :], map_[:, : map_.shape[1] // 2]], 1).flip(-1)


def mean_over_neighbours(scores, sigma, reach):
    """Eq. 2 cell by cell: {(i, j): C_ij} as nested lists."""
    h, w = GRID
    out = []
    for i in range(h * w):
        row = []
        for j in range(h * w):
            total = weights = 0.0
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    (iy, ix), (jy, jx) = divmod(i, w), divmod(j, w)
                    if 0 <= iy + dy < h and 0 <= jy + dy < h and 0 <= ix + dx < w and 0 <= jx + dx < w:
                        weight = exp(-(dx * dx + dy * dy) / (2 * sigma**2))
                        total += weight * scores[(iy + dy) * w + ix + dx][(jy + dy) * w + jx + dx]
                        weights += weight
            row.append(total / weights)
        out.append(row)
    return out


def guide_in_loops(model, source, target):
    """Consensus C, field G' and support of eqs. 1 to 6 for maps (C, h, w)."""
    n = range(len(CELLS))
    f, g = (m.flatten(1).T.tolist() for m in (source, target))

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / sqrt(sum(x * x for x in a)) / sqrt(sum(y * y for y in b))

    scores = mean_over_neighbours([[cosine(a, b) for b in g] for a in f], model.consensus, 1)
    likely = scores
    for _ in range(model.rounds):
        positive = [[max(v, 0.0) for v in row] for row in likely]
        by_row = [max(row) for row in positive]
        by_column = [max(positive[i][j] for i in n) for j in n]
        sparse = {}
        for i in n:
            q = [positive[i][j] ** 2 / max(by_row[i] * by_column[j], 1e-5) for j in n]
            kept = {j: exp(BETA * q[j]) for j in n if q[j] > model.rho}
            if kept:
                at = [sum(w * CELLS[j][axis] for j, w in kept.items()) / sum(kept.values()) for axis in (0, 1)]
                sparse[i] = [at[axis] - CELLS[i][axis] for axis in (0, 1)]
        assert sparse
        field = []
        for i in n:
            near = {s: exp(-(dist(CELLS[i], CELLS[s]) ** 2) / (2 * model.c_p**2)) for s in sparse}
            field.append([sum(w * sparse[s][axis] for s, w in near.items()) / sum(near.values()) for axis in (0, 1)])
        centres = [[CELLS[i][axis] + field[i][axis] for axis in (0, 1)] for i in n]
        likely = [[modulated(model, scores[i][j], CELLS[j], centres[i]) for j in n] for i in n]
    rows = sum(max(row) for row in likely) / len(CELLS)
    columns = sum(max(likely[i][j] for i in n) for j in n) / len(CELLS)
    return scores, field, rows + columns


def modulated(model, score, cell, centre):
    near = exp(-(dist(cell, centre) ** 2) / (2 * model.c_m**2))
    return (model.floor + (1 - model.floor) * near) * score


def read_in_loops(model, row):
    best = max(range(len(row)), key=row.__getitem__)
    inside = [
        j for j in range(len(row)) if max(abs(CELLS[j][axis] - CELLS[best][axis]) for axis in (0, 1)) <= model.radius
    ]
    weights = {j: exp((row[j] - row[best]) / model.temperature) for j in inside}
    return [STRIDE * sum(w * CELLS[j][axis] for j, w in weights.items()) / sum(weights.values()) for axis in (0, 1)]


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("margin", [0.01, 100.0])
def test_cell_centres_match_as_the_equations_in_loops(margin, rounds):
    model, src, trg = (
        build(margin=margin, rounds=rounds, c_p=1.2, c_m=1.7, floor=0.3, consensus=0.8),
        *map(features, (1, 2)),
    )
    mirrored = margin < 1
    source = swap(src.maps[0]) if mirrored else src.maps[0]
    scores, field, _ = guide_in_loops(model, source[0], trg.maps[0][0])
    found = model.match_points(src, trg, torch.tensor([CELLS], dtype=torch.float64) * STRIDE)[0]
    for k, (x, y) in enumerate(CELLS):
        i = CELLS.index((GRID[1] - x, y)) if mirrored else k
        centre = [CELLS[i][axis] + field[i][axis] for axis in (0, 1)]
        row = [modulated(model, scores[i][j], CELLS[j], centre) for j in range(len(CELLS))]
        assert found[k].tolist() == pytest.approx(read_in_loops(model, row), abs=1e-6)


def test_the_mirror_image_is_chosen_by_the_ratio_of_the_supports():
    model, src, trg = build(consensus=1.0), *map(features, (3, 4))
    _, _, plain = guide_in_loops(model, src.maps[0][0], trg.maps[0][0])
    _, _, mirrored = guide_in_loops(model, swap(src.maps[0])[0], trg.maps[0][0])
    points = torch.rand(1, 5, 2, dtype=torch.float64) * 60
    scores = model.hypotheses(src, trg, points)
    assert scores[2].item() == pytest.approx(mirrored / plain, rel=1e-9)
    for margin, want in ((0.999 * mirrored / plain, scores[1]), (1.001 * mirrored / plain, scores[0])):
        model.margin = margin
        torch.testing.assert_close(model.scores_at(src, trg, points), want)
    assert not torch.allclose(scores[0], scores[1])


def test_pairs_of_a_batch_choose_for_themselves():
    model = build(margin=1.0)
    pairs = [(features(seed), features(seed + 50)) for seed in range(8)]
    points = torch.rand(1, 4, 2, dtype=torch.float64) * 60
    joined = [
        Features(torch.cat([p[k].image for p in pairs]), [torch.cat([p[k].maps[0] for p in pairs])], None)
        for k in (0, 1)
    ]
    ratio = model.hypotheses(*joined, points.expand(8, -1, -1))[2]
    assert (ratio > 1).any() and (ratio < 1).any()
    together = model.match_points(*joined, points.expand(8, -1, -1))
    torch.testing.assert_close(together, torch.cat([model.match_points(*pair, points) for pair in pairs]))


@pytest.mark.parametrize("margin", [0.01, 100.0])
def test_flow_is_the_match_of_the_cell_centres(margin):
    model, src, trg = build(margin=margin), *map(features, (5, 6))
    centres = torch.tensor([CELLS], dtype=torch.float64) * STRIDE
    flow = model.match(src, trg).flow.flatten(2).mT
    torch.testing.assert_close(flow, model.match_points(src, trg, centres) - centres)


def test_prepared_map_of_the_mirror_image_is_flipped_with_its_halves_exchanged():
    model, image = build(), torch.rand(2, 3, 96, 128, dtype=torch.float64)
    plain, mirrored = (model.prepare(model.backbone(x)).maps[0] for x in (image, image.flip(-1)))
    torch.testing.assert_close(mirrored, swap(plain))
    half = plain.shape[1] // 2
    torch.testing.assert_close(plain[:, :half], build(mirror=False).prepare(model.backbone(image)).maps[0])


def test_a_mirrored_source_is_matched_at_mirrored_places():
    """Both hypotheses change places, whatever the features; at a margin of 1 the same one is chosen."""
    model, trg = build(margin=1.0), features(8)
    for seed in range(6):
        src = features(seed)
        turned = src._replace(maps=[swap(src.maps[0])])
        points = torch.rand(1, 7, 2, dtype=torch.float64) * torch.tensor([IMAGE[1], IMAGE[0]])
        x, y = points.unbind(-1)
        again = model.match_points(turned, trg, torch.stack([IMAGE[1] - x, y], -1))
        torch.testing.assert_close(again, model.match_points(src, trg, points))


def test_without_mirror_the_map_has_one_half_and_nothing_is_chosen():
    model, src, trg = build(mirror=False, margin=0.01), *map(features, (1, 2))
    points = torch.rand(1, 5, 2, dtype=torch.float64) * 60
    torch.testing.assert_close(model.match_points(src, trg, points), build(margin=100.0).match_points(src, trg, points))


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_consensus_is_the_mean_over_neighbours(sigma):
    scores = torch.randn(2, len(CELLS), len(CELLS), dtype=torch.float64)
    found = neighbour_consensus(scores, GRID, GRID, sigma)
    for got, one in zip(found, scores, strict=True):
        want = torch.tensor(mean_over_neighbours(one.tolist(), sigma, 1), dtype=torch.float64)
        torch.testing.assert_close(got, want)
    assert neighbour_consensus(scores, GRID, GRID, 0.0) is scores


def test_consensus_of_two_grids_of_different_sizes():
    one = torch.ones(1, 6, 20)
    torch.testing.assert_close(neighbour_consensus(one, (2, 3), (4, 5), 1.0), one)


def test_floor_one_without_consensus_is_the_baseline():
    """No part of the guidance is left: cosines, read in their window."""
    options = {"levels": [2, 3], "stride": 16, "remove_mean": True}
    torch.manual_seed(0)
    head = corrzoo.create_matcher("MirrorGuided", CNN, "random", floor=1.0, consensus=0.0, mirror=False, **options)
    torch.manual_seed(0)
    baseline = corrzoo.create_matcher("Baseline", CNN, "random", readout="window", temperature=0.05, **options)
    images = torch.rand(2, 1, 3, 96, 96)
    flows = [m.eval()(*images).flow for m in (head, baseline)]
    torch.testing.assert_close(*flows, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"margin": -1.0}, {"floor": 1.5}, {"consensus": -1.0}, {"c_m": 0.0}])
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ZooError, match=next(iter(wrong))):
        build(**wrong)
