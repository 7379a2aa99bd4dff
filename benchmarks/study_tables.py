"""The study's tables, from the result files of `benchmarks/study.py`; `readme_tables.py` puts them in place."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from corrzoo.errors import ZooError
from corrzoo.files import table
from corrzoo.leaderboard.results import find_results, read_results
from corrzoo.leaderboard.rows import Spread

RESULTS, ABLATIONS = Path(__file__).parent / "results", Path(__file__).parents[1] / "zoo_configs" / "ablation"
Result = dict[str, Any]
COLUMNS: dict[str, tuple[str, str, str]] = {
    "@.05": ("", "", "0.05"),
    "@.10": ("", "", "0.1"),
    "@.15": ("", "", "0.15"),
    **{name: ("category", name, "0.1") for name in ("bird", "bottle", "car", "horse")},
    "same scale": ("scale", "0", "0.1"),
    "other scale": ("scale", "2", "0.1"),
    "turned": ("viewpoint", "2", "0.1"),
}
"""Of the synthetic study, by title: the group of pairs, and alpha."""


def heads() -> str:
    """Every head on both backbones, whole."""
    runs = by_run("synthetic")
    rows = [[*who, *cells(runs[who], scores)] for who in ranked(runs) if not ablates(who[2])]
    return table(["backbone", "head", "", *COLUMNS], rows, range(3, 3 + len(COLUMNS)))


def parts() -> str:
    """What each part of a head brings: the PCK of the whole head less that of the head without it."""
    runs, rows = by_run("synthetic"), []
    for who in runs:
        backbone, head, label = who
        if ablates(label):
            whole, without = runs[backbone, head, ""], runs[who]
            pairs = [(whole[seed], without[seed]) for seed in sorted(whole.keys() & without.keys())]
            gained = [{key: scores(a)[key] - scores(b)[key] for key in scores(a)} for a, b in pairs]
            rows.append([f"{head}, `{label}`", *cells(dict(enumerate(gained)), dict, signed=True)])
    return table(["without", *COLUMNS], rows, range(1, 1 + len(COLUMNS)))


def real() -> str:
    """PF-WILLOW: without training, and learning from three kinds of objects to meet the fourth."""
    runs, columns = by_run("pfwillow_leave_one_out"), ["@.05", "@.10", "@.15", "car", "duck", "motorbike", "winebottle"]
    rows = [[who[1] if not who[2] else "", who[2], *cells(runs[who], by_kind)] for who in ranked(runs)]
    return table(["head", "", *columns], rows, range(2, 2 + len(columns)))


def digest() -> str:
    """The synthetic study in short, for the README."""
    runs, measures = by_run("synthetic"), ("0.05", "0.1", "0.15")
    backbones, rows = sorted({backbone for backbone, _, _ in runs}), []
    for backbone, head, label in ranked(runs):
        if backbone != backbones[0] or (label and head != "Baseline"):
            continue
        found = [runs.get((each, head, label), {}) for each in backbones]
        scored = [" / ".join(cells(seeds, lambda r: {a: r["pck"][f"pck@{a}"] for a in measures})) for seeds in found]
        rows.append([f"{head}{', ' * bool(label)}{label}", *scored])
    return table(["PCK @.05 / .10 / .15", *backbones], rows, range(1, 1 + len(backbones)))


def by_run(study: str) -> dict[tuple[str, str, str], dict[int, Result]]:
    """The results of a study by backbone, head and label, and then by seed."""

    def refuse(message: str) -> None:
        raise ZooError(message)

    runs: dict[tuple[str, str, str], dict[int, Result]] = defaultdict(dict)
    for result in read_results(find_results([RESULTS / study]), refuse):
        runs[result["backbone"], result["head"], result["label"]][result["seed"]] = result
    return dict(runs)


def ranked(runs: dict[tuple[str, str, str], dict[int, Result]]) -> list[tuple[str, str, str]]:
    """The runs of each backbone, the best PCK@.10 first."""
    return sorted(runs, key=lambda who: (who[0], -fmean(r["pck"]["pck@0.1"] for r in runs[who].values())))


def ablates(label: str) -> bool:
    """Whether a label names a file of zoo_configs/ablation: `<head>_<name>` is <head>/<name>.yaml."""
    head, _, name = label.partition("_")
    return (ABLATIONS / head / f"{name}.yaml").is_file()


def scores(result: Result) -> dict[str, float]:
    """The columns of the synthetic study, in percent."""
    found = {}
    for title, (kind, group, alpha) in COLUMNS.items():
        one = result["breakdown"][kind][group] if kind else result["pck"]
        found[title] = one[f"pck@{alpha}/image"]
    return found


def by_kind(result: Result) -> dict[str, float]:
    """PCK of all pairs, and at .10 of each kind of object: its sub-classes have as many pairs each."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for category, row in result["breakdown"]["category"].items():
        kinds[category.split("(")[0]].append(row["pck@0.1/image"])
    of_all = {f"@{alpha}": result["pck"][f"pck@{alpha}"] for alpha in (0.05, 0.1, 0.15)}
    return of_all | {kind: fmean(kinds[kind]) for kind in sorted(kinds)}


def cells(seeds: dict[int, Any], values: Callable[[Any], dict[str, float]], signed: bool = False) -> list[str]:
    """Mean and sample standard deviation of each value over the seeds."""
    found = [values(result) for result in seeds.values()]
    spreads = [Spread.of([one[key] for one in found]) for key in next(iter(found), {})]
    return [f"{'+' if signed and not str(spread).startswith('-') else ''}{spread}" for spread in spreads]
