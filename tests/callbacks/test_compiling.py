"""`compile: true` changes how a head is computed, not what: the same step of training, and the same matches."""

import shutil

import pytest
import torch
from lightning.pytorch import Trainer

import corrzoo
from corrzoo.callbacks import compiling
from corrzoo.data.module import PairsDataModule

VIT = "timm/test_vit.r160_in1k"
SMALL = {
    "ViTSC": {"head_resolution": 0.125, "low_stages": 1},
    "ACTR": {"grid": 4, "depth": 1},
    "LPMFlow": {"grid": 4, "depth": 1},
    "GSF": {"grid": 8, "stage1": 0.0},
}
BACKEND = "inductor" if shutil.which("gcc") else "aot_eager"


def run(tmp_path, head, compiled):
    """The matcher after two steps, and its matches in original pixels."""
    torch.manual_seed(0)
    model = corrzoo.create_matcher(
        head, backbone=VIT, weights="random", backbone_lr=1e-3, lr=1e-3, compile=compiled, **SMALL.get(head, {})
    )
    data = PairsDataModule(
        "synthetic", test=["synthetic"], image_size=64, batch_size=2, num_workers=0, packed=False,
        options={"synthetic": {"length": {"trn": 4, "val": 2, "test": 2}}},
    )  # fmt: skip
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=1, logger=False, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, data)
    return model, torch.cat([batch["points"] for batch in trainer.predict(model, data)])


@pytest.mark.parametrize("head", corrzoo.list_heads())
def test_a_compiled_head_trains_and_scores_as_it_does_otherwise(tmp_path, monkeypatch, head):
    plain, points = run(tmp_path, head, False)
    calls = []
    backend = BACKEND if head == "Baseline" else "aot_eager"  # inductor takes minutes for the larger heads

    def compile_and_count(method, **options):
        calls.append(method.__name__)
        return torch_compile(method, **{"backend": backend} | options)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_and_count)
    compiled, same = run(tmp_path, head, True)
    assert calls == 2 * ["_call_impl", *compiling.PARTS]  # the backbone and the head, for training and prediction
    torch.testing.assert_close(same, points, rtol=0, atol=0.05)  # pixels
    for (name, a), b in zip(plain.state_dict().items(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
