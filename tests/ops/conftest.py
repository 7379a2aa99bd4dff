"""Where the op's tests run: torch on every device, the kernels on a GPU or in Triton's interpreter."""

import importlib.util
from typing import NamedTuple

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def interpreter_rounds_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPUs do: Triton's interpreter truncates float32 to bfloat16, which has twice the error."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    def convert(x: np.ndarray, source: object, target: object, rounding: object) -> np.ndarray:
        if (str(source), str(target)) != ("fp32", "bf16"):
            return truncating(x, source, target, rounding)
        nearest = torch.from_numpy(np.array(x, dtype=np.float32)).bfloat16()
        return nearest.view(torch.int16).numpy().view(np.uint16)

    truncating = interpreter._convert_float
    monkeypatch.setattr(interpreter, "_convert_float", convert)


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
