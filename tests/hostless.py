"""Context in which host-device synchronisation raises, so that CPU tests can check code for GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
SYNCHRONISES = {
    aten._local_scalar_dense: "reads a tensor's value on the host (item, bool, float, if)",
    aten.nonzero: "has an output whose size depends on values",
    aten.masked_select: "has an output whose size depends on values",
    aten._unique2: "has an output whose size depends on values",
    aten.equal: "compares on the host",
    aten.allclose: "compares on the host",
    aten.lift_fresh: "makes a tensor of Python data (torch.tensor, new_tensor, x[[0, 1]], x[i] = 0.5)",
}
ON_THE_HOST = {
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.cpu,
    torch.Tensor.__array__,
    torch.tensor,
    torch.from_numpy,
}


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in SYNCHRONISES:
            raise AssertionError(f"{func} {SYNCHRONISES[func.overloadpacket]}")
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
                raise AssertionError(f"{func} with a mask synchronises: use torch.where or masked_fill")
        if func is aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None:
            raise AssertionError(f"{func} synchronises without output_size")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in ON_THE_HOST:
            raise AssertionError(f"{func.__name__} copies between host and device")
        return func(*args, **(kwargs or {}))


@contextmanager
def hostless() -> Iterator[None]:
    """Raise AssertionError at the first operation that would make the host wait for a GPU or copy to it.

    Tensors created without `device=` are on `meta` here, so mixing them with tensors of the model raises, too: for a
    model on a GPU, they would be on the CPU.
    """
    with torch.device("meta"), _Methods(), _Operators():
        yield
