"""ACTR against what its authors' code answers, and its options."""

import pytest
import torch

from corrzoo.losses import endpoint_error
from corrzoo.official import load_official
from corrzoo.types import Match
from golden import assert_close, record, without_dropout


@pytest.fixture(scope="module")
def released(golden):
    """A training step in float64 without dropout, and what every module answered in it."""
    torch.set_num_threads(2)
    model = load_official("actr", golden.official_state("actr"))
    with torch.no_grad():
        single = model(*golden.images()).flow / 8
    model = without_dropout(model.double())
    seen = record(model)
    flow = model(*(image.double() for image in golden.images())).flow / 8
    truth = torch.from_numpy(golden.arrays("data")["kpflow_64"]).double()
    loss = endpoint_error(flow, truth, (truth != 0).any(1))
    loss.backward()
    torch.set_num_threads(1)
    return model, single, flow, loss, seen


def test_flow(golden, released):
    _, single, flow, _, seen = released
    double = golden.arrays("actr_f64")
    assert_close(flow, double["flow"], 1e-8)
    for i, coarse in enumerate(seen["soft_argmax"][1].chunk(6)):
        assert_close(coarse, double[f"flow_coarse_{i}"], 1e-8)
    assert_close(single, golden.arrays("actr_f32")["flow"], 2e-3)


def test_intermediates(golden, released):
    *_, seen = released
    single = golden.arrays("actr_f32")
    for side, tokens in zip(("src", "trg"), seen["blocks.0"][0], strict=True):
        assert_close(tokens[:, ::8, ::4], single[f"bb_tokens_{side}"], 1e-4)
    for i in range(6):
        s, t, correlation = seen[f"blocks.{i}"][1]
        assert_close(s[:, ::16, ::8], single[f"dec_block{i}_src"], 1e-3)
        assert_close(t[:, ::16, ::8], single[f"dec_block{i}_trg"], 1e-3)
        assert_close(correlation[:, 1::4, 1::4], single[f"corr{i}"], 1e-4)
        assert_close(seen["super_resolution.head"][1].chunk(6)[i], single[f"flow_refine{i}"], 1e-2)
    project = "super_resolution.project"
    assert_close(seen[f"{project}.1"][1][:, ::6], single["refine_feat16"], 1e-4)
    assert_close(seen[project][1][:, ::6, ::4, ::4], single["refine_feat64"], 1e-4)
    for stage in (1, 2):
        for branch in (1, 2):
            name, key = f"super_resolution.stages.{stage - 1}.{branch - 1}", f"swin_{branch}_{stage}_it0"
            answer, (before, *_) = seen[name][1], seen[f"{name}.channels"][0]
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
