"""What holds for every head, on tiny backbones."""

from pathlib import Path

import pytest
import torch
import yaml

import corrzoo
import small
from corrzoo.data import PairDataset
from corrzoo.scoring.evaluation import predict_points
from corrzoo.types import ZooError
from small import CASES, VIT

CNN = "timm/test_resnet.r160_in1k"
WEAK = ("GSF", "NCNet")
"""Heads that learn from no keypoint, see their own tests."""
SUPERVISED = [head for head in CASES if head not in WEAK]
OPTIONS = {
    "TransforMatcher": {"grid": 8},
    # On a CPU, torch's bfloat16 gradient of a kernel of 5 cells on a volume of 4 is sometimes NaN (2.10 to 2.14).
    "NCNet": {"kernel_sizes": [3, 3], "channels": [16, 1]},
}
OVERFIT = {
    "ACTR": {"lr": 3e-4},
    "LPMFlow": {"lr": 3e-4, "steps": 480, "dropout": 0.0},
    "CATs": {"lr": 1e-3, "init": "aligned", "keypoints": 4},  # more of them share its coarse cells
    "TransforMatcher": {"lr": 1e-3, "steps": 100, "keypoints": 3},  # read from fewer cells than in training
    "GeoAware": {"lr": 1e-3, "grid": 32, "dropout": 0.0, "noise": 0.0},  # which reads whole cells in training
    "MirrorGuided": {"lr": 1e-3, "steps": 50, "stride": 8, "keypoints": 6},  # more of them share its cells
    "MirrorGuided, no layers": {"lr": 1e-3, "steps": 50, "stride": 8, "keypoints": 6},
    "Baseline": {"lr": 1e-3, "steps": 200, "stride": 4},
}
"""Transformers from nothing want smaller steps. A keypoint is read from four cells. With a stride of 4 pixels the
Baseline's loss supervises all of them; with 8 it supervises one, and rounding decides what the others learn."""


def build(head, **options):
    return small.build(head, **OPTIONS.get(head, {}) | options)


def batch(size=64, count=2):
    dataset = corrzoo.create_dataset("synthetic", "", "test", size=size)
    return PairDataset.collate([dataset[i] for i in range(count)])


def step(model, pair):
    loss = model.loss(model(pair.src_img, pair.trg_img), pair)
    return loss["loss"] if isinstance(loss, dict) else loss


@pytest.mark.parametrize("backbone", [VIT, CNN])
@pytest.mark.parametrize("head", CASES)
def test_a_step_reaches_every_parameter_that_trains(head, backbone):
    model, pair = build(head, backbone=backbone), batch()
    with torch.no_grad():
        for p in model.parameters():  # nothing stands at an initial zero that blocks the gradient of something else
            p += 0.02 * torch.randn_like(p).abs()  # nor falls a temperature below its bound
    step(model, pair).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without


@pytest.mark.parametrize("size", [(64, 96), (80, 48)])
@pytest.mark.parametrize("head", CASES)
def test_sizes_that_are_not_square(head, size):
    model, pair = build(head).eval(), batch(size, count=1)
    match = model(pair.src_img, pair.trg_img)
    assert match.flow.shape[:2] == (1, 2) and torch.isfinite(match.flow).all()
    assert predict_points(model, pair).shape == pair.trg_kps.shape


@pytest.mark.parametrize("head", CASES)
def test_a_size_that_the_patch_does_not_divide_is_refused(head):
    with pytest.raises(ZooError, match="16"):
        build(head)(torch.zeros(1, 3, 70, 70), torch.zeros(1, 3, 70, 70))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", CASES)
def test_half_precision_trains(head, dtype):
    model, pair = build(head), batch(count=2 if dtype == torch.bfloat16 else 1)  # no CPU is made for float16
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.param_groups(), eps=1e-12)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=dtype == torch.float16)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = step(model, pair)
        assert torch.isfinite(loss) and loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        scaler.step(optimizer)
        scaler.update()
    learnt = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learnt and not [name for name in learnt if torch.equal(before[name], model.get_parameter(name))]


@pytest.mark.parametrize("head", CASES)
def test_a_float64_model_matches_in_float64(head):
    images = torch.randn(2, 1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert build(head).double().eval()(*images).flow.dtype == torch.float64


@pytest.mark.parametrize("head", [head for head in CASES if head != "NCNet"])  # whose loss runs its network
def test_autocast_does_not_change_the_loss_of_a_match(head):
    model, pair = build(head).eval(), batch()
    match = model(pair.src_img, pair.trg_img)
    exact = model.loss(match, pair)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.loss(match, pair), exact, rtol=0, atol=0)


@pytest.mark.parametrize("head", SUPERVISED)
def test_one_pair_is_overfitted(head):
    options = {"lr": 3e-3, "steps": 150, "keypoints": 9} | OVERFIT.get(head, {})
    lr, steps, keypoints = (options.pop(name) for name in ("lr", "steps", "keypoints"))
    model, pair = build(head, backbone=CNN, levels=[1, 2], **options), batch(size=128, count=1)
    pair = pair._replace(kps_mask=pair.kps_mask & (torch.arange(pair.kps_mask.shape[1]) < keypoints))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    metric = corrzoo.PCK("default:bbox", alphas=(0.1,))
    for _ in range(steps):
        optimizer.zero_grad()
        step(model, pair).backward()
        optimizer.step()
    metric.update(predict_points(model.eval(), pair), pair)
    assert metric.compute()["pck@0.1"] == 100


@pytest.mark.parametrize("head", SUPERVISED)
def test_a_pair_without_keypoints_contributes_nothing(head):
    model, pair = build(head).eval(), batch(count=2)
    none = pair._replace(kps_mask=pair.kps_mask & torch.tensor([[True], [False]]))
    one = type(pair)(*(field[:1] for field in pair))
    torch.testing.assert_close(step(model, none), step(model, one))
    empty = pair._replace(kps_mask=torch.zeros_like(pair.kps_mask))
    loss = step(model, empty)
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("head", SUPERVISED)
def test_training_pairs_without_keypoints_are_an_error(head):
    model, pair = build(head), batch(count=1)
    none = {name: getattr(pair, name)[:, :0] for name in ("src_kps", "trg_kps", "kps_mask", "kps_ids", "mirror_ids")}
    with pytest.raises(ZooError, match="no keypoints, which the loss needs"):
        step(model, pair._replace(**none))


ABLATIONS = {
    f"{path.parent.name} {path.stem}": (path.parent.name, yaml.safe_load(path.read_text()).get("model", {}))
    for path in sorted((Path(corrzoo.__file__).parent / "zoo_configs").glob("ablation/*/*.yaml"))
}
SIZES = set("backbone levels finetune backbone_size alphas lr backbone_lr weight_decay optimizer schedule".split())
SIZES |= set("kernel_sizes channels windows grid stride width depth layers relocalization".split())


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_parameter_of_an_ablation_gets_a_gradient(name):
    """Distributed training waits for them all."""
    stem, config = ABLATIONS[name]
    head = next(head for head in corrzoo.list_heads() if head.lower() == stem)
    options = {k: v for k, v in config.get("init_args", {}).items() if k not in SIZES}
    model = build(head, **options).train()
    step(model, batch()).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("head", CASES)
def test_pixels_and_normalised_images_are_the_same_to_forward(head):
    model, pair = build(head).eval(), batch(count=1)
    normalised = (model.backbone.normalise(i) for i in (pair.src_img, pair.trg_img))
    torch.testing.assert_close(model(pair.src_img, pair.trg_img).flow, model(*normalised).flow)


def test_an_unknown_head_or_option_names_the_nearest():
    with pytest.raises(ZooError, match="did you mean 'Baseline'"):
        corrzoo.create_matcher("Basline")
    with pytest.raises(ZooError, match="did you mean 'stride'"):
        corrzoo.create_matcher("Baseline", backbone=VIT, weights="random", strid=4)
    with pytest.raises(ZooError, match="did you mean 'kernel'"):
        corrzoo.create_matcher("Baseline", "timm/test_vit", "random", readout="kernle")
    with pytest.raises(ZooError, match="expected one of all, none"):
        corrzoo.create_matcher("Baseline", "timm/test_vit", "random", finetune="last")
    with pytest.raises(ZooError, match="dinov2_b14"):
        corrzoo.create_matcher("Baseline", backbone="dinov2_b")
