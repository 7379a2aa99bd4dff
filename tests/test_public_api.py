"""`import corrzoo` is light, and every public name exists."""

import subprocess
import sys

import corrzoo


def test_every_public_name_exists():
    for name in corrzoo.__all__:
        assert getattr(corrzoo, name) is not None


def test_import_is_light():
    code = "import sys, corrzoo; print([m for m in ('torch', 'timm', 'lightning') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
