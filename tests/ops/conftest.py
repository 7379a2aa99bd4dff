"""Where the op's tests run: torch on every device, the kernels on a GPU or in Triton's interpreter."""

from typing import NamedTuple

import pytest
import torch


class Place(NamedTuple):
    backend: str
    device: torch.device


def place(name: str) -> Place:
    if name.endswith("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, and there is none here")
    if name.startswith("triton"):
        pytest.importorskip("triton", reason="needs triton, which runs the kernels")
        if not torch.cuda.is_available():
            return Place("triton", torch.device("cpu"))  # the interpreter: see tests/conftest.py
        return Place("triton", torch.device("cuda"))
    return Place("torch", torch.device(name.split()[1]))


@pytest.fixture(params=["torch cpu", "torch cuda", "triton"])
def where(request: pytest.FixtureRequest) -> Place:
    """An implementation and its device."""
    return place(request.param)


@pytest.fixture(params=["torch cpu", "torch cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """A device for the torch implementation."""
    return place(request.param).device


@pytest.fixture
def cuda() -> torch.device:
    return place("torch cuda").device
