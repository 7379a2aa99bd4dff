"""MirrorGuided against its equations in plain loops, and what mirroring must and must not change."""

from math import dist, exp, log, sqrt

import pytest
import torch

import corrzoo
from corrzoo.data import PairDataset
from corrzoo.heads.guidance import BETA, neighbour_consensus
from corrzoo.heads.mirrorguided import CHOICE
from corrzoo.heads.update import FeatureUpdate, row_cross_entropy
from corrzoo.types import Features, ZooError

CNN = "timm/test_resnet.r160_in1k"
GRID, STRIDE = (4, 6), 16
IMAGE = GRID[0] * STRIDE, GRID[1] * STRIDE
CELLS = [(x + 0.5, y + 0.5) for y in range(GRID[0]) for x in range(GRID[1])]


def build(**options):
    torch.manual_seed(0)
    return corrzoo.create_matcher("MirrorGuided", CNN, "random", levels=[2, 3], **options).double().eval()


def learning(**options):
    return build(**{"layers": 2, "width": 32, "epe_weight": 0.0, "row_weight": 1.0, "stride": STRIDE} | options).train()


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
    """Eq. 3 cell by cell: {(i, j): C_ij} as nested lists."""
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
    """Consensus C, field G' and support of eqs. 2 to 7 for maps (C, h, w)."""
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


@pytest.mark.parametrize(
    "wrong",
    [{"rounds": 0}, {"width": 100, "layers": 1}, {"margin": -1.0}, {"floor": 1.5}, {"consensus": -1.0}, {"c_m": 0.0}],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ZooError, match=next(iter(wrong))):
        build(**wrong)


# ---------------------------------------------------------------------- learning


def batch(count=2):
    dataset = corrzoo.create_dataset("synthetic", "", "test", size=96)
    pair = PairDataset.collate([dataset[i] for i in range(count)])
    return pair._replace(
        **{
            name: value.double()
            for name, value in pair._asdict().items()
            if torch.is_tensor(value) and name.endswith("kps")
        }
    )


def images(pair):
    return pair.src_img.double() / 255, pair.trg_img.double() / 255


@pytest.mark.parametrize("options", [{}, {"mirror": False}, {"margin": 0.01}, {"learn_guidance": False}])
def test_before_training_the_layers_change_nothing(options):
    """Bit by bit."""
    learned, zero_shot = learning(**options), build(stride=STRIDE, **options)
    assert any(p.requires_grad for n, p in learned.named_parameters() if not n.startswith("backbone"))
    pair = batch()
    found, want = (model.eval()(*images(pair)) for model in (learned, zero_shot))
    assert torch.equal(found.flow, want.flow) and torch.equal(found.correlation, want.correlation)
    points = [model.match_points(*model.features_of(*images(pair)), pair.src_kps) for model in (learned, zero_shot)]
    assert torch.equal(*points)


@pytest.mark.parametrize("options", [{}, {"mirror": False}, {"learn_guidance": False}, {"epe_weight": 1.0}])
def test_two_steps_reach_every_parameter(options):
    model, pair = learning(**{"finetune": "none"} | options), batch()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(model.param_groups(), lr=1e-3)
    reached = set()
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(model(*images(pair)), pair)["loss"].backward()
        reached |= {name for name, p in trained.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert reached == trained.keys()
    assert not [name for name in trained if torch.equal(trained[name], start[name])]


def test_backbone_learns_from_the_cosines():
    model, pair = learning(finetune="all"), batch()
    model.loss(model(*images(pair)), pair)["loss"].backward()
    first = next(p for p in model.backbone.parameters() if p.ndim == 4)
    assert first.grad is not None and first.grad.any()


def test_numbers_learn_ten_times_as_fast_and_do_not_decay():
    groups = {group["name"]: group for group in learning(lr=0.01, finetune="none").param_groups()}
    assert groups.keys() == {"head", "numbers"}
    assert [p.ndim for p in groups["numbers"]["params"]] == [0] * 4  # share, floor, margin, temperature
    assert groups["numbers"]["lr"] == pytest.approx(0.1) and groups["numbers"]["weight_decay"] == 0
    assert {group["name"] for group in build().param_groups()} == {"backbone"}


def test_numbers_of_a_backbone_learn_at_its_rate():
    model = learning(lr=0.01, backbone_lr=1e-4, finetune="all")
    model.backbone.gain = torch.nn.Parameter(torch.tensor(1.0))  # such as NFNet's
    (group,) = [group for group in model.param_groups() if any(p is model.backbone.gain for p in group["params"])]
    assert (group["name"], group["lr"]) == ("backbone", 1e-4)


def match_of_mirror_image(mirrored):
    """Matches of an image with its mirror image or with itself, so that one hypothesis is exact."""
    model, src = learning(finetune="none"), features(3)
    trg = src._replace(maps=[swap(src.maps[0])]) if mirrored else src
    kps = torch.tensor([[[20.0, 10.0], [70.0, 40.0], [50.0, 30.0]]], dtype=torch.float64)
    there = torch.stack([IMAGE[1] - kps[..., 0], kps[..., 1]], -1) if mirrored else kps
    pair = batch(1)._replace(
        src_img=src.image, trg_img=trg.image, src_kps=kps, trg_kps=there, kps_mask=torch.ones(1, 3, dtype=torch.bool)
    )
    return model, model.match(src, trg), pair


@pytest.mark.parametrize("mirrored", [True, False])
def test_margin_learns_which_hypothesis_is_right(mirrored):
    model, match, pair = match_of_mirror_image(mirrored)
    found = model.loss(match, pair)
    chance = 1 / (1 + exp(-(log(match.extras["ratio"].item()) - log(1.08)) / CHOICE))
    volumes = (match.extras[name] / model.row_temperature for name in ("plain", "mirrored"))
    plain, other = (row_cross_entropy(x, 1.0, pair, GRID).mean().item() for x in volumes)
    assert found["choice"].item() == pytest.approx((1 - chance) * plain + chance * other, rel=1e-5)
    assert (other < plain) == mirrored
    found["choice"].backward()
    assert (model.margin.grad > 0) == mirrored  # a step lowers the margin, so that more mirror images are chosen
    assert found["loss"].item() == pytest.approx(sum(found[k].item() for k in ("cosines", "plain", "choice")))


def test_margin_learns_nothing_where_both_hypotheses_are_equally_good():
    """Objects that look the same mirrored would otherwise pull the margin to 1, by chance."""
    model, match, pair = match_of_mirror_image(False)
    alike = match._replace(extras=match.extras | {"mirrored": match.extras["plain"]})
    model.loss(alike, pair)["choice"].backward()
    assert model.margin.grad == 0


def test_cross_entropy_of_rows_in_loops():
    pair, (h, w) = batch(), GRID
    pair = pair._replace(src_img=torch.zeros(2, 3, *IMAGE), trg_img=torch.zeros(2, 3, *IMAGE))
    scale = torch.tensor([IMAGE[1] / 96, IMAGE[0] / 96], dtype=torch.float64)
    pair = pair._replace(src_kps=pair.src_kps * scale, trg_kps=pair.trg_kps * scale)
    logits = torch.randn(2, h * w, h * w, dtype=torch.float64)
    found = row_cross_entropy(0.2 * logits, 0.2, pair, GRID)
    below = row_cross_entropy(1e-3 * logits, torch.tensor(-1.0), pair, GRID)  # counts as 0.001
    torch.testing.assert_close(below, found)

    def around(point):
        """{cell: weight} of the bilinear interpolation at a point in pixels."""
        weights = {}
        for j, (x, y) in enumerate(CELLS):
            at = [min(max(point[axis] / STRIDE, 0.5), GRID[1 - axis] - 0.5) for axis in (0, 1)]
            weights[j] = max(0.0, 1 - abs(at[0] - x)) * max(0.0, 1 - abs(at[1] - y))
        assert sum(weights.values()) == pytest.approx(1)
        return weights

    def one_way(volume, query, truth):
        row = [sum(q * volume[i][j] for i, q in around(query).items()) for j in range(h * w)]
        total = log(sum(exp(v) for v in row))
        return sum(q * (total - row[j]) for j, q in around(truth).items())

    for b, k in pair.kps_mask.nonzero().tolist():
        src, trg = pair.src_kps[b, k].tolist(), pair.trg_kps[b, k].tolist()
        want = one_way(logits[b].tolist(), src, trg) + one_way(logits[b].T.tolist(), trg, src)
        assert found[b, k].item() == pytest.approx(want / 2)


def test_updated_map_of_the_mirror_image_is_the_updated_map_mirrored():
    torch.manual_seed(0)
    update, maps = FeatureUpdate(8, True, 16, 2).double(), torch.randn(2, 16, 4, 6, dtype=torch.float64)
    assert torch.equal(update(maps), maps)
    torch.nn.init.normal_(update.out.weight)
    assert not torch.allclose(update(maps), maps)
    torch.testing.assert_close(update(swap(maps)), swap(update(maps)))


def test_what_was_learned_is_saved_and_loaded(tmp_path):
    model, pair = learning(finetune="none"), batch()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again = learning(finetune="none")
    again.load_state_dict(torch.load(tmp_path / "weights.pt"))
    found, want = (m.eval()(*images(pair)).flow for m in (again, model))
    assert torch.equal(found, want) and not torch.equal(want, build(stride=STRIDE)(*images(pair)).flow)


def test_a_loss_without_terms_is_refused():
    with pytest.raises(ZooError, match="epe_weight"):
        build(epe_weight=0.0)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_strength_goes_from_the_untrained_to_the_trained_head(strength):
    """Eq. 11: the last convolution of U, share, floor and margin are interpolated."""
    torch.manual_seed(3)
    model, untrained = learning(strength=strength), build(stride=STRIDE)
    with torch.no_grad():
        for parameter in model.update.out.parameters():
            parameter.normal_(std=0.05)
        for number, value in (model.share, 0.2), (model.floor, 0.9), (model.margin, 1.6):
            number.fill_(value)
    state = {name: value for name, value in model.state_dict().items() if name not in ("share", "floor", "margin")}
    whole = learning(learn_guidance=False, floor=0.75 + strength * 0.15, margin=1.08 + strength * 0.52)
    whole.load_state_dict({k: v * strength if k.startswith("update.out") else v for k, v in state.items()})
    whole.share = 1 - strength * 0.8
    pair = batch()
    found, want = (m.eval()(*images(pair)).correlation for m in (model, whole))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    if not strength:
        assert torch.equal(found, untrained(*images(pair)).correlation)
