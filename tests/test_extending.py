"""docs/extending.md, as a new user does it: its files written into an empty folder, its commands run there."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from corrzoo.cli import main
from corrzoo.registry import import_plugins
from corrzoo.types import ZooError

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.S)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
BACKBONE = ["--model.backbone=timm/test_vit.r160_in1k", "--model.weights=random", "--model.levels=null"]
TINY = [
    *(
        "--trainer.callbacks=null",
        "--data.image_size=64",
        "--data.num_workers=0",
        "--data.batch_size=4",
        "--trainer.enable_progress_bar=false",
    ),
    '--data.options={"synthetic": {"length": {"trn": 8, "val": 4, "test": 4}}}',
]
RUN = """
import json, os, sys
import corrzoo.cli  # the seconds that this takes are shared by all commands, each of which is a process of its own
from corrzoo.__main__ import main
for command in json.loads(sys.argv[1]):
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        try:
            sys.argv[1:] = command
            exec(command) if isinstance(command, str) else main()
        except SystemExit as leaving:
            print(leaving.code if isinstance(leaving.code, str) else "", flush=True)
            os._exit(bool(leaving.code))
        sys.stdout.flush()
        os._exit(0)
    print("\\nleft with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs command lines, and Python where a command is text, one after the other; says how each one left."""


def run(folder, *commands):
    """What commands print, and the status that each one leaves with, in processes where no plugin is imported yet."""
    ran = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CORRZOO_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    *said, last = re.split(r"\nleft with (\d+)\n", ran.stdout)
    assert ran.returncode == 0 and last == "", ran.stdout[-3000:]
    return list(zip(said[::2], map(int, said[1::2]), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the page's files, the zoo's configurations, and a few pictures of pets."""
    folder = tmp_path_factory.mktemp("user")
    for kind, text in BLOCKS:
        if kind != "bash":
            path = folder / text.splitlines()[0].removeprefix("# ")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    (folder / "zoo_configs").symlink_to(ROOT / "zoo_configs")
    home = folder / "data" / "pets"
    home.mkdir(parents=True)
    for k in range(4):
        Image.linear_gradient("L").rotate(20 * k).resize((90, 60 + k)).convert("RGB").save(home / f"{k}.png")
    rows = [f"{a}.png,{b}.png,{'cat' if a else 'dog'},10,20,30,40,50,6,70,8" for a in range(4) for b in range(4)]
    for split in ("trn", "val", "test"):
        (home / f"{split}.csv").write_text("\n".join(["src,trg,category,points", *rows]) + "\n")
    return folder


CHECKPOINT = "runs/Projected-timm-test_vit.r160_in1k/version_0/checkpoints/last.ckpt"
MATCH = ["match", "data/pets/1.png", "data/pets/2.png", "--size=64"]
FOLLOWING = {
    "test": [
        "test",
        "--config=runs/Projected-timm-test_vit.r160_in1k/version_0/config.yaml",
        f"--ckpt_path={CHECKPOINT}",
    ],
    "match": [*MATCH, "--plugins=toy.head", f"--ckpt={CHECKPOINT}"],
    "save": f"import toy.head, corrzoo; print(corrzoo.save(corrzoo.load({CHECKPOINT!r}), 'saved'))",
    "load": "import toy.head, corrzoo; print(corrzoo.load('saved').hparams.width, corrzoo.list_heads())",
    "match without import": [*MATCH, f"--ckpt={CHECKPOINT}"],
    "match a folder without import": [*MATCH, "--ckpt=saved"],
    "no such plugin": ["fit", "--plugins=toy.head,tow"],
    "no such plugin in a YAML": ["fit", "--config=wrong.yaml"],
    "plugins below the model": ["fit", "--config=late.yaml"],
}
"""What is done with the page's first checkpoint, and what cannot be done."""


@pytest.fixture(scope="module")
def ran(folder):
    """What the page's commands print, and the following ones, and the status that each leaves with."""
    (folder / "late.yaml").write_text("model:\n  class_path: Projected\nplugins: toy.head\n")
    (folder / "wrong.yaml").write_text("plugins: [toy.heed]\n")
    words = [shlex.split(line) for line in COMMANDS]
    assert [w[:2] for w in words] == [["lightning", stage] for stage in ("fit", "test", "fit", "fit", "test")]
    lines = [w[1:] + TINY + (BACKBONE if "toy.backbone" not in w else []) for w in words]
    return dict(zip([*COMMANDS, *FOLLOWING], run(folder, *lines, *FOLLOWING.values()), strict=True))


@pytest.mark.parametrize("command", [*COMMANDS, *list(FOLLOWING)[:4]])
def test_every_command_runs_in_a_process_of_its_own(ran, command):
    said, status = ran[command]
    assert status == 0, said[-3000:]


def test_what_the_commands_leave(ran, folder):
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("runs/**/results/*.json"))]
    assert [(r["head"], r["dataset"], r["pairs"]) for r in results] == [
        ("Baseline", "pets", 16),
        ("Projected", "synthetic", 4),
        ("Projected", "synthetic", 4),
    ]
    assert results[1]["options"]["width"] == 128 and results[1]["trained"]["dataset"] == "synthetic"
    assert results[1]["pck"] == results[2]["pck"]  # the configuration that the run has saved is the run
    assert "import corrzoo, toy.head\n" in (folder / "saved" / "README.md").read_text()
    assert ran["load"][0].strip() == "128 ['ACTR', 'Baseline', 'GSF', 'LPMFlow', 'Projected', 'ViTSC']"


@pytest.mark.parametrize(
    ("command", "words"),
    {
        # no file makes anyone import anything
        "match without import": f"{CHECKPOINT} holds a Projected of 'toy.head': import that module first (--plugins "
        "toy.head)",
        "match a folder without import": "saved holds a Projected of 'toy.head': import that module first",
        "no such plugin": "there is no plugin 'tow': expected the name of a module in the working folder",
        "no such plugin in a YAML": "there is no plugin 'toy.heed'",
        "plugins below the model": "unknown head 'Projected': choose one of ACTR, Baseline, GSF, LPMFlow, ViTSC, or "
        "say --plugins <module of your own> first",
    }.items(),
)
def test_errors_are_one_line(ran, command, words):
    said, status = ran[command]
    assert status and said.strip().startswith(f"error: {words}") and len(said.strip().splitlines()) == 1, said


def test_plugins_are_named_with_commas_or_as_a_list(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for number in range(4):
        (tmp_path / f"plugin{number}.py").touch()
    assert import_plugins("plugin0, plugin1") == ["plugin0", "plugin1"]
    assert import_plugins(["plugin2", "plugin3"]) == ["plugin2", "plugin3"]
    assert {f"plugin{number}" for number in range(4)} <= sys.modules.keys()


def test_plugins_that_are_named_twice_add_up(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("in_a_file", "said_first", "said_last"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "a.yaml").write_text("plugins: [in_a_file]\nmodel: {class_path: Baseline}\n")
    command = ["fit", "--plugins=said_first", f"--config={tmp_path / 'a.yaml'}", "--plugins=said_last, in_a_file"]
    with pytest.raises(SystemExit):
        main([*command, "--print_config"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("plugins:")]
    assert set(line.removeprefix("plugins: ").split(", ")) == {"said_first", "in_a_file", "said_last"}
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert "(type: modules, default: null)" in " ".join(capsys.readouterr().out.split())


def test_what_is_wrong_with_a_plugin_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    head = next(text for _, text in BLOCKS if text.startswith("# toy/head.py"))
    (tmp_path / "needy.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "twice.py").write_text(head.replace("Projected", "Baseline"))
    (tmp_path / "again.py").write_text(
        "from corrzoo.backbones import register_backbone as add\nadd('mae_b16', 'vit_base_patch16_224.mae')\n"
    )
    wrong = {
        "there": "there is no plugin 'there': expected",
        "needy.inside": "plugin 'needy.inside' needs the module 'a_module_that_is_not_there', which is not installed",
        "needy.py": "plugin 'needy.py' needs the module",
        "folder/needy.py": "there is no plugin 'folder/needy.py': expected",
        "twice": "head 'Baseline' is already registered: choose another name",
        "again": "backbone 'mae_b16' is already registered: choose another name",
    }
    for name, words in wrong.items():
        with pytest.raises(ZooError, match=f"^{re.escape(words)}") as error:
            import_plugins(name)
        assert "\n" not in str(error.value)
