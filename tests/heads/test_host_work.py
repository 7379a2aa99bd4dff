"""No step of a head reads a value on the host or copies data from it: on a GPU each would wait for all queued work."""

import pytest
import torch

import corrzoo
from corrzoo.data import PairDataset
from hostless import hostless

VIT = "timm/test_vit.r160_in1k"
SMALL = {
    "ViTSC": {"head_resolution": 0.125, "low_stages": 1},
    "ACTR": {"grid": 8, "depth": 2},
    "GeoAware": {"grid": 8, "width": 128},
    "LPMFlow": {"grid": 4, "depth": 2},
    "CATs": {"grid": 8, "width": 32},
    "TransforMatcher": {"grid": 4},
}
VARIANTS = {
    "ACTR": [{}, {"checkpointing": True}, {"read": "pixel"}],
    "TransforMatcher": [{}, {"rotary": "parity"}],
    "LPMFlow": [{}, {"checkpointing": True}, {"read": "pixel"}, {"larl": "cross"}, {"region_pe": False}],
    "MirrorGuided": [{}, {"layers": 1, "row_weight": 1.0, "epe_weight": 0.0}],
    "GSF": [{}, {"fusion": "product"}],
}
CASES = [
    pytest.param(head, options, id=f"{head} {options or ''}".strip())
    for head in corrzoo.list_heads()
    for options in VARIANTS.get(head, [{}])
]


def build(head, options):
    torch.manual_seed(0)
    return corrzoo.create_matcher(head, backbone=VIT, weights="random", **SMALL.get(head, {}), **options)


def batch():
    dataset = corrzoo.create_dataset("synthetic", "", "test", 64)
    return PairDataset.collate([dataset[i] for i in range(2)])


@pytest.mark.parametrize(("head", "options"), CASES)
def test_training_step(head, options):
    model, pair = build(head, options).train(), batch()
    with hostless():
        terms = model.loss(model.match(*model.features(pair)), pair)
        (terms["loss"] if isinstance(terms, dict) else terms).backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("head", "options"), CASES)
def test_evaluation_step(head, options):
    model, pair = build(head, options).eval(), batch()
    with torch.no_grad(), hostless():
        points = model.match_points(*model.features(pair), pair.src_kps)
    assert points.device.type == "cpu" and torch.isfinite(points).all()
