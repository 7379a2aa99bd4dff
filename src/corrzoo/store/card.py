"""The README of a saved matcher, with the front matter that the Hugging Face hub reads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corrzoo.backbones.specs import get_spec
from corrzoo.files import table
from corrzoo.types import ZooError

if TYPE_CHECKING:
    from corrzoo.matcher import Matcher

LICENCES = ("apache-2.0", "bsd-3-clause", "cc-by-nc-4.0", "mit")
"""Those of backbones' weights that the hub knows by name."""

FREE = ("protocol", "alphas", "backend", "feature_cache_mb", "weights")
"""Options that say how a score was taken or where weights once came from, not which model it is."""


def model_card(matcher: "Matcher", config: dict[str, Any], results: Sequence[str | Path | dict[str, Any]]) -> str:
    """Markdown: what the model is, what it learnt from, what it reaches, and under which licence its weights stand.

    Args:
        matcher: The model.
        config: What `save` writes beside its weights.
        results: Result files of `lightning test`, or their contents.

    Raises:
        ZooError: for a result file that cannot be read, or is another model's.
    """
    rows = [read_result(result, config) for result in results]
    spec, options = get_spec(matcher.hparams.backbone), config["options"]
    trained = config["trained"] or next((row["trained"] for row in rows if row.get("trained")), None)
    counts = [sum(p.numel() for p in module.parameters()) / 1e6 for module in (matcher.backbone, matcher)]
    known = spec.licence in LICENCES
    plugin = "" if config["module"].startswith("corrzoo.") else f", {config['module']}"
    front = {
        "library_name": "corrzoo",
        "pipeline_tag": "keypoint-detection",
        "tags": ["semantic-correspondence", config["head"], spec.key],
        "license": spec.licence if known else "other",
        **({} if known else {"license_name": spec.licence}),
        "model-index": [{"name": f"{config['head']} on {spec.key}", "results": [_index_entry(row) for row in rows]}],
    }
    about = {
        "head": f"{config['head']}: {(type(matcher).__doc__ or '').splitlines()[0]}",
        "backbone": f"`{spec.key}` (timm's `{spec.timm}`), {counts[0]:.1f} M parameters",
        "parameters": f"{counts[1]:.1f} M in all",
        "network image": f"{config['image_size']} px",
        "trained on": _training(trained),
        "licence": f"{spec.licence} for the backbone's weights, on which these are built; the datasets have their own",
    }
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),  # JSON is YAML
        "---",
        f"# {config['head']} on {spec.key}",
        "",
        "Semantic correspondence: points of one image are found in another image of the same kind of thing.",
        "",
        f'```python\nimport corrzoo{plugin}\n\nmatcher = corrzoo.load("<this folder, or hf://user/model>")',
        'corrzoo.match_images(matcher, "a.jpg", "b.jpg", [[120, 80]]).trg_points\n```',
        "",
        "| | |\n|---|---|",
        *(f"| {key} | {value} |" for key, value in about.items()),
        "",
        *_table(rows),
        f"## Options\n\n```json\n{json.dumps(options, indent=1)}\n```",
    ]
    return "\n".join(lines) + "\n"


def read_result(result: str | Path | dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What a result file holds, made sure to be of the model in `config`.

    Raises:
        ZooError: when it cannot be read, or is another model's.
    """
    name = "a result" if isinstance(result, dict) else str(result)
    try:
        row = result if isinstance(result, dict) else json.loads(Path(result).read_text())
        found = row["head"], row["backbone"]
        row["dataset"], row["protocol"], row["alphas"], row["pck"], row["pairs"]
    except OSError as error:
        raise ZooError(f"cannot read the result file {name}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ZooError(f"{name} is no result file of `lightning test` ({type(error).__name__}: {error})") from error
    if found != (config["head"], config["options"]["backbone"]):
        raise ZooError(
            f"{name} is of {found[0]} on {found[1]}, but the model is {config['head']} on "
            f"{config['options']['backbone']}: give the files that `lightning test` wrote for it"
        )
    own = json.loads(json.dumps(config["options"]))  # lists for tuples, as the file has them
    for option, value in row.get("options", {}).items():
        if option in own and option not in FREE and value != own[option]:
            raise ZooError(f"{name} was scored with {option}={value!r}, but the model has {own[option]!r}")
    return row


def _table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    alphas = sorted({alpha for row in rows for alpha in row["alphas"]})
    lines = []
    for row in rows:
        scores = [f"{row['pck'][f'pck@{a:g}']:.1f}" if a in row["alphas"] else "" for a in alphas]
        lines.append([row["dataset"], str(row["pairs"]), f"`{row['protocol']}`", *scores])
    titles = ["dataset", "pairs", "protocol", *(f"@{a:g}" for a in alphas)]
    numbers = [1, *range(3, len(titles))]
    return [
        "## PCK",
        "",
        table(titles, lines, numbers),
        "",
        "Results of different protocols do not compare: see `corrzoo.scoring.protocols`.",
        "",
    ]


def _index_entry(row: dict[str, Any]) -> dict[str, Any]:
    metrics = [
        {"type": "pck", "name": f"PCK@{a:g} ({row['protocol']})", "value": round(row["pck"][f"pck@{a:g}"], 2)}
        for a in row["alphas"]
    ]
    task = {"type": "keypoint-detection", "name": "semantic correspondence"}
    return {"task": task, "dataset": {"type": row["dataset"], "name": row["dataset"]}, "metrics": metrics}


def _training(trained: dict[str, Any] | None) -> str:
    if not trained:
        return "nothing that is recorded here; the backbone as its authors trained it"
    said = [f"{name} {trained[name]}" for name in ("steps", "batch_size", "size", "augment", "seed") if name in trained]
    return f"{trained.get('dataset') or 'unnamed data'} ({', '.join(said).replace('_', ' ')})"
