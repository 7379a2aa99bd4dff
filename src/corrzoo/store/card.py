"""Model card of a saved matcher: a README whose front matter the Hugging Face hub reads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from corrzoo.backbones.specs import get_spec
from corrzoo.leaderboard.results import completed, scores
from corrzoo.matcher import Matcher
from corrzoo.tables import markdown
from corrzoo.types import ZooError

LICENCES = ("apache-2.0", "bsd-3-clause", "cc-by-nc-4.0", "mit")
"""Licences of backbone weights that the hub knows by name."""

FREE = Matcher.evaluation_options | {"weights", "checkpointing"}
"""Options that may differ between a result and the model: they do not change predictions of trained weights."""

CARD = """---
{front}
---
# {head} on {backbone}

Semantic correspondence: given two images of objects of one category, match points of one image to the other.

```python
import corrzoo{plugin}

matcher = corrzoo.load("<this folder, or hf://user/model>")
corrzoo.match_images(matcher, "a.jpg", "b.jpg", [[120, 80]]).trg_points
```

{about}

{scores}## Options

```json
{options}
```
"""


def model_card(matcher: "Matcher", config: dict[str, Any], results: Sequence[str | Path | dict[str, Any]]) -> str:
    """Write the card in Markdown: model, training data, scores, licence and options.

    `config` is the content of `config.json`, `results` are result files of `corrzoo test` or their contents.
    """
    rows = [read_result(result, config) for result in results]
    spec, head = get_spec(matcher.hparams.backbone), config["head"]
    summary, _, _ = (type(matcher).__doc__ or "").partition("\n")
    trained = config["trained"] or next((row["trained"] for row in rows if row.get("trained")), None)
    own, inside = matcher.count_parameters()
    front = ModelCardData(
        license=spec.licence if spec.licence in LICENCES else "other",
        license_name=None if spec.licence in LICENCES else spec.licence,
        library_name="corrzoo",
        pipeline_tag="keypoint-detection",
        tags=["semantic-correspondence", head, spec.key],
        model_name=f"{head} on {spec.key}",
        eval_results=[result for row in rows for result in _eval_results(row)] or None,
    )
    about = {
        "head": f"{head}: {summary}",
        "backbone": f"`{spec.key}` (timm's `{spec.timm}`), {inside / 1e6:.1f} M parameters",
        "parameters": f"{(own + inside) / 1e6:.1f} M in all",
        "network image": f"{config['image_size']} px",
        "trained on": _training(trained),
        "licence": f"{spec.licence}, the licence of the backbone's weights; datasets have their own",
    }
    return CARD.format(
        front=front.to_yaml(),
        head=head,
        backbone=spec.key,
        plugin="" if config["module"].startswith("corrzoo.") else f", {config['module']}",
        about=markdown(["", ""], list(about.items())),
        scores=_scores(rows),
        options=json.dumps(config["options"], indent=1),
    )


def read_result(result: str | Path | dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Read a result file and check that it is of the model in `config`.

    Raises:
        ZooError: if the file cannot be read, or is of another model.
    """
    name = "a result" if isinstance(result, dict) else str(result)
    try:
        row = result if isinstance(result, dict) else json.loads(Path(result).read_text())
        found = row["head"], row["backbone"]
        row = completed(row)
        scores(row), row["pairs"]
    except OSError as error:
        raise ZooError(f"cannot read the result file {name}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ZooError(f"{name} is not a result file of `corrzoo test` ({type(error).__name__}: {error})") from error
    model = config["head"], config["options"]["backbone"]
    if found != model:
        told = "{} is of {} on {}, but the model is {} on {}: give the files that `corrzoo test` wrote for it"
        raise ZooError(told.format(name, *found, *model))
    own = json.loads(json.dumps(config["options"]))  # lists for tuples, as in the file
    for option, value in row.get("options", {}).items():
        if option in own and option not in FREE and value != own[option]:
            told = f"{name} was scored with {option}={value!r}, but the model has {own[option]!r}"
            raise ZooError(f"{told}: give a result of this model")
    return row


def _scores(rows: list[dict[str, Any]]) -> str:
    """Scores by dataset as a section; empty without results."""
    if not rows:
        return ""
    measures = sorted({measure for row in rows for measure in scores(row)})
    lines = []
    for row in rows:
        found = scores(row)
        cells = [f"{found[measure]:.1f}" if measure in found else "" for measure in measures]
        lines.append([row["dataset"], str(row["pairs"]), f"`{row['protocol']}`", *cells])
    titles = ["dataset", "pairs", "protocol", *measures]
    note = "Scores of different protocols are not comparable, see `corrzoo.scoring.protocols`."
    return f"## Scores\n\n{markdown(titles, lines, [1, *range(3, len(titles))])}\n\n{note}\n\n"


def _eval_results(row: dict[str, Any]) -> list[EvalResult]:
    """Entries of the hub's model index, one per measure."""
    same: dict[str, Any] = {"task_type": "keypoint-detection", "task_name": "semantic correspondence"}
    same |= {"dataset_type": row["dataset"], "dataset_name": row["dataset"]}
    out = []
    for measure, value in scores(row).items():
        kind, name = measure.split()[0].lower(), f"{measure} ({row['protocol']})"
        out.append(EvalResult(metric_type=kind, metric_name=name, metric_value=round(value, 2), **same))
    return out


def _training(trained: dict[str, Any] | None) -> str:
    if not trained:
        return "not recorded; the backbone has its authors' weights"
    names = ("steps", "batch_size", "size", "augment", "seed", "source")
    listed = ", ".join(f"{name.replace('_', ' ')} {trained[name]}" for name in names if name in trained)
    return (trained.get("dataset") or "an unnamed dataset") + (f" ({listed})" if listed else "")
