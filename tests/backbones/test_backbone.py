"""The Backbone module on timm's tiny models (0.3 M parameters), and on iBOT-B against the authors' golden values."""

import copy
import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import corrzoo.backbones as backbones
from corrzoo.backbones import Backbone, create_backbone, list_backbones
from corrzoo.types import Features, ZooError
from hostless import hostless

VIT, RESNET, EFFNET = "timm/test_vit.r160_in1k", "timm/test_resnet.r160_in1k", "timm/test_efficientnet.r160_in1k"
TINY = [VIT, RESNET, EFFNET, "timm/test_vit3.r160_in1k", "timm/test_convnext.r160_in1k"]


def tiny(name: str = VIT, **options) -> Backbone:
    torch.manual_seed(0)
    return create_backbone(name, weights="random", **options)


class TestRegistry:
    def test_every_key_is_registered(self):
        dino = {f"dinov2_{s}14{reg}" for s in "sbl" for reg in ("", "_reg")} | {f"dinov3_{s}16" for s in "sbl"}
        vits = {"ibot_b16", "ibot22k_b16", "mae_b16", "clip_b16", "siglip_b16"}
        cnns = {f"resnet{n}" for n in (18, 50, 101)} | {f"efficientnet_lite{n}" for n in range(3)}
        assert set(list_backbones()) == dino | vits | cnns

    @pytest.mark.parametrize(("key", "count"), [("dinov2_b14", 86_579_712), ("ibot_b16", 85_798_656)])
    def test_parameter_counts_equal_the_papers(self, key, count):
        with torch.device("meta"):
            assert Backbone(key).num_params == count

    def test_statistics(self):
        assert backbones.get_spec("ibot_b16").mean == (0.485, 0.456, 0.406)  # timm's card of that name says 0.5
        assert backbones.get_spec("clip_b16").std[0] == pytest.approx(0.2686, abs=1e-4)
        assert backbones.get_spec("efficientnet_lite1").mean == (127 / 255,) * 3

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("dinov2_b", "did you mean 'dinov2_b14"),
            ("timm/resnet_18", "did you mean 'resnet18'"),
            ("timm/resnet18.tv_in2k", "resnet18.tv_in1k"),
            ("timm/swin_tiny_patch4_window7_224", "neither a plain ViT nor a CNN"),
            ("timm/eva02_tiny_patch14_224.mim_in22k", "fc_norm"),
        ],
    )
    def test_unknown_or_unfit_name(self, name, hint):
        with pytest.raises(ZooError, match=hint) as error:
            Backbone(name, weights="random")
        assert "\n" not in str(error.value)


class TestForward:
    @pytest.mark.parametrize("name", TINY)
    def test_shapes_and_gradients(self, name):
        backbone = tiny(name)
        image = torch.randn(2, 3, 96, 160)
        out = backbone(image)
        assert isinstance(out, Features)
        assert out.image is image
        (stride,), (channels,) = backbone.strides, backbone.channels
        assert out.maps[0].shape == (2, channels, 96 // stride, 160 // stride)
        out.maps[0].square().sum().backward()
        missing = [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
        assert any(p.grad.abs().sum() > 0 for p in backbone.parameters() if p.grad is not None)

    @pytest.mark.parametrize("name", [VIT, RESNET])
    def test_bf16_autocast(self, name):
        backbone = tiny(name)
        image = torch.randn(1, 3, 64, 96)
        with torch.autocast("cpu", torch.bfloat16):
            out = backbone(image).maps[0]
        out.float().sum().backward()
        torch.testing.assert_close(out.float(), backbone(image).maps[0], atol=0.15, rtol=0.1)

    def test_odd_size_of_a_cnn(self):
        assert tiny(RESNET, levels=[2, -1])(torch.randn(1, 3, 75, 101)).maps[0].shape[2:] == (10, 13)

    def test_uint8_is_normalised_and_float_is_not(self):
        backbone = tiny("efficientnet_lite0", levels=[0])
        image = torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8)
        out = backbone(image)
        torch.testing.assert_close(out.image, (image.float() - 127) / 128)
        torch.testing.assert_close(backbone(out.image).maps[0], out.maps[0])

    def test_class_token(self):
        image = torch.randn(1, 3, 160, 160)
        backbone = tiny(VIT)
        tokens = backbone.trunk.model.forward_features(image)  # timm's own pass at its own size
        out = backbone(image)
        torch.testing.assert_close(out.cls, tokens[:, 0])
        torch.testing.assert_close(out.maps[0].flatten(2).transpose(1, 2), tokens[:, 1:])
        assert tiny(RESNET)(image).cls is None

    @pytest.mark.parametrize(
        ("name", "options"),
        [(VIT, {"pos_interp": "official"}), (VIT, {"finetune": "none"}), (RESNET, {"levels": ["layer2.0:pre", 2]})],
    )
    def test_compiles_without_graph_breaks(self, name, options):
        """At the first size and at others, as PyTorch makes the size symbolic the second time."""
        torch._dynamo.reset()
        backbone = tiny(name, **options)
        compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
        for size in [(64, 96), (96, 96)]:
            image = torch.randn(1, 3, *size)
            for ours, plain in zip(compiled(image).maps, backbone(image).maps, strict=True):
                torch.testing.assert_close(ours, plain)

    @pytest.mark.parametrize("name", [VIT, "timm/test_vit3.r160_in1k"])
    def test_a_vits_maps_are_views_of_its_tokens(self, name):
        """Channels-last by strides, so that neither resizing nor flattening copies them."""
        backbone, seen = tiny(name, levels=[1, -1]), []
        backbone.trunk.model.norm.register_forward_hook(lambda module, args, out: seen.append(out))
        for map_, tokens in zip(backbone(torch.randn(2, 3, 64, 96)).maps, seen, strict=True):
            assert map_.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
            assert map_.stride()[1:] == (1, 6 * map_.shape[1], map_.shape[1])
            rows = map_.flatten(2).mT
            assert torch.equal(rows, tokens[:, -24:]) and rows.data_ptr() == map_.data_ptr()

    @pytest.mark.parametrize("name", TINY)
    def test_no_host_device_synchronisation(self, name):
        for options in ({}, {"finetune": "none"}):
            backbone, image = tiny(name, **options), torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
            with hostless():
                maps = backbone(image).maps
                if not options:
                    maps[0].square().sum().backward()
                backbone.eval()
                with torch.no_grad():
                    backbone(image)

    @pytest.mark.parametrize("size", [(64, 65), (100, 64), (24, 16)])
    def test_size_that_the_patch_does_not_divide(self, size):
        with pytest.raises(ZooError, match=rf"patch of 16, got {size[0]}x{size[1]}.*nearest are .*backbone_size=True"):
            tiny()(torch.randn(1, 3, *size))

    def test_nearest_sizes_are_named(self):
        with pytest.raises(ZooError, match="the nearest are 96x64 and 112x64"):
            tiny()(torch.randn(1, 3, 100, 64))

    def test_cnn_needs_one_cell(self):
        with pytest.raises(ZooError, match="at least 32 pixels, got 31x64"):
            tiny(RESNET)(torch.randn(1, 3, 31, 64))

    def test_resize_to_the_nearest_multiple(self):
        out = tiny(backbone_size=True)(torch.randn(1, 3, 100, 9))
        assert out.image.shape[2:] == (100, 9)
        assert out.maps[0].shape[2:] == (6, 1)

    def test_resize_to_a_side(self):
        image = torch.randn(1, 3, 128, 96)
        small = F.interpolate(image, (64, 64), mode="bilinear", align_corners=False)
        out = tiny(backbone_size=64)(image)
        assert out.image is image
        assert torch.equal(out.maps[0], tiny()(small).maps[0])
        with pytest.raises(ZooError, match="backbone_size=65 is no multiple"):
            tiny(backbone_size=65)


class TestLevels:
    def test_tokens_before_the_class_token_is_added_are_a_level(self):
        backbone, image = tiny(levels=["patch_embed"]), torch.randn(2, 3, 64, 96)
        embedded = backbone.trunk.model.patch_embed(image)  # (B, h*w, C)
        assert torch.equal(backbone(image).maps[0].flatten(2).mT, embedded)

    def test_order_and_negative_numbers(self):
        image = torch.randn(1, 3, 64, 64)
        out = tiny(levels=[-1, 2, 0])(image).maps
        for level, map_ in zip([5, 2, 0], out, strict=True):
            assert torch.equal(map_, tiny(levels=[level])(image).maps[0])

    def test_final_norm_on_every_level(self):
        backbone = tiny(levels=[1])
        x = backbone.trunk.model
        image = torch.randn(1, 3, 160, 160)
        tokens = x.norm_pre(x.patch_drop(x._pos_embed(x.patch_embed(image))))
        tokens = x.norm(x.blocks[1](x.blocks[0](tokens)))
        torch.testing.assert_close(backbone(image).maps[0].flatten(2).transpose(1, 2), tokens[:, 1:])

    def test_hyperpixels_are_the_modules_outputs(self):
        names = ["layer3.0", "layer2.0.bn2"]  # the residual sum and the ReLU behind bn2 write in place
        backbone = tiny(RESNET, levels=[*names, 1])
        seen = {}
        for name in names:
            module = backbone.trunk.model.get_submodule(name)
            module.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out.clone()}))
        out = backbone(torch.randn(1, 3, 96, 64))
        assert torch.equal(out.maps[0], seen["layer3.0"])
        assert torch.equal(out.maps[1], seen["layer2.0.bn2"])
        assert backbone.strides == [16, 8, 4]
        assert [m.shape[1] for m in out.maps] == backbone.channels
        assert [96 // m.shape[2] for m in out.maps] == backbone.strides

    def test_nothing_after_the_deepest_level_is_computed(self):
        backbone = tiny(RESNET, levels=["layer2.0", 1])
        called = []
        backbone.trunk.model.layer3.register_forward_hook(lambda *_: called.append(True))
        backbone(torch.randn(1, 3, 64, 64))
        assert called == []
        assert not any(p.requires_grad for p in backbone.trunk.model.layer3.parameters())
        assert all(p.requires_grad for p in backbone.trunk.model.layer2.parameters())

    @pytest.mark.parametrize(
        ("name", "block", "count"), [(RESNET, "layer2.0", 2), (RESNET, "layer3.0", 3), ("timm/regnetx_002", "s3.b1", 0)]
    )
    def test_the_level_before_the_last_relu_is_the_residual_sum(self, name, block, count):
        backbone, seen = tiny(name, levels=[f"{block}:pre", block]).eval(), {}
        module = backbone.trunk.model.get_submodule(block)
        module.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].clone()))
        before, after = backbone(torch.randn(1, 3, 64, 96)).maps
        assert (before < 0).any() and torch.equal(before.relu(), after)
        if count:
            x = shortcut = seen["x"]
            for i in range(1, count + 1):
                x = getattr(module, f"bn{i}")(getattr(module, f"conv{i}")(x.relu() if i > 1 else x))
            torch.testing.assert_close(before, x + module.downsample(shortcut))

    def test_the_level_before_the_last_relu_trains_its_block(self):
        backbone = tiny(RESNET, levels=["layer2.0:pre"])
        assert all(p.requires_grad for p in backbone.trunk.model.layer2.parameters())
        assert not any(p.requires_grad for p in backbone.trunk.model.layer3.parameters())
        backbone(torch.randn(1, 3, 64, 64)).maps[0].square().sum().backward()
        assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)

    def test_a_copy_reads_its_own_features(self):
        backbone = tiny(RESNET, levels=["layer2.0:pre"])
        other = copy.deepcopy(backbone)
        with torch.no_grad():
            other.trunk.model.conv1[0].weight.mul_(-2)
        image = torch.randn(1, 3, 64, 64)
        assert not torch.equal(other(image).maps[0], backbone(image).maps[0])

    @pytest.mark.parametrize(
        ("name", "level", "message"),
        [
            (VIT, 6, "level 6 of .*expected -6 to 5"),
            (RESNET, -6, "level -6"),
            (RESNET, "layer3.9", "no module 'layer3.9'.*did you mean 'layer3"),
            (RESNET, "layer3.9:pre", "no module 'layer3.9'.*did you mean 'layer3"),
            (RESNET, "layer3:pre", "level 'layer3:pre' .*no ReLU"),
            (EFFNET, "blocks.2.0:pre", "no ReLU"),
            (RESNET, "global_pool", "gives no .*map"),
            (VIT, "head", "gives no .*map"),
            (VIT, "blocks.3.attn.q_norm", "gives no .*map"),
            (RESNET, "layer3.0:present", "no module 'layer3.0:present'"),
        ],
    )
    def test_unknown_levels_are_errors(self, name, level, message):
        with pytest.raises(ZooError, match=message):
            tiny(name, levels=[level])


class TestFinetune:
    def trained(self, backbone: Backbone) -> set[str]:
        return {name for name, p in backbone.trunk.model.named_parameters() if p.requires_grad}

    def test_none_freezes_the_backbone_in_eval_mode(self):
        backbone = tiny(finetune="none").train()
        assert self.trained(backbone) == set()
        assert not any(module.training for module in backbone.trunk.modules())
        assert not backbone(torch.randn(1, 3, 32, 32)).maps[0].requires_grad

    def test_last_blocks_and_final_norm(self):
        names = self.trained(tiny(finetune=2))
        assert {name.split(".")[0] for name in names} == {"blocks", "norm"}
        assert {name.split(".")[1] for name in names if name.startswith("blocks")} == {"4", "5"}

    def test_blocks_are_counted_from_the_deepest_level(self):
        names = self.trained(tiny(finetune=1, levels=[2]))
        assert {name.split(".")[1] for name in names if name.startswith("blocks")} == {"2"}

    def test_all(self):
        assert self.trained(tiny()) == {name for name, _ in tiny().trunk.model.named_parameters()}

    def test_batch_norm_keeps_its_statistics(self):
        backbone = tiny(RESNET).train()
        before = {key: value.clone() for key, value in backbone.trunk.model.named_buffers()}
        backbone(torch.randn(2, 3, 64, 64))
        assert all(torch.equal(before[key], value) for key, value in backbone.trunk.model.named_buffers())
        assert any("bn" in name for name in self.trained(backbone))

    @pytest.mark.parametrize(
        ("name", "finetune", "message"),
        [
            (VIT, 7, "finetune 7 .*all, none, or its last 1 to 6 blocks"),
            (VIT, 0, "finetune 0 .*1 to 6"),
            (VIT, "last", "finetune 'last' .*expected all, none"),
            (EFFNET, 2, "no transformer blocks"),
        ],
    )
    def test_invalid_values_are_errors(self, name, finetune, message):
        with pytest.raises(ZooError, match=message):
            tiny(name, finetune=finetune)


class TestPending:
    def test_forward_without_loaded_weights_is_an_error(self):
        backbone = Backbone("timm/test_vit")
        with pytest.raises(ZooError, match=r"weights 'pretrained' of timm/test_vit are not loaded: call load\(\)"):
            backbone(torch.randn(1, 3, 32, 32))

    def test_a_checkpoint_contains_the_weights(self):
        backbone = Backbone("timm/test_vit")
        outer = torch.nn.ModuleDict({"backbone": backbone})
        assert backbone.pending
        outer.load_state_dict({}, strict=False)
        assert backbone.pending
        outer.load_state_dict(torch.nn.ModuleDict({"backbone": tiny()}).state_dict())
        assert not backbone.pending
        image = torch.randn(1, 3, 32, 32)
        assert torch.equal(backbone(image).maps[0], tiny()(image).maps[0])
        assert backbone.load() is backbone  # and nothing is fetched over them

    def test_state_dict_holds_timm_keys_only(self):
        ours, theirs = tiny().state_dict(), tiny().trunk.model.state_dict()
        assert list(ours) == [f"trunk.model.{key}" for key in theirs]


def test_ibot_reproduces_the_authors_tokens(shared):
    """The released ACTR's backbone on 512 -> 256 px: position embedding, LayerNorm eps, resize and class token."""
    spec = importlib.util.spec_from_file_location("closed_form", shared / "golden" / "closed_form.py")
    closed_form = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(closed_form)
    golden = np.load(shared / "golden" / "actr_f32.npz")
    backbone = create_backbone("ibot_b16", weights="random", finetune="none", backbone_size=256)
    state = backbone.trunk.model.state_dict()
    filled = {key: closed_form.value(f"feature_extraction.backbone.{key}", v.shape) for key, v in state.items()}
    backbone.trunk.model.load_state_dict(filled)
    src, _, noise = closed_form.images(20240601)
    np.testing.assert_array_equal(noise, golden["img_noise8"])

    out = backbone(src[:1])
    tokens = torch.cat([out.cls.unsqueeze(1), out.maps[0].flatten(2).transpose(1, 2)], dim=1)
    # Float32 differs by 4e-6, LayerNorm eps 1e-5 by 1e-4, an embedding resized by size instead of scale by 0.3.
    torch.testing.assert_close(tokens[:, ::8, ::4], torch.from_numpy(golden["bb_tokens_src"][:1]), atol=2e-5, rtol=0)


def test_a_block_by_name_is_a_level_without_the_final_norm():
    """GeoAware reads such a level; the norm is then not reached, and does not train."""
    image = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    plain = Backbone(VIT, "random", levels=["blocks.3"]).eval()
    with torch.no_grad():
        plain.trunk.model.norm.weight.add_(torch.randn(64, generator=torch.Generator().manual_seed(1)))
    normed = Backbone(VIT, "random", levels=[3, "blocks.1"]).eval()
    normed.load_state_dict(plain.state_dict())
    (level,), (expected, earlier) = plain(image).maps, normed(image).maps
    assert level.shape == (2, 64, 3, 4) and plain.channels == [64] and plain.strides == [16]
    assert plain.trunk.stop == 3 and not torch.allclose(level, earlier)
    torch.testing.assert_close(normed.trunk.model.norm(level.movedim(1, -1)).movedim(-1, 1), expected)
    trained = {key for key, p in plain.trunk.named_parameters() if p.requires_grad}
    assert "model.norm.weight" not in trained and "model.blocks.3.norm1.weight" in trained
    assert not any(key.startswith("model.blocks.4.") for key in trained)
    last = Backbone(VIT, "random", levels=["blocks.3"], finetune=1)
    assert all(key.startswith("model.blocks.3.") for key, p in last.trunk.named_parameters() if p.requires_grad)
