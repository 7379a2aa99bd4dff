"""`corrzoo match`: match points of one image to another, as numbers and as a picture."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from corrzoo import visualize
from corrzoo.apps import add_model, matcher_of
from corrzoo.callbacks.results import write_csv, write_json
from corrzoo.errors import Parser, ZooError
from corrzoo.images import as_rgb
from corrzoo.inference import GRID, MAX_CYCLE_ERROR, ImagePair, open_pair

ABOUT = f"""Match points of one image to another.

Coordinates are (x, y) in pixels of the original images, after EXIF rotation. (0, 0) is the top-left corner of the
top-left pixel, whose centre is (0.5, 0.5).

Without --points, a grid of {GRID} x {GRID} points is matched. Matches with a cycle error of at most {MAX_CYCLE_ERROR:g}
grid steps are kept. The cycle error is the distance between a point and its match matched back.

Without --ckpt, matching is zero-shot: the Baseline on ImageNet features (pip install "corrzoo[offline]").
"""
DENSE = """also write the dense flow: flow.npy (H, W, 2) float32 and flow.flo (Middlebury) have (dx, dy) for each pixel
of A. The pixel in column x and row y of A, whose centre is (x + 0.5, y + 0.5), matches (x + 0.5 + dx, y + 0.5 + dy) in
B. flow.png shows the flow, and warped.png is B warped to A by the flow"""


def main(args: list[str]) -> None:
    """Run the command."""
    parser = Parser(prog="corrzoo match", description=ABOUT)
    parser.add_argument("a", help="source image, whose points are matched")
    parser.add_argument("b", help="target image, in which their matches are found")
    parser.add_argument("--points", help="query points of A, such as '120,80; 200.5,91'")
    parser.add_argument("--out", default="matches", help="output folder (matches)")
    parser.add_argument("--format", choices=("json", "csv"), default="json", help="format of the matches (json)")
    parser.add_argument("--dense", action="store_true", help=DENSE)
    add_model(parser)
    options = parser.parse_args(args)
    points = None if options.points is None else parse_points(options.points)
    images = as_rgb(options.a), as_rgb(options.b)  # fail before the model is loaded
    pair = open_pair(matcher_of(options), *images)
    found = pair.confident_matches() if points is None else pair.match_both_ways(points)

    out = Path(options.out)
    rows = [
        {"src_x": x, "src_y": y, "trg_x": u, "trg_y": v, "cycle_error": error}
        for (x, y), (u, v), error in zip(*(np.round(field.numpy(), 3).tolist() for field in found), strict=True)
    ]
    if options.format == "csv":
        write_csv(out / "matches.csv", rows)
    else:
        model = {"head": type(pair.matcher).__name__, "backbone": pair.matcher.hparams.backbone, "ckpt": options.ckpt}
        src, trg = (
            {"path": path, "size": image.size} for path, image in zip((options.a, options.b), images, strict=True)
        )
        write_json(out / "matches.json", {"src": src, "trg": trg, "model": model, "matches": rows})
    figure = visualize.draw_matches([pixels(pair.src)], [pixels(pair.trg)], [found.src_points], [found.trg_points])
    written = [out / f"matches.{options.format}", visualize.save_figure(figure, out / "matches.png")]
    if options.dense:
        written += write_dense(pair, out)
    print(f"{len(rows)} matches: {', '.join(map(str, written))}")


def parse_points(text: str) -> list[list[float]]:
    """Read points (x, y) from text such as `x,y; x,y`.

    Raises:
        ZooError: if the text has another form.
    """
    try:
        points = [[float(number) for number in point.split(",")] for point in text.strip("; ").split(";")]
    except ValueError:
        points = []
    if not points or any(len(point) != 2 for point in points):
        raise ZooError(f"--points {text!r}: expected x,y; x,y; ... such as '120,80; 200.5,91'")
    return points


def write_dense(pair: ImagePair, out: Path) -> list[Path]:
    """Write the flow, its picture and the warped target image, see DENSE."""
    flow, src, trg = pair.flow(), pixels(pair.src), pixels(pair.trg)
    np.save(out / "flow.npy", flow.permute(1, 2, 0).numpy())
    Image.fromarray(visualize.flow_warp(trg, flow).permute(1, 2, 0).numpy()).save(out / "warped.png")
    picture = visualize.save_figure(visualize.draw_flow([src], [flow]), out / "flow.png")
    return [out / "flow.npy", visualize.write_flo(flow, out / "flow.flo"), picture, out / "warped.png"]


def pixels(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
