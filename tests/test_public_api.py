"""`import corrzoo` is light, and everything it promises is there."""

import subprocess
import sys

import corrzoo


def test_every_public_name_is_there():
    for name in corrzoo.__all__:
        assert getattr(corrzoo, name) is not None


def test_importing_it_imports_nothing_heavy():
    code = "import sys, corrzoo; print([m for m in ('torch', 'timm', 'lightning') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
