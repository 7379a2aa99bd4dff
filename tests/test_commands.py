"""The command line: help, version, and errors in one line."""

import subprocess
import sys

import pytest

import corrzoo
from corrzoo.__main__ import main
from corrzoo.commands import COMMANDS


def test_user_errors_are_one_line(tmp_path):
    with pytest.raises(SystemExit) as leaving:
        main(["leaderboard", str(tmp_path)])
    assert str(leaving.value.code).startswith(f"error: no result files under {tmp_path}:")


@pytest.mark.parametrize("option", ["--chek", "--che"])
def test_misspelt_options_are_one_line_errors(option):
    with pytest.raises(SystemExit) as leaving:
        main(["leaderboard", option])
    assert leaving.value.code == f"error: unrecognized arguments: {option}; --help lists the options"


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_without_a_command_the_help_lists_all_of_them(capsys, args):
    main(args)
    text = capsys.readouterr().out
    assert text.startswith("usage: ") and all(f"  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["leaderboard", "--help"]])
def test_help_and_version_import_neither_torch_nor_lightning(args):
    code = (
        f"import sys; from corrzoo.__main__ import main\n"
        f"try: main({args})\n"
        "except SystemExit as end: assert not end.code\n"
        "print([m for m in ('torch', 'lightning') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len(out.splitlines()) > 1 and out.splitlines()[-1] == "[]"


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"corrzoo {corrzoo.__version__}\n"


def test_every_command_has_help(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as leaving:
            main([name, "--help"])
        assert not leaving.value.code and "usage:" in capsys.readouterr().out


def test_a_misspelt_command_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["leaderbord"])
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and error == "error: unknown command 'leaderbord': did you mean 'leaderboard'?\n"
