"""Position embeddings against an independent rendering: bicubic sampling written as two matrices."""

import copy

import numpy as np
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

import corrzoo.backbones.position as position
from corrzoo.backbones import create_backbone
from corrzoo.backbones.position import ResizeOnce, resize_pos_embed


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
def test_the_native_grid_is_unchanged(official):
    embed = torch.randn(1, 1 + 12, 4)
    assert resize_pos_embed(embed, (3, 4), (3, 4), 1, official) is embed
    assert resize_pos_embed(embed, (3, 4), (4, 3), 1, official) is not embed  # as many cells, another grid


def test_half_precision_is_resized_in_float32():
    embed = torch.randn(1, 16, 4).bfloat16()
    got = resize_pos_embed(embed, (4, 4), (6, 6), 0, True)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, resize_pos_embed(embed.float(), (4, 4), (6, 6), 0, True).bfloat16())


def test_the_backbone_uses_the_option_pos_interp():
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
    with torch.no_grad():
        backbone(torch.randn(1, 3, 64, 64))  # its result is not for the training step that follows
    backbone(torch.randn(1, 3, 64, 64)).maps[0].square().sum().backward()
    assert backbone.trunk.model.pos_embed.grad.abs().sum() > 0


# ---------------------------------------------------------------------- resized once


IMAGE = torch.zeros(1, 3, 64, 96)


@pytest.fixture
def resized(monkeypatch):
    """Counts the resizings of `ResizeOnce`."""
    grids = []

    def counting(embed, old, new, prefix, official):
        grids.append(new)
        return resize_pos_embed(embed, old, new, prefix, official)

    monkeypatch.setattr(position, "resize_pos_embed", counting)
    return grids


def vit(**options):
    torch.manual_seed(0)
    return create_backbone("timm/test_vit", "random", **options)


def fresh(backbone):
    """The map of a backbone that has the same weights and no past."""
    other = vit()
    other.load_state_dict(backbone.state_dict())
    return other(IMAGE).maps[0].detach()


def test_a_frozen_embedding_is_resized_once_per_grid(resized):
    backbone = vit(finetune=2).train()  # the embedding is frozen, blocks are trained
    for image in (IMAGE, IMAGE, torch.zeros(1, 3, 96, 64), torch.zeros(1, 3, 96, 64)):
        backbone(image).maps[0].sum().backward()
    assert resized[1:] == [(4, 6), (6, 4)]  # the first is of the pass that finds the levels' channels
    torch.testing.assert_close(backbone(IMAGE).maps[0], fresh(backbone))


def test_a_trained_embedding_is_resized_at_every_step_and_once_in_evaluation(resized):
    backbone = vit()
    resized.clear()
    for _ in range(2):
        backbone(IMAGE)
    assert len(resized) == 2
    backbone.eval()
    with torch.no_grad():
        for _ in range(2):
            backbone(IMAGE)
    assert len(resized) == 3


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_an_optimiser_step_invalidates_the_kept_result(kind, options):
    """Those of fused optimisers too, which leave the version as it was."""
    for training in (True, False):
        backbone = vit().train(training)
        optimizer = kind(backbone.parameters(), lr=0.1, **options)
        with torch.no_grad():
            backbone(IMAGE)
        backbone(IMAGE).maps[0].square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(backbone(IMAGE).maps[0], fresh(backbone))


def new_weights(backbone):
    torch.manual_seed(1)
    backbone.load_state_dict(create_backbone("timm/test_vit", "random").state_dict())


def in_place(backbone):
    with torch.no_grad():
        backbone.trunk.model.pos_embed.mul_(-3)


def replaced(backbone):
    backbone.trunk.model.pos_embed.data = torch.randn_like(backbone.trunk.model.pos_embed)


def rounded(backbone):
    backbone.half().float()  # the same version, and perhaps the same address


def swapped_before_evaluation(backbone):
    backbone.train().eval()
    backbone.trunk.model.pos_embed.data.mul_(-3)  # as averages of weights are put in place: no version counts this


@pytest.mark.parametrize("change", [new_weights, in_place, replaced, rounded, swapped_before_evaluation])
def test_a_change_of_the_embedding_invalidates_the_kept_result(change):
    backbone = vit(finetune="none")
    before = backbone(IMAGE).maps[0]
    change(backbone)
    found = backbone(IMAGE).maps[0]
    torch.testing.assert_close(found, fresh(backbone))
    assert not torch.equal(found, before)


def test_a_copy_resizes_its_own_embedding():
    backbone = vit(finetune="none")
    in_place(backbone)
    backbone(IMAGE)
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        other.trunk.model.pos_embed.add_(1)  # as many writes as the original has seen
    torch.testing.assert_close(other(IMAGE).maps[0], fresh(other))
    assert backbone.state_dict().keys() == vit().state_dict().keys()


def test_a_result_from_inference_mode_can_be_used_in_training():
    backbone = vit(finetune=2)
    with torch.inference_mode():
        backbone(IMAGE)
    backbone(IMAGE).maps[0].square().sum().backward()
    assert backbone.trunk.model.norm.weight.grad.abs().sum() > 0


def test_exported_and_compiled_models_do_not_read_the_kept_result():
    backbone = vit(finetune="none").eval()
    expected = backbone(IMAGE).maps[0]
    exported = torch.export.export(backbone, (IMAGE,), strict=False)
    torch.testing.assert_close(exported.module()(IMAGE).maps[0], expected)
    with torch.no_grad():
        backbone.trunk.model.pos_embed.mul_(-3)
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGE).maps[0], fresh(backbone))


def test_functional_calls_are_resized_by_their_own_embedding():
    backbone = vit(finetune="none")
    backbone(IMAGE)
    key = "trunk.model.pos_embed"
    embed = torch.randn_like(backbone.get_parameter(key))
    found = torch.func.functional_call(backbone, {key: embed}, (IMAGE,)).maps[0]
    with torch.no_grad():
        backbone.get_parameter(key).copy_(embed)
    torch.testing.assert_close(found, fresh(backbone))


def test_the_kept_result_is_not_copied():
    once, embed = ResizeOnce(), torch.nn.Parameter(torch.randn(1, 16, 4), requires_grad=False)
    given = (embed, (4, 4), (2, 2), 0, True, False)
    first = once(*given)
    assert once(*given) is first
    assert copy.deepcopy(once)(*given) is not first
