"""The parts that ACTR and LPMFlow share, against plain renderings of the same equations."""

import numpy as np
import pytest
import torch
from torch import nn

import corrzoo
from corrzoo.data import PairDataset
from corrzoo.geometry import transfer
from corrzoo.heads import tokens
from corrzoo.types import Features
from golden import without_dropout


def test_arf_is_its_formula_and_never_overflows():
    x = torch.linspace(-20, 20, 801, dtype=torch.float64).requires_grad_()
    literal = (x.exp() - (-x).exp()) / (x.exp() + (-x - 4).exp())
    literal = torch.where(literal < 0, 0, literal)
    torch.testing.assert_close(tokens.arf(x), literal, rtol=0, atol=1e-15)
    ours, theirs = (torch.autograd.grad(y.sum(), x)[0] for y in (tokens.arf(x), literal))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    assert [round(tokens.arf(torch.tensor(v)).item(), 5) for v in (0.5, 1.0, 2.0)] == [0.62789, 0.86253, 0.98136]
    far = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    assert tokens.arf(far).tolist() == [0, 0, 1, 1]
    assert torch.isfinite(torch.autograd.grad(tokens.arf(far).sum(), far)[0]).all()


def test_soft_argmax_finds_the_peak_from_source_to_target():
    scores = torch.zeros(1, 256, 256)
    scores[0, 5 * 16 + 7, 3 * 16 + 12] = 1  # source row 5, column 7; target row 3, column 12
    flow = tokens.SoftArgmax(16)(scores)
    torch.testing.assert_close(flow[0, :, 5, 7], torch.tensor([5.0, -2.0]), rtol=0, atol=1e-4)


def test_soft_argmax_by_sums_over_rows_and_columns():
    read, scores = tokens.SoftArgmax(4), torch.randn(2, 16, 16) / 20
    with torch.no_grad():
        read.x_normal += 0.1 * torch.randn(4)
    weights = (scores / 0.02).softmax(-1).unflatten(2, (4, 4))
    for r in range(4):
        for c in range(4):
            p = weights[:, 4 * r + c]
            x = ((p.sum(1) * read.x_normal).sum(1) + 1) * 1.5 - c
            y = ((p.sum(2) * read.y_normal).sum(1) + 1) * 1.5 - r
            torch.testing.assert_close(read(scores)[:, :, r, c], torch.stack([x, y], 1))


@pytest.mark.parametrize("update", [True, False])
def test_cross_attention_is_attention(update):
    """Against torch's own module; its weights are the mean over the heads, ours the sum."""
    ours, s, t = tokens.CrossAttention(32, update=update), torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    torchs = nn.MultiheadAttention(32, tokens.ATTENTION_HEADS, batch_first=True)
    torchs.in_proj_weight.data[:64] = ours.qkv.weight.data[:64]
    torchs.in_proj_bias.data[:64] = ours.qkv.bias.data[:64]
    if update:
        torchs.in_proj_weight.data[64:], torchs.in_proj_bias.data[64:] = ours.qkv.weight[64:], ours.qkv.bias[64:]
        torchs.out_proj.load_state_dict(ours.proj.state_dict())
    expected, weights = torchs(s, t, t)
    found, correlation = ours(s, t)
    torch.testing.assert_close(correlation, weights * tokens.ATTENTION_HEADS)
    torch.testing.assert_close(found, expected) if update else None


def test_windows_do_not_see_each_other_before_the_channel_attention():
    refine = tokens.WindowRefinement(16, 4)
    refine.channels = nn.Identity()
    maps = torch.randn(1, 16, 8, 12)
    changed = maps.clone()
    changed[:, 0, 5, 9] += 5
    moved = (refine(changed) - refine(maps)).abs().amax(1)[0] > 1e-7
    assert moved[4:, 8:].all() and moved.sum() == 16


def test_window_bias_is_of_query_minus_key():
    attention = tokens.WindowAttention(16, 3)
    index = attention.index
    assert index[0, 0] == 2 * 5 + 2 and index[0, 8] == 0 and index[8, 0] == 24 and index[1, 0] == 2 * 5 + 3


@pytest.mark.parametrize("grid", [64, 128])
def test_points_read_as_released(golden, grid):
    """flow2kps: bilinear enlargement to 512, whole pixels."""
    data = golden.arrays("data")
    pair, flow = golden.pair(), torch.from_numpy(data[f"pred_flow_{grid}"]) * (512 / grid)
    found = tokens.read_flow(pair.src_kps, flow, (512, 512), "pixel")
    expected = torch.from_numpy(data[f"est_kps_{grid}"]).transpose(1, 2)
    np.testing.assert_allclose(found[pair.kps_mask], expected[pair.kps_mask], rtol=0, atol=1e-3)
    exact = transfer(pair.src_kps, flow, (512, 512))[pair.kps_mask]
    assert (exact - expected[pair.kps_mask]).abs().max() > 0.1  # the lost fraction


def test_pixels_outside_the_image_are_clamped():
    flow, points = torch.zeros(1, 2, 4, 4), torch.tensor([[[-3.2, 5.9], [700.0, 64.0]]])
    assert tokens.read_flow(points, flow, (64, 128), "pixel").tolist() == [[[0, 5], [127, 63]]]


# ---------------------------------------------------------------------- options of both heads

SMALL = {"ACTR": {"depth": 2, "windows": [4, 8]}, "LPMFlow": {"depth": 1, "top_k": 16}}


def build(head, **options):
    torch.manual_seed(0)
    options = SMALL[head] | {"backbone_size": 128} | options
    return corrzoo.create_matcher(head, "timm/test_vit.r160_in1k", weights="random", **options)


@pytest.mark.parametrize("head", SMALL)
def test_checkpointing_changes_memory_but_neither_loss_nor_gradients(head):
    dataset = corrzoo.create_dataset("synthetic", "", "test", 64)
    pair, outcomes = PairDataset.collate([dataset[0]]), []
    for checkpointing in (False, True):
        model, kept = build(head, checkpointing=checkpointing).train(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x):
            torch.manual_seed(1)
            terms = model.loss(model.match(*model.features(pair)), pair)
        loss = terms["loss"] if isinstance(terms, dict) else terms
        forward = sum(kept)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        outcomes.append((loss, gradients, forward))
    (loss, gradients, kept), (same_loss, same_gradients, fewer) = outcomes
    assert loss == same_loss and loss > 0 and gradients.keys() == same_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, rtol=0, atol=0, msg=name)
    assert fewer < {"ACTR": 0.2, "LPMFlow": 0.1}[head] * kept


def own_cell_rate(head, **options):
    """Share of cells with the highest correlation at themselves, for two images with the same random features."""
    model = without_dropout(build(head, **options))
    maps = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(2))
    same = model.prepare(Features(torch.zeros(2, 3, 128, 128), [maps], maps.mean((2, 3))))
    with torch.no_grad():
        best = model.eval().match(same, same).correlation.argmax(-1)
    return (best == torch.arange(best.shape[1])).float().mean().item()


@pytest.mark.parametrize("head", SMALL)
def test_aligned_heads_start_from_feature_similarity(head):
    """With independent maps for queries and keys, the match of identical features is random."""
    assert own_cell_rate(head) < 0.1 and own_cell_rate(head, init="aligned") > 0.9


@pytest.mark.parametrize("head", SMALL)
def test_alignment_changes_queries_keys_and_the_update_of_the_flow_alone(head):
    paper, aligned = (build(head, init=init).state_dict() for init in ("paper", "aligned"))
    changed = {name for name in paper if not torch.equal(paper[name], aligned[name])}
    update = {name for name in paper if ".head.2." in name}
    weights = {name for name in paper if name.endswith("cross_attention.qkv.weight")}
    assert weights | update <= changed <= weights | update | {name.replace("weight", "bias") for name in weights}
    assert len(update) == 2 and not any(aligned[name].any() for name in update)
    for name in weights:
        queries, keys, values = aligned[name].chunk(3)
        torch.testing.assert_close(queries @ queries.T, torch.eye(64), rtol=0, atol=1e-5)
        assert torch.equal(queries, keys) and torch.equal(values, paper[name].chunk(3)[2])
        assert not aligned[name.replace("weight", "bias")][:128].any()


@pytest.mark.parametrize("head", SMALL)
def test_aligned_heads_learn_in_every_part(head):
    """The zero update of the flow blocks the refinement's gradients for one step only."""
    dataset = corrzoo.create_dataset("synthetic", "", "test", 64)
    pair, model = PairDataset.collate([dataset[0]]), without_dropout(build(head, init="aligned"))
    optimizer = torch.optim.SGD(model.param_groups(), lr=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        terms = model.loss(model.match(*model.features(pair)), pair)
        (terms["loss"] if isinstance(terms, dict) else terms).backward()
        optimizer.step()
    refinement = [p for m in model.modules() if isinstance(m, tokens.WindowRefinement) for p in m.mlp.parameters()]
    assert refinement and all(p.grad.any() for p in refinement)
