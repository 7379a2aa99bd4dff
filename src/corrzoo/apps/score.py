"""`corrzoo queries` and `corrzoo score`: the evaluation for matches that were made elsewhere, without a model."""

import argparse
import json
import os
import re
import time
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from corrzoo.callbacks.describe import describe_scores, versions
from corrzoo.data import DATASETS, create_dataset
from corrzoo.data.pairs import OPTIONS_OF_ALL, PairDataset
from corrzoo.errors import Parser, ZooError
from corrzoo.files import write_json
from corrzoo.registry import import_plugins
from corrzoo.scoring.pck import ALPHAS, PCK
from corrzoo.scoring.protocols import Protocol, get_protocol
from corrzoo.tables import read_csv, write_csv
from corrzoo.types import Record

QUERIES = """Write the query points of a dataset as a CSV file, for a method outside corrzoo.

A row is one query: `index` is its pair's number and `keypoint` its number in the pair; `x` and `y` are its place in
`query_image`, and its match is to be found in `target_image`. Points are in pixels of the stored images (EXIF rotation
is ignored); (0, 0) is the top-left corner of the top-left pixel. `part` is the dataset's number of the part, if known.
"""
SCORE = """Score the matches of any method, and write result files that `corrzoo leaderboard` ranks.

The CSV file has a row for each query of `corrzoo queries`, with the columns `index`, `keypoint`, `x` and `y`, the
match in pixels of the target image. The files that `corrzoo predict` writes have this form.
"""

SAME = ("head", "label", "dataset", "dataset_options", "split", "protocol")
"""Fields of a result file that are equal in one that may replace it."""


def add_dataset(parser: Parser) -> None:
    """Add the options that `read_dataset` reads."""
    parser.add_argument("--split", default="test", help="trn, val or test (test)")
    parser.add_argument("--root", default="data", type=Path, help="folder of the datasets (data)")
    parser.add_argument("--plugins", help="modules that register datasets, separated by commas")
    which = """options of the dataset, as JSON or YAML, such as '{"subset": "cross-species"}' of ap10k"""
    parser.add_argument("--options", default={}, type=dataset_options, help=which)


def dataset_options(text: str) -> dict[str, Any]:
    """The options of a dataset as `data.options` has them, of JSON or YAML text."""
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError:
        given = None
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise argparse.ArgumentTypeError(f"""{text!r}: expected a mapping such as '{{"subset": "cross-species"}}'""")
    for name in given.keys() & (OPTIONS_OF_ALL | {"name"}):
        raise argparse.ArgumentTypeError(f"{name!r} is no option of one dataset: leave it out")
    return given


def read_dataset(name: str, options: argparse.Namespace) -> tuple[PairDataset, list[Record]]:
    """The dataset that the options name, and its pairs.

    Raises:
        ZooError: if its images are rendered or mirrored, or its pairs have no keypoints.
    """
    if options.plugins:
        import_plugins(options.plugins)
    dataset = create_dataset(name, options.root, options.split, **options.options)
    records = [dataset.record(index) for index in range(len(dataset))] if dataset.images else []
    if not any(len(record.src_kps) for record in records) or any(record.flip for record in records):
        classes = map(DATASETS.__getitem__, DATASETS.names())
        usable = ", ".join(c.name for c in classes if c.folder and not c.outlines and "test" in c.splits)
        told = f"{name}, split {options.split}, has no image files with keypoints"
        raise ZooError(f"{told}: choose {usable}; split val or test")
    return dataset, records


def write_queries(args: list[str]) -> None:
    """Run `corrzoo queries`."""
    parser = Parser(prog="corrzoo queries", description=QUERIES)
    parser.add_argument("dataset", help="a name of `corrzoo list datasets` whose images are files")
    which = "some protocols, such as CATs', ask for the points of the other image (default)"
    parser.add_argument("--protocol", default="default", help=which)
    parser.add_argument("--out", type=Path, help="the CSV file (queries/<dataset>-<split>.csv)")
    add_dataset(parser)
    options = parser.parse_args(args)
    dataset, records = read_dataset(options.dataset, options)
    protocol = get_protocol(options.protocol, dataset.threshold)
    path = options.out or Path("queries", f"{dataset.name}-{dataset.split}.csv")
    write_csv(path, list(queries(records, protocol)))
    print(f"{len(dataset)} pairs, predicted in the {protocol.evaluated} image: {path}")


def queries(records: list[Record], protocol: Protocol) -> Iterator[dict[str, object]]:
    """The rows of `corrzoo queries`."""
    for index, record in enumerate(records):
        kps = record.src_kps if protocol.query == "src" else record.trg_kps
        paths = {"src": record.src_path, "trg": record.trg_path}
        parts = [""] * len(kps) if record.kps_ids is None else record.kps_ids.tolist()
        for keypoint, ((x, y), part) in enumerate(zip(kps.tolist(), parts, strict=True)):
            yield {
                "index": index, "keypoint": keypoint, "x": x, "y": y, "query_image": paths[protocol.query],
                "target_image": paths[protocol.evaluated], "category": record.category, "part": part,
            }  # fmt: skip


def main(args: list[str]) -> None:
    """Run `corrzoo score`."""
    parser = Parser(prog="corrzoo score", description=SCORE)
    parser.add_argument("predictions", type=Path, help="CSV file with the columns index, keypoint, x and y")
    parser.add_argument("--dataset", required=True, help="the dataset of the queries")
    parser.add_argument("--protocol", nargs="+", default=["default"], help="one or more protocols (default)")
    parser.add_argument("--method", help="name of the method in the leaderboard (the name of the file)")
    parser.add_argument("--backbone", default="", help="its backbone, for the leaderboard")
    parser.add_argument("--label", default="", help="its variant, for the leaderboard")
    parser.add_argument("--source", default="", help="where the predictions come from: a paper, an address, a commit")
    parser.add_argument("--supervision", choices=("keypoints", "weak", "none"), default="keypoints",
                        help="what it was trained with, which is how the leaderboard groups (keypoints)")  # fmt: skip
    parser.add_argument("--out", default="results", type=Path, help="folder of the result files (results)")
    add_dataset(parser)
    options = parser.parse_args(args)
    dataset, records = read_dataset(options.dataset, options)
    options.method = options.method or options.predictions.stem
    protocols = [get_protocol(name, dataset.threshold) for name in options.protocol]
    if len({protocol.evaluated for protocol in protocols}) > 1:
        names = " ".join(options.protocol)
        raise ZooError(f"--protocol {names}: some predict in the src image, others in the trg image; give one kind")
    points = read_predictions(options.predictions, records, protocols[0].evaluated)
    for protocol in protocols:
        metric = PCK(protocol, ALPHAS, dataset.categories)
        for index, (pred, record) in enumerate(zip(points, records, strict=True)):
            metric.update(pred, record, index, dataset.categories.index(record.category))
        split = "" if dataset.split == "test" else dataset.split
        which = [dataset.name, *map(str, options.options.values()), split, str(protocol)]
        words = "-".join(filter(None, [options.method, options.label, *which]))
        path = options.out / (re.sub(r"[^\w.-]+", "-", words) + ".json")
        result = about(options) | describe_scores(metric, dataset)
        write_result(path, result)
        scores = ", ".join(f"{title} {result['pck'][key]:.1f}" for title, _, key in metric.columns())
        print(f"{protocol}: {scores}: {path}")


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result file. It may replace an earlier result of the same method.

    Raises:
        ZooError: if the file has another result, as methods `a b` and `a-b` have one file name.
    """
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        found = found if isinstance(found, dict) else {}
        if any((found.get(name) or "") != (result[name] or "") for name in SAME):  # older files lack some
            told = f"{path} has another result, of {found.get('head')!r}"
            raise ZooError(f"{told}: choose another --method, --label or --out, or delete it")
    write_json(path, result)


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of a result file that a run of corrzoo knows by itself."""
    return {
        "label": options.label,
        "head": options.method,
        "backbone": options.backbone,
        "dataset_options": options.options,
        "source": options.source,
        "supervision": options.supervision,
        "predictions": os.fspath(options.predictions),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def read_predictions(path: Path, records: list[Record], evaluated: str) -> list[Tensor]:
    """(n, 2) float64 predictions of each pair.

    Raises:
        ZooError: if a query has no prediction or several, or a row is not one of the queries or not a finite point.
    """
    expected = [len(record.trg_kps) for record in records]
    points = [torch.full((n, 2), torch.nan, dtype=torch.float64) for n in expected]
    for line, row in enumerate(read_csv(path, ("index", "keypoint", "x", "y")), 2):
        try:
            index, keypoint, x, y = int(row["index"]), int(row["keypoint"]), float(row["x"]), float(row["y"])
        except (TypeError, ValueError) as error:
            told = f"{path}, line {line}: expected whole numbers index and keypoint, and numbers x and y"
            raise ZooError(told) from error
        where = f"{path}, line {line}: pair {index}, keypoint {keypoint}"
        if not (0 <= index < len(expected) and 0 <= keypoint < expected[index]):
            raise ZooError(f"{where} is not a query: see `corrzoo queries`")
        if not (isfinite(x) and isfinite(y)):
            raise ZooError(f"{where}: expected a finite point, got ({x}, {y})")
        if row.get("image") not in (None, "", evaluated):
            told = f"{where} lies in the {row['image']} image"
            raise ZooError(f"{told}, but the protocol evaluates the {evaluated} image")
        if not points[index][keypoint].isnan().all():
            raise ZooError(f"{where} is predicted twice")
        points[index][keypoint] = torch.tensor([x, y], dtype=torch.float64)
    missing = [(i, k) for i, found in enumerate(points) for k in found[:, 0].isnan().nonzero().flatten().tolist()]
    if missing:
        one = "pair {}, keypoint {}".format(*missing[0])
        raise ZooError(f"{path}: {len(missing)} of {sum(expected)} queries have no prediction, such as {one}")
    return points
