"""`corrzoo match`: points of one image found in another, as a picture and as numbers."""

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
from corrzoo.inference import GRID, ROUND_TRIP, ImagePair, open_pair

ABOUT = f"""Find points of one image in another.

Coordinates are (x, y) in pixels of the images as they are shown (upright, if the camera was turned): (0, 0) is the
top-left corner of the top-left pixel, whose centre is (0.5, 0.5). Without --points, those of a grid of
{GRID} x {GRID} points are answered whose match is matched back to within {ROUND_TRIP:g} of a grid step.

Without --ckpt nothing is trained: the Baseline on ImageNet features (pip install "corrzoo[offline]").
"""
DENSE = """also write the flow and what it makes: flow.npy (H, W, 2) float32 and flow.flo (Middlebury) hold (dx, dy) for
each pixel of A, so that the pixel in column x and row y of A, whose centre is (x + 0.5, y + 0.5), has its match at
(x + 0.5 + dx, y + 0.5 + dy) in pixels of B; flow.png shows it; warped.png is B pulled into the frame of A by it"""


def main(args: list[str]) -> None:
    """Run the command."""
    parser = Parser(prog="corrzoo match", description=ABOUT)
    parser.add_argument("a", help="image whose points are asked for")
    parser.add_argument("b", help="image in which they are found")
    parser.add_argument("--points", help="points of A, such as '120,80; 200.5,91'")
    parser.add_argument("--out", default="matches", help="folder to write into (matches)")
    parser.add_argument("--format", choices=("json", "csv"), default="json", help="of the matches (json)")
    parser.add_argument("--dense", action="store_true", help=DENSE)
    add_model(parser)
    said = parser.parse_args(args)
    points = None if said.points is None else parse_points(said.points)
    images = as_rgb(said.a), as_rgb(said.b)  # before the model is loaded
    pair = open_pair(matcher_of(said), *images)
    found = pair.confident_matches() if points is None else pair.match_both_ways(points)

    out = Path(said.out)
    rows = [
        {"src_x": x, "src_y": y, "trg_x": u, "trg_y": v, "round_trip": back}
        for (x, y), (u, v), back in zip(*(np.round(field.numpy(), 3).tolist() for field in found), strict=True)
    ]
    if said.format == "csv":
        write_csv(out / "matches.csv", rows)
    else:
        options = dict(pair.matcher.hparams)
        write_json(
            out / "matches.json",
            {
                "src": {"path": said.a, "size": pair.src.size},
                "trg": {"path": said.b, "size": pair.trg.size},
                "model": {"head": type(pair.matcher).__name__, "backbone": options["backbone"], "ckpt": said.ckpt},
                "matches": rows,
            },
        )
    src, trg = pixels(pair.src), pixels(pair.trg)
    figure = visualize.draw_matches([src], [trg], [found.src_points], [found.trg_points])
    written = [out / f"matches.{said.format}", visualize.save_figure(figure, out / "matches.png")]
    if said.dense:
        written += write_dense(pair, out)
    print(f"{len(rows)} matches: {', '.join(map(str, written))}")


def parse_points(text: str) -> list[list[float]]:
    """Points (x, y) from `x,y; x,y`.

    Raises:
        ZooError: for anything else.
    """
    try:
        points = [[float(number) for number in point.split(",")] for point in text.strip("; ").split(";")]
    except ValueError:
        points = []
    if not points or any(len(point) != 2 for point in points):
        raise ZooError(f"--points {text!r}: expected x,y; x,y; ... such as '120,80; 200.5,91'")
    return points


def write_dense(pair: ImagePair, out: Path) -> list[Path]:
    """The flow as .npy and .flo, its picture, and the target image warped by it: see DENSE."""
    flow, src, trg = pair.flow(), pixels(pair.src), pixels(pair.trg)
    np.save(out / "flow.npy", flow.permute(1, 2, 0).numpy())
    Image.fromarray(visualize.flow_warp(trg, flow).permute(1, 2, 0).numpy()).save(out / "warped.png")
    picture = visualize.save_figure(visualize.draw_flow([src], [flow]), out / "flow.png")
    return [out / "flow.npy", visualize.write_flo(flow, out / "flow.flo"), picture, out / "warped.png"]


def pixels(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
