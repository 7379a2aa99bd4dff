"""The Baseline against its equations written again as plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F

import corrzoo
from corrzoo.geometry import sample, transfer
from corrzoo.scoring.evaluation import predict_points
from corrzoo.types import Features
from hostless import hostless

TINY = dict(backbone="timm/test_vit.r160_in1k", weights="random")
READOUTS = ["kernel", "soft", "window", "argmax"]


def head(**options):
    return corrzoo.create_matcher("Baseline", **{**TINY, **options}).double().eval()


def features(grid, channels=5, seed=0, stride=8):
    g = torch.Generator().manual_seed(seed)
    h, w = grid
    image = torch.zeros(1, 3, h * stride, w * stride, dtype=torch.float64)
    return Features(image, [torch.randn(1, channels, h, w, generator=g, dtype=torch.float64)])


def position_by_loops(scores, readout, temperature, sigma, radius):
    """Scores {(row, column): score} of one source cell to (x, y) in target cells, cell c's centre at c + 0.5."""
    best = max(sorted(scores), key=lambda cell: scores[cell])
    if readout == "argmax":
        return best[1] + 0.5, best[0] + 0.5
    weights = {}
    for (r, c), s in scores.items():
        if readout == "kernel":
            s = s * math.exp(-((r - best[0]) ** 2 + (c - best[1]) ** 2) / (2 * sigma**2))
        if readout == "window" and max(abs(r - best[0]), abs(c - best[1])) > radius:
            continue
        weights[r, c] = math.exp(s / temperature)
    total = sum(weights.values())
    return (
        sum(p * (c + 0.5) for (_, c), p in weights.items()) / total,
        sum(p * (r + 0.5) for (r, _), p in weights.items()) / total,
    )


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("readout", READOUTS)
def test_flow_equals_the_equations_in_loops(readout, mutual):
    (h, w), (h2, w2), stride = (3, 4), (3, 4), 8
    model = head(readout=readout, sigma=1.3, radius=1, mutual=mutual, temperature=0.07)
    src, trg = features((h, w)), features((h2, w2), seed=1)
    flow = model.match(src, trg).flow
    s, t = src.maps[0][0], trg.maps[0][0]
    corr = {
        (a, b): {(r, c): cosine(s[:, a, b], t[:, r, c]) for r in range(h2) for c in range(w2)}
        for a in range(h)
        for b in range(w)
    }
    for (a, b), row in corr.items():
        scores = row
        if mutual:
            relu = {cell: max(v, 0) for cell, v in row.items()}
            column_best = {cell: max(corr[q][cell] for q in corr) for cell in row}
            scores = {
                cell: v * (v / max(relu.values())) * (v / column_best[cell]) if column_best[cell] > 0 else 0.0
                for cell, v in relu.items()
            }
        x, y = position_by_loops(scores, readout, 0.07, 1.3, 1)
        expected = torch.tensor([(x - b - 0.5) * stride, (y - a - 0.5) * stride], dtype=torch.float64)
        torch.testing.assert_close(flow[0, :, a, b], expected, atol=1e-6, rtol=1e-6)


def test_the_default_kernel_is_a_quarter_of_the_grid():
    src, trg = features((4, 8)), features((4, 8), seed=1)
    torch.testing.assert_close(head(sigma=2.0).match(src, trg).flow, head().match(src, trg).flow)


@pytest.mark.parametrize("readout", [*READOUTS, "identity"])
@pytest.mark.parametrize("mutual", [False, True])
def test_single_points_are_matched_as_by_the_dense_flow(readout, mutual):
    model = head(readout=readout, mutual=mutual)
    src, trg = features((5, 7)), features((5, 7), seed=1)
    points = torch.tensor([[[0.0, 0.0], [3.9, 4.0], [28.1, 19.7], [56.0, 40.0], [60.0, -3.0]]], dtype=torch.float64)
    dense = transfer(points, model.match(src, trg).flow, (40, 56))
    torch.testing.assert_close(model.match_points(src, trg, points), dense)


def test_identity_returns_the_same_relative_position():
    pair = corrzoo.create_dataset("synthetic", "", "test", size=64)[0]
    model = head(readout="identity").float()
    pair = corrzoo.data.PairDataset.collate([pair])
    pred = predict_points(model, pair)
    scale = pair.trg_size / 64
    torch.testing.assert_close(pred, (pair.src_kps * scale.unsqueeze(1)).double())


def test_an_image_matched_with_itself_has_zero_flow():
    src = features((6, 6), channels=64)
    assert head(readout="argmax").match(src, src).flow.abs().max() < 1e-9
    assert head(readout="window", temperature=0.01).match(src, src).flow.abs().max() < 1e-3


def test_remove_mean_removes_a_common_component():
    model = head(remove_mean=True, stride=8)
    a = features((4, 4))
    shifted = a._replace(maps=[a.maps[0] + torch.randn(1, 5, 1, 1, dtype=torch.float64)])
    torch.testing.assert_close(model.prepare(a).maps[0], model.prepare(shifted).maps[0])


def test_levels_are_resized_to_one_stride_with_equal_weight():
    fine, coarse = features((4, 6)), features((2, 3), stride=16, seed=1)
    both = fine._replace(maps=[fine.maps[0], 1000 * coarse.maps[0]])
    out = head(stride=8).prepare(both).maps[0]
    assert out.shape == (1, 10, 4, 6)
    torch.testing.assert_close(out[:, :5], F.normalize(fine.maps[0], dim=1))
    expected = F.interpolate(coarse.maps[0], (4, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(out[:, 5:], F.normalize(expected, dim=1))


def test_point_query_features_matches_interpolated_features():
    model = head(point_query="features", readout="argmax")
    src, trg = features((4, 4)), features((4, 4), seed=1)
    points = torch.tensor([[[7.0, 13.0], [12.0, 20.0]]], dtype=torch.float64)
    asked = sample(src.maps[0], points, (32, 32))[0]
    scores = F.normalize(asked, dim=1) @ F.normalize(trg.maps[0][0].flatten(1), dim=0)
    best = scores.argmax(1)
    expected = torch.stack([best % 4, best // 4], -1) * 8.0 + 4
    torch.testing.assert_close(model.match_points(src, trg, points)[0], expected.double())


def pairs(count=2):
    dataset = corrzoo.create_dataset("synthetic", "", "test", size=64)
    return corrzoo.data.PairDataset.collate([dataset[i] for i in range(count)])


@pytest.mark.parametrize("options", [{}, {"readout": "window"}, {"readout": "argmax"}, {"mutual": True}])
def test_no_host_device_synchronisation(options):
    """In a training step and in an evaluation step, for both ways to match points."""
    model, pair = head(**options).float().train(), pairs()
    with hostless():
        loss = model.loss(model(pair.src_img, pair.trg_img), pair)
        if model.readout != "argmax":
            loss.backward()
        with torch.no_grad():
            src, trg = model.eval().features_of(pair.src_img, pair.trg_img)
            for model.point_query in ("flow", "features"):
                model.match_points(src, trg, pair.src_kps)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("readout", READOUTS)
def test_compiles_without_graph_breaks(readout):
    torch._dynamo.reset()
    model, pair = head(readout=readout).float(), pairs(1)
    src, trg = model.features_of(pair.src_img, pair.trg_img)
    compiled = torch.compile(model.match, fullgraph=True, backend="aot_eager")
    flow, plain = compiled(src, trg).flow, model.match(src, trg).flow
    torch.testing.assert_close(flow, plain, atol=1e-3, rtol=1e-3)
    if readout != "argmax":
        ours, theirs = (torch.autograd.grad(f.square().mean(), model.temperature)[0] for f in (flow, plain))
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_the_temperature_is_the_only_new_parameter():
    model = head()
    own = [name for name, _ in model.named_parameters() if not name.startswith("backbone.")]
    assert own == ["temperature"]
    assert not head(learn_temperature=False).temperature.requires_grad
