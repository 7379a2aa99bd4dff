"""ACTR against what its authors' code answers, and its options."""

import zlib
from pathlib import Path

import pytest
import torch
import yaml

from corrzoo.heads import ACTR
from corrzoo.losses import endpoint_errors, mean_where
from corrzoo.store.official import load_official
from corrzoo.types import Match, ZooError
from golden import assert_close, record, without_dropout


@pytest.fixture(scope="module")
def released(golden, gigabytes):
    """A training step in float64 without dropout, and what every module answered in it."""
    torch.set_num_threads(2)
    model = load_official("actr", golden.official_state("actr"))
    with torch.no_grad():
        single = model(*golden.images()).flow / 8
    model = without_dropout(model.double())
    names = r"soft_argmax|blocks\.\d|super_resolution\.(head|project|project\.1|stages\.\d\.\d(\.channels)?)"
    with record(model, names) as seen:
        flow = model(*(image.double() for image in golden.images())).flow / 8
    truth = torch.from_numpy(golden.arrays("data")["kpflow_64"]).double()
    loss = mean_where(*endpoint_errors(flow, truth, (truth != 0).any(1)))
    loss.backward()
    torch.set_num_threads(1)
    yield model, single, flow, loss, seen


def test_flow(golden, released):
    _, single, flow, _, seen = released
    double = golden.arrays("actr_f64")
    assert_close(flow, double["flow"], 1e-8)
    for i, coarse in enumerate(seen["soft_argmax"][0][1].chunk(6)):
        assert_close(coarse, double[f"flow_coarse_{i}"], 1e-8)
    assert_close(single, golden.arrays("actr_f32")["flow"], 2e-3)


def test_intermediates(golden, released):
    *_, seen = released
    single = golden.arrays("actr_f32")
    for side, tokens in zip(("src", "trg"), seen["blocks.0"][0][0], strict=True):
        assert_close(tokens[:, ::8, ::4], single[f"bb_tokens_{side}"], 1e-4)
    for i in range(6):
        s, t, correlation = seen[f"blocks.{i}"][0][1]
        assert_close(s[:, ::16, ::8], single[f"dec_block{i}_src"], 1e-3)
        assert_close(t[:, ::16, ::8], single[f"dec_block{i}_trg"], 1e-3)
        assert_close(correlation[:, 1::4, 1::4], single[f"corr{i}"], 1e-4)
        assert_close(seen["super_resolution.head"][i][1], single[f"flow_refine{i}"], 1e-2)
    project = "super_resolution.project"
    assert_close(seen[f"{project}.1"][0][1][:, ::6], single["refine_feat16"], 1e-4)
    assert_close(seen[project][0][1][:, ::6, ::4, ::4], single["refine_feat64"], 1e-4)
    for stage in (1, 2):
        for branch in (1, 2):
            name, key = f"super_resolution.stages.{stage - 1}.{branch - 1}", f"swin_{branch}_{stage}_it0"
            answer, (before, *_) = seen[name][0][1], seen[f"{name}.channels"][0][0]
            assert_close(answer[:2, ::6, ::4, ::4], single[key], 5e-2)  # values reach 500
            assert_close(before[:2, ::6, ::4, ::4], single[f"{key}_preCA"], 5e-2)


def test_gradients(golden, released):
    model, *_ = released
    golden.assert_gradients("actr", model)


def test_loss(golden, released):
    """What training minimises, with our own pseudo-flow; the gradients above are those of the stored pseudo-flow."""
    model, _, flow, loss, _ = released
    assert loss.item() == pytest.approx(golden.gradients("actr")["total_loss"], rel=1e-12)
    assert model.loss(Match(8 * flow), golden.pair()).item() == pytest.approx(loss.item(), rel=1e-6)


# ---------------------------------------------------------------------- without the authors' values

VIT = "timm/test_vit.r160_in1k"
CONFIGS = Path(__file__).resolve().parents[2] / "zoo_configs"


def small(**options):
    torch.manual_seed(0)
    return ACTR(**{"backbone": VIT, "weights": "random", "backbone_size": 128, "depth": 2} | options)


def shaken(model):
    """Weights away from where they start, the same for parameters of one name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


IMAGES = torch.randn(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
FEWER = {"no_source_pe", "no_reweighting", "no_cross_attention", "no_dual_window", "no_super_resolution"}
ABLATIONS = sorted(p for p in CONFIGS.glob("ablation/actr/*.yaml") if p.stem not in ("h", "vitsc_table2"))


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda p: p.stem)
def test_ablations_differ_as_named(path):
    options = yaml.safe_load(path.read_text())["model"]["init_args"]
    assert len(options) == 1
    full, model = shaken(small()), shaken(small(**options))
    count, full_count = (sum(p.numel() for p in m.parameters()) for m in (model, full))
    assert count < full_count if path.stem in FEWER else count == full_count
    assert (model(*IMAGES).flow - full(*IMAGES).flow).abs().max() > 1e-3


def test_the_target_is_never_told_of_the_source():
    """Asymmetric: another source changes the target's tokens only through the re-weighting."""
    block = small(reweight=False).blocks[0]
    s, t = torch.randn(2, 1, 65, 64)
    torch.testing.assert_close(block(s, t)[1], block(torch.randn_like(s), t)[1])
    assert not torch.allclose(block(s, t)[0], block(s, torch.randn_like(t))[0])


def test_grids():
    """From the backbone and the size that it sees, or as asked; the flow has four times as many cells."""
    assert small().grid == 8 and small(backbone_size=256).grid == 16 and small(backbone_size=None).grid == 16
    assert small(backbone_size=True).grid == 16
    model = small(backbone="timm/test_resnet.r160_in1k", levels=[1, 2], width=24, grid=6, windows=[3, 8]).eval()
    assert model(*IMAGES).flow.shape == (1, 2, 24, 24) and model.prepare(model.backbone(IMAGES[0])).cls.shape == (1, 24)
    with torch.device("meta"):
        dino = ACTR(backbone="dinov2_b14", weights="random", backbone_size=224, depth=1)
        high = ACTR(backbone="ibot_b16", weights="random", backbone_size=512, depth=1)
    assert (dino.grid, dino.width, high.grid) == (16, 768, 32)


def test_mistakes():
    with pytest.raises(ZooError, match="windows of 8 cells do not divide 20 x 20, 4 times the grid of 5"):
        small(backbone_size=80)
    with pytest.raises(ZooError, match="36 channels do not divide into 8 heads: set width=32"):
        small(width=36)
    with pytest.raises(ZooError, match="at least 16 pixels"):
        small(backbone_size=None)(*torch.zeros(2, 1, 3, 8, 8))


def test_compiles_without_a_break():
    model = small()
    features = model.features_of(*IMAGES)
    model = without_dropout(model)
    compiled = torch.compile(model.match, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*features).flow, model.match(*features).flow)
