"""CATs against what its authors' code computes, and its options."""

import pytest
import torch

from corrzoo.heads import CATs
from corrzoo.losses import endpoint_error
from corrzoo.store.official import LAYOUTS, load_official, official_key
from corrzoo.types import Features
from golden import Further, assert_close, assert_gradients, record

EXACT = 1e-8
PARTS = r"blocks\.0|project\.\d+"
WHOLE = dict(reason="")


@pytest.fixture(scope="module")
def further():
    return Further("cats")


def block_of(hyperpixel: int) -> str:
    """The name of a level by its number in the released code: bottlenecks counted through ResNet-101, the stem 0."""
    if hyperpixel == 0:
        return "maxpool"
    stage, index = 1, hyperpixel - 1
    for count in (3, 4, 23, 3):
        if index < count:
            return f"layer{stage}.{index}:pre"
        stage, index = stage + 1, index - count
    raise ValueError(hyperpixel)


def options_of(sizes: dict) -> dict:
    return {"levels": [block_of(i) for i in sizes["hyperpixel"]], "attention_heads": sizes["num_heads"]}


def assert_arrays(ours: dict, theirs: dict) -> None:
    """The authors' arrays [name], with the strides of their README."""


def run(model: CATs, src: Features, trg: Features) -> dict:
    """One step in float64: everything that the authors' arrays hold. `src` is their target."""
    grid = model.grid
    with record(model, r"blocks\.0") as seen:
        match = model.match(src, trg)
    return match, seen["blocks.0"]
