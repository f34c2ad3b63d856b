"""The table of a comparison, for people and as CSV."""

from __future__ import annotations

import csv
import io
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from pss.inference.text import cell
from pss.runtime.files import in_words
from tools.benchmarks.measure import table, told
from tools.comparing.lines import COLUMNS
from tools.comparing.statistics import Mean

PUBLISHED = Path(__file__).with_name("published.toml")
Row = dict[str, Any]


def markdown(result: Row) -> str:
    """The whole page."""
    reference = result["plan"]["reference"]
    parts = [f"# {result['title']}", "", told(result), ""]
    if settings := result["plan"]["settings"]:
        parts += [f"Settings of all arms: {', '.join(settings)}.", ""]
    parts += [f"![{result['title']}](comparison.png)", ""]
    for column, name in COLUMNS.items():
        own = [line for line in result["lines"] if line["column"] == column]
        if not own:
            continue
        parts += [f"## {name.capitalize()}", "", _introduction(result, column), ""]
        parts += table(
            f"arm | epochs | top-1 % | against {reference} (95 % CI) | training | of {reference} | of it before "
            "fine-tuning",
            (" | ".join(_accuracy(line, reference)) for line in own),
        )
        parts.append("")
    parts += ["## Arithmetic and parameters", "", _ARITHMETIC, ""]
    parts += table(
        "arm | parameters, M | inference: backbone | extra | total | training, forward: backbone | extra | teacher | "
        f"whole step | whole run, of {reference}",
        (" | ".join(_costs(line)) for line in result["lines"] if line["column"] == "epochs"),
    )
    size = result["batch_size"]
    parts += ["", "## Inference", "", _inference(result), ""]
    parts += table(
        f"arm | point | top-1 % | against {reference} (95 % CI) | GFLOPs | images/s, batch {size} | of {reference} | "
        f"ms, batch 1 | of {reference}",
        (
            " | ".join(_speed(line, point))
            for line in result["lines"]
            if line["column"] == "epochs"
            for point in line["points"]
        ),
    )
    if rows := result["published"]:
        parts += ["", "## Published, on ImageNet-1k and on the authors' GPUs", "", _APART, ""]
        parts += table("method | top-1 % | GFLOPs | images/s | hours of training | source", map(_published, rows))
    parts += ["", "## What these numbers do not show", "", *(f"* {line}" for line in result["limits"])]
    return "\n".join(parts) + "\n"


_ARITHMETIC = (
    "GFLOPs are multiply-accumulates of one image, in 10^9. Those of training are averages over the steps of the run "
    "and of the one that it starts from; a whole step is forward and backward, teacher included. "
    "In brackets is what is not zero: kernels here compute zeros like any other number, and gain nothing by them."
)
_APART = "Quoted, not measured here; they are no rows of the tables above."


def _introduction(result: Row, column: str) -> str:
    plan = result["plan"]
    if column == "epochs":
        longer = [f"{name}, for {arm['times']} times as many" for name, arm in plan["arms"].items() if arm["times"] > 1]
        but = f" But {'; '.join(longer)}." if longer else ""
        return f"Every arm is trained for {plan['epochs']} epochs in all, those before fine-tuning included.{but}"
    return (
        f"Every arm is given the training time of the {plan['reference']} run of the same seed, validation not "
        "counted; the number of epochs is the one whose time is nearest at the pace of the runs above. `training` "
        "is what they then took."
    )


def _inference(result: Row) -> str:
    return (
        "The runs of equal epochs at each operating point of their methods, the first one being that of the tables "
        f"above. Real images, the model alone, all runs interleaved in one process, {result['environment']['device']}; "
        "medians and quartiles over rounds and seeds, ratios formed within the rounds."
    )


def _accuracy(line: Row, reference: str) -> list[str]:
    first, before = line["points"][0], line["seconds_before"]
    runs = zip(line["epochs_before"], line["epochs"], strict=True)
    epochs = dict.fromkeys(f"{prior} + {own}" if prior else f"{own}" for prior, own in runs)
    ratio = Mean.of(line["time_of_dense"])
    return [
        line["arm"],
        ", ".join(epochs),
        first["top1"].told(".2f"),
        "" if line["arm"] == reference else interval(first["difference"]),
        duration(line["seconds"]),
        "1" if line["arm"] == reference else ratio.told(".2f"),
        duration(before) if before.mean else "–",
    ]


def _costs(line: Row) -> list[str]:
    first = line["points"][0]
    extra = line["parameters_extra"]
    millions = f"{line['parameters_backbone'] / 1e6:.3g}" + (f" + {extra / 1e6:.2g}" if extra else "")
    active, theoretical = line.get("parameters_active"), line.get("gflops_theoretical")
    if active is not None and active < line["parameters_backbone"] + extra:
        millions += f" ({active / 1e6:.3g})"
    inference = [f"{first[key]:.3g}" for key in ("gflops_backbone", "gflops_extra", "gflops_total")]
    inference[2] += f" ({theoretical:.3g})" if theoretical is not None else ""
    training = [line[f"training_{part}"] for part in ("backbone", "extra", "teacher", "step")]
    return [
        line["arm"],
        millions,
        *inference,
        *(f"{value:.3g}" for value in training),
        f"{line['arithmetic_of_dense']:.2f}",
    ]


def _speed(line: Row, point: Row) -> list[str]:
    return [
        line["arm"],
        "as trained" if point["point"] is None else f"{point['knob']} {point['point']:.3g}",
        point["top1"].told(".2f"),
        interval(point["difference"]) if any(point["rate_of_dense"][k] != 1 for k in range(3)) else "",
        f"{point['gflops_total']:.3g}",
        _quartiles(point["images_per_second"], ",.0f"),
        _quartiles(point["rate_of_dense"], ".2f"),
        _quartiles(point["latency_ms"], ".3g"),
        _quartiles(point["latency_of_dense"], ".2f"),
    ]


def _published(row: Row) -> str:
    figures = [f"{row[key]:,}" if key in row else "–" for key in ("top1", "gflops", "images_per_second", "hours")]
    return " | ".join([f"{row['method']} (published)", *figures, row["source"]])


def _quartiles(values: Sequence[float], form: str) -> str:
    first, median, third = values
    return f"{median:{form}} ({first:{form}}–{third:{form}})"


def interval(difference: Mean) -> str:
    """A mean difference with its sign and 95 % confidence interval."""
    half = difference.half_width
    between = "" if half is None else f" ({difference.mean - half:+.2f} to {difference.mean + half:+.2f})"
    return f"{difference.mean:+.2f}{between}"


def duration(seconds: Mean) -> str:
    """In a unit that suits it."""
    unit, size = ("h", 3600) if seconds.mean >= 7200 else ("min", 60) if seconds.mean >= 120 else ("s", 1)
    return (
        Mean(seconds.mean / size, seconds.deviation and seconds.deviation / size, seconds.count).told(".1f")
        + f" {unit}"
    )


def limits(result: Row) -> list[str]:
    """What the numbers do not show, as the configuration has it."""
    plan, device = result["plan"], result["environment"]["device"]
    seeds = len(plan["seeds"])
    parameters = result["lines"][0]["parameters_backbone"]
    said = [
        f"{result['num_images']:,} training and {result['num_val_images']:,} validation images of "
        f"{result['num_classes']} classes, {result['img_size']} pixels, and a model of {parameters / 1e6:.2g} M "
        "parameters: none of it is ImageNet or DeiT-S, where these methods were published.",
        f"{plan['epochs']} epochs; published runs have 300 and more. Which method is ahead may depend on it.",
    ]
    if seeds == 1:
        said.append("One seed: there is no spread, and no difference here can be told from chance.")
    else:
        made = sum(line["arm"] != plan["reference"] for line in result["lines"])
        said.append(
            f"{seeds} seeds: a standard deviation of so few is itself uncertain, and the intervals take differences "
            f"for normally distributed. They are for one comparison each; {made} are made, of which one in "
            "twenty leaves its interval by chance."
        )
    tuned = [f"{name} {arm['note']}" for name, arm in plan["arms"].items() if arm["note"] and arm["start"]]
    if tuned:
        said.append(f"Fine-tuning is shorter than published: {'; '.join(tuned)}. Its warm-up is shortened alike.")
    said.append(
        "Settings that the methods share are those of the recipe, which was made for dense training and schedules; "
        "none was searched for any of the arms."
    )
    said.append(
        f"Times are those of {device}, threads {result['environment']['threads']}, while runs took turns; how "
        "much a method gains depends on the machine, the size of the model and of the batch."
        + ("" if device != "cpu" else " A GPU, which small models keep waiting, may rank them otherwise.")
    )
    at_equal_time = next(iter(result["equal_time"].values()), plan["arms"])
    if missing := [name for name, arm in plan["arms"].items() if arm["equal_time"] and name not in at_equal_time]:
        said.append(
            f"{', '.join(missing)} cannot be trained within the given time at all: even the fewest epochs exceed it."
        )
    late = [line for line in result["lines"] if line["column"] == "time" and abs(_mean_ratio(line) - 1) > 0.05]
    if late:
        which = ", ".join(f"{line['arm']} {_off(line['time_of_dense'])}{_at_pace(line)}" for line in late)
        known = any(line["time_at_pace"] for line in late)
        why = " (in brackets: at the pace of its runs of equal epochs; the rest is the machine, whose speed changed)"
        said.append(f"Not all arms met the training time that they were given{why * known}: {which}.")
    return said


def _mean_ratio(line: Row) -> float:
    return Mean.of(line["time_of_dense"]).mean


def _off(ratios: Sequence[float]) -> str:
    return f"{round(100 * (Mean.of(ratios).mean - 1)):+d}%"


def _at_pace(line: Row) -> str:
    return f" ({_off(line['time_at_pace'])})" if line["time_at_pace"] else ""


def as_csv(result: Row) -> str:
    """A row for every column, arm and operating point."""
    return csv_of([_flat(line, point) for line in result["lines"] for point in line["points"]])


def csv_of(rows: Sequence[Row]) -> str:
    """Rows of the same keys, which are the head."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _flat(line: Row, point: Row) -> Row:
    flat: Row = {}
    for key, value in (line | point).items():
        if isinstance(value, Mean):
            flat |= {key: value.mean, f"{key}_sd": value.deviation, f"{key}_ci95": value.half_width}
        elif key in ("images_per_second", "rate_of_dense", "latency_ms", "latency_of_dense"):
            flat |= dict(zip((f"{key}_q1", key, f"{key}_q3"), value, strict=True))
        elif isinstance(value, list):
            if key != "points":
                flat[key] = " ".join(f"{one:g}" for one in value)
        else:
            flat[key] = value
    return flat


def read_published(path: Path) -> list[Row]:
    """Rows of published figures, each with its source. Raises `ValueError` for a row that has none."""
    try:
        rows: list[Row] = tomllib.loads(path.read_text(encoding="utf-8")).get("row", [])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as TOML ({in_words(error)}); {PUBLISHED} shows what it looks like"
        ) from None
    for row in rows:
        if not row.get("source") or not row.get("method"):
            raise ValueError(f"{path} has a row without method or source; name both: who measured it, where it stands")
    return rows


def plain(value: Any) -> Any:
    """A result as JSON can hold it."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value
