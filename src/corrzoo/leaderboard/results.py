"""Result files: read, completed, and ranked where they are comparable."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from corrzoo.errors import ZooError
from corrzoo.leaderboard.papers import add_published
from corrzoo.leaderboard.rows import SUPERVISION, Ranking, Row, Spread

SHARED = "study dataset dataset_title split protocol measures pairs dataset_options flaw fingerprint".split()
"""Fields that are equal in all result files of a ranking."""
RUN = "label head options backbone weights resolution precision device params_head params_backbone supervision".split()
"""Fields that are equal in all result files of a row, beside the training data."""
WEAK = ("GSF", "NCNet")
"""Heads that learn from images, masks or boxes, and from no keypoint."""
SPLITS = {"trn", "train", "val", "test"}
DEGREES, SIDES = ("easy", "medium", "hard"), ("none", "source", "target", "both")
LEVELS = {"viewpoint": DEGREES, "scale": DEGREES, "truncation": SIDES, "occlusion": SIDES}
"""SPair-71k's names of the difficulty levels, which result files number from 0."""


def find_results(paths: Sequence[Path]) -> list[Path]:
    """List the JSON files among and under `paths`.

    Raises:
        ZooError: if a path does not exist.
    """
    for path in paths:
        if not path.exists():
            raise ZooError(f"no such file or folder: {path}")
    # names that begin with a dot are of files that are not complete yet
    return sorted({file for path in paths for file in (path.rglob("[!.]*.json") if path.is_dir() else [path])})


def read_results(files: Iterable[Path], warn: Callable[[str], None]) -> list[dict[str, Any]]:
    """Read result files, and add the fields `path`, `study` (the folder), and those that older files lack.

    `warn` is called with a message for each file that is skipped because it is not a result file.
    """
    results = []
    for path in files:
        try:
            result = json.loads(path.read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_finite)
            result = completed(result) | {"path": str(path), "study": path.resolve().parent.name}
            json.dumps(result, ensure_ascii=False).encode()  # fails on lone surrogates, which no output file can hold
            rank([result])
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError, OSError) as error:
            warn(f"{path} skipped: not a result file ({error})")
        else:
            results.append(result)
    return results


def _finite(text: str) -> float:
    if not isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)


def completed(result: Any) -> dict[str, Any]:
    """The content of a result file with the fields that files of corrzoo 0.1.0 lack.

    Raises:
        ValueError, TypeError, AttributeError or LookupError: if it is no content of a result file.
    """
    if not isinstance(result, dict):
        raise ValueError(f"expected an object, got a {type(result).__name__}")
    result = dict(result)
    for name in ("head", "backbone", "dataset", "split", "protocol"):
        if not isinstance(result.get(name), str):
            raise ValueError(f"no text field {name!r}")
    if type(result.get("seed")) not in (int, type(None)):
        raise ValueError(f"seed {result['seed']!r} is not an integer")
    if result["dataset"] == "pfwillow_kinds":  # of benchmarks/study.py leave_one_out
        options = {"leave-one-category-out": True}
        result |= {"dataset": "pfwillow", "dataset_title": "pfwillow", "dataset_options": options}
        result["trained"] = result.get("trained") and result["trained"] | {"dataset": "pfwillow"}
    trained = result.get("trained") or result.get("checkpoint")
    supervision = ("weak" if result["head"] in WEAK else "keypoints") if trained else "none"
    average = "point" if "point" in result.get("average", "") else "image"
    alphas = [] if "measures" in result else result["alphas"]
    old = [[f"@{alpha:g}", f"pck@{alpha:g}/{average}", f"pck@{alpha:g}"] for alpha in sorted(alphas)]
    return result | {
        "measures": [[re.sub("^@", "PCK @", title), *keys] for title, *keys in result.get("measures", old)],
        "dataset_title": result.get("dataset_title") or result["dataset"],
        "dataset_options": _options_of_split(result),
        "supervision": result.get("supervision") or supervision,
    }


def _options_of_split(result: dict[str, Any]) -> dict[str, Any]:
    """The dataset's options. Of an option with a value for each split, the value of the split that was scored."""
    options = dict(result.get("dataset_options") or {})
    for name, value in options.items():
        if isinstance(value, dict) and value.keys() <= SPLITS:
            options[name] = value.get(result["split"])
    return {name: value for name, value in options.items() if value is not None}


def scores(result: dict[str, Any]) -> dict[str, float]:
    """Percent by measure. Whatever the metric, its scores are the field with the keys that `measures` names."""
    keys = {key for _, _, key in result["measures"]}
    for found in result.values() if keys else ():
        if isinstance(found, dict) and keys <= found.keys():
            return {measure: _percent(found[key]) for measure, _, key in result["measures"]}
    raise ValueError(f"no field with the scores {', '.join(sorted(keys))}")


def _percent(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 100:
        raise ValueError(f"score {value!r} is not a percentage")
    return value


def rank(results: Iterable[dict[str, Any]], papers: Sequence[dict[str, str]] = ()) -> list[Ranking]:
    """Rank results: comparable ones in one ranking, and those that differ in the seed alone in one row.

    `papers` have the published numbers beside the measured ones, see `read_papers`.

    Raises:
        ZooError: if a ranking mixes versions of corrzoo, or contains a run twice.
    """
    rankings: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        rankings[json.dumps([result.get(k) for k in SHARED], sort_keys=True)].append(result)
    out = [_ranking(found, papers) for found in rankings.values()]
    return sorted(out, key=lambda ranking: (ranking.study, ranking.dataset, ranking.protocol, str(ranking.options)))


def _ranking(results: Sequence[dict[str, Any]], papers: Sequence[dict[str, str]]) -> Ranking:
    versions = {result.get("versions", {}).get("corrzoo"): result["path"] for result in results}
    if len(versions) > 1:
        (one, path), (other, its_path), *_ = versions.items()
        raise ZooError(f"{path} is of corrzoo {one} and {its_path} of {other}: measure again, or leave one out")
    runs: dict[str, dict[int | None, dict[str, Any]]] = defaultdict(dict)
    for result in _with_switches(results):
        seeds, seed = runs[_identity(result)], result.get("seed")
        if seed in seeds:
            raise ZooError(f"{result['path']} repeats {seeds[seed]['path']}, seed {seed}: keep one, or label them")
        seeds[seed] = result
    groups = [list(seeds.values()) for seeds in runs.values()]
    variants = _variants([group[0] for group in groups])
    rows = [_row(group, variant, papers) for group, variant in zip(groups, variants, strict=True)]
    first = results[0]
    ranking = Ranking(
        study=first["study"],
        dataset=first["dataset_title"],
        split=first["split"],
        protocol=first["protocol"],
        measures=list(scores(first)),
        pairs=first.get("pairs"),
        options=first["dataset_options"],
        flaw=first.get("flaw") or "",
        rows=rows,
    )
    rows.sort(key=lambda row: (-row.measured[ranking.headline].mean, row.head, row.backbone, row.variant))
    rows.sort(key=lambda row: SUPERVISION.index(row.supervision))
    for _, group in groupby(rows, key=lambda row: row.supervision):
        for place, row in enumerate(group, 1):
            row.place = place
    return ranking


def _with_switches(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results, each with the switches that are off in others of its head, which older files may lack."""
    off: dict[str, dict[str, Any]] = defaultdict(dict)
    for result in results:
        off[result["head"]] |= {name: value for name, value in result.get("options", {}).items() if value is False}
    return [result | {"options": off[result["head"]] | result.get("options", {})} for result in results]


def _identity(result: dict[str, Any]) -> str:
    trained = {k: v for k, v in (result.get("trained") or {}).items() if k not in ("seed", "steps")}
    if isinstance(trained.get("options"), dict):  # synthetic pairs have a seed as well
        trained["options"] = {k: v for k, v in trained["options"].items() if k != "seed"}
    return json.dumps([[result.get(k) for k in RUN], trained, bool(result.get("checkpoint"))], sort_keys=True)


def _variants(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The label of each run, or else those options that most unlabelled runs of its head and backbone do not share."""
    usual: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for run in runs:
        for name, value in _options(run) if not run.get("label") else ():
            usual[run["head"], run["backbone"], name][value] += 1
    out = []
    for run in runs:
        counts = [(name, value, usual[run["head"], run["backbone"], name]) for name, value in _options(run)]
        odd = [f"{name}={value}" for name, value, count in counts if 2 * count[value] <= count.total()]
        out.append(str(run.get("label") or ", ".join(odd)))
    return out


def _options(run: dict[str, Any]) -> list[tuple[str, str]]:
    """Options that a variant may be named by: not those that have a column, nor those that change no result."""
    trained = run.get("trained") or {}
    apart = {"backbone", "protocol", "alphas", "dataset", "seed", "steps", "pairs_seen"}
    apart |= {"max_epochs", "max_steps"} if "pairs_seen" in trained else set()
    options = {"precision": run.get("precision")} | trained | run.get("options", {})
    return [(name, str(value)) for name, value in options.items() if name not in apart]


def _row(seeds: Sequence[dict[str, Any]], variant: str, papers: Sequence[dict[str, str]]) -> Row:
    first = seeds[0]
    trained, options = first.get("trained") or {}, first.get("options", {})
    size = options.get("backbone_size", options.get("resize"))  # `resize` in 0.1.0; True stands for the head's own size
    size = size if type(size) is int else first.get("resolution")
    before = trained.get("before")
    height, width = size if isinstance(size, list) else (size, size)
    row = Row(
        head=first["head"],
        backbone=first["backbone"],
        variant=variant,
        supervision=first["supervision"],
        trained=" ".join(str(part) for part in (trained.get("dataset"), before and f"(after {before})") if part),
        resolution="" if size is None else str(height) if height == width else f"{height}x{width}",
        pairs_seen=trained.get("pairs_seen"),
        runs=len(seeds),
        device=str(first.get("device", "")),
        costs={k: first[k] / 1e6 for k in ("params_head", "params_backbone") if k in first},
        measured={measure: Spread.of([scores(r)[measure] for r in seeds]) for measure in scores(first)},
        groups=_groups(seeds),
    )
    for cost in ("ms_per_pair", "peak_memory_mb"):
        if all(result.get(cost) for result in seeds):
            row.costs[cost] = fmean(result[cost] for result in seeds)
    scored = {k: first[k] for k in ("dataset", "split")} | {"threshold": first["protocol"].rpartition(":")[2]}
    add_published(row, first.get("label") or "", scored, papers)
    row.source = row.source or str(first.get("source") or "")  # of `corrzoo score`
    return row


def _groups(seeds: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Spread]]:
    """Scores of groups of pairs, averaged within a group as over all pairs."""
    values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in seeds:
        for kind, groups in result.get("breakdown", {}).items():
            for level, found in groups.items():
                if level.startswith(">"):  # a union of other groups
                    continue
                name = LEVELS[kind][int(level)] if kind in LEVELS and level.isdecimal() else level
                for measure, key, _ in result["measures"]:
                    values[kind, name][measure].append(_percent(found[key]))
    return {group: {m: Spread.of(v) for m, v in by_measure.items()} for group, by_measure in values.items()}
