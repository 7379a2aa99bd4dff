"""The commands beside Lightning's own; they start without importing it."""

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
