"""Commands for user images, `corrzoo match` and `corrzoo demo`, and the model that both use."""

import argparse
from typing import Any

import torch
import yaml

from corrzoo import recipes
from corrzoo.errors import Parser, ZooError
from corrzoo.heads import HEADS, create_matcher
from corrzoo.matcher import Matcher
from corrzoo.registry import import_plugins
from corrzoo.store.checkpoints import load

BACKBONE = "efficientnet_lite0"
"""Default backbone, whose weights come with the extra `offline`."""
ZERO_SHOT = ("MirrorGuided", "Baseline")
"""Heads that need no training. The first is the default: it matches better, in twice the time."""


def add_model(parser: Parser) -> None:
    """Add the options that `matcher_of` reads."""
    model = parser.add_argument_group("model")
    model.add_argument("--ckpt", help="a checkpoint, a folder of corrzoo.save(), or hf://user/model")
    model.add_argument("--plugins", help="modules that register its head or backbone, separated by commas")
    model.add_argument("--head", help="head without --ckpt: MirrorGuided, or Baseline in half the time (MirrorGuided)")
    model.add_argument("--backbone", help=f"backbone without --ckpt, a name in docs/backbones.md ({BACKBONE})")
    model.add_argument("--weights", help="backbone weights without --ckpt: a file, random, or pretrained (pretrained)")
    model.add_argument("--size", type=int, help="side of the network image in pixels (as trained; 320 without --ckpt)")


def zero_shot(head: str, backbone: str) -> tuple[dict[str, Any], int]:
    """Options of a head of `ZERO_SHOT`, and the side of its network image in pixels.

    The options are those of `zoo_configs/backbone/<backbone>.yaml`. The Baseline gets soft mutual nearest neighbours,
    too, which score best on PF-WILLOW. A backbone without such a file uses EfficientNet-Lite0's, with default levels
    and stride.
    """
    folder = recipes.FOLDER / "backbone"
    known = (folder / f"{backbone}.yaml").is_file()
    config = yaml.safe_load((folder / f"{backbone if known else BACKBONE}.yaml").read_text())
    options = config["model"]["init_args"] | {"backbone": backbone, "mutual": True}
    if not known:
        options = {name: value for name, value in options.items() if name not in ("levels", "stride")}
        options["backbone_size"] = True
    taken = HEADS.options(head)
    return {name: value for name, value in options.items() if name in taken}, config["data"]["image_size"]


def matcher_of(args: argparse.Namespace) -> Matcher:
    """Create or load the matcher that the options describe, on a GPU if there is one.

    Raises:
        ZooError: if an option contradicts the checkpoint, or the head needs training.
    """
    if args.plugins:
        import_plugins(args.plugins)
    if args.ckpt:
        matcher = load(args.ckpt)
        for name, found in (("head", matcher.head_name), ("backbone", matcher.hparams.backbone)):
            if getattr(args, name) not in (None, found):
                raise ZooError(f"{args.ckpt} has the {name} {found}, not {getattr(args, name)}: leave --{name} out")
        if args.weights:
            raise ZooError(f"{args.ckpt} contains weights: leave --weights out")
    else:
        head = args.head or ZERO_SHOT[0]
        if HEADS[head].__name__ not in ZERO_SHOT:
            raise ZooError(f"{head} needs trained weights: give --ckpt, or --head {' or '.join(ZERO_SHOT)}")
        options, size = zero_shot(head, args.backbone or BACKBONE)
        try:
            matcher = create_matcher(head, **options | ({"weights": args.weights} if args.weights else {}))
        except ZooError as error:
            raise ZooError(str(error).replace("--model.", "--")) from error
        matcher.image_size = size
    if args.size is not None and args.size < 1:
        raise ZooError(f"--size {args.size}: expected the side of the network image in pixels, 1 or more")
    matcher.image_size = args.size or matcher.image_size
    return matcher.to("cuda" if torch.cuda.is_available() else "cpu")
