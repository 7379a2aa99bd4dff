"""GeoAware against what its authors' code computes, and its parts in plain loops."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import nn

import corrzoo
from corrzoo.backbones import register_backbone
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
