"""The card of a published model: front matter that the hub reads, what it is, how it is used, and what it reaches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pss.inference.hub import PICTURES
from pss.inference.publishing.facts import Facts
from pss.inference.table import COLUMNS
from pss.inference.text import markdown, printable
from pss.version import __version__

(PICTURE,) = PICTURES
"""The sweep's picture, in the folder beside the card."""

_TASK = "image-classification"
_USE = """The code needs the package patch-sampling-schedule; it was written by version {version}.

```python
import pss

folder = "."  # or "hf-hub:OWNER/NAME"
for found in pss.predict(folder, "photo.jpg", rho={rho}):
    print(found.file, found.classes)
```

The same in PyTorch, and as a backbone. `rho` is the share of tokens that are kept:

```python
import timm
import torch
from PIL import Image
from pss.inference import hub

model = hub.load(folder).model
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
images = transform(Image.open("photo.jpg").convert("RGB")).unsqueeze(0)
with torch.inference_mode():
    logits = model(images, rho={rho})  # (1, {num_classes})
    # One a block, (1, channels, rows, columns).
    maps = model.forward_intermediates(images, intermediates_only=True)
```
"""
_WITH_TIMM = """At ρ = 1 it is timm's own model, and needs timm alone:

```python
import timm

name = "local-dir:."  # or "hf-hub:OWNER/NAME"
model = timm.create_model(name, pretrained=True).eval()
```
"""
_WITH_PSS = """timm loads it once pss is imported; without pss it does not know this architecture, which has {parts}:

```python
import pss  # tells timm of its models
import timm

name = "local-dir:."  # or "hf-hub:OWNER/NAME"
model = timm.create_model(name, pretrained=True).eval()
```
"""
_PARTS = {
    "bias": "a relative position bias in every block",
    "separable": "a relative position bias in every block",
    "rope": "a rotary position embedding that keeps to the patches",
    "none": "parts of pss",
}


def text(name: str, *, rows: Sequence[dict[str, Any]], facts: Facts, plain: bool, picture: bool) -> str:
    """The card in Markdown.

    Args:
        name: What the model is called.
        rows: What a sweep found of it, as `pss.inference.sweep` has them.
        facts: What else is known; what is not is left out.
        plain: Whether timm builds it without pss.
        picture: Whether `PICTURE` lies beside the card.
    """
    parts = [
        f"---\n{_front_matter(name, rows, facts, plain)}---\n",
        f"# {markdown(name)}\n",
        _opening(facts),
        "## Use\n",
        _use(rows, facts, plain),
        "## Results\n",
        *([f"![Accuracy against images per second and against cost]({PICTURE})\n"] if picture else []),
        _results(rows, facts),
        *_training(facts),
        "## Images\n",
        _images(facts),
    ]
    return "\n".join(parts)


def _front_matter(name: str, rows: Sequence[dict[str, Any]], facts: Facts, plain: bool) -> str:
    import yaml
    from huggingface_hub import EvalResult, ModelCardData

    found = [] if facts.dataset is None else [
        EvalResult(
            task_type=_TASK,
            dataset_type=re.sub(r"[^a-z0-9]+", "-", facts.dataset.lower()).strip("-") or "images",
            dataset_name=printable(facts.dataset),
            dataset_split=facts.split,
            metric_type="accuracy",
            metric_name=f"{metric} at {_point(row)}",
            metric_value=round(row[key], 2),
        )
        for row in rows
        for key, metric in (("top1", "top-1 %"), ("top5", "top-5 %"))
    ]  # fmt: skip
    about: Any = ModelCardData(
        license=facts.licence,
        library_name="timm" if plain else "pss",
        pipeline_tag=_TASK,
        tags=[_TASK, "vision-transformer", "patch-sampling", "timm", "pss"],
        base_model=facts.base_model,
        model_name=printable(name) if found else None,
        eval_results=found or None,
    )
    shown: str = yaml.safe_dump(about.to_dict(), sort_keys=False, allow_unicode=True, width=1 << 20)
    return shown


def _point(row: dict[str, Any]) -> str:
    return "as trained" if row["rho"] is None else f"{row['knob']} = {row['rho']:.3g}"


def _opening(facts: Facts) -> str:
    size = facts.data.img_size
    lines = [
        f"A Vision Transformer ({markdown(facts.architecture)}, {facts.num_parameters / 1e6:.3g} M parameters, "
        f"{facts.num_classes:,} classes) for images of {size} × {size} pixels. It takes any share ρ of an image's "
        "patches: fewer patches are faster, more are more accurate.",
    ]
    if facts.method == "sampled":
        lines.append("It was trained with a Patch Sampling Schedule (McDanel & Huynh 2022).")
    if facts.base_model is not None:
        began = "Its weights are those" if facts.recipe is None else "Its training began with the weights"
        lines.append(f"{began} of {markdown(facts.base_model)}.")
    return " ".join(lines) + "\n"


def _use(rows: Sequence[dict[str, Any]], facts: Facts, plain: bool) -> str:
    points = [row["rho"] for row in rows if row["knob"] == "ρ" and row["rho"] is not None]
    rho = min(points, key=lambda point: abs(point - 0.6), default=0.6)
    shown = _USE.format(version=__version__, rho=f"{rho:g}", num_classes=facts.num_classes)
    return shown + "\n" + (_WITH_TIMM if plain else _WITH_PSS.format(parts=_PARTS[facts.rel_pos]))


def _results(rows: Sequence[dict[str, Any]], facts: Facts) -> str:
    where = "" if facts.dataset is None else f" of {markdown(facts.dataset)}"
    where += "" if facts.split is None else f", split {markdown(facts.split)}"
    first = rows[0]
    return "\n".join(
        [
            "| " + " | ".join(heading for heading, _ in COLUMNS) + " |",
            "|---" * len(COLUMNS) + "|",
            *("| " + " | ".join(shown(row) for _, shown in COLUMNS) + " |" for row in rows),
            "",
            f"Measured on {first['num_images']:,} images{where}; speed on {markdown(first['device'])}, torch "
            f"{first['torch']}, batches of {first['batch_size']}: median (slowest–fastest round). GFLOPs are "
            "multiply-accumulates.",
            "",
        ]
    )


def _training(facts: Facts) -> list[str]:
    told = [
        f"| {what} | {value} |"
        for what, value in (
            ("recipe", None if facts.recipe is None else markdown(facts.recipe)),
            ("method", None if facts.method is None else markdown(facts.method)),
            ("epochs", None if facts.epochs is None else f"{facts.epochs:,}"),
            ("trained for", None if facts.hours is None else _duration(facts.hours)),
            ("trained on", None if facts.hardware is None else markdown(facts.hardware)),
        )
        if value is not None
    ]
    if not told:
        return []
    table = "\n".join(["| | |", "|---|---|", *told, ""])
    parts = map(printable, facts.command or ())
    command = [] if facts.command is None else ["```sh\n" + " \\\n    ".join(parts) + "\n```\n"]
    return ["## Training\n", table, *command]


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours * 60 >= 1 else f"{hours * 3600:.1f} seconds"


def _images(facts: Facts) -> str:
    data = facts.data
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (data.mean, data.std))
    return (
        f"The shorter side is scaled to {int(data.img_size / data.crop_pct)} pixels ({data.interpolation}), the "
        f"{data.img_size} × {data.img_size} pixels in the middle are taken, and values from 0 to 1 are normalised with "
        f"mean ({mean}) and standard deviation ({std}).\n"
    )
