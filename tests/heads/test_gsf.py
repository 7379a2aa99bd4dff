"""GSF against its equations as plain loops, its mechanism on small scenes, its training stages and its ablations."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

import corrzoo
from corrzoo.data import PairDataset
from corrzoo.geometry import cell_centres
from corrzoo.heads import gsf, guidance
from corrzoo.losses import mean_where
from corrzoo.types import Features, ZooError
from hostless import hostless

VIT = "timm/test_vit.r160_in1k"
CONFIGS = Path(__file__).resolve().parents[2] / "zoo_configs"
ABLATIONS = {
    "no_matching": {"matching": False},
    "no_mls": {"mls": False},
    "no_pruning": {"pruning": False, "stage1": 0.0},
    "geo_only": {"weight_sil": 0.0, "stage1": 1.0, "matching": False},
    "sil_only": {"weight_geo": 0.0, "stage1": 1.0, "matching": False},
    "stage1_only": {"stage1": 1.0, "matching": False},
    "stage2_only": {"stage1": 0.0},
    "sfnet": {"adaptation": True, "fusion": "product"},
    "dinov2": {"backbone": "dinov2_b14", "levels": None},
    "eq9": {"start": "guidance"},
    "zero_shot": {
        **{"backbone": "efficientnet_lite0", "levels": ["blocks.4.2", "blocks.5.2"], "finetune": "none"},
        **{"remove_mean": True, "pruning": False, "stage1": 0.0, "readout_radius": 2, "rho": 0.99},
    },
}
GRID = (3, 5)
H, W = GRID
CELLS = cell_centres(GRID, GRID, dtype=torch.float64)
N = H * W


def head(**options):
    torch.manual_seed(0)
    return corrzoo.create_matcher("GSF", **{"backbone": VIT, "weights": "random", "width": 16, "grid": 5, **options})


def batch(size=80, count=2, dataset="synthetic", split="test"):
    pairs = corrzoo.create_dataset(dataset, "", split, size=size)
    return PairDataset.collate([pairs[i] for i in range(count)])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape, seed=0):
    return nn.functional.normalize(randn(*shape, seed=seed), dim=-1)


def place(i):
    """(x, y) of cell i's centre."""
    return i % W + 0.5, i // W + 0.5


def read(features, x, y):
    """Features (N, C) at a point, bilinearly between cell centres, the border's outside: eq. 11's warping operator."""
    x, y = min(max(x - 0.5, 0), W - 1), min(max(y - 0.5, 0), H - 1)
    total = 0
    for r in range(H):
        for c in range(W):
            total = total + max(0, 1 - abs(x - c)) * max(0, 1 - abs(y - r)) * features[r * W + c]
    return total


def mls_by_loops(values, known, c):
    out = []
    for i in range(N):
        weights = {
            s: math.exp(-((place(s)[0] - place(i)[0]) ** 2 + (place(s)[1] - place(i)[1]) ** 2) / (2 * c**2))
            for s in range(N)
            if known[s]
        }
        total = sum(weights.values())
        out.append([sum(w * float(values[s, k]) for s, w in weights.items()) / total for k in range(2)])
    return torch.tensor(out, dtype=torch.float64)


def mutual_by_loops(scores):
    q = torch.zeros_like(scores)
    for i in range(len(scores)):
        for j in range(len(scores[0])):
            q[i, j] = scores[i, j] ** 2 / (max(scores[:, j]) * max(scores[i]))
    return q


# ---------------------------------------------------------------- the equations


def test_moving_least_squares_equals_eq_7_in_loops():
    values, known = randn(2, N, 2), torch.arange(2 * N).view(2, N) % 4 == 1
    out = guidance.moving_least_squares(values, known, CELLS, 1.3)
    for b in range(2):
        torch.testing.assert_close(out[b], mls_by_loops(values[b], known[b], 1.3))


def test_moving_least_squares_far_away_without_any_and_its_gradient():
    values = randn(1, N, 2).requires_grad_()
    one = torch.zeros(1, N, dtype=torch.bool)
    assert (guidance.moving_least_squares(values, one, CELLS, 7.0) == 0).all()
    one[0, 0] = True  # at this width every other cell's weight is 0 in any precision, but their ratio is not
    torch.testing.assert_close(guidance.moving_least_squares(values, one, CELLS, 0.01), values[:, :1].expand(1, N, 2))
    some = torch.arange(N).unsqueeze(0) % 4 == 1
    assert torch.autograd.gradcheck(lambda v: guidance.moving_least_squares(v, some, CELLS, 1.3), values)
    guidance.moving_least_squares(values, some, CELLS, 1.3).sum().backward()
    assert not values.grad[~some].any()


def test_mutual_confidence_equals_eq_4_in_loops():
    scores = rand(2, 6, 7) + 0.01
    q = guidance.mutual_confidence(scores)
    for b in range(2):
        torch.testing.assert_close(q[b], mutual_by_loops(scores[b]))
    assert torch.isfinite(guidance.mutual_confidence(torch.zeros(1, 2, 3))).all()


def test_truncation_keeps_what_exceeds_the_threshold_and_never_nothing():
    x = rand(2, 12, 9, seed=3)
    x[1] *= 0.9  # nothing in this pair passes
    x.requires_grad_()
    kept, confident = guidance.truncate(x, 0.9)
    torch.testing.assert_close(kept[0], torch.where(x[0] > 0.9, x[0], 0))
    assert confident[0].tolist() == [any(v > 0.9 for v in row) for row in x[0].tolist()]
    best = sorted(range(12), key=lambda i: -x[1, i].max().item())[:8]
    assert confident[1].nonzero().flatten().tolist() == sorted(best)
    assert all((kept[1, i] > 0).sum() == 1 and kept[1, i].max() == x[1, i].max() for i in best)
    kept.sum().backward()
    torch.testing.assert_close(x.grad, (kept > 0).double())  # 1 where kept, 0 elsewhere


def test_displacements_equal_eq_6_over_the_kept_targets():
    kept = torch.where(rand(1, N, N) > 0.8, rand(1, N, N, seed=1) * 0.1 + 0.9, 0)
    found = guidance.displacements(kept, CELLS, CELLS, 50.0)[0]
    for i in range(N):
        weights = {j: math.exp(50 * kept[0, i, j]) for j in range(N) if kept[0, i, j] > 0}
        if weights:
            mean = [sum(w * place(j)[k] for j, w in weights.items()) / sum(weights.values()) for k in (0, 1)]
            torch.testing.assert_close(found[i], torch.tensor(mean, dtype=torch.float64) - CELLS[i])


def test_one_kept_match_is_not_pulled_to_the_middle_of_the_map():
    """As eq. 6 is printed, e^0.95 against 399 times e^0 would give (9.47, 9.47)."""
    cells = cell_centres((20, 20), (20, 20))
    kept = torch.zeros(1, 400, 400)
    kept[0, 0, 3 * 20 + 2] = 0.95
    torch.testing.assert_close(guidance.displacements(kept, cells, cells, 50.0)[0, 0], torch.tensor([2.0, 3.0]))


def test_modulation_equals_eq_8_in_loops():
    scores, field = rand(1, N, N), randn(1, N, 2)
    out = guidance.modulate(scores, CELLS + field, CELLS, 1.7)[0]
    for i in range(N):
        cx, cy = place(i)[0] + float(field[0, i, 0]), place(i)[1] + float(field[0, i, 1])
        for j in range(N):
            x, y = place(j)
            expected = math.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * 1.7**2)) * float(scores[0, i, j])
            assert float(out[i, j]) == pytest.approx(expected, rel=1e-9)


def test_silhouette_loss_equals_eq_12_in_loops():
    logits, initial, inside = randn(2, 6, 7), rand(2, 6, 7), rand(2, 6) > 0.3
    terms = [
        abs(math.log(1 / (1 + math.exp(-float(logits[b, i, j])))))
        for b in range(2)
        for i in range(6)
        for j in range(7)
        if initial[b, i, j] > 0.6 and inside[b, i]
    ]
    loss = mean_where(*gsf.silhouette_loss(logits, initial, 0.6, inside))
    assert float(loss) == pytest.approx(sum(terms) / len(terms))


def test_geometry_loss_equals_eq_11_in_loops():
    f, g, guidance = unit(1, N, 4), unit(1, N, 4, seed=1), randn(1, N, 2)
    weight, counted, radius = rand(1, N), rand(1, N, seed=2) > 0.4, 1
    terms = []
    for i in range(N):
        if not counted[0, i]:
            continue
        around = []
        for l in range(N):  # noqa: E741 - the paper's letter
            if abs(l % W - i % W) <= radius and abs(l // W - i // W) <= radius:
                x, y = place(l)[0] + float(guidance[0, l, 0]), place(l)[1] + float(guidance[0, l, 1])
                around.append(float(((f[0, l] - read(g[0], x, y)) ** 2).sum()))
        terms.append(float(weight[0, i]) * sum(around) / len(around))
    loss = mean_where(*gsf.geometry_loss(f, g, guidance, weight, counted, CELLS, GRID, radius))
    assert float(loss) == pytest.approx(sum(terms) / len(terms))


def test_matching_loss_equals_eqs_13_and_14_in_loops():
    f, g, tau, inside, radius = unit(1, N, 4), unit(1, N, 4, seed=1), randn(1, N, 2), rand(1, N) > 0.3, 2
    terms = []
    for i in range(N):
        if not inside[0, i]:
            continue
        weights = {}
        for l in range(N):  # noqa: E741
            if abs(l % W - i % W) <= radius and abs(l // W - i // W) <= radius:
                x, y = place(l)[0] + float(tau[0, l, 0]), place(l)[1] + float(tau[0, l, 1])
                weights[l] = math.exp(float(f[0, i] @ read(g[0], x, y)) / 0.3)
        terms.append(-math.log(weights[i] / sum(weights.values())))
    loss = mean_where(*gsf.matching_loss(f, g, tau, inside, CELLS, GRID, radius, 0.3))
    assert float(loss) == pytest.approx(sum(terms) / len(terms))


def test_smoothness_loss_in_loops():
    tau, inside = randn(1, N, 2), rand(1, N) > 0.3
    terms = []
    for i in range(N):
        for j in ([i + 1] if i % W < W - 1 else []) + ([i + W] if i + W < N else []):
            if inside[0, i] and inside[0, j]:
                terms.append(float((tau[0, i] - tau[0, j]).abs().sum()))
    assert float(mean_where(*gsf.smoothness_loss(tau, inside, GRID))) == pytest.approx(sum(terms) / len(terms))


def test_cells_on_the_object():
    mask = torch.zeros(2, 6, 10)
    mask[0, 0, 0], mask[0, 2:4, 6:8] = 0.2, 1.0  # a twentieth of a cell, and a whole cell
    mask[1] = 1
    box = torch.tensor([[torch.nan] * 4, [20.0, 0.0, 60.0, 10.0]])
    pair = batch()._replace(src_mask=mask, src_box=box, src_size=torch.tensor([[100.0, 30.0]] * 2))
    on = gsf.on_object(pair, GRID)
    assert on[0].nonzero().flatten().tolist() == [W + 3]
    assert on[1].nonzero().flatten().tolist() == [1, 2]  # their centres, 30 and 50, lie in the box
    anywhere = pair._replace(src_mask=torch.ones(2, 1, 1), src_box=box[:1].expand(2, 4))
    assert gsf.on_object(anywhere, GRID).all()


def soft_argmax(row, radius):
    """Expected target of one row of scores, over all cells or within a radius of its maximum on both axes."""
    best = max(range(N), key=lambda j: float(row[j]))
    far = [max(abs(a - b) for a, b in zip(place(j), place(best), strict=True)) for j in range(N)]
    near = [j for j in range(N) if radius is None or far[j] <= radius]
    weights = {j: math.exp(50 * float(row[j])) for j in near}
    return sum(w * CELLS[j] for j, w in weights.items()) / sum(weights.values())


@pytest.mark.parametrize("start, radius", [("refined", None), ("refined", 1), ("guidance", None)])
@pytest.mark.parametrize("mls", [True, False])
def test_the_whole_head_equals_the_equations_in_loops(mls, start, radius):
    model = head(grid=list(GRID), mls=mls, start=start, readout_radius=radius, c_p=1.5, c_m=1.2).double().eval()
    with torch.no_grad():
        for p in [*model.pruning.parameters(), *model.matching.leave.parameters()]:
            p.copy_(0.1 * randn(*p.shape))
    image = torch.zeros(1, 3, 16 * H, 16 * W, dtype=torch.float64)
    maps = [randn(1, 6, H, W), randn(1, 6, H, W, seed=1)]
    src, trg = (model.prepare(Features(image, [m])) for m in maps)
    match = model.match(src, trg)
    f, g = (m[0].flatten(1).T for m in maps)
    scores = torch.stack([torch.stack([max(a @ b / a.norm() / b.norm(), 0 * a[0]) for b in g]) for a in f])  # eq. 1
    q = mutual_by_loops(scores)  # eq. 4
    x = (q / (1 + torch.exp(-(model.pruning(q.unsqueeze(0), GRID)[0] + gsf.TRUST)))).detach()  # eq. 5
    guidance, confident = torch.zeros(N, 2, dtype=torch.float64), []
    for i in range(N):  # eq. 6
        row = x[i] * (x[i] > 0.9)
        confident.append(bool(row.any()))
        kept = row if confident[i] else scores[i]
        weights = {j: math.exp(50 * kept[j]) for j in range(N) if kept[j] > 0 or not confident[i]}
        guidance[i] = sum(w * CELLS[j] for j, w in weights.items()) / sum(weights.values()) - CELLS[i]
    assert 2 < sum(confident) < N
    if mls:
        guidance = mls_by_loops(guidance, confident, 1.5)  # eq. 7
    refined = torch.zeros(N, N, dtype=torch.float64)
    for i in range(N):  # eq. 8, footnote 1
        for j in range(N):
            far = float(((CELLS[j] - CELLS[i] - guidance[i]) ** 2).sum())
            refined[i, j] = scores[i, j] * (math.exp(-far / (2 * 1.2**2)) if mls or confident[i] else 1)
    begin = guidance
    if start == "refined":
        begin = torch.stack([soft_argmax(refined[i], radius) for i in range(N)]) - CELLS
    tau = begin + model.matching(refined.unsqueeze(0), GRID)[0]  # eq. 9
    torch.testing.assert_close(match.extras["field"][0], guidance)
    torch.testing.assert_close(match.flow[0].flatten(1).T, 16 * tau)


def test_the_mean_of_each_level_is_removed_before_it_is_normalised():
    maps = [randn(1, 4, H, W), randn(1, 3, 2 * H, 2 * W)]
    image = torch.zeros(1, 3, 16 * H, 16 * W, dtype=torch.float64)
    model = head(grid=list(GRID), levels=[3, 5], remove_mean=True).double()
    for level, found in zip(maps, model.prepare(Features(image, maps)).maps, strict=True):
        centred = level - level.flatten(2).mean(2)[..., None, None]
        if level.shape[-1] > W:  # twice the grid: the mean of four cells
            centred = centred.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
        torch.testing.assert_close(found, centred / centred.norm(dim=1, keepdim=True))


# ---------------------------------------------------------------- the mechanism


class Oracle(nn.Module):
    """A pruning network that has learnt not to trust some rows."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, volume, grid):
        logits = torch.full_like(volume, 9.0)
        logits[:, self.rows] = -9.0
        return logits


def repeated_pattern():
    """A scene shifted by a cell, in which two cells look alike: prepared features, and the two source cells."""
    h, w = 6, 7
    scene = unit(1, h * (w + 1), 60, seed=4).mT.unflatten(2, (h, w + 1))
    scene[..., 2, 2] = scene[..., 2, 5]
    image = torch.zeros(1, 3, 16 * h, 16 * w, dtype=torch.float64)
    src, trg = (Features(image, [scene[..., k : k + w]]) for k in (1, 0))  # what is at x lies at x + 1 in the target
    return src, trg, [(2, 1), (2, 4)]


@pytest.mark.parametrize("options", [{}, {"mls": False}, {"pruning": False, "stage1": 0}], ids=str)
def test_confident_neighbours_pull_ambiguous_matches_right(options):
    src, trg, alike = repeated_pattern()
    model = head(grid=[6, 7], c_p=0.7, start="guidance", **options).double().eval()
    if model.pruning:
        model.pruning = Oracle([r * 7 + c for r, c in alike])
    flow = model.match(model.prepare(src), model.prepare(trg)).flow.detach() / 16
    errors = [float((flow[0, :, r, c] - torch.tensor([1.0, 0.0])).norm()) for r, c in alike]
    if options:  # without propagation, or with nothing pruned, they point between the two
        assert min(errors) > 0.4
    else:
        assert max(errors) < 0.1


def test_the_flow_from_the_refined_scores_keeps_edges_that_the_guidance_blurs():
    """Columns 4 to 6 moved by one cell and columns 0 to 3 did not: G' changes gradually, the flow at once."""
    h, w = 6, 8
    scene = unit(1, h * w, 60, seed=4).mT.unflatten(2, (h, w))
    image = torch.zeros(1, 3, 16 * h, 16 * w, dtype=torch.float64)
    src = Features(image, [scene[..., [0, 1, 2, 3, 5, 6, 7, 7]]])
    errors = {}
    for start in ("guidance", "refined"):
        model = head(grid=[h, w], start=start).double().eval()
        flow = model.match(model.prepare(src), model.prepare(Features(image, [scene]))).flow / 16
        expected = torch.tensor([0.0, 0, 0, 0, 1, 1, 1])
        errors[start] = (flow[0, 0, :, :7] - expected).abs().amax(0)
    assert errors["guidance"][3:5].min() > 0.2
    assert errors["refined"].max() < 0.01


def test_modulation_silences_the_wrong_one_of_two_alike():
    scores = torch.tensor([[[1.0, 0, 0, 0, 1.0]]])
    cells = cell_centres((1, 5), (1, 5))
    row = guidance.modulate(scores, torch.tensor([[[1.0, 0.5]]]), cells, 1.0)[0, 0]
    assert row[0] > 100 * row[4]
    assert (guidance.modulate(scores, torch.tensor([[[1.0, 0.5]]]), cells, 1e6)[0, 0] - scores[0, 0]).abs().max() < 1e-6


def test_confidence_falls_where_the_surroundings_do_not_match():
    """Gradient of L_geo for a fixed guidance: it reaches the pruning network through the weights alone."""
    kept = torch.full((1, N, N), 0.95, dtype=torch.float64, requires_grad=True)
    f, guidance, counted = unit(1, N, 4), torch.zeros(1, N, 2, dtype=torch.float64), torch.ones(1, N, dtype=torch.bool)
    g = f.clone()
    g[0, 6] *= -1
    mean_where(*gsf.geometry_loss(f, g, guidance, kept.amax(2), counted, CELLS, GRID, 0)).backward()
    falls = kept.grad.sum(2)[0]
    assert falls[6] > 0 and not falls[torch.arange(N) != 6].any()


# ---------------------------------------------------------------- training


class Watch(Callback):
    """What changed in each step, by the name of the part."""

    def on_train_start(self, trainer, model):
        self.moved, self.before = [], {k: v.clone() for k, v in model.state_dict().items()}

    def on_train_batch_end(self, trainer, model, *args):
        now = model.state_dict()
        self.moved.append({k.split(".")[0] for k, v in now.items() if not torch.equal(v, self.before[k])})
        self.before = {k: v.clone() for k, v in now.items()}


def fit(model, pairs, steps, *callbacks):
    Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*callbacks],
    ).fit(model, DataLoader(pairs, batch_size=2, collate_fn=PairDataset.collate))  # fmt: skip


def samples(size=80, count=8):
    pairs = corrzoo.create_dataset("synthetic", "", "trn", size=size)
    return [pairs[i] for i in range(count)]


@pytest.mark.parametrize("share, stages", [(0.5, [1, 1, 2, 2]), (0.0, [2, 2]), (1.0, [1, 1])])
def test_the_first_stage_trains_the_pruning_network_alone(share, stages):
    model, watch = head(stage1=share, adaptation=True, optimizer="adamw", weight_decay=0.1, lr=1e-3), Watch()
    nn.init.normal_(model.matching.leave.weight)  # so that what lies before it has a gradient
    fit(model, samples(), len(stages), watch)
    everything = {"backbone", "adaptation", "pruning", "matching"}
    assert watch.moved == [{"pruning"} if stage == 1 else everything for stage in stages]


def test_training_reads_no_keypoint():
    """Neither loss nor steps: NaN for every keypoint leaves the trained weights as they are."""

    def trained(pairs):
        model = head(stage1=0.5)
        fit(model, pairs, 4)
        return model.state_dict()

    honest = samples()
    nan = torch.full_like(honest[0].src_kps, torch.nan)
    poisoned = [
        p._replace(src_kps=torch.full_like(p.src_kps, torch.nan), trg_kps=torch.full_like(p.trg_kps, torch.nan))
        for p in honest
    ]
    without = [p._replace(src_kps=nan[:0], trg_kps=nan[:0], kps_mask=p.kps_mask[:0]) for p in honest]
    expected = trained(honest)
    for pairs in (poisoned, without):
        for name, value in trained(pairs).items():
            assert torch.equal(value, expected[name]), name


def test_the_loss_is_eq_10_in_stage_1_and_eq_15_in_stage_2():
    model, pair = head(weight_p=2.0, weight_sil=3.0, weight_geo=5.0, weight_m=7.0, weight_sm=11.0), batch()
    nn.init.normal_(model.matching.leave.weight, std=0.01)
    model.stage2_from = 1
    first = model.training_losses(pair)
    model.stage2_from = 0
    second = model.training_losses(pair)
    assert first.keys() == {"loss", "sil", "geo"} and second.keys() == {"loss", "sil", "geo", "match", "smooth"}
    assert all(value > 0 for value in second.values())
    eq_10 = 2 * (3 * first["sil"] + 5 * first["geo"])
    torch.testing.assert_close(first["loss"], eq_10)
    torch.testing.assert_close(second["loss"], eq_10 + 7 * second["match"] + 11 * second["smooth"])


def test_pixels_off_the_object_are_not_learnt_from():
    model, pair = head().eval(), batch()
    match = model(pair.src_img, pair.trg_img)
    nowhere = model.loss(match, pair._replace(src_mask=torch.zeros(2, 1, 1)))
    assert nowhere["loss"] == 0
    nowhere["loss"].backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    boxed, masked = (
        model.loss(match, pair._replace(src_mask=mask))["match"]
        for mask in (torch.ones(2, 1, 1), (torch.arange(25).view(1, 5, 5) % 2).float().expand(2, 5, 5))
    )
    assert boxed != masked


@pytest.mark.parametrize(
    "options",
    [
        {"grid": [3, 7]},
        {"adaptation": True, "fusion": "product", "levels": [1, 3, 5]},
        {"start": "guidance", "remove_mean": True},
        *({k: v for k, v in changed.items() if k not in ("backbone", "levels")} for changed in ABLATIONS.values()),
    ],
    ids=str,
)
def test_every_option_trains_on_odd_grids_in_half_precision_with_one_pair(options):
    model, pair = head(**options), batch(size=(80, 48), count=1)
    with torch.autocast("cpu", torch.bfloat16):
        match = model(pair.src_img, pair.trg_img)
        loss = model.loss(match, pair)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(match.flow).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_training_step_does_not_wait_for_the_host(stage):
    model, pair = head(adaptation=True), batch()
    model.stage2_from = 3 - 2 * stage  # above or below step 0
    src, trg = model.features_of(pair.src_img, pair.trg_img)
    model.features_of = lambda *images_and_ids: (src, trg)
    with hostless():
        model.training_losses(pair)


def test_torch_compile_answers_the_same():
    model, pair = head(), batch()
    with torch.no_grad():
        src, trg = model.features_of(pair.src_img, pair.trg_img)
        compiled = torch.compile(model.match, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(src, trg).flow, model.match(src, trg).flow)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ZooError, match="stage1=0"):
        head(pruning=False)
    with pytest.raises(ZooError, match="multiple of 8"):
        head(width=20)


# ---------------------------------------------------------------- configurations


def test_the_recipe_has_the_papers_numbers():
    model = head(**{k: v for k, v in recipe().items() if k not in ("backbone", "weights", "levels")})
    assert (model.rho, model.c_p, model.c_m, model.hparams.radius) == (0.9, 1.5, 7, 5)
    assert recipe()["backbone"] == "resnet101" and recipe()["levels"] == ["layer3.22", "layer4.2"]


def test_every_configuration_has_the_same_widths_as_shares_of_its_grid():
    """1.5 and 7 of 20 cells (docs/heads/gsf.md), in the recipe's defaults, the study and the demo."""
    options = [yaml.safe_load(path.read_text()) for path in CONFIGS.rglob("*.yaml") if "c_p:" in path.read_text()]
    options = [read for read in options if read["model"].get("class_path") != "MirrorGuided"]
    assert options
    for init_args in (read["model"]["init_args"] for read in options):
        assert init_args["c_p"] == pytest.approx(1.5 * init_args["grid"] / 20)
        assert init_args["c_m"] == pytest.approx(7 * init_args["grid"] / 20)


def recipe(name="gsf"):
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["init_args"]


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_differ_as_named(name):
    changed = recipe(f"ablation/gsf/{name}")
    assert changed == ABLATIONS[name]
    model = head(**{k: v for k, v in (recipe() | changed).items() if k not in ("backbone", "weights", "levels")})
    assert (model.pruning is None) == (name in ("no_pruning", "zero_shot"))
    assert (model.matching is None) == (name in ("no_matching", "geo_only", "sil_only", "stage1_only"))
    assert model.mls == (name != "no_mls")


def test_every_ablation_is_tested():
    assert {p.stem for p in (CONFIGS / "ablation" / "gsf").glob("*.yaml")} == set(ABLATIONS)
