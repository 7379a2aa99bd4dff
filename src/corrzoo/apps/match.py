"""`corrzoo match`: match points of one image to another, as numbers and as a picture."""

import argparse
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from corrzoo import visualize
from corrzoo.apps import add_model, matcher_of
from corrzoo.apps.pairs import Query, list_queries
from corrzoo.errors import Parser, ZooError
from corrzoo.files import whole_file, write_bytes, write_json
from corrzoo.images import as_rgb
from corrzoo.inference import GRID, MAX_CYCLE_ERROR, ImagePair, open_pair
from corrzoo.matcher import Matcher
from corrzoo.tables import write_csv

COLUMNS = ("src_x", "src_y", "trg_x", "trg_y", "cycle_error", "confident")
ABOUT = """Match points of one image to another, or of many pairs with one model.

Coordinates are (x, y) in pixels of the original images, after EXIF rotation. (0, 0) is the top-left corner of the
top-left pixel, whose centre is (0.5, 0.5).

The cycle error of a match is the distance between a point and its match matched back. Above --max-error, a match is
uncertain. Without --points, a regular grid of points is matched, and uncertain matches are left out, as are those of
cells without structure.

Without --ckpt, matching is zero-shot: MirrorGuided on ImageNet features (pip install "corrzoo[offline]").
"""
DENSE = """also write the dense flow: flow.npy (H, W, 2) float32 and flow.flo (Middlebury) have (dx, dy) for each pixel
of A. The pixel in column x and row y of A, whose centre is (x + 0.5, y + 0.5), matches (x + 0.5 + dx, y + 0.5 + dy) in
B. flow.png shows the flow, and warped.png is B warped to A by the flow"""


def main(args: list[str]) -> None:
    """Run the command."""
    parser = Parser(prog="corrzoo match", description=ABOUT)
    parser.add_argument("a", nargs="?", help="source image, whose points are matched")
    parser.add_argument("b", nargs="?", help="target image, in which their matches are found; or a folder of them")
    parser.add_argument("--pairs", help="CSV file with the columns src, trg and, if wanted, points; instead of a and b")
    parser.add_argument("--points", help="query points of A: '120,80; 200.5,91', or a CSV file with columns x and y")
    parser.add_argument("--grid", type=int, default=GRID, help=f"points along each side, without --points ({GRID})")
    limit = f"in pixels of A ({MAX_CYCLE_ERROR / GRID:g} of its longer side)"
    parser.add_argument("--max-error", type=float, help=limit)
    parser.add_argument("--out", default="matches", type=Path, help="folder (matches); of many pairs, each has its own")
    parser.add_argument("--format", choices=("json", "csv"), default="json", help="format of the matches (json)")
    parser.add_argument("--dense", action="store_true", help=DENSE)
    add_model(parser)
    options = parser.parse_args(args)
    if options.grid < 1:
        raise ZooError(f"--grid {options.grid}: expected 1 or more")
    queries = list_queries(options.a, options.b, options.pairs, options.points)
    if len(queries) == 1:
        images = as_rgb(queries[0].src), as_rgb(queries[0].trg)  # fail before the model is loaded
        return match_pair(matcher_of(options), queries[0], images, options.out, options)
    matcher = matcher_of(options)
    failed = 0
    for number, query in enumerate(queries, 1):
        name = f"{number:0{len(str(len(queries)))}}-{Path(query.src).stem}-{Path(query.trg).stem}"
        try:
            match_pair(matcher, query, (as_rgb(query.src), as_rgb(query.trg)), options.out / name, options)
        except ZooError as error:
            failed += 1
            print(f"{query.src}, {query.trg}: {error}", file=sys.stderr)
    if failed:
        raise ZooError(f"{failed} of {len(queries)} pairs failed")


def match_pair(
    matcher: Matcher, query: Query, images: tuple[Image.Image, Image.Image], out: Path, options: argparse.Namespace
) -> None:
    """Match one pair, and write its files."""
    pair = open_pair(matcher, *images)
    limit = pair.max_error if options.max_error is None else options.max_error
    if query.points is None:
        found = pair.confident_matches(options.grid, limit)
    else:
        found = pair.match_both_ways(query.points)
    confident = found.cycle_error <= limit
    fields = [np.round(field.numpy(), 3).tolist() for field in found]
    rows = [
        dict(zip(COLUMNS, (*src, *trg, error, sure), strict=True))
        for src, trg, error, sure in zip(*fields, confident.tolist(), strict=True)
    ]
    if options.format == "csv":
        write_csv(out / "matches.csv", rows, COLUMNS)
    else:
        model = {"head": matcher.head_name, "backbone": matcher.hparams.backbone, "ckpt": options.ckpt}
        src, trg = {"path": query.src, "size": images[0].size}, {"path": query.trg, "size": images[1].size}
        content = {"src": src, "trg": trg, "model": model, "max_error": limit, "matches": rows}
        write_json(out / "matches.json", content)
    sides = [pil_to_tensor(pair.src)], [pil_to_tensor(pair.trg)]
    figure = visualize.draw_matches(*sides, [found.src_points], [found.trg_points], confident=[confident])
    written = [out / f"matches.{options.format}", visualize.save_figure(figure, out / "matches.png")]
    if options.dense:
        written += write_dense(pair, out)
    uncertain = len(rows) - int(confident.sum())
    note = f", {uncertain} of them uncertain (cycle error above {limit:.3g} px)" if uncertain else ""
    say(f"{len(rows)} match{'es' * (len(rows) != 1)}{note}: {', '.join(map(str, written))}")


def say(text: str) -> None:
    """Print a text. It may have file names with characters that the output cannot encode: they are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def write_dense(pair: ImagePair, out: Path) -> list[Path]:
    """Write the flow, its picture and the warped target image, see DENSE."""
    flow, src, trg = pair.flow(), pil_to_tensor(pair.src), pil_to_tensor(pair.trg)
    array = BytesIO()
    np.save(array, flow.permute(1, 2, 0).numpy())
    write_bytes(out / "flow.npy", array.getvalue())
    with whole_file(out / "warped.png") as partial:
        Image.fromarray(visualize.flow_warp(trg, flow).permute(1, 2, 0).numpy()).save(partial, "PNG")
    picture = visualize.save_figure(visualize.draw_flow([src], [flow]), out / "flow.png")
    return [out / "flow.npy", visualize.write_flo(flow, out / "flow.flo"), picture, out / "warped.png"]
