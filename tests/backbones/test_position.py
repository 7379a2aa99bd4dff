"""Position embeddings against an independent rendering: bicubic sampling written as two matrices."""

import numpy as np
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from corrzoo.backbones import create_backbone
from corrzoo.backbones.position import resize_pos_embed


def keys(t: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel with a = -0.75, PyTorch's."""
    a, t = -0.75, np.abs(t)
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0))


def bicubic(old: int, new: int, ratio: float) -> np.ndarray:
    """(new, old) matrix that samples at (i + 0.5) * ratio - 0.5, the border held."""
    matrix = np.zeros((new, old))
    for i in range(new):
        x = (i + 0.5) * ratio - 0.5
        for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            matrix[i, min(max(j, 0), old - 1)] += keys(np.array(x - j))
    return matrix


@pytest.mark.parametrize(("old", "new"), [((14, 14), (16, 16)), ((37, 37), (16, 23)), ((6, 9), (9, 6))])
def test_official_reads_the_old_grid_at_its_scale(old, new):
    embed = torch.randn(1, 1 + old[0] * old[1], 5, dtype=torch.float64)
    rows, cols = (bicubic(o, n, o / (n + 0.1)) for o, n in zip(old, new, strict=True))
    want = np.einsum("yh,xw,hwc->yxc", rows, cols, embed[0, 1:].unflatten(0, old).numpy())
    got = resize_pos_embed(embed, old, new, prefix=1, official=True)
    assert torch.equal(got[:, :1], embed[:, :1])
    np.testing.assert_allclose(got[0, 1:].unflatten(0, new).numpy(), want, atol=1e-12)


@pytest.mark.parametrize("new", [(5, 7), (16, 16), (14, 28)])
def test_timm_is_timms(new):
    embed = torch.randn(1, 5 + 14 * 14, 4)
    got = resize_pos_embed(embed, (14, 14), new, prefix=5, official=False)
    assert torch.equal(got, resample_abs_pos_embed(embed, new, (14, 14), num_prefix_tokens=5))


@pytest.mark.parametrize("official", [True, False])
def test_native_grid_is_left_alone(official):
    embed = torch.randn(1, 1 + 12, 4)
    assert resize_pos_embed(embed, (3, 4), (3, 4), 1, official) is embed
    assert resize_pos_embed(embed, (3, 4), (4, 3), 1, official) is not embed  # as many cells, another grid


def test_half_precision_is_resized_in_float32():
    embed = torch.randn(1, 16, 4).bfloat16()
    got = resize_pos_embed(embed, (4, 4), (6, 6), 0, True)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, resize_pos_embed(embed.float(), (4, 4), (6, 6), 0, True).bfloat16())


def test_the_backbone_uses_what_was_asked():
    image = torch.randn(1, 3, 64, 96)
    official, theirs = (create_backbone("timm/test_vit", "random", pos_interp=p) for p in ("official", "timm"))
    theirs.load_state_dict(official.state_dict())
    reference = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    reference.load_state_dict(official.trunk.model.state_dict())
    want = reference.forward_features(image)[:, 1:]
    torch.testing.assert_close(theirs(image).maps[0].flatten(2).transpose(1, 2), want)
    assert not torch.allclose(official(image).maps[0], theirs(image).maps[0], atol=1e-4)
    native = torch.randn(1, 3, 160, 160)
    assert torch.equal(official(native).maps[0], theirs(native).maps[0])


def test_gradient_reaches_the_embedding():
    backbone = create_backbone("timm/test_vit", "random", pos_interp="official")
    backbone(torch.randn(1, 3, 64, 64)).maps[0].square().sum().backward()
    assert backbone.trunk.model.pos_embed.grad.abs().sum() > 0
