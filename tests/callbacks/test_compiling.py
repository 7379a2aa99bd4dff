"""`compile: true` changes how a model is computed, not what."""

import copy
import shutil

import pytest
import torch
import torch._dynamo
from lightning.pytorch import Trainer

import corrzoo
from corrzoo.callbacks.compiling import compile_matcher
from corrzoo.data import PairDataset
from corrzoo.data.module import PairsDataModule
from small import CASES, VIT, build

OPTIONS = {
    "ACTR": {"grid": 4, "depth": 1, "windows": [4]},
    "LPMFlow": {"depth": 1, "windows": [4], "flows": ["22"]},
    "GSF": {"grid": 8},
}
BACKENDS = dict.fromkeys(CASES, "aot_eager")
"""`aot_eager` traces forward and backward. `inductor` takes minutes for a head of many layers."""
if shutil.which("g++"):
    BACKENDS["Baseline"] = "inductor"


@pytest.fixture
def compiled(monkeypatch):
    """Settings of torch.compile: `backend` replaces inductor. `calls` are its methods and options."""
    original, settings = torch.compile, {"backend": "eager", "calls": []}

    def replaced(method, **options):
        settings["calls"].append((method.__name__, options))
        return original(method, backend=settings["backend"])

    monkeypatch.setattr(torch, "compile", replaced)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield settings
    torch._dynamo.reset()


@pytest.mark.parametrize("head", BACKENDS)
def test_a_compiled_head_has_the_same_flow_gradients_and_matches(head, compiled):
    # With seed 0, some of TransforMatcher's scores are equal, and rounding decides which is the best. In float32 it
    # also decides between scores that are nearly equal, and some gradients of LPMFlow differ by 2 %.
    plain = build(head, seed=1, **OPTIONS.get(head, {})).double()
    dataset = corrzoo.create_dataset("synthetic", "", "test", 64)
    pair = PairDataset.collate([dataset[i] for i in range(2)])
    with torch.no_grad():
        features = plain.backbone(plain.backbone.normalise(torch.cat([pair.src_img, pair.trg_img])).double())

    def trained(model):
        torch.manual_seed(0)  # of dropout and of replaced tokens
        match = model.train().match(*model.prepare(features).halves())
        terms = model.loss(match, pair)
        (terms["loss"] if isinstance(terms, dict) else terms).backward()
        return match.flow.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def matched(model):
        with torch.no_grad():
            return model.eval().match_points(*model.prepare(features).halves(), pair.src_kps)

    other = copy.deepcopy(plain)
    compiled["backend"] = BACKENDS[head]
    compile_matcher(other)
    (flow, gradients), (same_flow, same_gradients) = trained(plain), trained(other)
    assert flow.dtype == torch.float64
    torch.testing.assert_close(same_flow, flow, rtol=0, atol=1e-9)  # network pixels
    assert same_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(same_gradients[name], gradient, rtol=0, atol=1e-9 * largest + 1e-12, msg=name)
    if BACKENDS[head] != "inductor":
        compiled["backend"] = "eager"  # the gradient has been compared, and tracing is what takes time
        compile_matcher(other)
    torch.testing.assert_close(matched(other), matched(plain), rtol=0, atol=1e-9)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 2 and not counters["graph_break"]


def run(tmp_path, compile):
    """The Baseline after two training steps, and its matches in original pixels."""
    torch.manual_seed(0)
    model = corrzoo.create_matcher("Baseline", backbone=VIT, weights="random", backbone_lr=1e-3, compile=compile)
    data = PairsDataModule(
        "synthetic", test=["synthetic"], image_size=64, batch_size=2, num_workers=0, packed=False,
        options={"synthetic": {"length": {"trn": 4, "val": 2, "test": 2}}},
    )  # fmt: skip
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=1, logger=False, accelerator="cpu", enable_checkpointing=False,
        precision="64-true", enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, data)
    return model, torch.cat([batch["points"] for batch in trainer.predict(model, data)])


def test_the_option_compiles_training_and_evaluation(tmp_path, compiled):
    plain, points = run(tmp_path, compile=False)
    assert not compiled["calls"]  # off by default
    other, same = run(tmp_path, compile=True)
    names = ["_call_impl", "prepare", "match", "match_points"]  # the first is the backbone's
    assert compiled["calls"] == 2 * [(name, {}) for name in names]
    torch.testing.assert_close(same, points, rtol=0, atol=1e-5)  # pixels
    weights = plain.state_dict()
    assert weights.keys() == other.state_dict().keys()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-9, msg=name)


def test_evaluation_on_a_gpu_runs_as_cuda_graphs(compiled):
    model = corrzoo.create_matcher("Baseline", backbone=VIT, weights="random")
    compile_matcher(model, graphs=True)
    graphs = {"mode": "reduce-overhead"}
    assert compiled["calls"] == [("_call_impl", {}), ("prepare", {}), ("match", graphs), ("match_points", graphs)]
