"""NCNet against what its authors' code computes, its loss on small scenes, and its options."""

from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import corrzoo
from corrzoo.data import PairDataset
from corrzoo.heads.ncnet import FRAME, NCNet, confidence, mutual_matching
from corrzoo.scoring.pck import score
from corrzoo.store.official import LAYOUTS, load_official, official_key
from corrzoo.types import Features, Record, ZooError
from golden import Further, assert_close, assert_gradients

VIT = "timm/test_vit.r160_in1k"
CONFIGS = Path(__file__).resolve().parents[2] / "zoo_configs"
EXACT = 1e-10


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
        agreed = model.consensus(filtered) + model.consensus(filtered.permute(0, 1, 4, 5, 2, 3)).permute(
            0, 1, 4, 5, 2, 3
        )
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
    assert score(found[0], record, "ncnet:img", (0.1,)).item() == pytest.approx(
        theirs["pck"].item(), abs=1e-7
    )  # float32


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
        return src, trg, model.match(src, trg)


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


def test_the_released_layout(further, model):
    """Parameters to the unit, the old names of the extractor, and no count of batches."""
    state = further.state(further.manifest())
    count = sum(value.numel() for key, value in state.items() if value.is_floating_point() and "running" not in key)
    own = {name: p for name, p in model.named_parameters() if ".layer4." not in name}  # which no level depends on
    assert sum(p.numel() for p in own.values()) == count
    assert (
        f"{sum(p.numel() for name, p in own.items() if 'consensus' in name):,}" in NCNet.__doc__
        and f"{count:,}" in NCNet.__doc__
    )
    old = {key.replace(".model.", ".vgg."): value for key, value in state.items() if "num_batches" not in key}
    again = load_official("ncnet", {"state_dict": old}).state_dict()
    for name in own:
        assert torch.equal(again[name].double(), own[name]), name
    lost = {key: value for key, value in state.items() if key != "NeighConsensus.conv.0.bias"}
    with pytest.raises(ZooError, match=r"1 missing \(NeighConsensus\.conv\.0\.bias\)"):
        load_official("ncnet", lost)


# ---------------------------------------------------------------------- without the authors' values


def small(**options):
    torch.manual_seed(0)
    options = {"backbone": VIT, "weights": "random", "kernel_sizes": [3, 3], "channels": [4, 1]} | options
    return corrzoo.create_matcher("NCNet", **options)


def batch(count=2, size=64):
    dataset = corrzoo.create_dataset("synthetic", "", "test", size=size)
    return PairDataset.collate([dataset[i] for i in range(count)])


def scene(*grid, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(batch, 3, 16 * grid[0], 16 * grid[1], dtype=torch.float64)
    return Features(image, [torch.randn(batch, 32, *grid, generator=generator, dtype=torch.float64)])


def test_the_filter_in_loops():
    volume = torch.randn(1, 1, 2, 3, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores, found = volume.reshape(6, 6), mutual_matching(volume).reshape(6, 6)
    for i in range(6):
        for j in range(6):
            ratios = [float(scores[i, j]) / (float(best.max()) + 1e-5) for best in (scores[:, j], scores[i])]
            assert float(found[i, j]) == pytest.approx(float(scores[i, j]) * ratios[0] * ratios[1], rel=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_symmetric_network_has_no_direction(symmetric):
    model = small(symmetric=symmetric).double()
    with torch.no_grad():
        for p in model.consensus.parameters():
            p.abs_()  # no ReLU is closed
    src, trg = (model.prepare(scene(3, 4, seed=seed)) for seed in (0, 1))
    one, other = model.match(src, trg).correlation, model.match(trg, src).correlation.mT
    assert ((one - other).abs().max() < 1e-15) == symmetric


def test_a_neighbourhood_that_agrees_outweighs_a_better_score():
    """A scene moved by one cell, in which one cell looks most like another place; the kernel counts its neighbours."""
    model = small(kernel_sizes=[3], channels=[1]).double()
    with torch.no_grad():
        for p in model.consensus.parameters():
            p.zero_()
        for d in range(9):  # the same offset in both images
            i, j = d // 3, d % 3
            model.consensus[0].weight[0, 0, i, j, i, j] = 1
    whole = scene(6, 7).maps[0]
    image = torch.zeros(1, 3, 96, 96, dtype=torch.float64)
    src, trg = (Features(image, [whole[..., k : k + 6].clone()]) for k in (1, 0))  # what is at x lies at x + 1 in trg
    src.maps[0][..., 2, 2] = 0.5 * src.maps[0][..., 2, 2] + 0.9 * trg.maps[0][..., 4, 0]
    matched = {}
    for consensus in (True, False):
        network = model.consensus if consensus else torch.nn.Sequential()
        model.consensus, kept = network, model.consensus
        matched[consensus] = model.match(model.prepare(src), model.prepare(trg)).flow[0, :, 2, 2] / 16
        model.consensus = kept
    assert matched[True].tolist() == [1, 0] and matched[False].tolist() == [-2, 2]


@pytest.mark.parametrize("k", [2, 3])
def test_relocalization_finds_the_cell_in_its_window(k):
    model = small(relocalization=k, consensus=False).double()
    whole = scene(6, 12 + k).maps[0]
    image = torch.zeros(1, 3, 96, 192, dtype=torch.float64)
    src, trg = (Features(image, [whole[..., start : start + 12]]) for start in (k - 1, 0))
    match = model.match(model.prepare(src), model.prepare(trg))
    assert match.flow.shape == (1, 2, 6 // k, 12 // k) and match.correlation.shape == (1, 72 // k**2, 72 // k**2)
    inside = match.flow[0, :, :, : (12 - k) // k] / 16
    torch.testing.assert_close(inside[0], torch.full_like(inside[0], k - 1))
    assert not inside[1].any()


def test_heat_maps_of_pooled_cells():
    model, pair = small(relocalization=2).eval(), batch(1)
    src, trg = model.features(pair)
    match = model.match(src, trg)
    h, w = match.flow.shape[2:]
    centre = torch.tensor([[[1.5 * 64 / w, 0.5 * 64 / h]]])  # of the source's second cell
    heat = model.heat_maps(src, trg, centre)
    assert heat.shape == (1, 1, h, w)
    torch.testing.assert_close(heat.flatten(), match.correlation[0, 1])


def test_corners_in_loops():
    model = small(read="corners").double()
    src, trg = (model.prepare(scene(*grid, seed=seed)) for grid, seed in (((3, 4), 0), ((4, 5), 1)))
    points = torch.tensor([[[30.0, 20.0], [0.5, 47.9], [17.6, 1.2]]], dtype=torch.float64)
    best = model.match(src, trg).correlation.argmax(2)[0]
    found = model.match_points(src, trg, points)[0]
    for point, result in zip(points[0], found, strict=True):
        x, y = (float(v) * FRAME / side for v, side in zip(point, (64, 48), strict=True))
        u, v = (x - 1) * 3 / (FRAME - 1), (y - 1) * 2 / (FRAME - 1)  # in steps between the centres
        column, row = (max(sum(n < at for n in range(count)) - 1, 0) for at, count in ((u, 4), (v, 3)))
        corners = [(c, r) for c in (column, column + 1) for r in (row, row + 1)]
        weights = [abs(u - (2 * column + 1 - c)) * abs(v - (2 * row + 1 - r)) for c, r in corners]
        for axis, (count, side) in enumerate(((5, 80), (4, 64))):
            cells = [(int(best[r * 4 + c]) % 5, int(best[r * 4 + c]) // 5)[axis] for c, r in corners]
            pixels = [1 + cell * (FRAME - 1) / (count - 1) for cell in cells]
            expected = sum(w * p for w, p in zip(weights, pixels, strict=True)) / sum(weights)
            assert float(result[axis]) == pytest.approx(expected * side / FRAME, rel=1e-9)


def test_the_loss_reads_images_alone():
    model, pair = small().double(), batch(3)
    match = model(pair.src_img, pair.trg_img)
    losses = model.loss(match, pair)
    for name in ("src_kps", "trg_kps", "src_box", "trg_box"):
        pair = pair._replace(**{name: getattr(pair, name) + 7})
    torch.testing.assert_close(model.loss(match, pair), losses)
    torch.testing.assert_close(losses["loss"], losses["negative"] - losses["positive"])


def test_a_batch_of_one_pair_has_no_other_source():
    model, pair = small(), batch(1)
    assert model.loss(model(pair.src_img, pair.trg_img), pair)["loss"] == 0


def test_training_separates_pairs_from_others():
    model, pair = small(finetune="none", lr=1e-2), batch(4, 96)
    optimizer = torch.optim.Adam(model.param_groups())
    losses = []
    for _ in range(40):
        loss = model.loss(model(pair.src_img, pair.trg_img), pair)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


def test_operations_are_counted():
    """180,000 multiplications and additions for each score and pass of the released network."""
    model = small(kernel_sizes=[5, 5, 5], channels=[16, 16, 1]).eval()
    src, trg = (model.prepare(scene(*grid)._replace(maps=[torch.randn(1, 8, *grid)])) for grid in ((4, 6), (5, 3)))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.match(src, trg)
    scores = 24 * 15
    assert counter.get_total_flops() == 2 * scores * (2 * 180_000 + 8)


IMAGES = torch.randn(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
ABLATIONS = sorted(CONFIGS.glob("ablation/ncnet/*.yaml"))


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda p: p.stem)
def test_ablations_differ_as_named(path):
    options = yaml.safe_load(path.read_text())["model"]["init_args"]
    full, model = small(), small(**options)
    count, full_count = (sum(p.numel() for p in m.consensus.parameters()) for m in (model, full))
    assert (count == full_count) == (path.stem in ("no_mutual", "no_symmetry", "l1"))
    pair = batch()
    one, other = (m.loss(m(pair.src_img, pair.trg_img), pair)["loss"] for m in (full, model))
    assert one != other


def test_mistakes():
    with pytest.raises(
        ZooError, match=r"channels \[4, 2\]: expected one for each of kernel_sizes \[3, 3\], the last 1"
    ):
        small(channels=[4, 2])
    with pytest.raises(ZooError, match="expected odd numbers"):
        small(kernel_sizes=[3, 4])
    with pytest.raises(ZooError, match="1 with read='corners'"):
        small(relocalization=2, read="corners")
    with pytest.raises(ZooError, match=r"relocalization 3 does not divide the grids \(4, 4\) and \(4, 4\)"):
        small(relocalization=3)(*IMAGES)


def test_compiles_without_a_break():
    model = small()
    features = model.features_of(*IMAGES)
    compiled = torch.compile(model.match, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*features).flow, model.match(*features).flow)
