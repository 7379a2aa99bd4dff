"""The entry point of the scripts `lightning` and `corrzoo`: commands that train nothing start without Lightning."""

import importlib
import os
import sys

from corrzoo.errors import ZooError

COMMANDS = {
    "leaderboard": ("corrzoo.leaderboard:main", "write the leaderboard from result files and published numbers"),
    "match": ("corrzoo.apps.match:main", "find points of one image in another"),
    "demo": ("corrzoo.apps.demo:main", "a local page: click a point, see its match"),
}
"""Name: (module:function that takes the arguments after the name, what `--help` says of it)."""


def listing() -> str:
    """The commands beside Lightning's, for `--help`."""
    return "More commands, each with its own --help: " + "; ".join(
        f"{name} ({what})" for name, (_, what) in COMMANDS.items()
    )


def main(args: list[str] | None = None) -> None:
    """Run a command of `COMMANDS`, and whatever else through LightningCLI.

    Args:
        args: The command line; that of the process when not given.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(
            os.getcwd()
        )  # scripts do not look there for plugins; last, so that no file's name hides a module
    said = list(sys.argv[1:] if args is None else args)
    if not said or said[0] not in COMMANDS:
        from corrzoo.cli import main as lightning

        return lightning(args)
    module, function = COMMANDS[said[0]][0].split(":")
    try:
        getattr(importlib.import_module(module), function)(said[1:])
    except ZooError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a file that cannot be read, a full disk
        sys.exit(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "))
