"""No step of a head reads a value on the host or copies data from it: on a GPU each would wait for all queued work."""

import pytest
import torch

import corrzoo
from corrzoo.data import PairDataset
from corrzoo.scoring.evaluation import predict_points
from hostless import hostless
from small import CASES, build

VARIANTS = {
    "ACTR": [{}, {"checkpointing": True}, {"read": "pixel"}],
    "TransforMatcher": [{}, {"rotary": "parity"}],
    "LPMFlow": [{}, {"checkpointing": True}, {"read": "pixel"}, {"larl": "cross"}, {"region_pe": False}],
    "GSF": [{}, {"fusion": "product"}],
}
STEPS = [
    pytest.param(head, options, id=f"{head} {options or ''}".strip())
    for head in CASES
    for options in VARIANTS.get(head, [{}])
]


def batch():
    dataset = corrzoo.create_dataset("synthetic", "", "test", 64)
    return PairDataset.collate([dataset[i] for i in range(2)])


@pytest.mark.parametrize(("head", "options"), STEPS)
def test_training_step(head, options):
    model, pair = build(head, **options).train(), batch()
    with hostless():
        terms = model.training_losses(pair)
        (terms["loss"] if isinstance(terms, dict) else terms).backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("head", "options"), STEPS)
def test_evaluation_step(head, options):
    model, pair = build(head, **options).eval(), batch()
    with hostless():
        points = predict_points(model, pair)
    assert points.shape == pair.trg_kps.shape and torch.isfinite(points).all()
