"""Every head, small enough for tests on a CPU."""

from typing import Any

import torch

import corrzoo
from corrzoo.matcher import Matcher

VIT = "timm/test_vit.r160_in1k"
SMALL: dict[str, dict[str, Any]] = {
    "ViTSC": {"head_resolution": 0.125, "low_stages": 1},  # its CNNs at every pixel are for GPUs
    "ACTR": {"grid": 8, "depth": 2},
    "GeoAware": {"grid": 8, "width": 128},
    "LPMFlow": {"grid": 4, "depth": 2},
    "CATs": {"grid": 8, "width": 32},
    "TransforMatcher": {"grid": 4},
    "MirrorGuided": {"layers": 1, "width": 32, "row_weight": 1.0, "epe_weight": 0.0},
}
CASES = [*corrzoo.list_heads(), "MirrorGuided, no layers"]
"""The heads, and MirrorGuided with its defaults: without a parameter, and with the EPE as its loss."""


def build(case: str, seed: int = 0, **options: Any) -> Matcher:
    """A head of `CASES` with random weights, and with the options of `SMALL` where no others are given."""
    torch.manual_seed(seed)
    options = {"backbone": VIT, "weights": "random"} | SMALL.get(case, {}) | options
    model = corrzoo.create_matcher(case.split(",")[0], **options)
    return disturb(model) if case == "MirrorGuided" else model  # whose network adds nothing before training


@torch.no_grad()
def disturb(model: Matcher) -> Matcher:
    """Add noise to every parameter, so that nothing stands at an initial zero that hides an error."""
    for p in model.parameters():
        p += 0.02 * torch.randn_like(p)
    return model
