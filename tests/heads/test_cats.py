"""CATs against what its authors' code computes, and its options."""

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
from corrzoo.heads import CATs
from corrzoo.heads.cats import correlate, mutual_filter
from corrzoo.heads.levels import resize
from corrzoo.losses import endpoint_errors, mean_where
from corrzoo.store.official import LAYOUTS, load_official, official_key
from corrzoo.types import Features, Match, ZooError
from golden import Further, assert_close, assert_gradients, record

CONFIGS = Path(__file__).resolve().parents[2] / "zoo_configs"
EXACT = 1e-9


def hyperpixel(number: int) -> str:
    """The level of a number of the released code: 0 is the stem, then the bottlenecks of all of ResNet-101 follow."""
    blocks = [f"layer{stage}.{i}:pre" for stage, count in enumerate((3, 4, 23, 3), 1) for i in range(count)]
    return ["maxpool", *blocks][number]


@pytest.fixture(scope="module")
def further():
    return Further("cats")


@pytest.fixture(scope="module")
def whole(further, gigabytes):
    """The released model of the values `e2e` in float64, and a training step with BatchNorm in evaluation mode."""
    sizes = further.config["e2e"]
    model = load_official(
        "cats",
        further.state(further.manifest()),
        levels=[hyperpixel(i) for i in sizes["hyperpixel"]],
        attention_heads=sizes["num_heads"],
    ).double()
    assert (model.grid, len(model.blocks)) == (sizes["feature_size"], sizes["depth"])
    source, target = (model.prepare(model.backbone(image)) for image in further.images(sizes["size"]))
    yield model, *step(model, source, target, further.arrays("e2e_f64"))


@pytest.fixture(scope="module")
def head(further):
    """The head of the values `head` on given features, in float64, and a training step."""
    sizes, state = further.config["head"], further.state(further.read("head_state_dict"), "head_gains")
    model = CATs(
        backbone="resnet101",
        weights="random",
        levels=[hyperpixel(i) for i in sizes["hyperpixel"]],
        grid=sizes["feature_size"],
        width=sizes["feature_proj_dim"],
        depth=sizes["depth"],
        attention_heads=sizes["num_heads"],
    ).double()
    missing = model.load_state_dict({ours: state[theirs] for ours, theirs in keys(model).items()}, strict=False)
    assert all(key.startswith("backbone.") for key in missing.missing_keys) and not missing.unexpected_keys
    shapes = [[2, count, *size] for count, size in zip(model.backbone.channels, sizes["sizes"], strict=True)]
    image = torch.zeros(2, 3, sizes["size"], sizes["size"], dtype=torch.float64)
    source, target = (model.prepare(Features(image, levels)) for levels in further.features(shapes))
    yield model, *step(model, source, target, further.arrays("head_f64"))


def keys(model):
    """The authors' key of each parameter of the head."""
    names = [name for name, _ in model.named_parameters() if not name.startswith("backbone.")]
    return {name: official_key(name, LAYOUTS["cats"].names) for name in names}


def in_cells(match, model, image):
    return match.flow * (model.grid / image.shape[-1])


def their_loss(flow, theirs):
    """EPE over the cells that their pseudo-flow moves."""
    return mean_where(*endpoint_errors(flow, theirs["gt_flow"], (theirs["gt_flow"] != 0).any(1)))


def step(model, source, target, theirs):
    """What the authors' arrays hold, by the strides of their README, and theirs. They ask for points of the target."""
    levels = len(model.backbone.channels)
    with record(model, r"blocks\.0") as seen:
        match = model.match(target, source)
    flow = in_cells(match, model, source.image)
    loss = their_loss(flow, theirs)
    loss.backward()
    ((first_in,), first_out), (_, second_out) = seen["blocks.0"]
    ours = {"flow": flow, "loss": loss, "refined": match.correlation.mT[:, ::5, ::3]}
    ours["corr_mnn"] = mutual_filter(correlate(source.maps[:levels], target.maps[:levels]))[:, :, ::7, ::5]
    for name, side in (("src_proj", source), ("trg_proj", target)):
        ours[name] = torch.stack(side.maps[levels:], dim=1).flatten(3).mT[:, :, ::9, ::7]
    blocks = {"first_in": first_in, "first_out": first_out, "second_out": second_out}
    return ours | {f"block0_{name}": value[:, :, ::11, ::17] for name, value in blocks.items()}, theirs


def test_golden_whole_model(whole):
    _, ours, theirs = whole
    assert ours.keys() == {name for name in theirs if "_level" not in name and name != "gt_flow"}
    for name, value in ours.items():
        assert_close(value, theirs[name], EXACT)


def test_golden_levels(further, whole):
    model, _, theirs = whole
    with torch.no_grad():
        for side, image in zip(("src", "trg"), further.images(further.config["e2e"]["size"]), strict=True):
            for i, level in enumerate(model.backbone(image).maps):
                level = resize(level, (model.grid, model.grid), align_corners=True)
                assert_close(level[:, ::31, ::5, ::3], theirs[f"{side}_level{i}"], EXACT)


def test_golden_gradients_of_the_whole_model(further, whole):
    assert_gradients(whole[0], further.read("e2e_grads_f64"), keys(whole[0]))


def test_golden_head(head):
    _, ours, theirs = head
    assert ours.keys() == theirs.keys() - {"gt_flow"}
    for name, value in ours.items():
        assert_close(value, theirs[name], EXACT)


def test_golden_gradients_of_the_head(further, head):
    assert_gradients(head[0], further.read("head_grads_f64"), keys(head[0]))


def test_golden_training_mode(further, whole):
    """The released training normalises by each batch's statistics, one image of the pairs after the other."""
    model, _, evaluated = whole
    theirs = further.arrays("e2e_train_f64")
    trunk = model.backbone.trunk
    before = {key: value.clone() for key, value in trunk.state_dict().items()}
    trunk.train()  # `Backbone.train` would leave BatchNorm in evaluation mode
    images = further.images(further.config["e2e"]["size"])
    with torch.no_grad():
        source, target = (model.prepare(model.backbone(image)) for image in images)
        flow = in_cells(model.match(target, source), model, images[0])
    statistics = {key: value.clone() for key, value in trunk.state_dict().items()}
    trunk.load_state_dict(before)
    model.backbone.eval()
    assert_close(flow, theirs.pop("flow"), EXACT)
    assert_close(their_loss(flow, evaluated), theirs.pop("loss"), EXACT)
    assert theirs
    for name, value in theirs.items():  # running_mean_layer3_5_bn2
        norm = name.removeprefix("running_mean_").replace("_", ".")
        assert_close(statistics[f"model.{norm}.running_mean"], value, EXACT)


# ---------------------------------------------------------------------- without the authors' values

VIT, CNN = "timm/test_vit.r160_in1k", "timm/test_resnet.r160_in1k"
LEVELS = ["maxpool", "layer2.0:pre", "layer3.0:pre"]


def small(**options):
    torch.manual_seed(0)
    sizes = {"backbone": CNN, "levels": LEVELS, "grid": 4, "width": 32, "attention_heads": 4}
    return CATs(weights="random", **sizes | options)


def batch(size=64, count=2):
    dataset = corrzoo.create_dataset("synthetic", "", "test", size=size)
    return PairDataset.collate([dataset[i] for i in range(count)])


def test_parameters_are_the_published_ones():
    recipe = yaml.safe_load((CONFIGS / "cats.yaml").read_text())["model"]["init_args"]
    with torch.device("meta"):
        model = CATs(**recipe)
    head = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("backbone."))
    assert head == 4_624_160 - 768 and sum(p.numel() for p in model.parameters()) == 47_123_552
    trained = {name.split(".")[2] for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert trained == {"conv1", "bn1", "layer1", "layer2", "layer3"}  # nothing reads layer4


def test_arithmetic_is_the_released_code_s():
    """GFLOPs of a pair by torch's counter: the released code's, less layer4, which nothing reads."""
    recipe = yaml.safe_load((CONFIGS / "cats.yaml").read_text())["model"]["init_args"]
    model, images = CATs(**recipe | {"weights": "random"}).eval(), torch.zeros(2, 1, 3, 256, 256)
    counts = []
    for run in (lambda: model.backbone(images.flatten(0, 1)), lambda: model(*images)):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()  # the counter leaves out the CPU's fused attention
        counts.append(counter.get_total_flops() / 1e9)
    backbone, total = counts
    assert total - backbone == pytest.approx(33.4, abs=0.05) and backbone < 2 * 20.4


def test_mutual_filter_cell_by_cell():
    scores = torch.randn(1, 2, 5, 7, dtype=torch.float64)
    scores[0, 1, :, 3], scores[0, 1, 2] = 0, -1
    found = mutual_filter(scores)
    for level in range(2):
        for i in range(5):
            for j in range(7):
                c = scores[0, level, i, j]
                row, column = max(scores[0, level, i]), max(scores[0, level, :, j])
                expected = c * (c / (row or 1e-30)) * (c / (column or 1e-30))
                assert found[0, level, i, j].item() == pytest.approx(expected.item(), rel=1e-12)


def test_features_are_normalised_with_their_epsilon():
    maps = 1e-3 * torch.randn(1, 3, 4, 4)
    found = correlate(
        [small(appearance=False).prepare(Features(maps, [maps] * 3)).maps[0]], [maps / maps.norm(dim=1, keepdim=True)]
    )
    length = maps.square().sum(1)
    torch.testing.assert_close(found[0, 0].diagonal(), (length / (length + 1e-6)).sqrt().flatten())


@pytest.mark.parametrize("axis", ["x", "y"])
def test_a_position_is_of_its_column_then_of_its_row(axis):
    """The tokens of a column have its embedding in the first half of their channels, those of a row in the second."""
    model, images, tokens = small(swapping=False).eval(), torch.randn(2, 1, 3, 64, 64), []
    model.blocks.register_forward_pre_hook(lambda _, args: tokens.append(args[0].clone()))
    with torch.no_grad():
        model(*images)
        embedding = model.get_parameter(f"pos_embed_{axis}")
        (embedding[0, 1, 0, 2] if axis == "x" else embedding[0, 1, 2, 0]).add_(1)
        model(*images)
    moved = ((tokens[1] - tokens[0]).abs() > 0.5).unflatten(2, (4, 4))  # (1, levels, rows, columns, channels)
    expected = torch.zeros_like(moved)
    (expected[:, 1, :, 2, :24] if axis == "x" else expected[:, 1, 2, :, 24:]).fill_(True)
    assert torch.equal(moved, expected)


def test_a_keypoint_supervises_the_cells_within_17_of_256_pixels():
    pair = batch(256)
    flow = torch.zeros(2, 2, 16, 16, requires_grad=True)
    small(grid=16).loss(Match(flow), pair).backward()
    centres = torch.arange(16) * 16 + 8
    for b in range(2):
        for r, c in ((r, c) for r in range(16) for c in range(16)):
            x, y = pair.src_kps[b][pair.kps_mask[b]].unbind(-1)
            near = ((x - centres[c]).abs() <= 17) & ((y - centres[r]).abs() <= 17)
            assert bool(flow.grad[b, :, r, c].any()) == bool(near.any())


@pytest.mark.parametrize("read", ["point", "pixel"])
def test_points_are_read_from_the_enlarged_flow(read):
    """The released `flow2kps`, in plain steps: enlarge to the image, truncate the point, add what is there."""
    model, pair = small(read=read).eval(), batch()
    with torch.no_grad():
        features = model.features(pair)
        found = model.match_points(*features, pair.src_kps)
        full = F.interpolate(model.match(*features).flow, (64, 64), mode="bilinear", align_corners=False)
    for b, k in pair.kps_mask.nonzero().tolist():
        x, y = (min(max(math.trunc(v), 0), 63) for v in pair.src_kps[b, k].tolist())
        released = torch.tensor([x, y]) + full[b, :, y, x]
        if read == "pixel":
            torch.testing.assert_close(found[b, k], released)
        else:
            assert (found[b, k] - released).abs().max() < 1.5


def test_one_level_has_no_attention_across_levels():
    one, three = small(levels=LEVELS[-1:]), small()
    assert not [name for name, _ in one.named_parameters() if ".inter." in name]
    assert [name for name, _ in three.named_parameters() if ".inter." in name]


def test_a_released_model_of_one_level_has_its_mlp_where_the_released_block_does():
    model = CATs(backbone="resnet101", weights="random", levels=["layer3.22:pre"])
    state = {official_key(key, LAYOUTS["cats"].names): value for key, value in model.state_dict().items()}
    names = {".mlp2.": ".mlp.", ".norm4.": ".norm2."}
    theirs = {}
    for key, value in state.items():
        for ours, released in names.items():
            if ours in key:
                theirs[key] = torch.randn_like(value)  # never trained
                key = key.replace(ours, released)
        theirs[key] = value
    loaded = load_official("cats", theirs, levels=["layer3.22:pre"]).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


ABLATIONS = sorted(CONFIGS.glob("ablation/cats/no_*.yaml"))


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda p: p.stem)
def test_ablations_differ_as_named(path):
    options = yaml.safe_load(path.read_text())["model"]["init_args"]
    switched = [name for name, value in options.items() if value is False]
    assert switched == [path.stem.removeprefix("no_")] and options.keys() - set(switched) <= {"attention_heads"}
    full, model, images = small().eval(), small(**options).eval(), torch.randn(2, 1, 3, 64, 64)
    if switched != ["appearance"]:  # without it, the tokens have fewer channels
        model.load_state_dict(full.state_dict(), strict=False)
        assert (model(*images).flow - full(*images).flow).abs().max() > 1e-3
    count, full_count = (sum(p.numel() for p in m.parameters()) for m in (model, full))
    assert count < full_count if path.stem in ("no_appearance", "no_inter") else count == full_count


def test_without_swapping_or_appearance_only_scores_are_refined():
    """One pass whose weights are zero adds a bias to the filtered scores, and nothing else."""
    model, images = small(swapping=False, appearance=False).eval(), torch.randn(2, 1, 3, 64, 64)
    with torch.no_grad():
        model.to_scores.weight.zero_()
        model.to_scores.bias.copy_(torch.arange(16.0))
        src, trg = model.features_of(*images)
        expected = mutual_filter(correlate(src.maps, trg.maps)).mean(1) + torch.arange(16.0)
        torch.testing.assert_close(model.match(src, trg).correlation, expected)


def test_mistakes():
    message = r"tokens of 48 channels \(4 x 4 cells \+ width=32\) do not divide into 5 heads and two halves"
    with pytest.raises(ZooError, match=message):
        small(attention_heads=5)
    with pytest.raises(ZooError, match=r"49 channels \(7 x 7 cells\)"):
        small(grid=7, appearance=False, attention_heads=7)


def test_compiles_without_a_break():
    model = small().eval()
    features = model.features_of(*torch.randn(2, 1, 3, 64, 64))
    compiled = torch.compile(model.match, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*features).flow, model.match(*features).flow)
