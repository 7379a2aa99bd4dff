"""Commands besides those of LightningCLI. They start without importing torch or Lightning."""

COMMANDS = {
    "leaderboard": ("corrzoo.leaderboard:main", "write the leaderboard from result files and published numbers"),
    "match": ("corrzoo.apps.match:main", "match points of one image to another"),
    "demo": ("corrzoo.apps.demo:main", "open a local page: click a point, see its match"),
}
"""By name: `module:function`, which takes the arguments after the name, and the description in `--help`."""


def listing() -> str:
    """Describe the commands, for `--help`."""
    return "More commands, each with its own --help: " + "; ".join(
        f"{name} ({what})" for name, (_, what) in COMMANDS.items()
    )
