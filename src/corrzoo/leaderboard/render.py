"""Rankings as Markdown, CSV and one HTML page."""

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from corrzoo.leaderboard.rows import Ranking, Row, Spread
from corrzoo.tables import csv_text, markdown

COSTS = {
    "ms_per_pair": ("ms / pair", ",.1f"),
    "params_head": ("head params (M)", ",.3f"),
    "params_backbone": ("backbone params (M)", ",.3f"),
    "peak_memory_mb": ("memory (MB)", ",.0f"),
}
"""Column title and number format of each cost."""
FORMATS = dict(COSTS.values()) | {"published": ".1f", "difference": "+.1f"}
WORDS = {
    "spair71k": "SPair-71k",
    "pfpascal": "PF-PASCAL",
    "pfwillow": "PF-WILLOW",
    "cub": "CUB-200-2011",
    "caltech101": "Caltech-101",
    "ap10k": "AP-10K",
    "spair71k_u": "SPair-U",
    "synthetic": "synthetic pairs",
    "synthetic_warps": "synthetic warps",
    "voc_warps": "warps of VOC 2012",
    "none": "training-free (zero-shot)",
}
"""Names of datasets and kinds of supervision, for readers."""
IN_HEADING = {
    "supervision": "supervision: {}",
    "trained on": "trained on {}",
    "pairs seen": "{} training pairs seen",
    "px": "{} px",
    "seeds": "seeds: {}",
    "device": "device: {}",
}
"""Columns that a ranking's heading replaces if all rows agree, and how it states the value."""
FOLD = 12
"""Markdown folds longer tables."""


def tabulate(ranking: Ranking) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """What all rows share, in words; the titles of the other columns that are not empty; and the cells of each row."""
    rows, shared, titles = [_cells(row, ranking) for row in ranking.rows], [], []
    for title in rows[0]:
        texts = {text_of(title, row[title]) for row in rows}
        if title in IN_HEADING and len(rows) > 1 and len(texts) == 1 and "" not in texts:
            shared.append(IN_HEADING[title].format(*texts))
        elif texts != {""}:
            titles.append(title)
    return shared, titles, rows


def _cells(row: Row, ranking: Ranking) -> dict[str, Any]:
    short = {measure: measure.removeprefix("PCK ") for measure in ranking.measures}
    return {
        "#": row.place,
        "method": row.head,
        "backbone": row.backbone,
        "variant": row.variant,
        "supervision": in_full(row.supervision),
        "trained on": in_full(row.trained),
        "pairs seen": row.pairs_seen,
        "px": row.resolution,
        "seeds": row.runs or None,
        **{measure: row.measured.get(measure) for measure in short},
        **{f"published {name}": row.published.get(measure) for measure, name in short.items()},
        **{f"difference {name}": row.difference(measure) for measure, name in short.items()},
        **{COSTS[cost][0]: row.costs.get(cost) for cost in ("ms_per_pair", "params_head")},  # plots show the others
        "source": row.source,
        "device": row.device,
    }


def text_of(title: str, value: Any) -> str:
    """A cell as text; empty if there is no value."""
    if isinstance(value, int | float):
        return format(value, FORMATS.get(title) or FORMATS.get(title.partition(" ")[0], ","))
    return "" if value is None else str(value)


def in_full(name: str) -> str:
    """Name of a dataset or kind of supervision for readers: "cub (100 species)" -> "CUB-200-2011 (100 species)"."""
    word, *note = name.split(" ", 1)
    return " ".join([WORDS.get(word, word), *note])


def heading_of(ranking: Ranking) -> tuple[str, list[str]]:
    """The dataset with its options; and origin, split, number of pairs, and protocol or threshold."""
    title = ", ".join(filter(None, [in_full(ranking.dataset), in_words(ranking.options)]))
    if not ranking.rows[0].runs:
        return title, ["published", f"{ranking.split} split", ranking.protocol.replace("published:", "threshold ")]
    pairs = [f"{ranking.pairs} pairs"] if ranking.pairs else []
    return title, [f"measured, study {ranking.study}", f"{ranking.split} split", *pairs, f"protocol {ranking.protocol}"]


def in_words(options: dict[str, Any]) -> str:
    """Options as words: {"length": 400, "noise": {"blur": 2}} -> "length 400, noise blur 2"."""
    phrases = []
    for name, value in options.items():
        value = in_words(value) if isinstance(value, dict) else value
        value = " ".join(map(str, value)) if isinstance(value, list) else value
        phrases.append(name.replace("_", " ") + ("" if value is True else f" {value}"))
    return ", ".join(phrases)


def to_markdown(rankings: Sequence[Ranking]) -> str:
    """A heading and a table for each ranking. Long tables and those of synthetic datasets are folded."""
    lines = []
    for ranking in rankings:
        (title, details), (shared, titles, rows) = heading_of(ranking), tabulate(ranking)
        flaw = [f"flaw: {ranking.flaw}"] if ranking.flaw else []
        lines += [f"### {_plain(title)}", "", _plain(", ".join([*details, *shared, *flaw])), ""]
        folded = len(rows) > FOLD or ranking.dataset.startswith("synthetic")
        lines += [f"<details><summary>{len(rows)} rows</summary>", ""] if folded else []
        numbers = [k for k, name in enumerate(titles) if any(_number(row[name]) is not None for row in rows)]
        lines += [markdown(titles, ([_plain(text_of(t, row[t])) for t in titles] for row in rows), numbers), ""]
        lines += ["</details>", ""] if folded else []
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text in one line that Markdown shows as it is."""
    return re.sub(r"([\\`*<\[])", r"\\\1", " ".join(text.split()))


def to_csv(rankings: Sequence[Ranking]) -> str:
    """A line for each measured row, measure and group: all pairs, then each category, difficulty and geometry."""
    lines = []
    for ranking, row in ((one, row) for one in rankings for row in one.rows):
        line = {k: getattr(ranking, k) for k in "study dataset split protocol pairs".split()}
        line["options"] = in_words(ranking.options)
        line |= {k: getattr(row, k) for k in "place head backbone variant supervision trained pairs_seen".split()}
        line |= {k: getattr(row, k) for k in "resolution device runs".split()} | {k: row.costs.get(k) for k in COSTS}
        for (group, level), scores in ({("", ""): row.measured} | row.groups).items():
            for measure, (mean, deviation) in scores.items():
                line |= {"measure": measure, "group": group, "level": level, "measured": mean, "deviation": deviation}
                line["published"] = None if group else row.published.get(measure)
                line["difference"] = None if group else row.difference(measure)
                line["source"] = "" if group else row.source
                lines.append({key: _no_formula(value) for key, value in line.items()})
    return csv_text(lines)


def _no_formula(value: Any) -> Any:
    """Quote text that a spreadsheet would execute."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def to_html(rankings: Sequence[Ranking]) -> str:
    """One page that needs no other file and no network. Its script builds tables and plots from the data in it."""

    def order(ranking: Ranking) -> tuple[bool, ...]:  # SPair-71k as published, measured, other published, synthetic
        published, spair = not ranking.rows[0].runs, ranking.dataset == "spair71k"
        return ranking.dataset.startswith("synthetic"), not (published and spair), published, not spair

    data = [_data(ranking) for ranking in sorted(rankings, key=order)]
    titles = {cost: title for cost, (title, _) in COSTS.items()}
    page = (files("corrzoo.leaderboard") / "page.html").read_text(encoding="utf-8")
    return page.replace("{{data}}", json.dumps({"costs": titles, "rankings": data}).replace("<", "\\u003c"))


def _data(ranking: Ranking) -> dict[str, Any]:
    (title, details), (shared, titles, rows) = heading_of(ranking), tabulate(ranking)
    return {
        "dataset": in_full(ranking.dataset),
        "protocol": ranking.protocol,
        "title": title,
        "details": [*details, *shared],
        "flaw": ranking.flaw,
        "folded": ranking.dataset.startswith("synthetic"),
        "headline": ranking.headline,
        "titles": titles,
        "rows": [
            {
                "head": row.head,
                "backbone": row.backbone,
                "variant": row.variant,
                "supervision": in_full(row.supervision) * (row.runs > 0),
                "cells": [[text_of(name, cells[name]), _number(cells[name])] for name in titles],
                "scores": {measure: spread.mean for measure, spread in row.measured.items()} or row.published,
                "groups": [[*group, {m: spread.mean for m, spread in v.items()}] for group, v in row.groups.items()],
                "costs": row.costs,
            }
            for row, cells in zip(ranking.rows, rows, strict=True)
        ],
    }


def _number(value: Any) -> float | None:
    """The number that a cell is sorted by; None for text and for empty cells."""
    return value.mean if isinstance(value, Spread) else value if isinstance(value, int | float) else None
