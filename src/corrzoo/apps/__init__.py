"""Commands for one's own images, `corrzoo match` and `corrzoo demo`, and the model that both run."""

import argparse
from typing import Any

import torch
import yaml

from corrzoo import recipes
from corrzoo.errors import Parser, ZooError
from corrzoo.heads import HEADS, Baseline, create_matcher
from corrzoo.matcher import Matcher
from corrzoo.registry import import_plugins
from corrzoo.store.checkpoints import load

BACKBONE = "efficientnet_lite0"
"""The backbone without --ckpt and --backbone: its weights come with the extra `offline`."""


def add_model(parser: Parser) -> None:
    """The options that `matcher_of` reads."""
    model = parser.add_argument_group("model")
    model.add_argument("--ckpt", help="a checkpoint, a folder of corrzoo.save(), or hf://user/model")
    model.add_argument("--plugins", help="modules that register its head or backbone, with commas between them")
    model.add_argument("--head", help="without --ckpt: Baseline, which matches untrained")
    model.add_argument("--backbone", help=f"without --ckpt: any of list_backbones() ({BACKBONE})")
    model.add_argument("--weights", help="without --ckpt: pretrained, random, or a file of the backbone's weights")
    model.add_argument("--size", type=int, help="side of the network image; default: as trained, or 320")


def zero_shot(backbone: str) -> tuple[dict[str, Any], int]:
    """Options of the Baseline without training, and the side of its network image in pixels.

    They are those of `zoo_configs/backbone/<backbone>.yaml`, with soft mutual nearest neighbours, which score best on
    PF-WILLOW. A backbone without such a file takes EfficientNet-Lite0's, but its own levels, at the default stride.
    """
    folder = recipes.FOLDER / "backbone"
    known = (folder / f"{backbone}.yaml").is_file()
    config = yaml.safe_load((folder / f"{backbone if known else BACKBONE}.yaml").read_text())
    options = config["model"]["init_args"] | {"backbone": backbone, "mutual": True}
    if not known:
        options = {name: value for name, value in options.items() if name not in ("levels", "stride")}
        options["backbone_size"] = True
    return options, config["data"]["image_size"]


def matcher_of(args: argparse.Namespace) -> Matcher:
    """The matcher that the options ask for, on a GPU if there is one, with its `image_size`.

    Raises:
        ZooError: for a checkpoint that is another model than the options say, and for heads that need training.
    """
    if args.plugins:
        import_plugins(args.plugins)
    if args.ckpt:
        matcher = load(args.ckpt)
        for name, found in (("head", type(matcher).__name__), ("backbone", matcher.hparams.backbone)):
            if getattr(args, name) not in (None, found):
                raise ZooError(f"{args.ckpt} has the {name} {found}, not {getattr(args, name)}: leave --{name} out")
        if args.weights:
            raise ZooError(f"{args.ckpt} brings its own weights: leave --weights out")
    else:
        if args.head and HEADS[args.head] is not Baseline:
            raise ZooError(f"{args.head} needs trained weights: give --ckpt, or --head Baseline")
        options, size = zero_shot(args.backbone or BACKBONE)
        try:
            matcher = create_matcher("Baseline", **options | ({"weights": args.weights} if args.weights else {}))
        except ZooError as error:
            raise ZooError(str(error).replace("--model.", "--")) from error
        matcher.image_size = size
    if args.size is not None and args.size < 1:
        raise ZooError(f"--size {args.size}: expected the side of an image in pixels")
    matcher.image_size = args.size or matcher.image_size
    return matcher.to("cuda" if torch.cuda.is_available() else "cpu")
