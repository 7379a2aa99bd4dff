"""Released checkpoints load completely, and files that do not fit are refused."""

import argparse
import math
import re

import numpy as np
import pytest
import torch
import yaml

import corrzoo
from corrzoo.recipes import FOLDER
from corrzoo.store.official import LAYOUTS, _state_of, official_key
from corrzoo.types import ZooError

PUBLISHED = {
    "actr": (172_810_369, 28_564_481),
    "lpmflow": (179_136_194, 2_969_088),
    "cats": (49_173_320, 2_049_768),
    "transformatcher": (87_885_413, 45_359_160),
}
"""Parameters of the released models, and those among them that ours does without."""
# The files of NCNet and GeoAware lack a part of our models: tests/heads/test_ncnet.py and test_geoaware.py.
BUFFERS = r".*\.(running_mean|running_var|freqs)"


@pytest.fixture(scope="module", params=sorted(PUBLISHED))
def released(request, golden):
    """Name of a released model, a state dict in which every tensor has its own constant, and our model of it."""
    name = request.param
    state = {
        key: torch.full([], float(i)).expand(shape) if kind == "float32" else torch.zeros(shape, dtype=torch.int64)
        for i, (key, shape, kind) in enumerate(golden.manifest(name))
    }
    return name, state, corrzoo.load_official(name, state)


def test_every_parameter_is_loaded_or_known_to_be_unused(golden, released):
    name, _, model = released
    state = {key: torch.zeros([]).expand(shape) for key, shape, kind in golden.manifest(name) if kind == "float32"}
    state = LAYOUTS[name].convert({key: value for key, value in state.items() if not re.fullmatch(BUFFERS, key)})
    sizes = {key: math.prod(value.shape) for key, value in state.items()}
    unused = sum(size for key, size in sizes.items() if re.fullmatch(LAYOUTS[name].unused, key))
    ours = sum(p.numel() for p in model.parameters())
    assert (sum(sizes.values()), unused) == PUBLISHED[name]
    assert ours == sum(sizes.values()) - unused
    assert all(f"{count:,}" in type(model).__doc__ for count in (ours, *PUBLISHED[name]))


def test_every_key_maps_to_its_weight(released):
    name, state, model = released
    converted = LAYOUTS[name].convert(state)
    for key, value in model.state_dict().items():
        theirs = converted[official_key(key, LAYOUTS[name].names)]
        assert value.shape == theirs.shape and (value == theirs.flatten()[0]).all(), key
    assert not model.training


def test_the_training_dictionary_loads_from_memory_and_file(released, tmp_path):
    """The authors' dictionary has more than weights: an epoch, a NumPy score, a pickled Namespace."""
    name, state, model = released
    path = tmp_path / "model_best.pth"
    content = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}
    torch.save(content | {"best_loss": np.float64(0.62), "args": argparse.Namespace(depth=6)}, path)
    (tmp_path / "args.pkl").write_bytes(b"never opened")
    again = corrzoo.load_official(name, path)
    for (key, ours), value in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, value), key


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_the_image_size_is_the_recipes(name):
    assert LAYOUTS[name].image_size == yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["data"]["image_size"]


def test_a_released_model_is_trained_and_has_its_image_size(released):
    name, _, model = released
    size = LAYOUTS[name].image_size
    assert model.image_size == size and model.trained == {"dataset": None, "size": size, "source": "state dict"}


def test_a_released_file_stays_trained_when_saved(tmp_path):
    small = dict(backbone="timm/test_vit.r160_in1k", weights="random", levels=[-1])
    torch.save(official_state_of(corrzoo.heads.GeoAware(**small)), tmp_path / "best_856.PTH")
    model = corrzoo.load_official("geoaware", tmp_path / "best_856.PTH", **small)
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(content)
    torch.save(content, tmp_path / "a.ckpt")
    for again in (corrzoo.load(corrzoo.save(model, tmp_path / "saved")), corrzoo.load(tmp_path / "a.ckpt")):
        assert again.image_size == 840 and again.trained == model.trained
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "an unnamed dataset (size 840, source best_856.PTH)" in card
    assert "None" not in card.partition("## Options")[0]


def official_state_of(model):
    """The weights of our model under the authors' names."""
    layout = LAYOUTS["geoaware"]
    ours = {key: value for key, value in model.state_dict().items() if not re.fullmatch(layout.absent, key)}
    return {official_key(key, layout.names): value for key, value in ours.items()}


def test_keys_that_do_not_fit_are_named(released):
    name, state, _ = released
    for other in set(LAYOUTS) - {name}:
        refused(other, state, "missing")
    lost, changed = [key for key in state if key.endswith(("proj.weight", "to_out.weight"))][:2]
    damaged = {key: value for key, value in state.items() if key != lost} | {changed: torch.zeros(3)}
    told = f"1 missing ({lost}); 1 unexpected (stranger); 1 of another shape ({changed})"
    refused(name, damaged | {"stranger": torch.zeros(1)}, re.escape(told))


def refused(name, state, match):
    with pytest.raises(ZooError, match=match) as error:
        corrzoo.load_official(name, state)
    assert "\n" not in str(error.value)


def test_as_tested_loads_like_the_released_test_script(released):
    """There, embeddings of LPMFlow share memory, and the one loaded last remains (in the manifest's order)."""
    name, state, _ = released
    if name != "lpmflow":
        with pytest.raises(ZooError, match="expected 'lpmflow'"):
            corrzoo.load_official(name, state, as_tested=True)
        return
    encoder = corrzoo.load_official(name, state, as_tested=True).encoder
    assert (encoder.pos_embed_trg == state["encoder.pos_embed_src"][0, 0, 0]).all()
    assert (encoder.pos_embed_src == state["encoder.pos_embed_src"][0, 0, 0]).all()
    assert (encoder.cls_embed_src == state["encoder.cls_pos_embed_trg"][0, 0, 0]).all()
    assert list(state).index("encoder.pos_embed_trg") < list(state).index("encoder.pos_embed_src")


def test_unknown_names_missing_files_and_unsafe_files_raise(tmp_path):
    with pytest.raises(ZooError, match="did you mean 'lpmflow'"):
        corrzoo.load_official("lpm", {})
    with pytest.raises(ZooError, match="no checkpoint at"):
        corrzoo.load_official("actr", tmp_path / "absent.pth")
    refused("transformatcher", {"backbone.cls_token": torch.zeros(1, 1, 8), "source.weight": torch.zeros(1)}, "missing")
    assert _state_of({1: torch.zeros(1), "module.a": torch.ones(1)}) == {"a": torch.ones(1)}
    torch.save({"state_dict": tmp_path}, tmp_path / "odd.pth")
    with pytest.raises(ZooError, match="more than tensors"):
        corrzoo.load_official("actr", tmp_path / "odd.pth")
