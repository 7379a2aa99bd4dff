import json
import multiprocessing
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import corrzoo
from corrzoo.store.checkpoints import read_checkpoint
from corrzoo.types import ZooError
from processes import obey_permissions

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


def test_a_checkpoint_loads_without_the_pretrained_weights(tmp_path, monkeypatch):
    """A checkpoint of a fine-tuned pretrained backbone contains its weights."""
    model = corrzoo.create_matcher("Baseline", **TINY)
    model.hparams.weights = "pretrained"
    loaded = corrzoo.load(checkpoint(tmp_path / "a.ckpt", model))
    assert not loaded.backbone.pending


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"state_dict": {}}, "not a corrzoo checkpoint: it names no head"),
        ([1, 2], "holds a list"),
        *(
            (content, "a.ckpt is damaged, or refused")
            for content in (b"nothing of the kind", b"", b"hello", b"\x80\x02.")
        ),
    ],
)
def test_files_that_are_no_checkpoints_are_refused(tmp_path, content, expected):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
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


def fill_the_disk(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def protect(folder):
    folder.chmod(0o555)
    obey_permissions()


@pytest.mark.parametrize("trouble, said", [(fill_the_disk, "File too large"), (protect, "Permission denied")])
def test_a_full_or_read_only_folder_is_one_error_and_keeps_the_model(tmp_path, trouble, said):
    folder = corrzoo.save(corrzoo.create_matcher("Baseline", **TINY), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()

    def work():
        trouble(folder)
        with pytest.raises(ZooError) as error:
            corrzoo.save(corrzoo.create_matcher("Baseline", **TINY), folder)
        answers.put(str(error.value))

    process = fork.Process(target=work)
    process.start()
    process.join(120)
    folder.chmod(0o755)
    assert process.exitcode == 0
    error = answers.get()
    assert error.startswith(f"cannot save to {folder}: ") and said in error and "\n" not in error
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_missing_weight_is_an_error(tmp_path):
    path = checkpoint(tmp_path / "a.ckpt", corrzoo.create_matcher("Baseline", **TINY))
    content = torch.load(path, weights_only=True)
    content["state_dict"].pop("temperature")
    torch.save(content, path)
    with pytest.raises(ZooError, match="do not fit Baseline"):
        corrzoo.load(path)


def test_a_missing_file_names_the_folder_of_checkpoints(tmp_path):
    with pytest.raises(ZooError, match=r"no checkpoint at .*checkpoints/best\.ckpt"):
        corrzoo.load(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "change",
    [
        {"hyper_parameters": TINY | {"stride": "a"}},
        {"hyper_parameters": TINY | {"levels": 7}},
        {"hyper_parameters": TINY | {"backbone": 5}},
        {"state_dict": None},
        {"state_dict": {1: torch.zeros(1)}},
        {"trained": "long"},
        {"image_size": "abc"},
        {"image_size": [64]},
        {"image_size": "224"},
        {"image_size": -5},
        {"image_size": 10**7},
        {"image_size": [64, 64.0]},
        {"image_size": True},
    ],
)
def test_an_invalid_checkpoint_is_refused_in_one_line(tmp_path, change):
    path = checkpoint(tmp_path / "a.ckpt", corrzoo.create_matcher("Baseline", **TINY))
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(ZooError, match=r"a\.ckpt: its options or weights do not fit Baseline") as error:
        corrzoo.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change", [lambda t: t * torch.nan, lambda t: t / 0, lambda t: t > 0, lambda t: t + 1j, lambda t: t[None]]
)
def test_weights_that_are_no_finite_numbers_are_refused(tmp_path, change):
    path = checkpoint(tmp_path / "a.ckpt", corrzoo.create_matcher("Baseline", **TINY))
    content = torch.load(path, weights_only=True)
    content["state_dict"]["temperature"] = change(content["state_dict"]["temperature"])
    torch.save(content, path)
    with pytest.raises(ZooError, match=r"a\.ckpt: its options or weights do not fit Baseline: .*temperature") as error:
        corrzoo.load(path)
    assert "\n" not in str(error.value)


def test_a_small_file_that_names_a_large_backbone_allocates_nothing(tmp_path, monkeypatch):
    folder = corrzoo.save(corrzoo.create_matcher("Baseline", **TINY), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["options"]["backbone"] = "timm/vit_giant_patch14_dinov2"
    (folder / "config.json").write_text(json.dumps(config))
    devices, register = set(), torch.nn.Module.register_parameter
    monkeypatch.setattr(
        torch.nn.Module,
        "register_parameter",
        lambda module, name, value: (
            devices.add(value is not None and value.device.type) or register(module, name, value)
        ),
    )
    with pytest.raises(ZooError, match=r"model: its options or weights do not fit Baseline: \d+ missing"):
        corrzoo.load(folder)
    assert devices - {False} == {"meta"}


def test_a_plugin_whose_constructor_reads_values_of_tensors_loads(tmp_path, monkeypatch):
    class Reading(corrzoo.heads.Baseline):
        def __init__(self, **options):
            super().__init__(**options)
            self.rate = torch.linspace(0, 1, 3)[1].item()

    monkeypatch.setitem(corrzoo.heads.HEADS._things, "Reading", Reading)
    assert corrzoo.load(checkpoint(tmp_path / "a.ckpt", Reading(**TINY))).rate == 0.5


def test_a_head_with_a_name_of_its_own_loads(tmp_path, monkeypatch):
    class Named(corrzoo.heads.Baseline):
        name = "my_head"

    monkeypatch.setattr(corrzoo.heads.HEADS, "_things", dict(corrzoo.heads.HEADS._things))  # forgotten after this test
    corrzoo.heads.HEADS.register(Named)
    model = corrzoo.create_matcher("my_head", **TINY)
    assert model.title == "my_head on timm/test_vit.r160_in1k"
    results = [RESULT | {"head": model.head_name}]  # as result files have it
    for path in (corrzoo.save(model, tmp_path / "saved", results), checkpoint(tmp_path / "a.ckpt", model)):
        assert type(corrzoo.load(path)) is Named


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = corrzoo.save(corrzoo.create_matcher("Baseline", **TINY, stride=4), "~/model")
    assert folder == tmp_path / "model" and corrzoo.load("~/model").hparams.stride == 4


def test_a_plugin_without_a_docstring_is_saved(tmp_path):
    class Plain(corrzoo.heads.Baseline):
        pass

    corrzoo.save(Plain(**TINY), tmp_path)
    assert "| head | Plain:" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("head", corrzoo.list_heads())
@pytest.mark.parametrize("backbone", [TINY["backbone"], "timm/test_resnet.r160_in1k"])
def test_every_head_can_be_built_without_memory(head, backbone):
    """`load` compares names and shapes before it allocates anything."""
    with torch.device("meta"):
        planned = corrzoo.heads.HEADS[head](backbone=backbone).state_dict()
    built = corrzoo.heads.HEADS[head](backbone=backbone).state_dict()
    assert {name: value.shape for name, value in planned.items()} == {k: v.shape for k, v in built.items()}


@pytest.mark.parametrize("config", ["[" * 100_000, "null", "9" * 5000, None])
def test_an_invalid_folder_is_refused_in_one_line(tmp_path, config):
    folder = corrzoo.save(corrzoo.create_matcher("Baseline", **TINY), tmp_path / "model")
    path = folder / ("model.safetensors" if config is None else "config.json")
    path.unlink() if config is None else path.write_text(config)
    with pytest.raises(ZooError, match=r"no .*model/model.safetensors" if config is None else "model is damaged"):
        corrzoo.load(folder)


def test_folders_cannot_be_resumed(tmp_path):
    for place in (
        corrzoo.save(corrzoo.create_matcher("Baseline", **TINY), tmp_path / "model"),
        Path("hf://user/model"),
    ):
        with pytest.raises(ZooError, match=r"is for corrzoo.load\(\) .*: give --ckpt_path a .ckpt"):
            read_checkpoint(place)


RESULT = {
    "head": "Baseline",
    "backbone": TINY["backbone"],
    "dataset": "pfwillow",
    "split": "test",
    "protocol": "default:bbox-kp",
    "alphas": [0.05, 0.1],
    "pairs": 900,
    "pck": {"pck@0.05": 37.23, "pck@0.1": 61.24, "pck@0.1/point": 60.0},
    "trained": {"dataset": "synthetic", "steps": 150, "batch_size": 16, "size": 128, "seed": 3},
}


def front_matter(folder):
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_training_data_is_kept_from_checkpoint_to_folder(tmp_path):
    path = checkpoint(tmp_path / "a.ckpt", corrzoo.create_matcher("Baseline", **TINY))
    content = torch.load(path, weights_only=True)
    torch.save(content | {"trained": {"dataset": "synthetic", "steps": 12, "size": 96}}, path)
    for loaded in (corrzoo.load(path), corrzoo.load(corrzoo.save(corrzoo.load(path), tmp_path / "model"))):
        assert loaded.image_size == 96 and loaded.trained["steps"] == 12
    assert "synthetic (steps 12, size 96)" in (tmp_path / "model" / "README.md").read_text()


def test_options_that_change_no_prediction_may_differ_from_a_result(tmp_path):
    model = corrzoo.create_matcher("ACTR", **TINY, grid=8, depth=1)
    result = RESULT | {"head": "ACTR", "options": {"checkpointing": True, "compile": True, "weights": "pretrained"}}
    assert corrzoo.save(model, tmp_path / "model", results=[result])


def test_the_card_describes_the_model_and_its_scores(tmp_path):
    (tmp_path / "pfwillow.json").write_text(json.dumps(RESULT))
    other = RESULT | {"dataset": "spair71k", "protocol": "actr:bbox", "alphas": [0.1], "pck": {"pck@0.1": 9.96}}
    model = corrzoo.create_matcher("Baseline", **TINY)
    front, body = front_matter(corrzoo.save(model, tmp_path / "model", results=[tmp_path / "pfwillow.json", other]))
    assert front["license"] == model.backbone.spec.licence and "Baseline" in front["tags"]
    (index,) = front["model-index"]
    assert [m["value"] for r in index["results"] for m in r["metrics"]] == [37.23, 61.24, 9.96]
    assert "| pfwillow | 900 | `default:bbox-kp` | 37.2 | 61.2 |" in body
    assert "| spair71k | 900 | `actr:bbox` |  | 10.0 |" in body
    assert "synthetic (steps 150, batch size 16, size 128, seed 3)" in body
    options = body.split("```json\n")[1].split("```")[0]
    assert json.loads(options)["temperature"] == 0.03
    params = sum(p.numel() for p in model.parameters()) / 1e6
    assert f"| parameters | {params:.1f} M in all |" in body
    front, body = front_matter(corrzoo.save(model, tmp_path / "model"))
    assert "model-index" not in front and "## Scores" not in body


def test_the_card_has_scores_of_label_transfer_beside_pck(tmp_path):
    transferred = {"lt_acc_mask": 87.25, "iou_mask": 61.0}
    columns = [["LT-ACC mask", "lt_acc_mask", "lt_acc_mask"], ["IoU mask", "iou_mask", "iou_mask"]]
    other = RESULT | {"dataset": "caltech101", "protocol": "label transfer", "alphas": [], "measures": columns}
    del other["pck"]
    model = corrzoo.create_matcher("Baseline", **TINY)
    results = [RESULT, other | {"label_transfer": transferred}]
    front, body = front_matter(corrzoo.save(model, tmp_path / "model", results=results))
    assert "| dataset | pairs | protocol | IoU mask | LT-ACC mask | PCK @0.05 | PCK @0.1 |" in body
    assert "| caltech101 | 900 | `label transfer` | 61.0 | 87.2 |  |  |" in body
    metrics = [m for r in front["model-index"][0]["results"] for m in r["metrics"]]
    assert [m["value"] for m in metrics if m["type"] in ("iou", "lt-acc")] == [87.25, 61.0]


@pytest.mark.parametrize(
    "content, expected",
    [
        ("{", "is not a result file"),
        ("[1]", "is not a result file"),
        (json.dumps({"head": "Baseline"}), "not a result file of `corrzoo test` .*'backbone'"),
        (json.dumps(RESULT | {"head": "ACTR"}), "is of ACTR on timm/test_vit.r160_in1k, but the model is Baseline"),
        (
            json.dumps(RESULT | {"options": {"stride": 16, "protocol": "x"}}),
            "scored with stride=16, but the model has 8",
        ),
        (None, "cannot read the result file .*No such file"),
    ],
)
def test_results_of_another_model_are_refused_before_writing(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "r.json").write_text(content)
    with pytest.raises(ZooError, match=expected):
        corrzoo.save(corrzoo.create_matcher("Baseline", **TINY), tmp_path / "model", results=[tmp_path / "r.json"])
    assert not (tmp_path / "model").exists()


def test_a_folder_without_weights_or_with_unknown_options_is_an_error(tmp_path):
    folder = corrzoo.save(corrzoo.create_matcher("Baseline", **TINY), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["options"]["strde"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ZooError, match="unknown option 'strde' of Baseline: did you mean 'stride'"):
        corrzoo.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ZooError, match=r"model\.safetensors"):
        corrzoo.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ZooError):
        corrzoo.load(folder)


LOAD = "import corrzoo, sys; print(corrzoo.load(sys.argv[1]).hparams.stride)"


def test_a_shared_model_loads_from_the_hubs_cache_when_offline(tmp_path, monkeypatch):
    """In a new process, as the hub's client reads environment variables on import."""
    snapshot = tmp_path / "hub" / "models--user--model" / "snapshots" / "0a1b"
    corrzoo.save(corrzoo.create_matcher("Baseline", **TINY, stride=4), tmp_path / "model")
    shutil.copytree(tmp_path / "model", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0a1b")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = f"{LOAD}\nfor name in sys.argv[2:]:\n try: corrzoo.load(name)\n except corrzoo.ZooError as e: print(e)"
    names = ["hf://user/model", "hf://user/other", "hf://a/b/c", "hf://user/model@v2"]
    run = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    stride, other, malformed, revision = run.stdout.splitlines()
    assert stride == "4"
    assert "hf://user/other is not in the hub's cache" in other and "HF_HUB_OFFLINE" in other
    assert "expected hf://user/model" in malformed and "hf://user/model@v2 is not in" in revision
