"""The command line: `corrzoo`, `lightning` and `python -m corrzoo`."""

import importlib
import os
import sys

from corrzoo.commands import COMMANDS
from corrzoo.errors import ZooError


def main(args: list[str] | None = None) -> None:
    """Run a command of `COMMANDS`, or else LightningCLI.

    Args:
        args: The command line; that of the process when not given.
    """
    if os.getcwd() not in sys.path:
        # Console scripts do not search the working folder for plugins. Last, so that no file there hides a module.
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
    except OSError as error:  # a file that cannot be read, a full disk
        sys.exit(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "))


if __name__ == "__main__":
    main()
