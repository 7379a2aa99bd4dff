"""Commands besides Lightning's start without importing it and fail in one line."""

import subprocess
import sys

import pytest

from corrzoo.__main__ import main
from corrzoo.commands import COMMANDS, listing


def test_a_command_starts_without_torch_or_lightning():
    code = (
        "import sys; from corrzoo.__main__ import main\n"
        "try: main(['leaderboard', '--help'])\n"
        "except SystemExit as end: print(end.code, [m for m in ('torch', 'lightning') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "usage: corrzoo leaderboard" in out and out.splitlines()[-1] == "0 []"


def test_user_errors_are_one_line(tmp_path):
    with pytest.raises(SystemExit) as leaving:
        main(["leaderboard", str(tmp_path)])
    assert str(leaving.value.code).startswith(f"error: no result files under {tmp_path}:")


@pytest.mark.parametrize("option", ["--chek", "--che"])
def test_misspelt_options_are_one_line_errors(option):
    with pytest.raises(SystemExit) as leaving:
        main(["leaderboard", option])
    assert leaving.value.code == f"error: unrecognized arguments: {option}; --help lists the options"


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert leaving.value.code == 0 and " ".join(listing().split()) in said
    assert all(f"{name} (" in said for name in COMMANDS)


def test_a_misspelt_command_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["leaderbord"])
    assert leaving.value.code == 2 and "did you mean 'leaderboard'" in capsys.readouterr().err
