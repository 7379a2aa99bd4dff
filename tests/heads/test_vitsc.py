"""ViTSC against its equations written again as plain loops, and each of its mechanisms in miniature."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml

import corrzoo
from corrzoo.geometry import sample
from corrzoo.heads.vitsc import CrossPerception, LowEncoder, position_encoding, projection, triplet_loss
from corrzoo.matcher import HEADS
from corrzoo.scoring.evaluation import Evaluation
from corrzoo.types import Features, Match, ZooError
from hostless import hostless

TINY = dict(backbone="timm/test_vit.r160_in1k", weights="random")
ROOT = Path(__file__).resolve().parents[2]
CONFIGS, PAGE = ROOT / "zoo_configs", ROOT / "docs" / "heads" / "vitsc.md"


def head(**options):
    torch.manual_seed(0)
    return corrzoo.create_matcher("ViTSC", **{**TINY, "low_stages": 1, "head_resolution": 0.125, **options})


def awake(module):
    """Nothing stands at its initial zero any more."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


def pairs(count=2, size=64):
    dataset = corrzoo.create_dataset("synthetic", "", "test", size=size)
    return corrzoo.data.PairDataset.collate([dataset[i] for i in range(count)])


def unit(x):
    return x / x.norm()


# ---------------------------------------------------------------------- Table 10 and the L-encoder


@pytest.mark.parametrize(
    "letter, module, total", [("s", 3_850_755, 28.7), ("b", 3_949_059, 93.3), ("l", 4_014_595, 311.2)]
)
def test_parameters_are_those_of_table_10(letter, module, total):
    width = {"s": 384, "b": 768, "l": 1024}[letter]
    with torch.device("meta"):
        model = HEADS["ViTSC"](backbone=f"dinov2_{letter}14")
    count = sum(p.numel() for p in model.parameters())
    low = sum(p.numel() for p in model.low.parameters())
    assert low == model.low.num_params == 2_782_784
    attention = 2 * (2 * (4 * 256**2 + 4 * 256) + 2 * 256 * 1024 + 1024 + 256 + 4 * 2 * 256)
    guide = 81 * 128 + 128 + 128 * 192 * 9 + 192
    flow = 2 * 64 * 49 + 64 + 64 * 128 * 9 + 128
    last = 320 * 256 * 9 + 256 + 256 * 256 * 9 + 256 + 256 * 2 * 9 + 2
    assert count - low - model.backbone.num_params == width * 256 + 256 + attention + guide + flow + last + 1 == module
    assert round(count / 1e6, 1) == total  # Table 10 prints 309.9 for L, from an H-encoder that no DINOv2-L has


def test_the_low_encoder_is_resnet18_without_strides_and_last_stage():
    low = LowEncoder("random", 3, corrzoo.backbones.get_spec("dinov2_b14")).eval()
    image = torch.randn(1, 3, 40, 56)
    (out,) = low(image).maps
    assert out.shape == (1, 256, 10, 14) and low.strides == [4]
    stock = timm.create_model("resnet18").eval()
    stock.load_state_dict(low.trunk.model.state_dict(), strict=False)
    x = stock.maxpool(F.relu(stock.bn1(stock.conv1(image))))
    for block in [*stock.layer1, *stock.layer2, *stock.layer3]:
        y = F.relu(block.bn1(F.conv2d(x, block.conv1.weight, padding=1)))
        y = block.bn2(F.conv2d(y, block.conv2.weight, padding=1))
        skip = x if block.downsample is None else block.downsample[1](F.conv2d(x, block.downsample[0].weight))
        x = F.relu(y + skip)
    torch.testing.assert_close(out, x)


def test_low_weights_load_from_a_file_or_a_checkpoint(tmp_path):
    whole = timm.create_model("resnet18")
    path = tmp_path / "resnet18.pth"
    torch.save(whole.state_dict(), path)
    model = HEADS["ViTSC"](**TINY, low_weights=str(path), low_stages=2)
    with pytest.raises(ZooError, match="not loaded"):
        model(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))
    model.load_weights()
    mine = model.low.trunk.model
    torch.testing.assert_close(mine.layer2.state_dict(), whole.layer2.state_dict())
    assert not list(mine.layer3.parameters())
    again = HEADS["ViTSC"](**TINY, low_weights="nowhere.pth", low_stages=2)
    again.load_state_dict(model.state_dict())
    again.load_weights()  # there is nothing left to look for
    with pytest.raises(ZooError, match=r"nowhere\.pth"):
        HEADS["ViTSC"](**TINY, low_weights="nowhere.pth").load_weights()


def test_the_low_encoder_normalises_images_for_imagenet():
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    lite = corrzoo.backbones.Backbone("efficientnet_lite0", "random")
    low = LowEncoder("random", 1, lite.spec).eval()
    seen, own = lite.normalise(pixels), low.normalise(pixels)
    assert not torch.allclose(seen, own, atol=0.1)
    torch.testing.assert_close(low(seen).image, own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("finetune", ["all", "none"])
@pytest.mark.parametrize(("weights", "group"), [("pretrained", "backbone"), ("random", "head")])
def test_a_random_low_encoder_trains_at_the_heads_rate(weights, group, finetune):
    model = HEADS["ViTSC"](**TINY, low_weights=weights, finetune=finetune)
    groups = {g["name"]: [id(p) for p in g["params"]] for g in model.param_groups()}
    rates = {g["name"]: g["lr"] for g in model.param_groups()}
    assert rates.items() <= {"head": model.hparams.lr, "backbone": model.hparams.backbone_lr}.items()
    assert {id(p) for p in model.low.parameters() if p.requires_grad} <= set(groups[group])
    assert id(model.temperature) in groups["head"]
    assert (id(model.backbone.trunk.model.norm.weight) in groups.get("backbone", [])) == (finetune == "all")
    every = [p for ids in groups.values() for p in ids]
    assert sorted(every) == sorted(id(p) for p in model.parameters() if p.requires_grad)  # each once


def test_the_low_encoders_features_are_cached_in_evaluation():
    model, low = head().eval(), []
    model.low.register_forward_hook(lambda module, args, output: low.append(len(args[0])))
    dataset = corrzoo.create_dataset("synthetic", "", "test", size=64, length=2)
    pair = corrzoo.data.PairDataset.collate([dataset[0]])
    evaluation = Evaluation(model, SimpleNamespace(dataset=dataset), "default", (0.1,), cache_mb=1)
    first, second = evaluation.predict(pair, 0), evaluation.predict(pair, 0)
    assert sum(low) == 2  # each image once: on a CPU one by one
    torch.testing.assert_close(first, second)


# ---------------------------------------------------------------------- 4.1


def attend(module, query, key, value):
    """Multi-head attention of one item in plain steps: (N, C), (M, C), (M, C) -> (N, C)."""
    (wq, wk, wv), (bq, bk, bv) = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    q, k, v = query @ wq.T + bq, key @ wk.T + bk, value @ wv.T + bv
    out = []
    for i in range(0, 256, 32):  # 8 heads
        weights = torch.softmax(q[:, i : i + 32] @ k[:, i : i + 32].T / math.sqrt(32), dim=1)
        out.append(weights @ v[:, i : i + 32])
    return torch.cat(out, dim=1) @ module.out_proj.weight.T + module.out_proj.bias


def norm(layer, x):
    x = (x - x.mean(1, True)) / (x.var(1, False, keepdim=True) + 1e-5).sqrt()
    return x if layer is None else x * layer.weight + layer.bias


def update(block, x, other, pos, other_pos):
    known = norm(block.norm_context, other)
    x = x + attend(block.cross, norm(block.norm_query, x) + pos, known + other_pos, known)
    own = norm(block.norm_self, x)
    x = x + attend(block.self_attention, own + pos, own + pos, own)
    first, _, second = block.ffn
    hidden = norm(block.norm_ffn, x) @ first.weight.T + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + hidden @ second.weight.T + second.bias


@pytest.mark.parametrize("order", ["interleaved", "symmetric", "asymmetric"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_order_of_the_updates_equals_table_4(order, layers):
    torch.manual_seed(0)
    module = awake(CrossPerception(layers, order).double())
    src, trg = torch.randn(1, 256, 2, 3).double(), torch.randn(1, 256, 3, 2).double()
    pos_a, pos_b = position_encoding(src), position_encoding(trg)
    a, b = norm(None, src[0].flatten(1).T), norm(None, trg[0].flatten(1).T)
    blocks = iter(module.blocks)
    for _ in range(layers):
        if order == "interleaved":
            a = update(next(blocks), a, b, pos_a, pos_b)
            b = update(next(blocks), b, a, pos_b, pos_a)
        elif order == "symmetric":
            block = next(blocks)
            a, b = update(block, a, b, pos_a, pos_b), update(block, b, a, pos_b, pos_a)
        else:
            a = update(next(blocks), a, b, pos_a, pos_b)
    assert next(blocks, None) is None
    found = module(src, trg)
    torch.testing.assert_close(found[0][0].flatten(1).T, a)
    torch.testing.assert_close(found[1][0].flatten(1).T, b)


@pytest.mark.parametrize("channels", [32, 152, 256])
def test_the_projection_starts_with_the_cosines_of_the_features(channels):
    torch.manual_seed(0)
    layer = projection(channels).double()
    maps = torch.randn(1, channels, 3, 4, dtype=torch.float64)
    cosines = [(f @ f.mT) for f in (F.normalize(x.flatten(2).mT, dim=2) for x in (maps, layer(maps)))]
    torch.testing.assert_close(*cosines, atol=1e-6, rtol=0)


def test_a_projection_to_fewer_channels_starts_orthogonal():
    torch.manual_seed(0)
    layer = projection(384)
    weight = layer.weight.flatten(1)
    torch.testing.assert_close(weight @ weight.mT, torch.eye(256), atol=1e-5, rtol=0)
    assert not layer.bias.any()


def test_an_untrained_perception_keeps_the_features():
    a, b = torch.randn(1, 256, 3, 3), torch.randn(1, 256, 3, 3)
    expected = tuple(F.layer_norm(x.movedim(1, -1), (256,)).movedim(-1, 1) for x in (a, b))
    torch.testing.assert_close(CrossPerception(2, "interleaved")(a, b), expected)


def test_positions_are_relative_to_the_image():
    small, large = (position_encoding(torch.zeros(1, 256, n, n, dtype=torch.float64)) for n in (28, 84))
    large = large.view(28, 3, 28, 3, 256)[:, 1, :, 1].flatten(0, 1)  # the centre of every 3 x 3 cells
    torch.testing.assert_close(small, large)
    x, y = 4.5, 2.5
    at = small[2 * 28 + 4].view(2, 2, 64)  # axis, sine and cosine, frequency
    for i in (0, 1, 40):
        frequency = 10_000 ** (-i / 64)
        expected = [[math.sin(v * frequency), math.cos(v * frequency)] for v in (x, y)]
        torch.testing.assert_close(at[:, :, i], torch.tensor(expected, dtype=torch.float64))


# ---------------------------------------------------------------------- 4.2


def read(map_, x, y):
    """A map (C, h, w) at continuous cells, by its four neighbours; zero outside."""
    column, row, total = math.floor(x - 0.5), math.floor(y - 0.5), 0.0
    for r in (row, row + 1):
        for c in (column, column + 1):
            if 0 <= r < map_.shape[1] and 0 <= c < map_.shape[2]:
                total += (1 - abs(x - 0.5 - c)) * (1 - abs(y - 0.5 - r)) * map_[:, r, c]
    return total


@pytest.mark.parametrize("upsampler", ["low", "high"])
def test_look_up_equals_equation_8_in_loops(upsampler):
    g = torch.Generator().manual_seed(0)
    model, (h, w), radius = head(upsampler=upsampler, radius=2).double(), (3, 4), 2
    image = torch.zeros(1, 3, 8 * h, 8 * w)
    src, trg = (
        Features(image, [torch.randn(1, 5, n * h, n * w, generator=g, dtype=torch.float64) for n in (1, 2)])
        for _ in range(2)
    )
    flow = 12 * torch.randn(1, 2, h, w, generator=g, dtype=torch.float64)
    found = model.look_up(flow, src, trg)
    low = upsampler == "low"
    source, target, cell = src.maps[low][0], trg.maps[low][0], 4 if low else 8
    units = F.normalize(target, dim=0)
    for row in range(h):
        for col in range(w):
            f = source[:, row, col]
            if low:
                f = sum(source[:, 2 * row + i, 2 * col + j] for i in (0, 1) for j in (0, 1)) / 4
            x = (8 * (col + 0.5) + flow[0, 0, row, col]) / cell
            y = (8 * (row + 0.5) + flow[0, 1, row, col]) / cell
            offsets = [(dx, dy) for dy in range(-radius, radius + 1) for dx in range(-radius, radius + 1)]
            expected = [float((unit(f) * read(units, x + dx, y + dy)).sum()) for dx, dy in offsets]
            torch.testing.assert_close(found[0, :, row, col], torch.tensor(expected, dtype=torch.float64))


def test_without_its_modules_the_flow_is_the_baselines_resized():
    pair = pairs(1)
    baseline = corrzoo.create_matcher("Baseline", **TINY)
    for options in ({"upsampler": "bilinear"}, {"upsampler": "low"}):  # what the CNN adds begins at zero
        model = head(enhancement="none", **options)
        model.backbone.load_state_dict(baseline.backbone.state_dict())
        flow = baseline(pair.src_img, pair.trg_img).flow
        expected = F.interpolate(flow, (64, 64), mode="bilinear", align_corners=False)
        torch.testing.assert_close(model(pair.src_img, pair.trg_img).flow, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"upsampler": "high"}, {"upsampler": "unguided"}, {"upsampler": "bilinear"}])
@pytest.mark.parametrize("attend_at", ["stride8", "native"])
def test_the_same_weights_serve_every_size(options, attend_at):
    model = awake(head(attend_at=attend_at, **options)).eval()
    for size in [(64, 64), (128, 128), (48, 80), (112, 16)]:
        src, trg = torch.randn(1, 3, *size), torch.randn(1, 3, *size)
        flow = model(src, trg).flow
        assert flow.shape == (1, 2, *size) and torch.isfinite(flow).all()


def test_the_flow_has_full_resolution_at_every_head_resolution():
    pair = pairs(1, size=32)
    full, half = (awake(head(head_resolution=r)).eval()(pair.src_img, pair.trg_img).flow for r in (1.0, 0.5))
    assert full.shape == half.shape == (1, 2, 32, 32) and not torch.equal(full, half)
    with pytest.raises(ZooError, match="head_resolution"):
        head(head_resolution=0.0)


@pytest.mark.parametrize("upsampler", ["low", "high", "unguided", "bilinear"])
def test_compiles_without_graph_breaks(upsampler):
    torch._dynamo.reset()
    model, pair = awake(head(upsampler=upsampler)).eval(), pairs(1)
    with torch.no_grad():
        src, trg = model.features_of(pair.src_img, pair.trg_img)
        match = torch.compile(model.match, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(match(src, trg).flow, model.match(src, trg).flow, atol=1e-3, rtol=1e-3)


def test_compiled_training_has_the_same_gradients():
    torch._dynamo.reset()
    model, pair = awake(head()).train(), pairs(1)
    src, trg = model.features_of(pair.src_img, pair.trg_img)
    parameters = [p for module in (model.perception, model.upsampler) for p in module.parameters()]
    compiled = torch.compile(model.match, fullgraph=True, backend="aot_eager")
    gradients = (
        torch.autograd.grad(model.loss(match(src, trg), pair)["loss"], parameters, retain_graph=True)
        for match in (compiled, model.match)
    )
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-2 * plain.abs().max().item(), rtol=0)


@pytest.mark.parametrize("options", [{}, {"upsampler": "high", "attend_at": "native"}, {"upsampler": "bilinear"}])
def test_no_host_device_synchronisation(options):
    """In a training step and in an evaluation step."""
    model, pair = awake(head(**options)).train(), pairs()
    with hostless():
        loss = model.loss(model(pair.src_img, pair.trg_img), pair)["loss"]
        loss.backward()
        with torch.no_grad():
            src, trg = model.eval().features_of(pair.src_img, pair.trg_img)
            model.match_points(src, trg, pair.src_kps)
    assert torch.isfinite(loss)


# ---------------------------------------------------------------------- 4.3


def test_triplet_loss_equals_equations_9_and_10_in_loops():
    g = torch.Generator().manual_seed(0)
    src, trg = (F.normalize(torch.randn(4, 5, 3, generator=g, dtype=torch.float64), dim=-1) for _ in range(2))
    counts = [5, 3, 1, 0]  # the last two pairs have no triplet
    mask = torch.stack([torch.randperm(5, generator=g) < n for n in counts])
    each = []
    for b, n in enumerate(counts):
        kept = [k for k in range(5) if mask[b, k]]
        total = 0.0
        for i in kept:
            for j in kept:
                if i != j:
                    near, far = math.dist(src[b, i], trg[b, i]), math.dist(src[b, i], trg[b, j])
                    total += max(near - far + 0.3, 0)
        if n > 1:
            each.append(total / (n * (n - 1)))
    expected = torch.tensor(sum(each) / len(each), dtype=torch.float64)
    torch.testing.assert_close(triplet_loss(src, trg, mask, 0.3), expected)


def test_triplet_loss_of_equal_features_has_a_finite_gradient():
    src = torch.ones(1, 3, 4, requires_grad=True)
    loss = triplet_loss(src, src.detach(), torch.ones(1, 3, dtype=torch.bool), 0.3)
    loss.backward()
    assert loss.item() == pytest.approx(0.3) and torch.isfinite(src.grad).all()


def test_the_loss_is_equation_11_at_full_resolution():
    g = torch.Generator().manual_seed(0)
    model, pair = head(epe_weight=0.5, triplet_weight=7.0, margin=0.2), pairs(1)
    kps = torch.tensor([[[8.2, 9.9], [30.0, 40.5], [55.1, 20.3]]])
    pair = pair._replace(src_kps=kps, trg_kps=kps.flip(1), kps_mask=torch.tensor([[True, True, False]]))
    flow = torch.randn(1, 2, 64, 64, generator=g, dtype=torch.float64)
    maps = [torch.randn(1, 6, 8, 8, generator=g) for _ in range(2)]
    terms = model.loss(Match(flow, extras=dict(zip(("src", "trg"), maps, strict=True))), pair)

    errors, radius = [], 17 * 64 / 512
    for x in range(64):
        for y in range(64):
            for p, q in zip(kps[0, :2].tolist(), pair.trg_kps[0, :2].tolist(), strict=True):
                if abs(x - p[0]) <= radius and abs(y - p[1]) <= radius:  # eq. 5, on whole pixels as CATs
                    errors.append(math.dist(flow[0, :, y, x].tolist(), [q[0] - p[0], q[1] - p[1]]))
    assert terms["epe"].item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    points = [F.normalize(sample(m, k, (64, 64)), dim=-1) for m, k in zip(maps, (kps, pair.trg_kps), strict=True)]
    triplet = triplet_loss(*points, pair.kps_mask, 0.2)
    torch.testing.assert_close(terms["triplet"], triplet)
    torch.testing.assert_close(terms["loss"], 0.5 * terms["epe"] + 7 * triplet, check_dtype=False)
    assert "triplet" not in head(triplet_weight=0.0).loss(Match(flow), pair)


# ---------------------------------------------------------------------- in miniature


def alike_parts(count, generator):
    """Pairs whose two parts share all but a hint, which is weaker than what differs from image to image."""
    basis, cells = torch.eye(64), [(1, 1), (2, 3)]
    maps = 0.3 * torch.randn(2, count, 64, 4, 4, generator=generator)
    for side in range(2):
        for (row, column), hint in zip(cells, basis[:2], strict=True):
            look = 0.5 * torch.randn(count, 8, generator=generator) @ basis[4:12]  # pose, light, ...
            maps[side, :, :, row, column] = 3 * basis[3] + 0.5 * hint + look
    kps = torch.tensor([[8 * c + 4.0, 8 * r + 4.0] for r, c in cells]).expand(count, 2, 2)
    image, mask = torch.zeros(count, 3, 32, 32), torch.ones(count, 2, dtype=torch.bool)
    pair = pairs(1)._replace(src_img=image, trg_img=image, src_kps=kps, trg_kps=kps, kps_mask=mask)
    return Features(image, [maps[0]]), Features(image, [maps[1]]), pair


@pytest.mark.parametrize("triplet_weight, told_apart", [(10.0, True), (0.0, False)])
def test_the_triplet_loss_separates_two_similar_parts(triplet_weight, told_apart):
    generator = torch.Generator().manual_seed(0)
    model = head(upsampler="bilinear", triplet_weight=triplet_weight)
    model.perception = None  # each image speaks for itself: only the loss can bring the hint forward
    optimizer = torch.optim.Adam(model.project.parameters(), lr=3e-3)
    for _ in range(40):
        src, trg, pair = alike_parts(16, generator)
        optimizer.zero_grad()
        model.loss(model.match(model.prepare(src), model.prepare(trg)), pair)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        src, trg, pair = alike_parts(256, generator)
        match = model.match(model.prepare(src), model.prepare(trg))
    a, b = (F.normalize(sample(match.extras[k], pair.src_kps, (32, 32)), dim=-1) for k in ("src", "trg"))
    right = ((a @ b.mT).argmax(2) == torch.arange(2)).float().mean().item()
    assert right > 0.95 if told_apart else right < 0.75, right


@pytest.mark.parametrize("upsampler, regained", [("low", True), ("unguided", False)])
def test_low_level_guidance_recovers_displacements_below_a_cell(upsampler, regained):
    generator = torch.Generator().manual_seed(0)
    model = head(upsampler=upsampler, enhancement="none")
    optimizer = torch.optim.Adam(model.upsampler.parameters(), lr=2e-3)
    high, image, errors = torch.randn(1, 64, 4, 4, generator=generator), torch.zeros(16, 3, 32, 32), []
    for _ in range(50):
        shift = torch.randint(-1, 2, (16, 2), generator=generator)  # in cells of 4 pixels; the flow's are of 8
        texture = torch.randn(16, 16, 8, 8, generator=generator)
        moved = torch.stack([t.roll((int(dy), int(dx)), (1, 2)) for t, (dx, dy) in zip(texture, shift, strict=True)])
        src, trg = (Features(image, [high.expand(16, -1, -1, -1), low]) for low in (texture, moved))
        error = (model.match(src, trg).flow - 4.0 * shift[:, :, None, None]).norm(dim=1).mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    late = sum(errors[-5:]) / 5
    assert late < 2.5 if regained else late > 3.8, late  # a flow of zero errs by 4.3 pixels in the mean


# ---------------------------------------------------------------------- zoo_configs


def options_in(name):
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()).get("model", {"init_args": {}})["init_args"]


FULL = options_in("vitsc")
ROWS = {  # what each row changes, and what follows for the number of parameters (blocks of attention, others)
    "table3_448": ({}, None),
    "table4_none": ({"enhancement": "none"}, "no perception"),
    "table4_symmetric": ({"enhancement": "symmetric"}, "one block"),
    "table4_asymmetric": ({"enhancement": "asymmetric"}, "one block"),
    "table5_layers0": ({"layers": 0}, "no perception"),
    "table5_layers2": ({"layers": 2}, "four blocks"),
    "table5_layers3": ({"layers": 3}, "six blocks"),
    "table6_bilinear": ({"upsampler": "bilinear"}, "no upsampler"),
    "table6_unguided": ({"upsampler": "unguided"}, "no guide"),
    "table6_high": ({"upsampler": "high"}, "no low encoder"),
    "table7_epe_only": ({"triplet_weight": 0.0}, None),
    "table8_ibot": ({"backbone": "ibot_b16", "finetune": 8}, None),
    "table8_mae": ({"backbone": "mae_b16", "finetune": 4}, None),
    "table8_clip": ({"backbone": "clip_b16", "finetune": 8}, None),
    "table10_small": ({"backbone": "dinov2_s14"}, None),
    "table10_large": ({"backbone": "dinov2_l14"}, None),
}


def test_every_row_has_a_file_or_an_option():
    files = {p.stem for p in (CONFIGS / "ablation" / "vitsc").glob("*.yaml")}
    options = re.findall(r"^\| vitsc_(\w+) \| `--model", PAGE.read_text(), re.M)
    assert sorted([*files, *options]) == sorted(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_builds_and_differs_from_the_full_model_as_named(row):
    changes, consequence = ROWS[row]
    if (found := re.search(rf"^\| vitsc_{row} \| `--model\.(\w+) (\w+)`", PAGE.read_text(), re.M)) is not None:
        assert {found[1]: yaml.safe_load(found[2])} == changes
    else:
        assert options_in(f"ablation/vitsc/{row}") == changes
    with torch.device("meta"):
        if "backbone" in changes:
            model = HEADS["ViTSC"](**(FULL | changes))
            assert model.project.in_channels == model.backbone.channels[0]
            return
        full, model = (HEADS["ViTSC"](**(FULL | c | {"backbone": TINY["backbone"]})) for c in ({}, changes))
    assert (len(full.perception.blocks), full.perception.order) == (2, "interleaved")
    blocks = {"one block": 1, "four blocks": 4, "six blocks": 6}.get(consequence)
    assert blocks is None or len(model.perception.blocks) == blocks
    assert (model.perception is None) == (consequence == "no perception")
    assert (model.upsampler is None) == (consequence == "no upsampler")
    assert (model.low is None) == (consequence in ("no upsampler", "no guide", "no low encoder"))
    if model.upsampler is not None:
        assert (model.upsampler.guide is None) == (consequence == "no guide")
    if "enhancement" in changes and model.perception is not None:
        assert model.perception.order == changes["enhancement"]


@pytest.mark.parametrize("row", ["ibot", "mae", "clip"])
def test_rows_of_table_1_are_the_baseline_on_other_backbones(row):
    assert options_in(f"ablation/baseline/table1_{row}") == options_in(f"ablation/vitsc/table8_{row}")


def test_actr_in_table_2_is_trained_as_vitsc_is():
    stacked, full = (
        yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("ablation/actr/vitsc_table2", "vitsc")
    )
    own = {"backbone_size": None, "weight_decay": 0.0, "schedule": "constant"}
    assert (FULL | own).items() >= stacked["model"]["init_args"].items()
    assert stacked["data"].items() <= full["data"].items() and stacked["trainer"] == full["trainer"]
    with torch.device("meta"):
        model = HEADS["ACTR"](**stacked["model"]["init_args"])
    assert model.grid == 16 == 224 // model.backbone.patch
