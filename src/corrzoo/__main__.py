"""Command line: `corrzoo`, `lightning` and `python -m corrzoo`."""

import ctypes
import importlib
import os
import signal
import sys
from pathlib import Path

import corrzoo
from corrzoo.commands import COMMANDS, LIGHTNING, help_text
from corrzoo.errors import ZooError
from corrzoo.registry import nearest

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when its parent ends."""


def main(args: list[str] | None = None) -> None:
    """Run a command of `COMMANDS`; without one, print the help. `args` is the command line, `sys.argv` if None."""
    if int(os.environ.get("LOCAL_RANK", "0")) and sys.platform == "linux":
        # If the first process is killed, its other training processes would wait for it.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getcwd() not in sys.path:
        # Plugins may be in the working folder, which console scripts do not search. Last, so that it hides no module.
        sys.path.append(os.getcwd())
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        return print(help_text(Path(sys.argv[0]).name.replace("__main__.py", "python -m corrzoo")))
    if words[0] == "--version":
        return print(f"corrzoo {corrzoo.__version__}")
    if words[0] not in COMMANDS and not words[0].startswith("-"):
        sys.stderr.write(f"error: unknown command {words[0]!r}{nearest(words[0], COMMANDS) or '; --help lists them'}\n")
        sys.exit(2)
    target, _ = COMMANDS.get(words[0], (LIGHTNING, ""))
    module, function = target.split(":")
    try:
        getattr(importlib.import_module(module), function)(words if target == LIGHTNING else words[1:])
    except ZooError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # an unreadable file, a full disk
        sys.exit(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "))


if __name__ == "__main__":
    main()
