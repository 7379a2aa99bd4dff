"""Rankings as Markdown, CSV, LaTeX and one HTML page."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from math import inf
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from corrzoo.files import table
from corrzoo.leaderboard.results import Ranking, Row, Spread

COSTS = {
    "ms_per_pair": ("ms / pair", ",.1f"),
    "params_head": ("head, M", ",.2f"),
    "params_backbone": ("backbone, M", ",.2f"),
    "peak_memory_mb": ("MB", ",.0f"),
}
"""A row's costs: their column's title, and how a number is written."""
FOLD = 12
"""In Markdown, a table of more rows is folded."""


class Column(NamedTuple):
    """One column of a ranking."""

    title: str
    value: Callable[[Row], Any]
    """None, or an empty string, where nothing was measured or published."""
    kind: Literal["text", "number", "score"] = "text"
    form: str = ""

    def text(self, row: Row) -> str:
        """The cell."""
        value = self.value(row)
        return "" if value is None else format(value, self.form) if self.form else str(value)

    def key(self, row: Row) -> float:
        """What a number is ranked and sorted by; none comes last."""
        value = self.value(row)
        return -inf if value is None else value.mean if isinstance(value, Spread) else value


def columns(ranking: Ranking) -> list[Column]:
    """A ranking's columns, less those with nothing in them."""
    titles = {"head": "head", "backbone": "backbone", "variant": "variant", "trained": "trained on", "resolution": "px"}
    out = [Column(title, attrgetter(name)) for name, title in titles.items()]
    out += [Column("runs", lambda row: row.runs or None, "number")]
    short = {measure: measure.removeprefix("PCK ") for measure in ranking.measures}
    out += [Column(measure, _item("measured", measure), "score") for measure in short]
    out += [Column(f"published {name}", _item("published", m), "score", ".1f") for m, name in short.items()]
    out += [Column(f"difference {name}", _difference(m), "number", "+.1f") for m, name in short.items()]
    out += [Column(title, _item("costs", key), "number", form) for key, (title, form) in COSTS.items()]
    out += [Column("source", attrgetter("source"))]
    if len({row.device for row in ranking.rows}) > 1:  # then no time compares with another
        out.append(Column("device", attrgetter("device")))
    return [column for column in out if any(column.text(row) for row in ranking.rows)]


def _item(name: str, key: Any) -> Callable[[Row], Any]:
    return lambda row: getattr(row, name).get(key)


def _difference(measure: str) -> Callable[[Row], float | None]:
    return lambda row: row.difference(measure)


def title_of(ranking: Ranking) -> str:
    """What the rows of a ranking have in common."""
    pairs = f"{ranking.pairs} pairs" if ranking.pairs else ""
    return ", ".join(filter(None, [f"{ranking.dataset} {ranking.split}", pairs, ranking.protocol, ranking.options]))


def to_markdown(rankings: Sequence[Ranking]) -> str:
    """A table for each ranking, each study under its name; a long one is folded."""
    lines, study = [], ""
    for ranking in rankings:
        lines += [f"### {ranking.study}", ""] if ranking.study != study else []
        study, shown = ranking.study, [c for c in columns(ranking) if c.title not in ("backbone, M", "MB")]
        title = title_of(ranking) + (f" (flaw: {ranking.flaw})" if ranking.flaw else "")
        folded = len(ranking.rows) > FOLD
        lines += [f"<details><summary>{title}: {len(ranking.rows)} rows</summary>" if folded else title, ""]
        rows = ([str(place), *(column.text(row) for column in shown)] for place, row in enumerate(ranking.rows, 1))
        numbers = [0, *(k for k, column in enumerate(shown, 1) if column.kind != "text")]
        lines += [table(["#", *(column.title for column in shown)], rows, numbers), ""]
        lines += ["</details>", ""] if folded else []
    return "\n".join(lines)


def to_latex(rankings: Sequence[Ranking]) -> str:
    """A table for each ranking, the best score of a column in bold."""
    lines = ["% \\usepackage{booktabs}"]
    for ranking in rankings:
        shown = columns(ranking)
        best = {c.title: max(map(c.key, ranking.rows)) for c in shown if c.kind == "score"}

        def cell(column: Column, row: Row, best: dict[str, float] = best) -> str:
            text = re.sub(r"([&%$#_{}])", r"\\\1", column.text(row)).replace("±", "$\\pm$")
            return f"\\textbf{{{text}}}" if column.title in best and column.key(row) == best[column.title] else text

        lines += [
            f"\n% {ranking.study}: {title_of(ranking)}",
            f"\\begin{{tabular}}{{{''.join('l' if column.kind == 'text' else 'r' for column in shown)}}}",
            f"\\toprule\n{' & '.join(column.title for column in shown)} \\\\\n\\midrule",
            *(" & ".join(cell(column, row) for column in shown) + " \\\\" for row in ranking.rows),
            "\\bottomrule\n\\end{tabular}",
        ]
    return "\n".join(lines) + "\n"


def to_csv(rankings: Sequence[Ranking]) -> str:
    """A line for each measured row, measure and group of pairs: all, then each category and difficulty."""
    lines = []
    for ranking in rankings:
        shared = {k: getattr(ranking, k) for k in "study dataset split protocol pairs options".split()}
        for place, row in enumerate(ranking.rows, 1):
            who = {k: getattr(row, k) for k in "head backbone variant trained resolution device".split()}
            who |= {"runs": row.runs or None} | {key: row.costs.get(key) for key in COSTS}
            for measure, (mean, deviation) in row.measured.items():
                line = shared | {"place": place} | who | {"measure": measure, "group": "", "level": ""}
                numbers = {"measured": mean, "deviation": deviation, "published": row.published.get(measure)}
                lines.append(line | numbers | {"difference": row.difference(measure), "source": row.source})
                for (group, level), found in row.groups.items():
                    mean, deviation = found[measure]
                    numbers = {"measured": mean, "deviation": deviation}
                    lines.append(line | {"group": group, "level": level} | numbers)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def to_html(rankings: Sequence[Ranking]) -> str:
    """One page that needs no other file and no network."""
    page = (files("corrzoo.leaderboard") / "page.html").read_text()
    data = [
        {
            "headline": ranking.headline,
            "rows": [
                {
                    "variant": row.variant or row.source.split(",")[0] * (not row.runs),
                    "scores": {measure: spread.mean for measure, spread in row.measured.items()} or row.published,
                    "groups": [
                        [*group, {m: spread.mean for m, spread in v.items()}] for group, v in row.groups.items()
                    ],
                    "costs": row.costs,
                }
                for row in ranking.rows
            ],
        }
        for ranking in rankings
    ]
    tables = "\n".join(_section(i, ranking) for i, ranking in enumerate(rankings))
    titles = json.dumps({key: title for key, (title, _) in COSTS.items()})
    content = {"tables": tables, "costs": titles, "data": json.dumps(data).replace("<", "\\u003c")}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: content[found[1]], page)


def _section(number: int, ranking: Ranking) -> str:
    """A ranking's heading and table; the page's script adds the plots."""
    shown, (what, *rest) = columns(ranking), title_of(ranking).split(", ", 1)
    head = '<th scope="col" aria-sort="none"{}><button type="button">{}</button></th>'
    heads = [head.format("" if c.kind == "text" else ' class="n"', escape(c.title)) for c in shown]
    rows = [
        f'<tr data-head="{escape(row.head)}" data-backbone="{escape(row.backbone)}"><td class="n" data-key="{place}">'
        f"{place}</td>{''.join(_cell(column, row) for column in shown)}</tr>"
        for place, row in enumerate(ranking.rows, 1)
    ]
    flaw = f'<p class="flaw">A flaw of this protocol: {escape(ranking.flaw)}</p>' if ranking.flaw else ""
    return f"""<section data-dataset="{escape(ranking.dataset)}" data-protocol="{escape(ranking.protocol)}">
<p class="study">{escape(ranking.study)}</p>
<h2 id="t{number}">{escape(what)}{"".join(f" <span>{escape(more)}</span>" for more in rest)}</h2>
{flaw}<div class="scroll"><table aria-labelledby="t{number}">
<thead><tr>{head.format(' class="n"', "#").replace("none", "ascending")}{"".join(heads)}</tr></thead>
<tbody>
{chr(10).join(rows)}
</tbody></table></div>
<div class="plots"></div>
</section>"""


def _cell(column: Column, row: Row) -> str:
    text = escape(column.text(row))
    if column.kind == "text":
        return f'<th scope="row">{text}</th>' if column.title == "head" else f"<td>{text}</td>"
    if not text:
        return '<td class="n" data-key=""></td>'
    bar = f' bar" style="--v:{column.key(row):.1f}' if column.kind == "score" else ""
    return f'<td class="n{bar}" data-key="{column.key(row)}">{text}</td>'
