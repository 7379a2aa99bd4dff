"""4-D convolution against plain loops, its reference and numerical gradients."""

from itertools import product

import pytest
import torch
from problems import assert_close, run

from corrzoo import ops
from corrzoo.ops.convolution import conv4d_reference
from corrzoo.types import ZooError

SHAPE = (2, 3, 4, 2)
"""h, w, H, W: all different, and narrower than a kernel of 5."""


def problem(channels, outputs, kernel, dtype=torch.float64):
    g = torch.Generator().manual_seed(channels + 10 * outputs)
    shapes = (2, channels, *SHAPE), (outputs, channels, *[kernel] * 4), (outputs,)
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("function", [ops.conv4d, conv4d_reference])
@pytest.mark.parametrize(("channels", "outputs", "kernel"), [(2, 3, 3), (3, 2, 3), (1, 1, 5)])
def test_equals_the_sum_over_all_offsets(function, channels, outputs, kernel):
    volume, weight, bias = problem(channels, outputs, kernel)
    expected = bias.view(-1, 1, 1, 1, 1).expand(2, outputs, *SHAPE).clone()
    for at in product(*map(range, SHAPE)):
        for d in product(range(kernel), repeat=4):
            source = [p + o - kernel // 2 for p, o in zip(at, d, strict=True)]
            if all(0 <= s < side for s, side in zip(source, SHAPE, strict=True)):
                index = (slice(None), slice(None), *source)
                expected[(slice(None), slice(None), *at)] += volume[index] @ weight[(slice(None), slice(None), *d)].T
    torch.testing.assert_close(function(volume, weight, bias), expected)


@pytest.mark.parametrize("function", [ops.conv4d, conv4d_reference])
@pytest.mark.parametrize(("channels", "outputs"), [(1, 2), (2, 1)])
def test_gradients(function, channels, outputs):
    inputs = [x.requires_grad_() for x in problem(channels, outputs, 3)]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "outputs"), [(1, 4), (4, 4), (4, 1)])
def test_equals_the_reference_in_other_precisions(dtype, channels, outputs):
    inputs = problem(channels, outputs, 3, dtype)  # torch's bfloat16 gradients of kernels wider than volumes are wrong
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert_close(run(ops.conv4d, inputs), run(conv4d_reference, inputs, torch.float64), tolerance)


def test_what_does_not_fit_is_refused():
    volume, weight, _ = problem(2, 3, 3)
    with pytest.raises(ZooError, match=r"got \(2, 2, 2, 3, 4, 2\) and \(3, 1, 3, 3, 3, 3\)"):
        ops.conv4d(volume, weight[:, :1])
    with pytest.raises(ZooError, match=r"one odd side, got \(2, 2, 2, 2\)"):
        ops.conv4d(volume, weight[..., :2, :2, :2, :2])
