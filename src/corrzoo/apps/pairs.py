"""What `corrzoo match` is asked: two images, an image and a folder, or a CSV file of pairs, with their query points."""

import os
from pathlib import Path
from typing import NamedTuple

from corrzoo.errors import ZooError
from corrzoo.tables import read_csv

SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".png", ".ppm", ".tif", ".tiff", ".webp"}
"""Names of image files in a folder end in one of these."""
Points = list[list[float]]


class Query(NamedTuple):
    """Paths of two images, and query points of the first; None for a grid."""

    src: str
    trg: str
    points: Points | None


def list_queries(a: str | None, b: str | None, pairs: str | None, points: str | None) -> list[Query]:
    """The pairs that the arguments of `corrzoo match` name. Paths in a CSV file are relative to its folder.

    Raises:
        ZooError: if no pair is named, or a file is missing or lacks a column.
    """
    common = None if points is None else read_points(points, "--points")
    if pairs and not a:
        folder = Path(pairs).parent
        return [
            Query(
                str(folder / row["src"]),
                str(folder / row["trg"]),
                read_points(row["points"], pairs, folder) if row.get("points") else common,
            )
            for row in read_csv(Path(pairs), ("src", "trg"))
        ]
    if pairs or not (a and b):
        raise ZooError("expected two images, or an image and a folder, or --pairs alone; --help lists the options")
    if not Path(b).is_dir():
        return [Query(a, b, common)]
    targets = sorted(str(path) for path in Path(b).iterdir() if path.suffix.lower() in SUFFIXES)
    if not targets:
        raise ZooError(f"no image in the folder {b}: expected files that end in {', '.join(sorted(SUFFIXES))}")
    return [Query(a, target, common) for target in targets]


def read_points(text: str, source: str, folder: Path = Path()) -> Points:
    """Read points (x, y) from text such as `x,y; x,y`, or from the CSV file of that name in `folder`.

    Raises:
        ZooError: if the text has another form; `source` is where it was given.
    """
    if os.path.isfile(folder / text):  # unlike Path.is_file, it takes text that is too long for a path
        text = "; ".join(f"{row['x']},{row['y']}" for row in read_csv(folder / text, ("x", "y")))
    try:
        points = [[float(number) for number in point.split(",")] for point in text.strip("; ").split(";")]
    except ValueError:
        points = []
    if not points or any(len(point) != 2 for point in points):
        raise ZooError(f"{source} {text!r}: expected x,y; x,y; ... such as '120,80; 200.5,91', or a CSV file")
    return points
