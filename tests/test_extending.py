"""Files and commands of docs/extending.md, in a folder outside the package."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import corrzoo
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
import corrzoo.cli  # imported once for all commands, each of which is a process of its own
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
    print("\\nexit status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs command lines, or Python code if a command is text, one after the other, and prints each exit status."""


def run(folder, *commands):
    """Output and exit status of each command, in a process without imported plugins."""
    ran = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CORRZOO_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    *printed, last = re.split(r"\nexit status (\d+)\n", ran.stdout)
    assert ran.returncode == 0 and last == "", ran.stdout[-3000:]
    return list(zip(printed[::2], map(int, printed[1::2]), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the page's files and a few images of pets. Recipes come from the package."""
    folder = tmp_path_factory.mktemp("user")
    for kind, text in BLOCKS:
        if kind != "bash":
            path = folder / text.splitlines()[0].removeprefix("# ")
            path.write_text(text)
    home = folder / "data" / "pets"
    home.mkdir(parents=True)
    for k in range(4):
        Image.linear_gradient("L").rotate(20 * k).resize((90, 60 + k)).convert("RGB").save(home / f"{k}.png")
    rows = [f"{a}.png,{b}.png,{'cat' if a else 'dog'},10,20,30,40,50,6,70,8" for a in range(4) for b in range(4)]
    for split in ("trn", "val", "test"):
        (home / f"{split}.csv").write_text("\n".join(["src,trg,category,points", *rows]) + "\n")
    return folder


RUN_FOLDER = "runs/Projection-timm-test_vit.r160_in1k/version_0"
CHECKPOINT = f"{RUN_FOLDER}/checkpoints/last.ckpt"
MATCH = ["match", "data/pets/1.png", "data/pets/2.png", "--size=64"]
PYTHON = f"""
import corrzoo, projection
trained = corrzoo.load({CHECKPOINT!r})
print(corrzoo.save(trained, "saved"))
loaded = corrzoo.load("saved")
first, second = (corrzoo.match_images(m, "data/pets/1.png", "data/pets/2.png", [[30, 20], [50, 40]], size=64)
                 for m in (trained, loaded))
print(loaded.hparams.width, first.trg_points.shape, bool((first.trg_points == second.trg_points).all()))
print(corrzoo.list_heads())
"""
FOLLOWING = {
    "test": ["test", f"--config={RUN_FOLDER}/config.yaml", f"--ckpt_path={CHECKPOINT}"],
    "match": [*MATCH, "--plugins=projection", f"--ckpt={CHECKPOINT}"],
    "python": PYTHON,
    "help": ["fit", "--plugins=projection", "--model.help=Projection"],
    "match without import": [*MATCH, f"--ckpt={CHECKPOINT}"],
    "match a folder without import": [*MATCH, "--ckpt=saved"],
    "no such plugin": ["fit", "--plugins=projection,tow"],
    "no such plugin in a YAML": ["fit", "--config=wrong.yaml"],
    "plugins below the model": ["fit", "--config=late.yaml"],
}
"""Further commands, which use the page's first checkpoint; the last five are errors."""


@pytest.fixture(scope="module")
def ran(folder):
    """Output and exit status of the page's commands and of the further ones."""
    (folder / "late.yaml").write_text("model:\n  class_path: Projection\nplugins: projection\n")
    (folder / "wrong.yaml").write_text("plugins: [projectoin]\n")
    words = [shlex.split(line) for line in COMMANDS]
    assert [w[:2] for w in words] == [["lightning", stage] for stage in ("fit", "test", "fit", "fit", "test")]
    lines = [w[1:] + TINY + (BACKBONE if "patch_net" not in w else []) for w in words]
    return dict(zip([*COMMANDS, *FOLLOWING], run(folder, *lines, *FOLLOWING.values()), strict=True))


@pytest.mark.parametrize("command", [*COMMANDS, *list(FOLLOWING)[:4]])
def test_commands_run(ran, command):
    printed, status = ran[command]
    assert status == 0, printed[-3000:]


def test_commands_write_results(ran, folder):
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("runs/**/results/*.json"))]
    assert [(r["head"], r["dataset"], r["pairs"]) for r in results] == [
        ("Baseline", "pets", 16),
        ("Projection", "synthetic", 4),
        ("Projection", "synthetic", 4),
    ]
    assert results[1]["options"]["width"] == 64 and results[1]["trained"]["dataset"] == "synthetic"
    assert results[1]["pck"] == results[2]["pck"]  # from the page's YAMLs and from the run's own config.yaml


def test_the_checkpoint_loads_back_and_matches_images(ran, folder):
    assert "import corrzoo, projection\n" in (folder / "saved" / "README.md").read_text()
    assert ran["python"][0].strip().splitlines()[-2:] == [
        "64 torch.Size([2, 2]) True",
        str(sorted([*corrzoo.list_heads(), "Projection"])),
    ]
    assert "Channels after the projection." in ran["help"][0]


@pytest.mark.parametrize(
    ("command", "words"),
    {
        # no file makes anyone import anything
        "match without import": f"{CHECKPOINT} is a Projection model of 'projection': import that module first "
        "(--plugins projection)",
        "match a folder without import": "saved is a Projection model of 'projection': import that module first",
        "no such plugin": "there is no plugin 'tow': expected the name of a module in the working folder",
        "no such plugin in a YAML": "there is no plugin 'projectoin'",
        "plugins below the model": "unknown head 'Projection': choose one of "
        f"{', '.join(corrzoo.list_heads())}, or give --plugins <your module> first",
    }.items(),
)
def test_errors_are_one_line(ran, command, words):
    printed, status = ran[command]
    assert status and printed.strip().startswith(f"error: {words}") and len(printed.strip().splitlines()) == 1, printed


def test_plugins_are_separated_by_commas_or_a_list(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for number in range(4):
        (tmp_path / f"plugin{number}.py").touch()
    assert import_plugins("plugin0, plugin1") == ["plugin0", "plugin1"]
    assert import_plugins(["plugin2", "plugin3"]) == ["plugin2", "plugin3"]
    assert {f"plugin{number}" for number in range(4)} <= sys.modules.keys()


def test_plugins_of_yaml_and_command_line_are_combined(tmp_path, monkeypatch, capsys):
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


def test_plugin_errors_are_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    head = next(text for _, text in BLOCKS if text.startswith("# projection.py"))
    (tmp_path / "needy.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "twice.py").write_text(head.replace("class Projection", "class Baseline"))
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
