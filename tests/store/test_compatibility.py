"""Checkpoints and saved folders of version 0.1.0 (commit 783f026) load and give the same flow.

`written_by_0.1.0.tar.xz` has for each head of that version a checkpoint of `Trainer.save_checkpoint` after one epoch, a
folder of `corrzoo.save`, and the flow on fixed images. The weights follow a short pattern and the optimiser state is
zero, so that the archive is small.
"""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

import corrzoo
from corrzoo.types import ZooError

ARCHIVE = Path(__file__).with_name("written_by_0.1.0.tar.xz")
HEADS = ("ACTR", "Baseline", "GSF", "LPMFlow", "ViTSC")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "written_by_783f026"


def images() -> torch.Tensor:
    """(2, 1, 3, 64, 64) uint8 images of the stored flows."""
    i = torch.arange(2 * 3 * 64 * 64)
    return ((i * 7919 + i // 977) % 256).to(torch.uint8).view(2, 1, 3, 64, 64)


@pytest.mark.parametrize("kind", ["{}.ckpt", "{}"])
@pytest.mark.parametrize("head", HEADS)
def test_an_old_model_loads_and_gives_the_same_flow(written, head, kind):
    matcher = corrzoo.load(written / kind.format(head))
    with torch.no_grad():
        flow = matcher(*images()).flow
    expected = torch.load(written / f"{head}.flow.pt", weights_only=True)
    torch.testing.assert_close(flow, expected, rtol=1e-4, atol=1e-3)
    assert type(matcher).__name__ == head and matcher.trained["steps"] == 2 and matcher.image_size == 64


def test_an_old_gsf_reads_its_flow_from_the_guidance(written):
    options = dict(corrzoo.load(written / "GSF.ckpt").hparams)
    assert options["start"] == "guidance" and options["readout_radius"] is None and not options["remove_mean"]
    assert not options.keys() & {"network", "soft_argmax", "geo_weight"}


@pytest.mark.parametrize("name, value", [("network", "conv4d"), ("soft_argmax", "literal")])
def test_an_old_gsf_with_a_removed_option_is_refused(written, tmp_path, name, value):
    folder = shutil.copytree(written / "GSF", tmp_path / "GSF")
    config = json.loads((folder / "config.json").read_text())
    config["options"][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ZooError, match=f"needs GSF's {name}='{value}', which was removed: load it with corrzoo 0.1.0"):
        corrzoo.load(folder)
