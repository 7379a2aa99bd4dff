"""Command line: `corrzoo`, `lightning` and `python -m corrzoo`."""

import importlib
import os
import sys

from corrzoo.commands import COMMANDS
from corrzoo.errors import ZooError


def main(args: list[str] | None = None) -> None:
    """Run a command of `COMMANDS` or of LightningCLI.

    Args:
        args: Command line; `sys.argv` if None.
    """
    if os.getcwd() not in sys.path:
        # Plugins may be in the working folder, which console scripts do not search. Last, so that it hides no module.
        sys.path.append(os.getcwd())
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] not in COMMANDS:
        from corrzoo.cli import main as lightning

        return lightning(args)
    module, function = COMMANDS[words[0]][0].split(":")
    try:
        getattr(importlib.import_module(module), function)(words[1:])
    except ZooError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # an unreadable file, a full disk
        sys.exit(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "))


if __name__ == "__main__":
    main()
