import pytest
import torch

import corrzoo
from corrzoo.types import ZooError

TINY = dict(backbone="timm/test_vit.r160_in1k", weights="random")


def checkpoint(path, model):
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(content)
    torch.save(content, path)
    return path


def test_a_checkpoint_loads_as_the_same_model(tmp_path):
    model = corrzoo.create_matcher("Baseline", **TINY, stride=4, finetune=2).eval()
    loaded = corrzoo.load(checkpoint(tmp_path / "a.ckpt", model))
    assert dict(loaded.hparams) == dict(model.hparams) and not loaded.training
    images = torch.rand(2, 1, 3, 64, 64)
    torch.testing.assert_close(loaded(*images).flow, model(*images).flow)


def test_it_needs_none_of_the_original_weights(tmp_path, monkeypatch):
    """A checkpoint of a fine-tuned pretrained backbone brings its weights along."""
    model = corrzoo.create_matcher("Baseline", **TINY)
    model.hparams.weights = "pretrained"
    loaded = corrzoo.load(checkpoint(tmp_path / "a.ckpt", model))
    assert not loaded.backbone.pending


@pytest.mark.parametrize(
    "content, expected",
    [({"state_dict": {}}, "does not say which head"), ([1, 2], "holds a list"), (None, "cannot be read|refused")],
)
def test_other_files_are_refused(tmp_path, content, expected):
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"nothing of the kind") if content is None else torch.save(content, path)
    with pytest.raises(ZooError, match=expected):
        corrzoo.load(path)


def test_a_saved_folder_loads_as_the_same_model(tmp_path):
    model = corrzoo.create_matcher("Baseline", **TINY, stride=4).eval()
    loaded = corrzoo.load(corrzoo.save(model, tmp_path / "model"))
    images = torch.rand(2, 1, 3, 64, 64)
    torch.testing.assert_close(loaded(*images).flow, model(*images).flow)
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ZooError, match=r"config\.json"):
        corrzoo.load(tmp_path / "model")


def test_weights_that_do_not_fit_are_an_error(tmp_path):
    path = checkpoint(tmp_path / "a.ckpt", corrzoo.create_matcher("Baseline", **TINY))
    content = torch.load(path, weights_only=True)
    content["state_dict"].pop("temperature")
    torch.save(content, path)
    with pytest.raises(ZooError, match="do not fit Baseline"):
        corrzoo.load(path)


def test_a_missing_file_says_where_checkpoints_are(tmp_path):
    with pytest.raises(ZooError, match=r"no checkpoint at .*checkpoints/best\.ckpt"):
        corrzoo.load(tmp_path / "a.ckpt")
