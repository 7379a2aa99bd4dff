"""Published numbers: papers.csv, and rankings of its methods."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from corrzoo.errors import ZooError
from corrzoo.leaderboard.rows import Ranking, Row, Spread
from corrzoo.tables import read_csv

PAPERS = Path(__file__).with_name("papers.csv")
COLUMNS = (
    "paper table label method variant head ablation config backbone resolution train supervision "
    "dataset split threshold metric alpha category difficulty value"
).split()

TITLES = {
    "gsf": "GSF",
    "vitsc": "ViTSC",
    "actr_poster": "ACTR poster",
    "cats_readme": "CATs, README of its code",
    "lpmflow_poster": "LPMFlow poster",
    "lpmflow_supplement": "LPMFlow supplement",
}


def read_papers(path: Path = PAPERS) -> list[dict[str, str]]:
    """Read papers.csv; docs/papers.md describes its columns.

    Raises:
        ZooError: if the file cannot be read, lacks a column, or has a value that is not a number.
    """
    rows = read_csv(path, COLUMNS)
    for row in rows:
        if not re.fullmatch(r"\d+(\.\d+)?", row["value"]):
            raise ZooError(f"{path}: the value {row['value']!r} of {row['paper']}, {row['table']} is not a number")
    return rows


def add_published(row: Row, label: str, scored: dict[str, str], papers: Iterable[dict[str, str]]) -> None:
    """Add the published numbers of the same configuration to a measured row.

    `scored` has its dataset, split and threshold. An ablation's label is the name of its file in zoo_configs.
    """
    same = scored | {"head": row.head, "backbone": row.backbone, "train": row.trained, "supervision": row.supervision}
    same |= {"metric": "PCK", "category": "", "difficulty": ""}
    for paper in papers if row.trained or row.supervision == "none" else ():
        whole = not (row.variant or paper["variant"] or paper["ablation"])
        named = label == paper["config"] if label else whole
        if named and paper["resolution"] in ("", row.resolution) and all(paper[k] == v for k, v in same.items()):
            _publish(row, f"PCK @{paper['alpha']}", paper)


def rank_papers(papers: Iterable[dict[str, str]]) -> list[Ranking]:
    """Rank whole methods, not their ablations, as the papers print them: a ranking for each dataset and threshold.

    If a paper prints a number twice, the first one counts.
    """
    tables: dict[tuple[str, str], dict[tuple[str, ...], Row]] = defaultdict(dict)
    parameters: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for paper in papers:
        value, who = float(paper["value"]), tuple(paper[k] for k in ("paper", "label", "backbone", "resolution"))
        if paper["metric"] in ("params head", "params backbone"):
            parameters[who].setdefault(paper["metric"].replace(" ", "_"), value)
        if paper["metric"] != "PCK" or paper["ablation"]:
            continue
        names = ("method", "backbone", "variant", "supervision", "train", "resolution")
        head, backbone, variant, supervision, trained, resolution = facts = tuple(paper[name] for name in names)
        new = Row(head, backbone, variant, supervision, trained, resolution, costs=parameters[who])
        row = tables[paper["dataset"], paper["threshold"]].setdefault((*who, *facts), new)
        measure, (kind, _, level) = f"PCK @{paper['alpha']}", paper["difficulty"].partition(" ")
        if paper["category"]:
            kind, level = "category", paper["category"]
        if kind:
            row.groups.setdefault((kind, level), {}).setdefault(measure, Spread(value))
        else:
            _publish(row, measure, paper)
    scored = {names: [row for row in rows.values() if row.published] for names, rows in tables.items()}
    return [_ranking(*names, _merged(rows)) for names, rows in scored.items() if rows]


def _ranking(dataset: str, threshold: str, rows: list[Row]) -> Ranking:
    measures = sorted({measure for row in rows for measure in row.published})
    ranking = Ranking("published", dataset, "test", f"published:{threshold}", measures, None, {}, "", rows)
    rows.sort(key=lambda row: (-row.published.get(ranking.headline, 0.0), row.head, row.backbone))
    for place, row in enumerate(rows, 1):
        row.place = place
    return ranking


def _merged(rows: Iterable[Row]) -> list[Row]:
    """Merge rows of one method that share a score and contradict each other in nothing: papers repeat each other."""
    out: list[Row] = []
    for row in rows:
        for other in out:
            both = row.published.keys() & other.published.keys()
            facts = [(getattr(row, k), getattr(other, k)) for k in ("backbone", "resolution", "trained", "supervision")]
            fits = all(a == b or "" in (a, b) for a, b in facts) and row.variant == other.variant
            if row.head == other.head and fits and both and all(row.published[m] == other.published[m] for m in both):
                other.backbone, other.resolution, other.trained, other.supervision = (b or a for a, b in facts)
                if row.published.keys() - other.published.keys() or row.costs.keys() - other.costs.keys():
                    other.source = _joined(other.source, row.source)
                other.published, other.groups = row.published | other.published, row.groups | other.groups
                other.costs = row.costs | other.costs
                break
        else:
            out.append(row)
    return out


def _publish(row: Row, measure: str, paper: dict[str, str]) -> None:
    """Add a paper's number and its source: paper and table, and the method's name there if it differs."""
    if measure not in row.published:
        row.published[measure] = float(paper["value"])
        label = f" ({paper['label']})" if paper["label"] != paper["method"] else ""
        row.source = _joined(row.source, f"{TITLES.get(paper['paper'], paper['paper'])}, {paper['table']}{label}")


def _joined(*sources: str) -> str:
    return "; ".join(dict.fromkeys(part for source in sources if source for part in source.split("; ")))
