"""LPMFlow against what its authors' code answers, and its options."""

import random

import numpy as np
import pytest
import torch

from corrzoo.heads.lpmflow import grid_neighbours, self_contrast
from corrzoo.losses import endpoint_error
from corrzoo.official import load_official
from golden import assert_close, record, without_dropout


@pytest.fixture(scope="module")
def released(golden):
    """In float64: the evaluation, the same as the authors' test script loads it, a training step without dropout."""
    torch.set_num_threads(2)
    model = load_official("lpmflow", golden.official_state("lpmflow"))
    with torch.no_grad():
        flows = {"single": model(*golden.images()).flow / 4}
    features = model.double()._features_of(*(image.double() for image in golden.images()))
    seen = record(model)
    with torch.no_grad():
        flows["double"] = model.match(*features).flow / 4
        evaluated = dict(seen)
        encoder = model.encoder
        kept = {key: value.clone() for key, value in encoder.state_dict().items()}
        encoder.pos_embed_trg.copy_(encoder.pos_embed_src)
        encoder.cls_embed_src.copy_(encoder.cls_embed_trg)
        flows["as_tested"] = model.match(*features).flow / 4
        encoder.load_state_dict(kept)
    without_dropout(model).draw_ranks = authors_ranks(golden)
    match = model.match(*features)
    flows["training"] = match.flow / 4
    truth = torch.from_numpy(golden.arrays("data")["kpflow_128"]).double()
    terms = {"epe": endpoint_error(flows["training"], truth, (truth != 0).any(1))}
    terms["rptc"] = self_contrast(match.extras["tokens"], match.extras["masked"], model.neighbours)
    terms["loss"] = terms["epe"] + model.rptc_rate(0) * terms["rptc"].mean()
    terms["loss"].backward()
    torch.set_num_threads(1)
    return model, flows, evaluated, match, terms


def authors_ranks(golden):
    """They draw with Python's generator, one sample after the other."""
    rng = random.Random(golden.config["python_random_seed"])
    return lambda count, device: torch.tensor([rng.sample(range(64), 16) for _ in range(count)])


def test_flow(golden, released):
    _, flows, seen, *_ = released
    double = golden.arrays("lpmflow_f64")
    assert_close(flows["double"], double["flow"], 1e-8)
    for scales, coarse in zip(("11", "12", "21", "22"), seen["soft_argmax"][1].chunk(4), strict=True):
        assert_close(coarse, double[f"flow_coarse_{scales}"], 1e-8)
    assert_close(flows["single"], golden.arrays("lpmflow_f32")["flow"], 2e-2)


def test_intermediates(golden, released):
    _, _, seen, *_ = released
    single = golden.arrays("lpmflow_f32")
    for i in range(6):
        assert_close(seen[f"encoder.blocks.{i}"][1][:, ::16, ::8], single[f"enc_block{i}"], 1e-3)
    assert_close(seen["encoder.drop"][1][:, ::16, ::8], single["enc_in"], 1e-3)
    assert_close(torch.cat(seen["encoder"][1], 1)[:, ::8, ::4], single["enc_out"], 1e-3)
    for key, name in (("11", "pyramid.decoder1"), ("22", "pyramid.decoder3")):
        s, t, correlation = seen[name][1]
        assert_close(s[:, ::16, ::8], single[f"dec_{key}_src"], 1e-3)
        assert_close(t[:, ::16, ::8], single[f"dec_{key}_trg"], 1e-3)
        assert_close(correlation[:, ::8, ::8], single[f"corr_{key}"], 1e-4)
    s, t, correlation = seen["pyramid.decoder2"][1]  # its second call
    assert_close(s[:, ::16, ::8], single["dec_21_src"], 1e-3)
    assert_close(t[:, ::16, ::8], single["dec_21_trg"], 1e-3)
    assert_close(correlation[:, ::8, ::8], single["corr_21"], 1e-4)
    for up, key in zip(seen["pyramid.up"][1].chunk(2), ("up_src12", "up_trg21"), strict=True):
        assert_close(up[:, ::32, ::16], single[key], 1e-2)  # values reach 100
    project = "integration.project"
    assert_close(seen[f"{project}.1"][1][:, ::8, ::4, ::4], single["refine_feat32"], 1e-3)
    assert_close(seen[project][1][:, ::8, ::8, ::8], single["refine_feat128"], 1e-3)
    for i, window in enumerate((16, 8, 4)):
        assert_close(seen[f"integration.refine.{i}"][1][:, ::8, ::8, ::8], single[f"swin_{window}"], 0.5)
    assert_close(seen["integration"][1], single["flow_refine"], 2e-2)


def test_as_the_authors_test_it(golden, released):
    _, flows, *_ = released
    assert_close(flows["as_tested"], golden.arrays("lpmflow_aliased_load_f32")["flow"], 2e-2)
    assert (flows["as_tested"] - flows["double"]).abs().max() > 100


def test_token_replacement(golden, released):
    _, flows, _, match, _ = released
    stored = golden.arrays("lpmflow_train_f64")
    assert (match.extras["masked"].numpy() == stored["mask_index"]).all()
    assert_close(match.extras["tokens"][:, ::16, ::8], stored["src_recover"], 1e-8)
    assert_close(flows["training"], stored["flow"], 1e-8)


def test_training_step(golden, released):
    model, _, _, match, terms = released
    stored = golden.gradients("lpmflow")
    np.testing.assert_allclose(terms["rptc"].detach(), stored["infonce_per_sample"], rtol=1e-10)
    assert terms["epe"].item() == pytest.approx(stored["epe"], rel=1e-12)
    assert terms["loss"].item() == pytest.approx(stored["total_loss"], rel=1e-12)
    ours = model.loss(match, golden.pair())  # with our own pseudo-flow
    assert ours["loss"].item() == pytest.approx(stored["total_loss"], rel=1e-6)
    golden.assert_gradients("lpmflow", model)


def test_self_contrast(golden):
    stored = golden.arrays("rptc")
    tokens = torch.from_numpy(stored["tokens"]).double().requires_grad_()
    per_sample = self_contrast(tokens, torch.from_numpy(stored["mask_index"]), grid_neighbours(16))
    assert_close(per_sample, stored["infonce_per_sample"], 1e-5)
    (0.2 * per_sample.mean()).backward()
    np.testing.assert_allclose(tokens.grad[:, :, ::16], stored["grad_tokens_sub"], rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(tokens.grad.norm(dim=-1), stored["grad_tokens_rownorm"], rtol=1e-4, atol=1e-9)
