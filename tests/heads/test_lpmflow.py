"""LPMFlow against what its authors' code answers, and its options."""

import random
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import corrzoo
from corrzoo.data import PairDataset
from corrzoo.heads.lpmflow import LPMFlow, grid_neighbours, self_contrast
from corrzoo.losses import endpoint_errors, mean_where
from corrzoo.store.official import load_official
from corrzoo.types import ZooError
from golden import assert_close, record, without_dropout


@pytest.fixture(scope="module")
def released(golden, gigabytes):
    """In float64: the evaluation, the same as the authors' test script loads it, a training step without dropout."""
    torch.set_num_threads(2)
    model = load_official("lpmflow", golden.official_state("lpmflow"))
    with torch.no_grad():
        flows = {"single": model(*golden.images()).flow / 4}
    features = model.double().features_of(*(image.double() for image in golden.images()))
    names = (
        r"soft_argmax|encoder(\.(drop|blocks\.\d))?|pyramid\.(decoder\d|up)|integration(\.(project(\.1)?|refine\.\d))?"
    )
    with torch.no_grad():
        with record(model, names) as evaluated:
            flows["double"] = model.match(*features).flow / 4
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
    terms = {"epe": mean_where(*endpoint_errors(flows["training"], truth, (truth != 0).any(1)))}
    terms["rptc"] = self_contrast(match.extras["tokens"], match.extras["masked"], model.neighbours)
    terms["loss"] = terms["epe"] + model.rptc_rate(0) * terms["rptc"].mean()
    terms["loss"].backward()
    torch.set_num_threads(1)
    yield model, flows, evaluated, match, terms


def authors_ranks(golden):
    """They draw with Python's generator, one sample after the other."""
    rng = random.Random(golden.config["python_random_seed"])
    return lambda count, device: torch.tensor([rng.sample(range(64), 16) for _ in range(count)])


def test_flow(golden, released):
    _, flows, seen, *_ = released
    double = golden.arrays("lpmflow_f64")
    assert_close(flows["double"], double["flow"], 1e-8)
    for scales, coarse in zip(("11", "12", "21", "22"), seen["soft_argmax"][-1][1].chunk(4), strict=True):
        assert_close(coarse, double[f"flow_coarse_{scales}"], 1e-8)
    assert_close(flows["single"], golden.arrays("lpmflow_f32")["flow"], 2e-2)


def test_intermediates(golden, released):
    _, _, seen, *_ = released
    single = golden.arrays("lpmflow_f32")
    for i in range(6):
        assert_close(seen[f"encoder.blocks.{i}"][-1][1][:, ::16, ::8], single[f"enc_block{i}"], 1e-3)
    assert_close(seen["encoder.drop"][-1][1][:, ::16, ::8], single["enc_in"], 1e-3)
    assert_close(torch.cat(seen["encoder"][-1][1], 1)[:, ::8, ::4], single["enc_out"], 1e-3)
    for key, name in (("11", "pyramid.decoder1"), ("22", "pyramid.decoder3")):
        s, t, correlation = seen[name][-1][1]
        assert_close(s[:, ::16, ::8], single[f"dec_{key}_src"], 1e-3)
        assert_close(t[:, ::16, ::8], single[f"dec_{key}_trg"], 1e-3)
        assert_close(correlation[:, ::8, ::8], single[f"corr_{key}"], 1e-4)
    s, t, correlation = seen["pyramid.decoder2"][-1][1]  # its second call
    assert_close(s[:, ::16, ::8], single["dec_21_src"], 1e-3)
    assert_close(t[:, ::16, ::8], single["dec_21_trg"], 1e-3)
    assert_close(correlation[:, ::8, ::8], single["corr_21"], 1e-4)
    for up, key in zip(seen["pyramid.up"][-1][1].chunk(2), ("up_src12", "up_trg21"), strict=True):
        assert_close(up[:, ::32, ::16], single[key], 1e-2)  # values reach 100
    project = "integration.project"
    assert_close(seen[f"{project}.1"][-1][1][:, ::8, ::4, ::4], single["refine_feat32"], 1e-3)
    assert_close(seen[project][-1][1][:, ::8, ::8, ::8], single["refine_feat128"], 1e-3)
    for i, window in enumerate((16, 8, 4)):
        assert_close(seen[f"integration.refine.{i}"][-1][1][:, ::8, ::8, ::8], single[f"swin_{window}"], 0.5)
    assert_close(seen["integration"][-1][1], single["flow_refine"], 2e-2)


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


# ---------------------------------------------------------------------- without the authors' values

VIT = "timm/test_vit.r160_in1k"
ROOT = Path(__file__).resolve().parents[2]


def small(**options):
    torch.manual_seed(0)
    return LPMFlow(**{"backbone": VIT, "weights": "random", "backbone_size": 128, "depth": 2} | options)


def ablations():
    """Options of every ablation: those of the files, and those of the page's table of values."""
    files = sorted((ROOT / "zoo_configs" / "ablation" / "lpmflow").glob("*.yaml"))
    found = {path.stem: yaml.safe_load(path.read_text())["model"]["init_args"] for path in files}
    page = (ROOT / "docs" / "heads" / "lpmflow.md").read_text()
    rows = re.findall(r'^\| lpmflow_(\w+) \| `--model\.(\w+) "?([^`"]+)"?`', page, re.M)
    return found | {name: {option: yaml.safe_load(value)} for name, option, value in rows}


def batch(size=64):
    dataset = corrzoo.create_dataset("synthetic", "", "test", size=size)
    return PairDataset.collate([dataset[i] for i in range(2)])


def outcome(model, training):
    """The loss and flow of a step whose random choices are the same for every model."""
    without_dropout(model) if training else model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        torch.manual_seed(1)
        match = model(*batch()[:2])
        return match.flow, model.loss(match, batch())["loss"]


FEWER = {"no_larl", "no_pfsr", "no_mmfi", "no_region_pe", "no_interactive", "no_feature_block", "k_0", "windows_4"}
SAME = {"foreground_mean", "no_gradual_guidance", "no_contrastive_loss", "isolated", "cross", "no_internal"}
ABLATIONS = ablations()


def test_every_ablation_is_found():
    assert len(ABLATIONS) == 14 + 16


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_differ_as_named(name):
    options = ABLATIONS[name]
    assert len(options) == 1
    # K = 64 must not be all there is, so 16 x 16 cells where K is what is asked
    common = {"backbone_size": 256, "depth": 1} if name.startswith("k_") or name == "foreground_mean" else {}
    full, model = small(**common), small(**common | options)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, full)]
    if name in FEWER:
        assert sizes[0] < sizes[1]
    elif name in SAME:
        assert sizes[0] == sizes[1]
    rates = [[m.rptc_rate(epoch) for epoch in range(12)] for m in (model, full)]
    if name.startswith(("lambda", "decline", "no_gradual", "no_contrastive")):
        assert rates[0] != rates[1]
        return
    assert rates[0] == rates[1]
    if name.startswith("k_"):
        assert model.masked == options["top_k"] // 4
    training = name.startswith(("k_", "foreground"))
    (flow, loss), (full_flow, full_loss) = outcome(model, training), outcome(full, training)
    assert (flow - full_flow).abs().max() > 1e-3 and loss != full_loss


def test_guidance_declines():
    """Spec 5: the released code's rates; supplement 2.3: a tenth of lambda each epoch, to zero."""
    released, paper = small(), small(rptc_decline=0.1)
    expected = [0.2, 0.2, 0.1, 0.2 / 3, 0.05, 0.04, 0.2 / 6, 0.2 / 7, 0.025, 0.2 / 9, 0.02, 0.02]
    assert [released.rptc_rate(epoch) for epoch in range(12)] == pytest.approx(expected)
    assert [paper.rptc_rate(epoch) for epoch in (0, 1, 5, 10, 11)] == pytest.approx([0.2, 0.18, 0.1, 0, 0])


def test_self_contrast_by_loops():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 17, 6, generator=generator, dtype=torch.float64)
    masked = torch.tensor([[1, 2, 16], [6, 7, 11]])
    expected = []
    for b in range(2):
        cells = tokens[b, 1:].view(4, 4, 6)
        losses = []
        for position in masked[b].tolist():
            row, column = divmod(position - 1, 4)
            near = [
                cells[r, c]
                for r in range(max(row - 1, 0), min(row + 2, 4))
                for c in range(max(column - 1, 0), min(column + 2, 4))
                if (r, c) != (row, column)
            ]
            query = tokens[b, position]
            others = [tokens[b, i] for i in masked[b].tolist() if i != position]
            keys = [torch.stack(near).mean(0), *others]
            logits = torch.stack([torch.cosine_similarity(query, key, dim=0) for key in keys]) / 0.1
            losses.append(-logits.log_softmax(0)[0])
        expected.append(torch.stack(losses).mean())
    torch.testing.assert_close(self_contrast(tokens, masked, grid_neighbours(4)), torch.stack(expected))


def test_replaced_tokens_are_the_foreground():
    """Every replaced one is among the K most like the class tokens, none twice, and all may be."""
    model = small(backbone_size=256, top_k=8)
    s, t = torch.randn(2, 257, 64), torch.randn(2, 257, 64)
    best = 1 + model.foreground_heat(s[:, 1:], s[:, :1], t[:, :1]).topk(8).indices
    drawn = []
    for _ in range(40):
        hidden, masked = model.hide_tokens(s, t)
        for b in range(2):
            assert set(masked[b].tolist()) < set(best[b].tolist()) and len(set(masked[b].tolist())) == 2
        drawn += masked[0].tolist()
    assert set(drawn) == set(best[0].tolist())
    changed = (hidden != s).any(-1)
    assert changed.sum() == 4
    torch.testing.assert_close(hidden[0, masked[0]], (s[0, 0] + t[0, 0]).expand(2, -1))


def test_a_pair_without_keypoints_contributes_nothing_to_training():
    model, pair = without_dropout(small()), batch()
    none = pair._replace(kps_mask=torch.zeros_like(pair.kps_mask))
    assert model.loss(model(*none[:2]), none)["loss"] == 0


def test_mistakes():
    with pytest.raises(ZooError, match="expected some of 11, 12, 21, 22"):
        small(flows=["13"])
    with pytest.raises(ZooError, match="expected some of 11, 22 "):
        small(flows=["12", "21"], pfsr="no_interactive")
    with pytest.raises(ZooError, match="expected some of 11 "):
        small(flows=["22", "12"], pfsr="off", windows=[4])
    with pytest.raises(ZooError, match="windows of 16 cells do not divide 40 x 40, 8 times the grid of 5"):
        small(backbone_size=80, pfsr="off")
    with pytest.raises(ZooError, match="windows of 4 cells do not divide 10 x 10"):
        small(backbone_size=80)
    with pytest.raises(ZooError, match="set width=32"):
        small(backbone="timm/test_resnet.r160_in1k", width=36)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_break(training):
    model = small()
    features = model.features_of(*batch()[:2])
    without_dropout(model) if training else model.eval()
    compiled = torch.compile(model.match, fullgraph=True, backend="eager")
    torch.manual_seed(1)
    expected = model.match(*features).flow
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(*features).flow, expected)
