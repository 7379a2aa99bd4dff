"""Result files and published numbers, put side by side where they can be compared."""

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, NoReturn

from corrzoo.errors import ZooError

LEVELS = {
    "viewpoint": ("easy", "medium", "hard"),
    "scale": ("easy", "medium", "hard"),
    "truncation": ("none", "source", "target", "both"),
    "occlusion": ("none", "source", "target", "both"),
}
"""What SPair-71k calls its difficulty flags 0, 1, ..."""
NEEDED = {"head": str, "backbone": str, "dataset": str, "split": str, "protocol": str, "alphas": list}
"""What makes a JSON file a result, beside its scores."""
TRANSFER = {
    "LT-ACC polygon": "lt_acc_polygon",
    "IoU polygon": "iou_polygon",
    "LT-ACC mask": "lt_acc_mask",
    "IoU mask": "iou_mask",
}
"""Caltech-101's measures, and their keys in a result."""
SHARED = "study dataset split protocol alphas pairs dataset_options flaw fingerprint".split()
"""What the runs of a ranking have in common; `fingerprint` is of all pairs, and version 0.1.0 did not write it."""
RUN = "label head options backbone weights resolution precision device params_head params_backbone".split()
"""What tells one configuration from another within a ranking, beside what was learnt from; no seed, no date."""
SPLITS = {"trn", "train", "val", "test"}
PAPERS = "paper table method head variant config backbone resolution train dataset split threshold metric".split()


class Spread(NamedTuple):
    """A number over the seeds: mean, and sample standard deviation where there are two or more."""

    mean: float
    deviation: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(fmean(values), stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.deviation:.1f}" if self.deviation is not None else "")


@dataclass
class Row:
    """A configuration that was measured, or a method that a paper lists."""

    head: str
    backbone: str
    variant: str
    trained: str
    """The dataset that was learnt from, or "nothing"; empty where it is not known."""
    resolution: str
    runs: int = 0
    device: str = ""
    costs: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Spread] = field(default_factory=dict)
    """In percent, by measure: "PCK @0.1", ..."""
    published: dict[str, float] = field(default_factory=dict)
    source: str = ""
    """Of what was published: paper and table."""
    groups: dict[tuple[str, str], dict[str, Spread]] = field(default_factory=dict)
    """By measure for ("category", "bus"), ("scale", "hard"), ...; measured where the row is."""

    def difference(self, measure: str) -> float | None:
        """Measured - published, where there are both."""
        both = measure in self.measured and measure in self.published
        return self.measured[measure].mean - self.published[measure] if both else None


class Ranking(NamedTuple):
    """Rows that can be compared: one dataset, one protocol, the same pairs and measures."""

    study: str
    """The folder of its files; "published" for the papers' tables."""
    dataset: str
    split: str
    protocol: str
    measures: list[str]
    pairs: int | None
    options: str
    """The dataset's own, as JSON."""
    flaw: str
    """What is wrong with the protocol."""
    rows: list[Row]

    @property
    def headline(self) -> str:
        """The measure that ranks: the field's PCK @0.1, or else the last, which has the largest tolerance."""
        return "PCK @0.1" if "PCK @0.1" in self.measures else self.measures[-1]


def find_results(paths: Sequence[Path]) -> list[Path]:
    """The JSON files among and under `paths`.

    Raises:
        ZooError: when there are none.
    """
    files = sorted({file for path in paths for file in (path.rglob("*.json") if path.is_dir() else [path])})
    if not files:
        listed = ", ".join(map(str, paths))
        raise ZooError(
            f"no result files under {listed}: `lightning test` leaves results/<dataset>.json in a run's folder"
        )
    return files


def read_results(files: Iterable[Path], warn: Callable[[str], None]) -> list[dict[str, Any]]:
    """What the files hold, each with its `path` and `study`; `warn` is told of files that are no results."""
    results = []
    for path in files:
        try:
            result = json.loads(path.read_text(), parse_constant=_no_number)
            _check(result)
            result |= {"path": str(path), "study": path.resolve().parent.name, "dataset_options": _of_split(result)}
            rank([result])
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, OSError) as error:
            warn(f"{path} is skipped, it is no result file: {error}")
        else:
            results.append(result)
    return results


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"it says {constant}")


def _check(result: Any) -> None:
    if not isinstance(result, dict):
        raise ValueError(f"it holds a {type(result).__name__}")
    for name, kind in NEEDED.items():
        if not isinstance(result.get(name), kind):
            raise ValueError(f"it has no {name!r}")
    if not all(isinstance(value, int | float) for value in scores(result).values()):
        raise ValueError("its scores are no numbers")


def _of_split(result: dict[str, Any]) -> dict[str, Any]:
    """The dataset's options as far as they concern the split: of what is given by split, as a length, its own."""
    given = (result.get("dataset_options") or {}).items()
    by_split = {name for name, value in given if isinstance(value, dict) and value.keys() <= SPLITS}
    said = {name: value.get(result["split"]) if name in by_split else value for name, value in given}
    return {name: value for name, value in said.items() if value is not None}


def scores(result: dict[str, Any]) -> dict[str, float]:
    """A result's numbers by measure."""
    if "label_transfer" in result:
        return {measure: result["label_transfer"][key] for measure, key in TRANSFER.items()}
    return {f"PCK @{alpha:g}": result["pck"][f"pck@{alpha:g}"] for alpha in sorted(result["alphas"])}


def rank(results: Iterable[dict[str, Any]], papers: Sequence[dict[str, str]] = ()) -> list[Ranking]:
    """What was measured: comparable runs are in one ranking, those that differ in the seed alone in one row.

    Args:
        results: From `read_results`.
        papers: From `read_papers`, for the published number beside the measured one of the same thing.

    Raises:
        ZooError: for several versions of the zoo in a ranking, and for a run that is there twice.
    """
    rankings: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        rankings[json.dumps([result.get(k) for k in SHARED], sort_keys=True)].append(result)
    out = []
    for found in rankings.values():
        one, rows = found[0], _rows(found, papers)
        options = json.dumps(one["dataset_options"], sort_keys=True) if one.get("dataset_options") else ""
        names = one["study"], one.get("dataset_title") or one["dataset"], one["split"], one["protocol"]
        out.append(Ranking(*names, list(scores(one)), one.get("pairs"), options, str(one.get("flaw") or ""), rows))
    for ranking in out:
        ranking.rows.sort(key=lambda row: (-row.measured[ranking.headline].mean, row.head, row.backbone, row.variant))
    return sorted(out, key=lambda ranking: (ranking.study, ranking.dataset, ranking.protocol, ranking.options))


def _rows(results: Sequence[dict[str, Any]], papers: Sequence[dict[str, str]]) -> list[Row]:
    versions = {result.get("versions", {}).get("corrzoo"): result["path"] for result in results}
    if len(versions) > 1:
        (one, path), (other, its_path), *_ = versions.items()
        raise ZooError(f"{path} is of corrzoo {one} and {its_path} of {other}: measure again, or leave one out")
    runs: dict[str, dict[Any, dict[str, Any]]] = defaultdict(dict)
    for result in results:
        seeds, seed = runs[_identity(result)], result.get("seed")
        if seed in seeds:
            raise ZooError(f"{result['path']} is {seeds[seed]['path']} again, seed {seed}: keep one, or label them")
        seeds[seed] = result
    seeds_of = [list(seeds.values()) for seeds in runs.values()]
    variants = _variants([seeds[0] for seeds in seeds_of])
    return [_row(seeds, variant, papers) for seeds, variant in zip(seeds_of, variants, strict=True)]


def _identity(result: dict[str, Any]) -> str:
    learnt = {k: v for k, v in (result.get("trained") or {}).items() if k not in ("seed", "steps")}
    if isinstance(learnt.get("options"), dict):  # drawings have a seed as well
        learnt["options"] = {k: v for k, v in learnt["options"].items() if k != "seed"}
    return json.dumps([[result.get(k) for k in RUN], learnt, bool(result.get("checkpoint"))], sort_keys=True)


def _variants(runs: Sequence[dict[str, Any]]) -> list[str]:
    """A run's label; without one, what of it is not so in most unlabelled runs of its head and backbone."""
    usual: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for run in runs:
        for name, value in _options(run) if not run.get("label") else ():
            usual[run["head"], run["backbone"], name][value] += 1

    def odd(run: dict[str, Any], name: str, value: str) -> bool:
        counts = usual[run["head"], run["backbone"], name]
        return 2 * counts[value] <= counts.total()

    return [
        str(run.get("label") or "") or ", ".join(f"{k}={v}" for k, v in _options(run) if odd(run, k, v)) for run in runs
    ]


def _options(run: dict[str, Any]) -> list[tuple[str, str]]:
    apart = ("backbone", "protocol", "alphas", "dataset", "seed", "steps")  # are shown otherwise, or say nothing
    said = {"precision": run.get("precision")} | (run.get("trained") or {}) | run.get("options", {})
    return [(name, str(value)) for name, value in said.items() if name not in apart]


def _row(seeds: Sequence[dict[str, Any]], variant: str, papers: Sequence[dict[str, str]]) -> Row:
    first = seeds[0]
    trained, options = first.get("trained"), first.get("options", {})
    resize = options.get("backbone_size", options.get("resize"))  # resize: its name in version 0.1.0
    row = Row(
        first["head"],
        first["backbone"],
        variant,
        trained["dataset"] or "" if trained else "" if first.get("checkpoint") else "nothing",
        _side(resize if type(resize) is int else first.get("resolution")),  # True says: to what the head needs
        len(seeds),
        str(first.get("device", "")),
        {k: fmean(r[k] for r in seeds) for k in ("ms_per_pair", "peak_memory_mb") if all(r.get(k) for r in seeds)},
        {measure: Spread.of([scores(r)[measure] for r in seeds]) for measure in scores(first)},
        groups=_groups(seeds),
    )
    row.costs |= {k: first[k] / 1e6 for k in ("params_head", "params_backbone") if k in first}
    label, kind = first.get("label", ""), first["protocol"].rpartition(":")[2]
    same = {"head": row.head, "backbone": row.backbone, "dataset": first["dataset"], "split": first["split"]}
    same |= {"threshold": kind, "train": row.trained, "metric": "PCK", "category": "", "difficulty": ""}
    for paper in papers if row.trained else ():
        # an ablation is known by the name of the file in zoo_configs that asks for it
        it = label == paper["config"] if label else not (variant or paper["variant"])
        if it and paper["resolution"] in ("", row.resolution) and all(paper[k] == v for k, v in same.items()):
            row.published.setdefault(f"PCK @{paper['alpha']}", float(paper["value"]))
            row.source = row.source or f"{paper['paper']}, {paper['table']}"
    return row


def _groups(seeds: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Spread]]:
    """The measures by category and by difficulty, averaged within a group as they are over all pairs."""
    within = "point" if "point" in seeds[0].get("average", "image") else "image"
    keys = {measure: TRANSFER.get(measure, f"pck@{measure[5:]}/{within}") for measure in scores(seeds[0])}
    values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in seeds:
        for kind, groups in result.get("breakdown", {}).items():
            levels = LEVELS.get(kind)
            for name, found in groups.items():
                if levels is None or name.isdigit():  # ">0" holds the same pairs once more
                    for measure, key in keys.items():
                        values[kind, levels[int(name)] if levels else name][measure].append(found[key])
    return {group: {m: Spread.of(v) for m, v in by_measure.items()} for group, by_measure in values.items()}


def read_papers(path: Path) -> list[dict[str, str]]:
    """The rows of papers.csv; benchmarks/papers.md says what its columns hold.

    Raises:
        ZooError: when there is no such file, or it lacks a column.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file, restval=""))
    except FileNotFoundError as error:
        raise ZooError(f"no published numbers at {path}: give --papers the file, or '' to go without") from error
    for name in (*PAPERS, "alpha", "category", "difficulty", "value"):
        if not rows or name not in rows[0]:
            raise ZooError(f"{path} has no column {name!r}, see benchmarks/papers.md")
    for row in rows:
        if not re.fullmatch(r"\d+(\.\d+)?", row["value"]):
            raise ZooError(f"{path}: the value {row['value']!r} of {row['paper']}, {row['table']} is no number")
    return rows


def rank_papers(papers: Iterable[dict[str, str]]) -> list[Ranking]:
    """What papers print of whole methods, a ranking for each dataset and threshold.

    Where a paper prints a number of the same thing twice, the first counts.
    """
    tables: dict[tuple[str, str], dict[tuple[str, ...], Row]] = defaultdict(dict)
    parameters: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for paper in papers:
        value, who = float(paper["value"]), tuple(paper[k] for k in ("paper", "method", "backbone", "resolution"))
        if paper["metric"] in ("params head", "params backbone"):
            parameters[who].setdefault(paper["metric"].replace(" ", "_"), value)
        if paper["metric"] != "PCK" or paper["variant"]:
            continue
        # the papers mark who was run again with another backbone, which has a column here
        name = paper["head"] or paper["method"].rstrip("‡*" if "_" in paper["backbone"] else "")
        new = Row(name, paper["backbone"], "", paper["train"], paper["resolution"], costs=parameters[who])
        row = tables[paper["dataset"], paper["threshold"]].setdefault((*who, paper["train"]), new)
        measure, (kind, _, level) = f"PCK @{paper['alpha']}", paper["difficulty"].partition(" ")
        if paper["category"]:
            kind, level = "category", paper["category"]
        if kind:
            row.groups.setdefault((kind, level), {}).setdefault(measure, Spread(value))
        else:
            row.published.setdefault(measure, value)
            row.source = row.source or f"{paper['paper']}, {paper['table']}"
    out = []
    for (dataset, threshold), found in tables.items():
        rows = _merged(found.values())
        measures = sorted({measure for row in rows for measure in row.published})
        ranking = Ranking("published", dataset, "test", f"published:{threshold}", measures, None, "", "", rows)
        at = ranking.headline
        rows.sort(key=lambda row: (-row.published.get(at, 0.0), row.head, row.backbone))
        out.append(ranking)
    return out


def _merged(rows: Iterable[Row]) -> list[Row]:
    """Papers copy numbers from each other: rows that do not contradict each other and share a number become one."""
    out: list[Row] = []
    said = ("backbone", "resolution", "trained")
    for row in rows:
        for other in out:
            same = all(getattr(row, k) == getattr(other, k) or "" in (getattr(row, k), getattr(other, k)) for k in said)
            both = row.published.keys() & other.published.keys()
            if row.head == other.head and same and both and all(row.published[m] == other.published[m] for m in both):
                other.published, other.groups = row.published | other.published, row.groups | other.groups
                other.costs = row.costs | other.costs
                for k in said:
                    setattr(other, k, getattr(other, k) or getattr(row, k))
                break
        else:
            out.append(row)
    return out


def _side(size: Any) -> str:
    """A network image's size as papers.csv has it: 224, or 224x320 for height and width."""
    if isinstance(size, list):
        return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
    return "" if size is None else str(size)
