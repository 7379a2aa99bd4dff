"""GeoAware against what its authors' code computes, and its parts in plain loops."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from timm.models import register_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import corrzoo
from corrzoo.backbones import register_backbone
from corrzoo.backbones.cache import FeatureCache
from corrzoo.backbones.specs import BACKBONES
from corrzoo.data import PairDataset
from corrzoo.geometry import pixels_to_cells
from corrzoo.heads.geoaware import GeoAware, combine, mirror_images, mutual_distance, self_flip
from corrzoo.losses import mean_where
from corrzoo.store.official import LAYOUTS, load_official, official_key
from corrzoo.types import Features, Pair, ZooError
from golden import Further, assert_close, assert_gradients

VIT = "timm/test_vit.r160_in1k"
CONFIGS = Path(__file__).resolve().parents[2] / "zoo_configs"
EXACT = 1e-9


class GivenLevels(nn.Module):
    """A backbone of levels with given numbers of channels, each of stride 8: stands for features computed elsewhere."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.num_features = channels[-1]
        self.feature_info = [{"num_chs": count, "reduction": 8} for count in channels]
        self.levels = nn.ModuleList(nn.Conv2d(3, count, 8, 8) for count in channels)

    def forward_intermediates(self, image, indices, **options):
        return [self.levels[i](image) for i in indices]


def on_levels(channels, **options):
    """A GeoAware on levels with these channels, from the authors' state dict if there is one."""
    name = f"given_{'_'.join(map(str, channels))}"
    if name not in BACKBONES:

        def given(pretrained=False, **_):
            return GivenLevels(channels)

        given.__name__, given.__module__ = name, __name__
        globals()[name] = given
        register_model(given)
        register_backbone(name, name, licence="mit", mean=(0.5,) * 3, std=(0.25,) * 3)
    return {"backbone": name, "weights": "random", "levels": list(range(len(channels)))} | options


@pytest.fixture(autouse=True, scope="module")
def backbones_are_forgotten_after_these_tests():
    before = dict(BACKBONES._things)
    yield
    BACKBONES._things = before


@pytest.fixture(scope="module")
def further():
    return Further("geoaware")


@pytest.fixture(scope="module")
def model(further):
    config, manifest = further.config, further.manifest()
    kept = {"logit_scale": torch.tensor(1 / 0.07).log(), "self_logit_scale": torch.tensor(10.0).log()}
    state = further.state(manifest) | kept
    options = on_levels(config["feature_dims"], grid=config["grid"], read="cell")
    model = load_official("geoaware", state, **options).double()
    assert model.bottlenecks[0].conv3.out_channels == config["projection_dim"]
    return model


@pytest.fixture(scope="module")
def maps(further):
    """Levels of source and target: at the grid, half, a quarter of it, and the grid again for the last ones."""
    config = further.config
    sides = [config["grid"] // 2**i if i < 3 else config["grid"] for i in range(len(config["feature_dims"]))]
    shapes = [[1, count, side, side] for count, side in zip(config["feature_dims"], sides, strict=True)]
    pairs = [further.closed_form.feature(config["feature_seed"], f"map{i}", shape) for i, shape in enumerate(shapes)]
    return [[level.double() for level in side] for side in zip(*pairs, strict=True)]


def prepared(further, model, levels):
    side = further.config["anno_size"]
    return model.prepare(Features(torch.zeros(1, 1, 1, 1, dtype=torch.float64).expand(1, 3, side, side), levels))


def rows(features):
    return features.maps[0].flatten(2).mT


def test_golden_descriptors(further, model, maps):
    theirs = further.arrays("f64")
    with torch.no_grad():
        for i, levels in enumerate(maps, 1):
            assert_close(model.aggregate(levels)[:, ::7, ::7, ::7], theirs[f"aggregated{i}"], EXACT)
            assert_close(rows(prepared(further, model, levels))[:, ::37, ::5], theirs[f"desc{i}"], EXACT)
        src, trg = (rows(prepared(further, model, levels))[0] for levels in maps)
        assert_close((src @ trg.T)[::61, ::53], theirs["sim"], EXACT)


def readouts(arrays):
    """Options of each read-out that has arrays, with the names of its cells and keypoints."""
    for name in arrays:
        if found := re.fullmatch(r"target_cells_window(\d+)", name):
            how = {"readout": "window", "window": int(found[1])} if int(found[1]) else {"readout": "soft"}
            yield how, name, f"kps_1_to_2_window{found[1]}"
        elif found := re.fullmatch(r"target_cells_gaussian(\d+)", name):
            yield {"readout": "gaussian", "window": int(found[1])}, name, f"kps_1_to_2_window-{found[1]}"
    yield {"readout": "argmax"}, None, "kps_1_to_2_argmax"


def test_golden_readouts(further, model, maps):
    """Matches of all cells, and of the keypoints."""
    theirs, (h, w) = further.arrays("f64"), model.grid
    src, trg = (prepared(further, model, levels) for levels in maps)
    compared = {name for name in theirs if name.startswith(("target_cells", "kps_1_to_2"))}
    with torch.no_grad():
        for options, cells, keypoints in readouts(theirs):
            model.readout, model.window = options["readout"], options.get("window", 7)
            if cells is not None:
                found = model.find(rows(src), rows(trg)) - 0.5  # their cell c has its centre at c
                assert_close(found.unflatten(1, (h, w))[:, ::3, ::3], theirs[cells], EXACT)
            found = model.match_points(src, trg, theirs["kps1"][None, :, :2])
            assert_close(found[0], theirs[keypoints], EXACT * 100)
            compared -= {cells, keypoints}
    model.readout, model.window = "window", 7
    assert not compared


def test_golden_distances_of_mutual_neighbours(further, model, maps):
    """What adaptive pose alignment compares: of the source and of its mirror image."""
    theirs, (src, trg) = further.arrays("f64"), maps
    with torch.no_grad():
        columns = rows(prepared(further, model, trg))
        for name, levels in (("", src), ("_flip", [level.flip(-1) for level in src])):
            found = mutual_distance(rows(prepared(further, model, levels)), columns)
            assert_close(found[0], theirs[f"mutual_nn_distance{name}"], EXACT)


def test_golden_keypoints_lie_in_their_cells(further, model):
    theirs, side = further.arrays("f64"), further.config["anno_size"]
    cells = pixels_to_cells(theirs["kps1"][:, :2], model.grid, (side, side)).floor().long()
    assert torch.equal(cells[:, 1] * model.grid[1] + cells[:, 0], theirs["patch_idx"])


def annotated(further):
    """The stored keypoints as a batch of one pair; also the source's own, as the released self flip takes them."""
    theirs, side = further.arrays("f64"), further.config["anno_size"]
    (src, seen), (trg, seen_too) = (
        (theirs[name][None, :, :2], theirs[name][None, :, 2] > 0) for name in ("kps1", "kps2")
    )
    image, size = torch.zeros(1, 3, 1, 1).expand(1, 3, side, side), torch.tensor([[float(side)] * 2])
    number, ids = torch.zeros(1, dtype=torch.int64), torch.arange(src.shape[1])[None]
    box = torch.tensor([[0.0, 0.0, 300.0, 300.0]])
    pair = Pair(
        image, image, src, trg, seen & seen_too, size, size, box, box, number, number, number, number,
        number.new_zeros(1, 4), kps_ids=ids, mirror_ids=theirs["permutation"][None],
    )  # fmt: skip
    return pair, pair._replace(kps_mask=seen)


@pytest.mark.parametrize("augmented", [False, True])
def test_golden_losses_and_gradients(further, model, maps, augmented):
    theirs, (pair, source) = further.arrays("f64"), annotated(further)
    model.zero_grad()
    views = [*maps, *([level.flip(-1) for level in levels] for levels in maps)] if augmented else maps
    descriptors = [rows(prepared(further, model, levels)) for levels in views]
    assert not model.training  # neither dropout nor noise
    terms = [(1.0, *model.pair_loss(*descriptors[:2], model.points(pair)))]
    if augmented:
        double, own = model.points(mirror_images(pair)), model.points_of_self_flip(source)
        terms.append((1.0, *model.dense_loss(*descriptors[2:], double)))
        terms.append((0.25, *model.dense_loss(descriptors[2], descriptors[0], own)))
    loss = mean_where(*combine(terms))
    loss.backward()
    assert_close(loss, theirs["loss_pair_augment" if augmented else "loss_plain"], EXACT)
    if not augmented:
        sparse = model.sparse_loss(*descriptors, model.points(pair))
        assert_close(sparse[0], theirs["loss_sparse"], EXACT)
    stored = further.read("grads_pair_augment_f64" if augmented else "grads_plain_f64")
    for name in ("x_normal", "y_normal"):  # their coordinates are float32, and so are the gradients of these
        gradient, (norm, *numbers) = model.get_parameter(name).grad, stored.pop(f"corr.{name}")
        assert [gradient.norm(), gradient.sum(), gradient[0]] == pytest.approx([norm, *numbers], rel=0, abs=1e-6 * norm)
    assert_gradients(model, stored, keys(model), 1e-7)


def keys(model):
    """The authors' key of each parameter of the network."""
    names = [name for name, _ in model.named_parameters() if not name.startswith(("backbone.", "x_", "y_"))]
    return {name: official_key(name, LAYOUTS["geoaware"].names) for name in names}


def test_golden_every_array_is_compared(further):
    read = {"thresholds", "kps1", "kps2", "permutation", "patch_idx", "sim", "loss_sparse"}
    read |= {"loss_plain", "loss_pair_augment", "mutual_nn_distance", "mutual_nn_distance_flip"}
    read |= {f"{name}{i}" for name in ("aggregated", "desc") for i in (1, 2)}
    names = further.arrays("f64").keys()
    assert {name for name in names if not name.startswith(("target_cells", "kps_1_to_2"))} == read - {"thresholds"}


def test_the_published_layout(further):
    """Every key of the published network has its place, and the numbers of parameters are those in the docstring."""
    manifest = [tuple(entry) for entry in further.read("state_dict_published")]
    state = {key: torch.full([], float(i)).expand(shape) for i, (key, shape, _) in enumerate(manifest)}
    channels = [shape[1] for key, shape, _ in manifest if key.endswith("conv1.weight")]
    model = load_official("geoaware", state, **on_levels(channels))
    ours = keys(model)
    assert set(ours.values()) == state.keys() - {"self_logit_scale"}
    for name, theirs in ours.items():
        assert (model.get_parameter(name) == state[theirs].flatten()[0]).all(), name
    assert f"{sum(value.numel() for value in state.values()):,}" in GeoAware.__doc__
    with pytest.raises(ZooError, match=r"1 missing \(mixing_weights\)"):
        load_official("geoaware", {k: v for k, v in state.items() if k != "mixing_weights"}, **on_levels(channels))


# ---------------------------------------------------------------------- without the authors' values


def small(**options):
    torch.manual_seed(0)
    return corrzoo.create_matcher(
        "GeoAware", **{"backbone": VIT, "weights": "random", "grid": 8, "width": 128} | options
    )


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(count=2, size=64):
    """Synthetic pairs whose keypoints 0 and 1 are mirror twins."""
    dataset = corrzoo.create_dataset("synthetic", "", "test", size=size)
    pair = PairDataset.collate([dataset[i] for i in range(count)])
    ids = torch.arange(pair.kps_mask.shape[1]).expand_as(pair.kps_mask).masked_fill(~pair.kps_mask, -1)
    return pair._replace(kps_ids=ids, mirror_ids=torch.where((ids == 0) | (ids == 1), 1 - ids, ids))


@pytest.mark.parametrize("window", [1, 2, 9])
@pytest.mark.parametrize("scale", [1.0, 0.1, -1.0])
def test_the_window_as_released(window, scale):
    """Cosines outside the window are zero before the softmax over all cells, also where all are below zero."""
    model = small(grid=[4, 6], window=window).double()
    f, g = F.normalize(randn(1, 5, 16), dim=2), F.normalize(randn(1, 24, 16, seed=1), dim=2)
    if scale < 0:
        g = -f.mean(1, keepdim=True) + 0.1 * g
    f = f * abs(scale)
    found = model.find(f, g)[0]
    for i in range(5):
        row = f[0, i] @ g[0].T
        best = int(row.argmax())
        cells = [(j % 6, j // 6) for j in range(24)]
        near = [max(abs(x - best % 6), abs(y - best // 6)) <= window for x, y in cells]
        weights = torch.softmax(torch.where(torch.tensor(near), row, 0) / 0.02, 0)
        for axis in (0, 1):
            mean = sum(float(w) * (cell[axis] + 0.5) for w, cell in zip(weights, cells, strict=True))
            assert float(found[i, axis]) == pytest.approx(mean, abs=1e-9)


def test_a_window_that_excludes_and_one_over_all_cells_agree_where_it_is_large():
    f, g = F.normalize(randn(1, 5, 16), dim=2), F.normalize(randn(1, 64, 16, seed=1), dim=2)
    model = small(window=8).double()
    all_cells = small(readout="soft").double().find(f, g)
    torch.testing.assert_close(model.find(f, g), all_cells)
    model.outside = "excluded"
    torch.testing.assert_close(model.find(f, g), all_cells)


def test_a_point_in_its_cell():
    model, pair = small(read="cell").double().eval(), batch()
    src, trg = model.features(pair)
    points = torch.tensor([[[9.0, 1.0], [15.9, 7.9], [64.0, 70.0]]] * 2, dtype=torch.float64)
    found, flow = model.match_points(src, trg, points), model.match(src, trg).flow
    centre = torch.tensor([12.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(found[:, 0], found[:, 1])
    torch.testing.assert_close(found[:, 0], centre + flow[:, :, 0, 1])
    torch.testing.assert_close(found[:, 2], 60 + flow[:, :, 7, 7])  # outside: the nearest cell


def test_the_sparse_loss_in_loops():
    model, pair = small().double(), batch()
    pair = pair._replace(kps_mask=pair.kps_mask & (torch.arange(pair.kps_mask.shape[1]) < 4))
    src, trg = (F.normalize(randn(2, 64, 16, seed=seed), dim=2) for seed in (0, 1))
    found = model.sparse_loss(src, trg, model.points(pair))
    for b in range(2):
        at = [
            [int(y // 8) * 8 + int(x // 8) for x, y in kps[b][pair.kps_mask[b]].clamp(0, 63).tolist()]
            for kps in (pair.src_kps, pair.trg_kps)
        ]
        logits = (src[b][at[0]] @ trg[b][at[1]].T) / 0.07
        own = torch.arange(len(logits))
        expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        torch.testing.assert_close(found[b], expected, rtol=1e-6, atol=1e-6)  # the scale's logarithm is float32


def test_mirrored_images_and_points():
    pair = batch()
    mirrored = mirror_images(pair)
    assert torch.equal(mirrored.src_img, pair.src_img.flip(-1))
    torch.testing.assert_close(
        mirrored.trg_kps[..., 0] + pair.trg_kps[..., 0], torch.full_like(pair.trg_kps[..., 0], 64)
    )
    assert (mirrored.src_id == torch.where(pair.src_id < 0, pair.src_id, pair.src_id + 2**40)).all()


def test_the_self_flip_joins_twins():
    """Keypoints 3 and 5 are twins, 4 is its own, 7 has a twin that is not annotated, and one is unknown."""
    ids = torch.tensor([[3, 4, 5, 7, -1, 3]])
    mirrored = torch.tensor([[5, 4, 3, 8, -1, 5]])
    mask = torch.tensor([[True, True, True, True, True, False]])
    kps = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [9.0, 1.0], [0.0, 0.0]]])
    places, twins, known = self_flip(kps, ids, mirrored, mask, 64)
    assert places[0, 0].tolist() == [63, 2] and known.tolist() == [[True, True, True, False, False, False]]
    assert twins[0, :3].tolist() == [2, 1, 0]
    unknown = torch.full_like(ids, -1)
    assert not self_flip(kps, unknown, unknown, mask, 64)[2].any()


@pytest.mark.parametrize("cached", [False, True])
def test_a_training_step_has_mirrored_pairs(cached):
    """The terms one by one, each from features of images that are mirrored, not of mirrored features."""
    model, pair = small(finetune="none", dropout=0.0, noise=0.0).double(), batch()
    if cached:
        model._training_features = FeatureCache(2**20)
        model.trainer = trainer = SimpleNamespace(training=True)  # noqa: F841 - the model keeps a weak reference
    descriptors = {
        name: rows(model.prepare(model.backbone(image.flip(-1) if mirrored else image)))
        for side, image in (("src", pair.src_img), ("trg", pair.trg_img))
        for name, mirrored in ((side, False), (f"{side} mirrored", True))
    }
    flipped = pair._replace(
        src_kps=torch.stack([64 - pair.src_kps[..., 0], pair.src_kps[..., 1]], -1),
        trg_kps=torch.stack([64 - pair.trg_kps[..., 0], pair.trg_kps[..., 1]], -1),
    )
    order = torch.tensor([1, 0, *range(2, pair.kps_mask.shape[1])])
    to_itself = pair._replace(src_kps=flipped.src_kps, trg_kps=pair.src_kps[:, order])
    base = model.pair_loss(descriptors["src"], descriptors["trg"], model.points(pair))[0]
    double = model.dense_loss(descriptors["src mirrored"], descriptors["trg mirrored"], model.points(flipped))[0]
    own = model.dense_loss(descriptors["src mirrored"], descriptors["src"], model.points(to_itself))[0]
    expected = ((base + double + 0.25 * own) / 2.25).mean()
    for _ in range(2):
        torch.testing.assert_close(model.training_losses(pair), expected)
    base_alone = model.loss(model(pair.src_img, pair.trg_img), pair)
    torch.testing.assert_close(base_alone, base.mean())
    nothing = pair._replace(mirror_ids=torch.full_like(pair.kps_ids, -1))  # no table of mirror pairs
    torch.testing.assert_close(model.training_losses(nothing), ((base + double) / 2).mean())


def test_the_noise_is_relative_to_the_object():
    model, pair = small(), batch()
    box, size = torch.tensor([[10.0, 20.0, 40.0, 35.0], [torch.nan] * 4]), torch.tensor([[120.0, 60.0]] * 2)
    lengths = {name: None for name in ("box", "image", "pixels")}
    for name in lengths:
        model.noise_length = name
        lengths[name] = model.length(box, size).tolist()
    assert lengths == {"box": [2.0, 8.0], "image": [8.0, 8.0], "pixels": [112.0, 112.0]}
    model.noise_length = "box"
    src, trg = (F.normalize(randn(2, 64, 16, seed=seed).float(), dim=2) for seed in (0, 1))
    points = model.points(pair)
    exact = model.eval().dense_loss(src, trg, points)[0]
    first, second = (model.train().dense_loss(src, trg, points)[0] for _ in range(2))
    assert (first != second).all() and not torch.allclose(first, exact)
    model.noise = 0.0
    assert torch.equal(model.dense_loss(src, trg, points)[0], exact)


def test_pose_alignment_matches_the_mirrored_source():
    """The target is the source's mirror image, so every part lies where its twin lay, mirrored."""
    model = small(network=False, readout="argmax", read="cell", levels=[3]).eval()
    pair = batch(1)
    pair = pair._replace(trg_img=pair.src_img.flip(-1), trg_kps=mirror_images(pair).src_kps)
    src, trg = model.features(pair)
    plain = model.match_keypoints(src, trg, pair)
    model.pose_alignment = True
    aligned = model.match_keypoints(src, trg, pair)
    order = torch.tensor([1, 0, *range(2, pair.kps_mask.shape[1])])
    mask = pair.kps_mask[0]
    cells = (pair.trg_kps[:, order] // 8 * 8 + 4)[0]
    assert (aligned[0] - cells)[mask].abs().max() <= 8  # of the neighbouring cell, where a border is in between
    assert not torch.equal(plain, aligned)
    nowhere = pair._replace(kps_ids=torch.full_like(pair.kps_ids, -1))
    assert torch.equal(model.match_keypoints(src, trg, nowhere), plain)


ABLATIONS = sorted(CONFIGS.glob("ablation/geoaware/*.yaml"))


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda p: p.stem)
def test_ablations_differ_as_named(path):
    options = yaml.safe_load(path.read_text())["model"]["init_args"]
    pair, steps = batch(), []
    for changed in ({}, options):
        model = small(**{"window": 2} | changed)
        torch.manual_seed(0)
        loss, (f, g) = model.training_losses(pair), (rows(side) for side in model.eval().features(pair))
        steps.append((loss, model.find(0.1 * f, g)))  # cosines so small that it matters how they are read
    (loss, found), (other_loss, other_found) = steps
    reads = path.stem in {"no_window", "argmax", "excluded"}
    assert (loss == other_loss) == reads
    assert not reads or not torch.allclose(found, other_found)


@pytest.mark.parametrize(
    ("channels", "operations"),
    [([640, 1280, 1280, 768], 2.63e9), ([768], 2 * 0.63e6 * 256)],
    ids=["published", "DINOv2"],
)
def test_operations_of_an_image_are_counted(channels, operations):
    """At 16 x 16 cells."""
    with torch.device("meta"):
        model = corrzoo.heads.HEADS["GeoAware"](**on_levels(channels, grid=16)).eval()
        levels = [torch.empty(1, count, 16, 16) for count in channels]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.aggregate(levels)
    assert counter.get_total_flops() == pytest.approx(operations, rel=1e-2)


def test_mistakes():
    with pytest.raises(ZooError, match="width 96: expected a multiple of 128"):
        small(width=96)
    with pytest.raises(ZooError, match="readout='soft' reads all cells"):
        small(window=0)


def test_compiles_without_a_break():
    model = small()
    images = torch.randn(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = model.eval().features_of(*images)
    compiled = torch.compile(model.match, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*features).flow, model.match(*features).flow)
