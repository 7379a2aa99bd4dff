"""Tables and the picture of the study, from the result files of `study.py`; `readme_tables.py` puts them in place."""

import json
from collections import defaultdict
from statistics import fmean
from typing import Any

import study
from corrzoo.leaderboard.rows import Spread
from corrzoo.scoring.pck import ALPHAS
from corrzoo.tables import markdown

NAMES = {
    "mirrorguided": "MirrorGuided",
    "geoaware": "GeoAware",
    "vitsc": "ViTSC",
    "lpmflow": "LPMFlow",
    "actr": "ACTR",
    "transformatcher": "TransforMatcher",
    "cats": "CATs",
    "baseline": "Baseline",
    "gsf": "GSF",
    "ncnet": "NCNet",
}
"""Heads in the order of the rows: the zoo's own, those with published SPair-71k scores, and last those
that need no keypoints."""
LEARNS = dict.fromkeys(NAMES, "keypoints") | {"gsf": "images, boxes or masks", "ncnet": "images"}
SEEDS = {"cub_frozen": (0, 1, 2), "cub_finetuned": (0,), "synthetic": (0,), "leave_one_out": (0,)}
"""Seeds that a complete study has."""
TITLES = {
    "cub_frozen": "photographs (CUB), frozen features",
    "cub_finetuned": "photographs (CUB), fine-tuned backbone",
    "synthetic": "synthetic pairs, fine-tuned backbone",
    "leave_one_out": "PF-WILLOW, leave one category out",
}
MISSING, NOTHING = "not run yet", "nothing to train"
SCORES = "PCK @.05 / .10 / .15"
Result = dict[str, Any]
Seeds = dict[int, Result]


def read(name: str) -> dict[str, Seeds]:
    """Results of a study by run, such as `actr`, `actr_no_multi_path` or `actr_untrained`, then by seed."""
    runs: dict[str, Seeds] = defaultdict(dict)
    for path in sorted((study.RESULTS / name).glob("*.json")):
        run, _, seed = path.stem.rpartition("-")
        runs[run][int(seed)] = json.loads(path.read_text())
    return runs


# ---------------------------------------------------------------------- tables


def both() -> dict[str, str]:
    """The tables of README.md and of docs/study.md, by marker."""
    return {"photographs": photographs(), "synthetic": synthetic()}


def page() -> dict[str, str]:
    """The other tables of docs/study.md, by marker."""
    made = (missing, transfer, curves, parts, left_out, rates)
    return {function.__name__: function() for function in made}


def photographs() -> str:
    """CUB: every head untrained, trained on frozen features, and trained with the backbone."""
    frozen, finetuned = read("cub_frozen"), read("cub_finetuned")
    rows = [
        [
            title,
            LEARNS[head],
            scores(frozen, f"{head}_untrained"),
            trained("cub_frozen", head, frozen),
            scores(finetuned, head),
        ]
        for head, title in NAMES.items()
    ]
    return markdown([SCORES, "learns from", "untrained", "frozen features", "fine-tuned backbone"], rows, (2, 3, 4))


def synthetic() -> str:
    """Synthetic pairs: every head untrained, and trained with the backbone."""
    runs = read("synthetic")
    rows = [
        [title, LEARNS[head], scores(runs, f"{head}_untrained"), scores(runs, head)] for head, title in NAMES.items()
    ]
    return markdown([SCORES, "learns from", "untrained", "fine-tuned backbone"], rows, (2, 3))


def transfer() -> str:
    """PF-WILLOW, all pairs, and PCK @.10 of the ducks: every head untrained, and after training on CUB."""
    frozen, finetuned = read("cub_frozen_pfwillow"), read("cub_finetuned_pfwillow")
    rows = []
    for head, title in NAMES.items():
        cells = [title]
        for group in ("", "duck"):
            untrained, after = scores(frozen, f"{head}_untrained", group), trained("cub_frozen", head, frozen, group)
            cells += [untrained, after, scores(finetuned, head, group)]
        rows.append(cells)
    columns = [f"{group}{state}" for group in ("", "ducks, ") for state in ("zero-shot", "frozen", "fine-tuned")]
    return markdown([f"{SCORES}; ducks @.10", *columns], rows, range(1, 7))


def curves() -> str:
    """PCK @.10 of validation pairs by the number of training pairs seen, the mean over seeds."""
    rows = []
    marks = [mark for mark in study.MARKS if mark <= study.PAIRS]
    steps = [mark // study.BATCH * study.BATCH for mark in marks]  # scored after whole batches
    for name in ("cub_frozen", "cub_finetuned", "synthetic"):
        runs = read(name)
        for head, title in NAMES.items():
            if found := runs.get(head):
                points = curve(found)
                rows.append([TITLES[name], title, *(f"{points[seen]:.1f}" if seen in points else "" for seen in steps)])
    return markdown(["study", "head", *(f"{mark:,}" for mark in marks)], rows, range(2, 2 + len(marks)))


def parts() -> str:
    """CUB, frozen features: PCK of the whole head less that of the head without a part, paired by seed."""
    runs, rows = read("cub_frozen"), []
    for head, ablations in study.ABLATIONS.items():
        for part in ablations:
            whole, without = runs.get(head, {}), runs.get(f"{head}_{part}", {})
            gains = [[pck(whole[s], a) - pck(without[s], a) for a in ALPHAS] for s in sorted(whole.keys() & without)]
            spreads = map(Spread.of, zip(*gains, strict=True))
            shown = [f"{'' if spread.mean < 0 else '+'}{spread}" for spread in spreads] or [MISSING] * len(ALPHAS)
            rows.append([NAMES[head], f"`{part}`", *shown])
    return markdown(["head", "ablation", "@.05", "@.10", "@.15"], rows, (2, 3, 4))


def left_out() -> str:
    """PF-WILLOW, each kind of object tested by a head that was trained on the other three."""
    # Untrained heads match the same 900 pairs in both studies.
    untrained = {run: seeds for run, seeds in read("cub_frozen_pfwillow").items() if run.endswith("_untrained")}
    runs, rows = untrained | read("leave_one_out"), []
    for head, title in NAMES.items():
        for state, run in {"untrained": f"{head}_untrained", "trained": head}.items():
            if state == "trained" and not trains("leave_one_out", head):
                continue
            kinds = [scores(runs, run, kind) for kind in study.KINDS]
            rows.append([title, state, scores(runs, run), *kinds])
    return markdown(["head", "", SCORES, *study.KINDS], rows, range(2, 3 + len(study.KINDS)))


def rates() -> str:
    """Learning rates tried: PCK @.10 of validation pairs after 12 % of the pairs, the best in bold."""
    rows = []
    for name in ("cub_frozen", "cub_finetuned", "synthetic"):
        for head, title in NAMES.items():
            if found := study.tried_rates(study.Run(name, head, 0, study.PAIRS)):
                best = study.best_rate(found)
                cells = [f"{found[lr]:.1f}" if lr in found else "" for lr in study.LEARNING_RATES]
                bold = [f"**{c}**" if lr == best else c for lr, c in zip(study.LEARNING_RATES, cells, strict=True)]
                rows.append([TITLES[name], title, *bold])
    columns = [f"{lr:g}" for lr in study.LEARNING_RATES]
    return markdown(["study", "head", *columns], rows, range(2, 2 + len(columns)))


def missing() -> str:
    """How many runs of a complete study are there, and which are not."""
    rows = []
    for name, seeds in SEEDS.items():
        runs = read(name)
        wanted = {head: seeds for head in NAMES if trains(name, head)}
        if name == "cub_frozen":
            wanted |= {f"{head}_{part}": (0,) for head, parts_of in study.ABLATIONS.items() for part in parts_of}
        absent = {run: [seed for seed in wanted[run] if seed not in runs.get(run, {})] for run in wanted}
        shown = [f"`{run}` ({', '.join(map(str, without))})" for run, without in absent.items() if without]
        total, left = (sum(map(len, each.values())) for each in (wanted, absent))
        rows.append([TITLES[name], f"{total - left} of {total}", ", ".join(shown) or "nothing"])
    return markdown(["study", "runs", f"{MISSING} (seeds)"], rows)


# ---------------------------------------------------------------------- cells


def trains(name: str, head: str) -> bool:
    """Whether a study has something to train in a head."""
    return study.trainable(study.Run(name, head, seed=0, pairs=study.PAIRS))


def trained(name: str, head: str, runs: dict[str, Seeds], group: str = "") -> str:
    """The scores of a trained head, or that it has nothing to train."""
    return scores(runs, head, group) if trains(name, head) else NOTHING


def scores(runs: dict[str, Seeds], run: str, group: str = "") -> str:
    """PCK of a run at all thresholds, or @.10 of one group of categories: mean and deviation over the seeds."""
    if not (found := runs.get(run)):
        return MISSING
    if group:
        return str(Spread.of([of_group(result, group) for result in found.values()]))
    return " / ".join(str(Spread.of([pck(result, alpha) for result in found.values()])) for alpha in ALPHAS)


def pck(result: Result, alpha: float) -> float:
    return result["pck"][f"pck@{alpha}"]


def of_group(result: Result, group: str) -> float:
    """PCK @.10 over the pairs of some categories: `duck` has duck(M) and duck(S)."""
    rows = [row for name, row in result["breakdown"]["category"].items() if name.split("(")[0] == group]
    return sum(row["pairs"] * row["pck@0.1/image"] for row in rows) / sum(row["pairs"] for row in rows)


def curve(seeds: Seeds, alpha: float = 0.1) -> dict[int, float]:
    """PCK by number of pairs seen, the mean over the seeds that were scored there."""
    values: dict[int, list[float]] = defaultdict(list)
    for result in seeds.values():
        for seen, found in result["curve"].items():
            values[int(seen)].append(found[f"pck@{alpha}"])
    return {seen: fmean(values[seen]) for seen in sorted(values)}


# ---------------------------------------------------------------------- picture


def picture() -> Any:
    """A figure of PCK @.10 of validation pairs over pairs seen: a panel for each study that has a run."""
    import matplotlib.pyplot as plt

    shown = {name: runs for name in ("cub_frozen", "cub_finetuned", "synthetic") if (runs := read(name)).keys() & NAMES}
    panels = max(len(shown), 1)
    figure, axes = plt.subplots(
        1, panels, figsize=(4.6 * panels, 3.8), squeeze=False, sharey=True, layout="constrained"
    )
    start = study.MARKS[1] / 2  # the place of 0 on a logarithmic axis
    for (name, runs), ax in zip(shown.items(), axes[0], strict=False):
        for k, (head, title) in enumerate(NAMES.items()):
            style: dict[str, Any] = {"color": f"C{(k - 1) % 10}", "marker": ">o^sDPvX*<"[k], "ms": 5, "label": title}
            if found := runs.get(head):
                points = curve(found)
                ax.plot([seen or start for seen in points], list(points.values()), **style)
            elif not trains(name, head) and (found := read("cub_finetuned").get(head)):
                ax.axhline(curve(found)[0], ls="--", **style | {"marker": None})  # before training
        marks = [mark for mark in study.MARKS if mark <= study.PAIRS]
        ax.set_xscale("log")
        ax.set_xticks([mark or start for mark in marks], [f"{mark:,}" for mark in marks])
        ax.minorticks_off()
        ax.set_title(TITLES[name], fontsize=10)
        ax.set_xlabel("training pairs seen")
        ax.grid(alpha=0.4)
    axes[0, 0].set_ylabel("PCK @.10, validation pairs")
    drawn = {line.get_label(): line for ax in axes.flat for line in ax.lines if line.get_label() in NAMES.values()}
    lines = [drawn[title] for title in NAMES.values() if title in drawn]
    figure.legend(handles=lines, loc="outside upper center", ncols=4 * panels, fontsize=8)
    return figure
