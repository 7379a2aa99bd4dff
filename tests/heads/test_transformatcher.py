"""TransforMatcher against what its authors' code computes, and its options."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import corrzoo
from corrzoo.data import PairDataset
from corrzoo.geometry import transfer
from corrzoo.heads import TransforMatcher, transformatcher
from corrzoo.heads.transformatcher import REACH, REACH_IN_TRAINING, correlate, read_points, to_unit
from corrzoo.store.official import LAYOUTS, load_official, official_key
from corrzoo.types import Features, Match, Pair
from golden import Further, assert_close, assert_gradients, record

CONFIGS = Path(__file__).resolve().parents[2] / "zoo_configs"
EXACT = 1e-9
PARTS = r"embed|layers\.\d+|layers\.\d+\.(attention|ffn)|to_score"


def levels_of(config):
    """The blocks of the stages `luse`, counted as ResNet-101 has them."""
    return [f"layer{stage}.{i}" for stage in config["luse"] for i in range((3, 4, 23, 3)[stage - 1])]


def filled(further):
    """The authors' state dict: both streams of the backbone have the same values."""
    state = {}
    for key, shape, kind in further.manifest():
        doubled = key.startswith("backbone.") and not key.startswith("backbone.fc.") and bool(shape)
        half = [shape[0] // 2, *shape[1:]] if doubled else shape
        value = further.state([(key, half, kind)])[key]
        state[key] = torch.cat([value, value]) if doubled else value
    return state


@pytest.fixture(scope="module")
def further():
    return Further("transformatcher")


@pytest.fixture(scope="module")
def whole(further, gigabytes):
    """The released model of the values `e2e` in float64, its backbone's levels, and a pass without gradients."""
    model = load_official("transformatcher", filled(further), levels=levels_of(further.config)).double()
    with torch.no_grad():
        src, trg = (model.backbone(image) for image in further.images(further.config["size"]))
        theirs = further.arrays("e2e_f64")
        ours = run(model, src, trg, theirs)
    yield model, {"src": src.maps, "trg": trg.maps}, ours, theirs


@pytest.fixture(scope="module")
def head(further, gigabytes):
    """The head of the values `head` on given features, in float64, and a training step."""
    config, theirs = further.config, further.arrays("head_f64")
    model = TransforMatcher(backbone="resnet101", weights="random", levels=levels_of(config)).double()
    state = further.state([entry for entry in further.manifest() if entry[0].startswith("match2match.")])
    missing = model.load_state_dict({ours: state[released] for ours, released in keys(model).items()}, strict=False)
    assert all(key.startswith("backbone.") for key in missing.missing_keys) and not missing.unexpected_keys
    shapes = [[2, channels, side, side] for channels, side in config["head_levels"]]
    image = torch.zeros(2, 3, config["size"], config["size"], dtype=torch.float64)
    ours = run(model, *(Features(image, levels) for levels in further.features(shapes)), theirs)
    ours["loss"].backward()
    yield model, ours, theirs


def keys(model):
    """The authors' key of each parameter of the head."""
    names = [name for name, _ in model.named_parameters() if not name.startswith("backbone.")]
    return {name: official_key(name, LAYOUTS["transformatcher"].names) for name in names}


def run(model, src, trg, theirs):
    """What the authors' arrays hold, by the strides of their README."""
    src, trg = model.prepare(src), model.prepare(trg)
    grid = [model.grid] * 4
    with record(model, PARTS) as seen:
        match = model.match(src, trg)
    out = {name: calls[0][1] for name, calls in seen.items()}
    pair = keypoints(theirs, src.image)
    matched, points = match.extras["matched"], to_unit(pair.src_kps, src.image.shape[-2:])
    score = correlate(src.maps, trg.maps).mT.unflatten(2, grid)  # (B, L, g, g, g, g)
    ours = {
        "corr_in": score[:, ::5, ::5, ::5, ::3, ::4],
        "emb": out["embed"][:, ::997],
        "tokens": out[f"layers.{len(model.layers) - 1}"][:, ::997],
        "refined": out["to_score"].mT.unflatten(2, grid)[:, :, ::3, ::4, ::3, ::4],
        "corr_out": match.correlation[:, ::29, ::19],
        "target_xy": matched.mT,
        "loss": model.loss(match, pair),
        "prd_train": read_points(points, matched, REACH_IN_TRAINING).mT,
        "prd_eval": read_points(points, matched, REACH).mT,
    }
    for i in range(len(model.layers)):
        ours[f"attn{i}"] = out[f"layers.{i}.attention"][:, ::1999, ::3]
        ours[f"ff{i}"] = out[f"layers.{i}.ffn"][:, ::1999, ::3]
    return {k: v.masked_fill(~pair.kps_mask.unsqueeze(1), -2) if k.startswith("prd_") else v for k, v in ours.items()}


def keypoints(theirs, image):
    """The stored keypoints, in pixels of the network image."""
    src, trg = (theirs[f"{side}_kps"].mT for side in ("src", "trg"))
    mask = torch.arange(src.shape[1]) < theirs["n_pts"].unsqueeze(1)
    count = len(image)
    size, box, number = torch.full((count, 2), 1.0), torch.full((count, 4), torch.nan), torch.arange(count)
    rest = (size, size, box, box, number, number, number, number, number.new_zeros(count, 4))
    return Pair(image, image, src, trg, mask, *rest)


GIVEN = {"src_kps", "trg_kps", "n_pts"}


def test_golden_whole_model(whole):
    _, _, ours, theirs = whole
    assert ours.keys() == {name for name in theirs if "_level" not in name} - GIVEN
    for name, value in ours.items():
        assert_close(value, theirs[name], EXACT)


def test_golden_levels(whole):
    _, maps, _, theirs = whole
    names = [name for name in theirs if "_level" in name]
    assert names
    for name in names:
        side, _, number = name.partition("_level")
        assert_close(maps[side][int(number)][:, ::31, ::4, ::3], theirs[name], EXACT)


def test_golden_keypoint_transfer(further, whole):
    """By the head's own method, in pixels of the network image."""
    model, maps, _, theirs = whole
    size = further.config["size"]
    image = torch.zeros(2, 3, size, size, dtype=torch.float64)
    pair = keypoints(theirs, image)
    src, trg = (model.prepare(Features(image, maps[side])) for side in ("src", "trg"))
    with torch.no_grad():
        found = model.match_points(src, trg, pair.src_kps)
    expected = (theirs["prd_eval"].mT + 1) * (size / 2)
    assert_close(found[pair.kps_mask], expected[pair.kps_mask], 1e-7)


def test_golden_head(head):
    _, ours, theirs = head
    assert ours.keys() == theirs.keys() - GIVEN
    for name, value in ours.items():
        assert_close(value, theirs[name], EXACT)


def test_golden_gradients_of_the_head(further, head):
    stored = {f"match2match.{key}": numbers for key, numbers in further.read("head_grads_f64").items()}
    assert_gradients(head[0], stored, keys(head[0]))


# ---------------------------------------------------------------------- without the authors' values

CNN = "timm/test_resnet.r160_in1k"


def small(**options):
    torch.manual_seed(0)
    return TransforMatcher(**{"backbone": CNN, "levels": [1, 2], "weights": "random", "grid": 4} | options)


def batch(size=64, count=2):
    dataset = corrzoo.create_dataset("synthetic", "", "test", size=size)
    return PairDataset.collate([dataset[i] for i in range(count)])


def test_parameters_are_the_published_ones():
    recipe = yaml.safe_load((CONFIGS / "transformatcher.yaml").read_text())["model"]["init_args"]
    with torch.device("meta"):
        one, two = TransforMatcher(**recipe), TransforMatcher(**recipe | {"two_streams": True})
    counts = [sum(p.numel() for p in model.parameters()) for model in (one, two)]
    head = sum(p.numel() for name, p in one.named_parameters() if not name.startswith("backbone."))
    assert head == 836_093 - 15**4 * 16 == 26_093
    assert counts == [42_526_253, 42_526_253 + 42_500_160]
    assert 87_885_413 - counts[1] == 810_000 + 2_049_000  # posenc, classifier


def test_arithmetic_is_the_released_code_s():
    """GFLOPs of a pair by torch's counter."""
    recipe = yaml.safe_load((CONFIGS / "transformatcher.yaml").read_text())["model"]["init_args"]
    model, images = TransforMatcher(**recipe | {"weights": "random"}).eval(), torch.zeros(2, 1, 3, 240, 240)
    counts = []
    for run in (lambda: model.backbone(images.flatten(0, 1)), lambda: model(*images)):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()  # the counter leaves out the CPU's fused attention
        counts.append(counter.get_total_flops() / 1e9)
    assert counts == pytest.approx([36.3, 41.9], abs=0.05)


def test_attention_match_by_match():
    """The equations of one layer in plain loops, one head and one match at a time."""
    layer = transformatcher.AdditiveAttention().double()
    x, count = torch.randn(1, 7, 16, dtype=torch.float64), 7
    cosine = torch.tensor([(-1.0) ** n for n in range(count)], dtype=torch.float64)
    turn = cosine.view(-1, 1, 1).expand(-1, 1, 4)
    found = layer(x, (turn, torch.zeros_like(turn)))
    heads = []
    for h in range(8):
        q, k, v = (layer.qkv.weight[32 * i + 4 * h : 32 * i + 4 * h + 4] @ x[0].T for i in range(3))  # (4, 7) each
        logits = [0.5 * (layer.query_score.weight[0] * q[:, n]).sum() for n in range(count)]
        a = torch.stack(logits).softmax(0)
        query = sum(a[n] * cosine[n] * q[:, n] for n in range(count))
        mixed = [k[:, n] * query for n in range(count)]
        logits = [0.5 * (layer.key_score.weight[0] * torch.stack([m[0] + m[1], m[2] + m[3]])).sum() for m in mixed]
        b = torch.stack(logits).softmax(0)
        key = sum(b[n] * cosine[n] * k[:, n] for n in range(count))
        u = v * key.unsqueeze(1)
        folded = torch.stack([u[0] + u[1], u[2] + u[3]])
        heads.append(layer.value.weight @ folded + layer.value.bias.unsqueeze(1) + q)
    expected = layer.out.weight @ torch.cat(heads) + layer.out.bias.unsqueeze(1)
    torch.testing.assert_close(found[0].T, expected)


def test_the_literal_rotation_is_parity_but_for_rounding():
    exact, literal = (small(rotary=kind).rotation(15**4) for kind in ("parity", "literal"))
    assert torch.equal(exact[0][:4, 0, 0], torch.tensor([1.0, -1, 1, -1])) and not exact[1].any()
    error = [(a - b).abs().max() for a, b in zip(exact, literal, strict=True)]
    assert 0 < error[0] < 2e-3 and 1e-3 < error[1] < 6e-2
    model = small(rotary="none")
    assert (model.rotation(5)[0] == 1).all() and not model.rotation(5)[1].any()


@pytest.mark.parametrize("rotary", ["parity", "none"])
def test_rotary_options_differ_as_named(rotary):
    images = torch.randn(2, 1, 3, 64, 64)
    literal, other = (small(rotary=kind).eval()(*images).correlation for kind in ("literal", rotary))
    difference = (literal - other).abs().max()
    assert difference < 1e-3 if rotary == "parity" else difference > 1e-4


def test_scores_are_upsampled_in_both_images():
    scores = torch.randn(1, 3, 3, 3, 3, dtype=torch.float64)
    found = transformatcher.upsample(scores).reshape(6, 6, 6, 6)
    for at in [(0, 0, 0, 0), (5, 5, 5, 5), (2, 3, 4, 1)]:
        low = [math.floor(i * 2 / 5) for i in at]
        share = [i * 2 / 5 - first for i, first in zip(at, low, strict=True)]
        expected = 0.0
        for corner in range(16):
            bits = [corner >> k & 1 for k in range(4)]
            weight = math.prod(s if bit else 1 - s for s, bit in zip(share, bits, strict=True))
            cell = [min(first + bit, 2) for first, bit in zip(low, bits, strict=True)]
            expected += weight * scores[0, *cell].item()
        assert found[at].item() == pytest.approx(expected)


def test_points_are_read_from_the_cells_around_them():
    """In plain steps; on the released grid of 30 cells, a reach is 0.05 of coordinates from -1 to 1."""
    matched, points = torch.rand(1, 900, 2, dtype=torch.float64), 2 * torch.rand(1, 6, 2, dtype=torch.float64) - 1
    for reach, radius in ((REACH, 0.05), (REACH_IN_TRAINING, 0.1)):
        found = read_points(points, matched, reach)
        for k, (x, y) in enumerate(points[0].tolist()):
            total, expected = 1e-5, torch.zeros(2, dtype=torch.float64)
            for cell in range(900):
                own = -1 + 2 * (cell % 30) / 29, -1 + 2 * (cell // 30) / 29
                weight = max(0, radius - math.sqrt((own[0] - x) ** 2 + (own[1] - y) ** 2 + 1e-5))
                total, expected = total + weight, expected + weight * matched[0, cell]
            torch.testing.assert_close(found[0, k], expected / total)


def test_the_flow_of_a_shift_is_that_shift():
    """Every released cell moves by the same pixels, so every cell of the zoo's grid does."""
    shift = torch.tensor([0.25, -0.5])
    flow = transformatcher.to_flow(transformatcher.lattice(8, shift).unsqueeze(0) + shift, (64, 96))
    torch.testing.assert_close(flow, torch.tensor([12.0, -16]).view(1, 2, 1, 1).expand(1, 2, 8, 8))


def test_the_flow_leads_where_points_do():
    model, pair = small().eval(), batch()
    with torch.no_grad():
        src, trg = model.features(pair)
        by_flow = transfer(pair.src_kps, model.match(src, trg).flow, (64, 64))
        found = model.match_points(src, trg, pair.src_kps)
    assert ((by_flow - found).norm(dim=-1)[pair.kps_mask] < 64 / 8).all()


def test_loss_image_by_image():
    model, pair = small(), batch()
    matched = torch.rand(2, 64, 2) * 2 - 1
    loss = model.loss(Match(torch.zeros(2, 2, 8, 8), extras={"matched": matched}), pair)
    found, total = read_points(to_unit(pair.src_kps, (64, 64)), matched, REACH_IN_TRAINING), 0.0
    for b in range(2):
        wanted = (pair.trg_kps[b] - 32) / 32
        errors = [((found[b, k] - wanted[k]) ** 2).sum() for k in range(len(wanted)) if pair.kps_mask[b, k]]
        total += sum(errors) / len(errors) / 2
    torch.testing.assert_close(loss, total)


def test_a_feature_of_length_zero_stays_zero():
    level = F.pad(torch.randn(1, 5, 2, 2), (0, 1)).requires_grad_()
    out = transformatcher.normalise(level)
    assert not out[..., 2].any() and torch.allclose(out[..., :2].norm(dim=1), torch.ones(1))
    out.sum().backward()
    assert torch.isfinite(level.grad).all()


# ---------------------------------------------------------------------- two streams


def test_two_streams_start_equal_and_each_sees_its_side():
    one, two, images = small().eval(), small(two_streams=True).eval(), torch.randn(2, 1, 3, 64, 64)
    two.load_state_dict(one.state_dict(), strict=False)
    torch.testing.assert_close(two(*images).flow, one(*images).flow)
    assert len(two.backbones()) == 2
    two(*images).correlation.sum().backward()
    gradients = [two.backbone.trunk.model.conv1[0].weight.grad, two.target_backbone.trunk.model.conv1[0].weight.grad]
    assert all(g.any() for g in gradients) and not torch.allclose(*gradients)
    with torch.no_grad():
        two.target_backbone.trunk.model.conv1[0].weight.mul_(-1)
    src, trg = two.features_of(*images)
    before = one.features_of(*images)
    torch.testing.assert_close(src.maps[:2], before[0].maps)
    assert not torch.allclose(trg.maps[2], before[1].maps[0])


def test_a_checkpoint_whose_streams_differ_has_two():
    """The source's weights are the first half of the authors' tensors, the target's the second."""
    model = TransforMatcher(
        backbone="resnet101", weights="random", levels=levels_of({"luse": [3, 4]}), two_streams=True
    )
    with torch.no_grad():
        for parameter in model.target_backbone.parameters():
            parameter.add_(1)
    state = {official_key(key, LAYOUTS["transformatcher"].names): value for key, value in model.state_dict().items()}
    theirs = {key: value for key, value in state.items() if key.startswith("match2match.")}
    for key, value in state.items():
        if key.startswith("source."):
            name = key.removeprefix("source.")
            both = [value, state[f"target.{name}"]]
            theirs[f"backbone.{name}"] = torch.cat(both) if value.ndim else value
    theirs |= {"backbone.fc.weight": torch.zeros(1000, 2048), "backbone.fc.bias": torch.zeros(1000)}
    loaded = load_official("transformatcher", theirs)
    assert loaded.hparams.two_streams
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_compiles_without_a_break():
    model = small().eval()
    features = model.features_of(*torch.randn(2, 1, 3, 64, 64))
    compiled = torch.compile(model.match, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*features).flow, model.match(*features).flow)
