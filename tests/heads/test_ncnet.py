"""NCNet against what its authors' code computes, its loss on small scenes, and its options."""

from pathlib import Path

import pytest
import torch
import yaml

import corrzoo
from corrzoo.data import PairDataset
from corrzoo.heads.ncnet import FRAME, NCNet, confidence, mutual_matching
from corrzoo.scoring.pck import score
from corrzoo.store.official import LAYOUTS, load_official, official_key
from corrzoo.types import Features, Record, ZooError
from golden import Further, assert_close, assert_gradients

VIT = "timm/test_vit.r160_in1k"
CONFIGS = Path(__file__).resolve().parents[2] / "zoo_configs"
EXACT = 1e-12


@pytest.fixture(scope="module")
def further():
    return Further("ncnet")


@pytest.fixture(scope="module")
def model(further):
    model = load_official("ncnet", further.state(further.manifest())).double()
    sizes = further.config
    assert [layer.weight.shape[2] for layer in model.consensus[::2]] == sizes["kernel_sizes"]
    assert [len(layer.bias) for layer in model.consensus[::2]] == sizes["channels"]
    return model


@pytest.fixture(scope="module")
def given(further, model):
    """Prepared features of source and target, in images of the released evaluation's size."""
    sides = further.closed_form.feature(further.config["feature_seed"], "layer3", further.config["head_feature"])
    return [prepared(model, side) for side in sides]


def prepared(model, level):
    image = torch.zeros(len(level), 3, FRAME, FRAME, dtype=torch.float64)
    return model.prepare(Features(image, [level.double()]))


def volume_of(match, src, trg):
    """(B, 1, h, w, h', w')."""
    return match.correlation.unflatten(2, trg.maps[0].shape[2:]).unflatten(1, src.maps[0].shape[2:]).unsqueeze(1)


def coordinates(cells, grid, low=-1.0):
    """Columns and rows of cells (..., 2) as the released code has them: from `low` at the first cell to 1."""
    return (low + (1 - low) * cells[..., i] / (side - 1) for i, side in enumerate(reversed(grid)))


def test_golden_volumes(further, model, given):
    theirs, (src, trg) = further.arrays("head_f64"), given
    with torch.no_grad():
        filtered = mutual_matching(model.volume(src.maps[0], trg.maps[0])[0])
        agreed = model.consensus(filtered) + model.consensus(filtered.permute(0, 1, 4, 5, 2, 3)).permute(0, 1, 4, 5, 2, 3)
        volumes = {"mutual": filtered, "consensus": agreed, "corr": volume_of(model.match(src, trg), src, trg)}
    for name, volume in volumes.items():
        assert_close(volume[:, :, ::2, ::2], theirs[name], EXACT)


def test_golden_matches(further, model, given):
    """The best source cell of each target cell, in coordinates from -1 to 1, and its score."""
    theirs, (src, trg) = further.arrays("head_f64"), given
    grid, (h, w) = src.maps[0].shape[2:], trg.maps[0].shape[2:]
    with torch.no_grad():
        match = model.match(trg, src)
    own = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy"), dim=-1).flatten(0, 1)
    scores = {0: match.correlation, 1: match.correlation.softmax(2)}
    places = ("A", match.extras["cells"].double(), grid), ("B", own.double().expand(len(match.flow), -1, 2), (h, w))
    for softmax, values in scores.items():
        assert_close(values.amax(2), theirs[f"toA_score_softmax{softmax}"], EXACT)
        for image, cells, size in places:
            for axis, found in zip("xy", coordinates(cells, size), strict=True):
                assert_close(found, theirs[f"toA_{axis}{image}_softmax{softmax}"], EXACT)
    pixels = torch.tensor([FRAME / grid[1], FRAME / grid[0]], dtype=torch.float64)
    moved = (match.extras["cells"] - own) * pixels
    torch.testing.assert_close(match.flow.double().flatten(2).mT, moved)


def test_golden_points(further, model, given):
    theirs, (src, trg) = further.arrays("head_f64"), given
    one = [side._replace(image=side.image[:1], maps=[side.maps[0][:1]]) for side in (trg, src)]
    model.read = "corners"
    with torch.no_grad():
        found = model.match_points(*one, theirs["points"].mT)
    model.read = "point"
    assert_close(found.mT, theirs["warped"], 1e-10)
    record = Record(None, None, theirs["src_points"][0].T, theirs["points"][0].T, (FRAME, FRAME), (FRAME, FRAME), "cat")
    assert score(found[0], record, "ncnet:img", (0.1,)).item() == pytest.approx(theirs["pck"].item(), abs=1e-7)  # float32


def test_golden_losses_and_gradients(further, model, given):
    theirs, (src, trg) = further.arrays("head_f64"), given
    model.zero_grad()
    match = model.match(src, trg)
    loss = model.loss(match, None)["loss"]
    loss.backward()
    assert_close(loss, theirs["weak_loss"], EXACT)
    with torch.no_grad():
        others = model.match(src._replace(maps=[src.maps[0].roll(-1, 0)]), trg).correlation
        for name in ("l1", "none"):
            positive, negative = (confidence(scores, name) for scores in (match.correlation, others))
            assert_close(negative - positive, theirs[f"weak_loss_{name}"], EXACT)
    assert_gradients(model, further.read("head_grads_f64"), keys(model), 1e-8)


def keys(model):
    names = [name for name, _ in model.named_parameters() if not name.startswith("backbone.")]
    return {name: official_key(name, LAYOUTS["ncnet"].names) for name in names}


def test_golden_relocalization(further, model):
    theirs, config = further.arrays("head_f64"), further.config
    shape = [1, *config["head_feature"][1:]]
    k = model.relocalization = config["relocalization"]
    seed = config["image_seed"] + 3
    src, trg = (prepared(model, side) for side in further.closed_form.feature(seed, "reloc", shape))
    grid = [side // k for side in shape[2:]]
    try:
        with torch.no_grad():
            _, offsets = model.volume(src.maps[0], trg.maps[0])
            match, swapped = model.match(src, trg), model.match(trg, src)
    finally:
        model.relocalization = 1
    volume = match.correlation.unflatten(2, grid).unflatten(1, grid).unsqueeze(1)
    assert_close(volume[..., ::2, ::2, ::2], theirs["reloc_corr"], EXACT)
    for i in range(4):
        offset = offsets // k ** (3 - i) % k
        assert_close(offset.unsqueeze(1)[..., ::2, ::2, ::2].double(), theirs[f"reloc_delta_{i}"], 0)
    own = own_cells(swapped, grid, k, [side.maps[0].shape[2:] for side in (trg, src)])
    for image, cells in (("A", swapped.extras["cells"].double()), ("B", own)):
        for axis, found in zip("xy", coordinates(cells, shape[2:], 0.0), strict=True):
            assert_close(found, theirs[f"reloc_{axis}{image}"], EXACT)
    assert_close(swapped.correlation.softmax(2).amax(2), theirs["reloc_score"], EXACT)


def own_cells(match, grid, k, sizes):
    """The cells that ask, from what they match and how far they move; images have FRAME pixels."""
    h, w = sizes[0]
    pixels = torch.tensor([FRAME / w, FRAME / h], dtype=torch.float64)
    return match.extras["cells"].double() - match.flow.double().flatten(2).mT / pixels


@pytest.fixture(scope="module")
def whole(further, model):
    with torch.no_grad():
        images = further.closed_form.images(further.config["image_seed"], further.config["size"], 1)
        src, trg = (model.prepare(model.backbone(image.double())) for image in images)
        yield src, trg, model.match(src, trg)


def test_golden_features(further, whole):
    src, trg, _ = whole
    theirs = further.arrays("e2e_f64")
    for name, side in (("src", src), ("trg", trg)):
        assert_close(side.maps[0][:, ::31, ::2, ::2], theirs[f"feature_{name}"], EXACT)


def test_golden_whole_model(further, whole):
    src, trg, match = whole
    theirs, scores = further.arrays("e2e_f64"), match.correlation
    assert_close(volume_of(match, src, trg)[:, :, ::2, ::2], theirs["corr"], EXACT)
    for dim, name, side in ((1, "A_of_B", trg), (2, "B_of_A", src)):
        best, index = scores.max(dim)
        assert_close(best.unflatten(1, side.maps[0].shape[2:]), theirs[f"max_{name}"], EXACT)
        assert torch.equal(index.unflatten(1, side.maps[0].shape[2:]), theirs[f"argmax_{name}"])
    w = trg.maps[0].shape[3]
    cells = match.extras["cells"].long()
    assert torch.equal(cells[..., 1] * w + cells[..., 0], theirs["argmax_B_of_A"].flatten(1))


def test_golden_every_array_is_compared(further):
    names = {"mutual", "consensus", "corr", "points", "warped", "src_points", "pck"}
    names |= {"weak_loss", "weak_loss_l1", "weak_loss_none", "reloc_corr", "reloc_score"}
    names |= {f"toA_{what}_softmax{i}" for what in ("xA", "yA", "xB", "yB", "score") for i in (0, 1)}
    names |= {f"reloc_{what}" for what in ("xA", "yA", "xB", "yB", *(f"delta_{i}" for i in range(4)))}
    assert further.arrays("head_f64").keys() == names
    of = {"argmax_A_of_B", "max_A_of_B", "argmax_B_of_A", "max_B_of_A"}
    assert further.arrays("e2e_f64").keys() == of | {"corr", "feature_src", "feature_trg"}
