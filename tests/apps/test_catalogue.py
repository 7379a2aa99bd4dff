"""`corrzoo list`: everything that is registered, and what of it is on this machine."""

import pytest
import timm
import torch
import yaml

from corrzoo.__main__ import main
from corrzoo.apps.catalogue import LISTS, weights_of
from corrzoo.backbones import BACKBONES, get_spec, list_backbones
from corrzoo.data import list_datasets
from corrzoo.heads import HEADS, Baseline, create_matcher, list_heads
from corrzoo.recipes import FOLDER
from corrzoo.scoring.protocols import get_protocol, list_protocols


def lines_of(capsys, *args):
    """First word and rest of each printed line after the titles."""
    main(["list", *args])
    _, *lines = capsys.readouterr().out.splitlines()
    return dict(line.split(maxsplit=1) for line in lines)


def test_names_of_everything_without_a_kind(capsys):
    main(["list"])
    text = capsys.readouterr().out
    for names in (list_heads(), list_backbones(), list_datasets(), list_protocols()):
        assert all(name in text for name in names)
    assert [line.partition(":")[0] for line in text.splitlines() if line[0] not in " `"] == list(LISTS)


def test_heads_with_the_parameters_of_their_recipes(capsys):
    found = lines_of(capsys, "heads")
    assert list(found) == list_heads()
    options = yaml.safe_load((FOLDER / "transformatcher.yaml").read_text())["model"]["init_args"]
    net = create_matcher("TransforMatcher", **options | {"weights": "random"})
    own = sum(p.numel() for name, p in net.named_parameters() if not name.startswith("backbone."))
    assert found["TransforMatcher"].split()[:3] == [f"{own:,}", "transformatcher", "resnet101"]
    assert found["Baseline"].split()[0] == "1"


def test_a_head_whose_constructor_reads_values_of_tensors_is_listed_without_its_size(capsys, monkeypatch):
    class Reading(Baseline):
        """Reads a value."""

        def __init__(self, **options):
            super().__init__(**options)
            self.rate = torch.linspace(0, 1, 3)[1].item()

    monkeypatch.setitem(HEADS._things, "Reading", Reading)
    assert lines_of(capsys, "heads")["Reading"] == "Reads a value."


def test_backbones_with_licence_and_whether_their_weights_are_here(capsys, monkeypatch, tmp_path):
    found = lines_of(capsys, "backbones")
    assert list(found) == [*list_backbones(), "timm/<name>"]
    size = sum(p.numel() for p in timm.create_model("resnet18", num_classes=0).parameters())
    assert found["resnet18"].startswith(f"{size / 1e6:.1f} M") and "bsd-3-clause" in found["resnet18"]
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert weights_of(get_spec("ibot_b16")) == "downloaded when used"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "ibot_b16.pth").touch()
    assert weights_of(get_spec("ibot_b16")) == "on this machine"


def test_datasets_with_their_folders(capsys, tmp_path):
    (tmp_path / "PF-WILLOW").mkdir()
    found = lines_of(capsys, "datasets", "--root", str(tmp_path))
    assert list(found) == list_datasets()
    assert f"in {tmp_path / 'PF-WILLOW'}" in found["pfwillow"] and "rendered" in found["synthetic"]
    assert "test  with --data.download true" in found["spair71k"] and "not found" in found["ap10k"]
    assert "images with --data.download true" in found["spair71k_u"]  # not its annotations
    assert "non-commercial" in found["cub"]


def test_protocols_and_recipes(capsys):
    found = lines_of(capsys, "protocols")
    assert list(found) == list_protocols()
    assert all(get_protocol(name).meaning in line for name, line in found.items())
    found = lines_of(capsys, "configs")
    assert len(found) == len(list(FOLDER.rglob("*.yaml"))) and all(found.values())
    assert found["zoo_configs/demo.yaml"].startswith("Stack on a head's YAML")


def test_a_plugin_is_listed_and_a_typo_is_one_line(capsys, monkeypatch, tmp_path):
    (tmp_path / "my_backbone.py").write_text(
        "from corrzoo.backbones import register_backbone\nregister_backbone('listed', 'test_resnet.r160_in1k')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(BACKBONES, "_things", dict(BACKBONES._things))  # forgotten after this test
    main(["list", "--plugins", "my_backbone"])
    assert "listed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="invalid choice: 'head'"):
        main(["list", "head"])
