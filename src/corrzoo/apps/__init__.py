"""Commands for one's own images, `corrzoo match` and `corrzoo demo`, and the model that both run."""

import argparse
from typing import Any

import torch

from corrzoo.errors import Parser, ZooError
from corrzoo.heads import HEADS, Baseline, create_matcher
from corrzoo.matcher import Matcher
from corrzoo.registry import import_plugins
from corrzoo.store.checkpoints import load

BACKBONE, SIZE = "efficientnet_lite0", 320
ZERO_SHOT: dict[str, Any] = {
    "finetune": "none",
    "remove_mean": True,
    "readout": "window",
    "radius": 2,
    "point_query": "features",
    "temperature": 0.05,
    "mutual": True,
}
"""The Baseline without training, as zoo_configs/backbone/efficientnet_lite0.yaml has it, with what scores best on
PF-WILLOW: soft mutual nearest neighbours."""
ZERO_SHOT_LITE0: dict[str, Any] = {"levels": ["blocks.4.2", "blocks.5.2"], "stride": 16}
"""What belongs to that backbone alone."""


def add_model(parser: Parser) -> None:
    """The options that `matcher_of` reads."""
    model = parser.add_argument_group("model")
    model.add_argument("--ckpt", help="a checkpoint, a folder of corrzoo.save(), or hf://user/model")
    model.add_argument("--plugins", help="modules that register its head or backbone, with commas between them")
    model.add_argument("--head", help="without --ckpt: Baseline, which matches untrained")
    model.add_argument("--backbone", help=f"without --ckpt: any of list_backbones() ({BACKBONE})")
    model.add_argument("--weights", help="without --ckpt: pretrained, random, or a file of the backbone's weights")
    model.add_argument("--size", type=int, help=f"side of the network image (the checkpoint's own; {SIZE} without one)")


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
            raise ZooError(f"{args.head} matches nothing before it is trained: give --ckpt, or --head Baseline")
        backbone = args.backbone or BACKBONE
        options = ZERO_SHOT | (ZERO_SHOT_LITE0 if backbone == BACKBONE else {"backbone_size": True})
        try:
            matcher = create_matcher("Baseline", backbone, args.weights or "pretrained", **options)
        except ZooError as error:
            raise ZooError(str(error).replace("--model.", "--")) from error
        matcher.image_size = SIZE
    if args.size is not None and args.size < 1:
        raise ZooError(f"--size {args.size}: expected the side of an image in pixels")
    matcher.image_size = args.size or matcher.image_size
    return matcher.to("cuda" if torch.cuda.is_available() else "cpu")
