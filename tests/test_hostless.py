"""Operations that `hostless` refuses and allows."""

import pytest
import torch

from hostless import hostless

X = torch.arange(12.0).view(3, 4)
FORBIDDEN = {
    "item": lambda: X.sum().item(),
    "float": lambda: float(X.sum()),
    "if": lambda: 1 if (X > 0).any() else 0,
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(X > 3),
    "unique": lambda: X.unique(),
    "equal": lambda: torch.equal(X, X),
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "cpu": lambda: X.cpu(),
    "new_tensor": lambda: X.new_tensor([1, 2]),
    "tensor": lambda: torch.tensor([1.0], device=X.device),
    "list as index": lambda: X[:, [0, 1]],
    "mask as index": lambda: X[X > 3],
    "mask assigned": lambda: X.clone().index_put_((X > 3,), X[0, :1]),
    "counts": lambda: X.repeat_interleave(X[:, 0].long(), 0),
    "constant on the CPU": lambda: X + torch.arange(4),
    "backward": lambda: Synchronising.apply(X.clone().requires_grad_()).sum().backward(),
}


class Synchronising(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * gradient.sum().item()


@pytest.mark.parametrize("name", FORBIDDEN)
def test_synchronisation_raises(name):
    with hostless(), pytest.raises((AssertionError, RuntimeError)):
        FORBIDDEN[name]()


def test_device_operations_are_allowed():
    """Python scalars, tensors made on the device, whole-number and slice indices, and a backward pass."""
    x = (X / 3).requires_grad_()
    with hostless():
        y = torch.where(x > 1, x, 0.5) * 2 + torch.arange(4, device=x.device)
        y = y.masked_fill(y > 9, 1.0)[:, 1:].repeat_interleave(2, 1)
        y.index_select(0, torch.arange(2, device=x.device)).softmax(-1).square().sum().backward()
    assert x.grad.abs().sum() > 0
