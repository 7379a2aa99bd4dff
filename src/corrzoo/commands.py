"""All commands, and their help. Nothing here imports torch or Lightning."""

LIGHTNING = "corrzoo.cli:main"
COMMANDS = {
    "fit": (LIGHTNING, "train a head"),
    "validate": (LIGHTNING, "score a head on validation pairs"),
    "test": (LIGHTNING, "score a head on test pairs, and write result files"),
    "predict": (LIGHTNING, "write the predicted points of test pairs"),
    "list": ("corrzoo.apps.catalogue:main", "list heads, backbones, datasets, protocols or configs (the recipes)"),
    "queries": ("corrzoo.apps.score:write_queries", "write the query points of a dataset for a method outside corrzoo"),
    "score": ("corrzoo.apps.score:main", "score predictions of any method, without a model"),
    "match": ("corrzoo.apps.match:main", "match points of one image to another"),
    "demo": ("corrzoo.apps.demo:main", "open a local page: click a point, see its match"),
    "export": ("corrzoo.apps.export:main", "export a model as one file that runs without corrzoo: .pt2 or .onnx"),
    "leaderboard": ("corrzoo.leaderboard:main", "write the leaderboard from result files and published numbers"),
}
"""By name: `module:function`, and the description in `--help`."""

EXAMPLES = {
    "fit --config zoo_configs/demo/lpmflow.yaml": "train a small LPMFlow on synthetic pairs",
    "test --config zoo_configs/demo/lpmflow.yaml --ckpt_path best": "score its best checkpoint",
    "list configs": "list the recipes, which --config finds from any folder",
    "match a.jpg b.jpg": "match two images without training",
}


def help_text(program: str) -> str:
    """The text of `<program> --help`."""
    return "\n".join(
        [
            f"usage: {program} [--help] [--version] <command> ...",
            "\nTrain and compare matching heads for semantic correspondence.",
            "\ncommands, each with its own --help:",
            *(f"  {name:<14}{description}" for name, (_, description) in COMMANDS.items()),
            "\nexamples:",
            *(f"  # {what}\n  {program} {command}" for command, what in EXAMPLES.items()),
        ]
    )
