"""Training methods against each other, with seeds and spread, at equal epochs and at equal training time.

    python -m tools.compare_methods --data DIR --output runs/comparison --recipe digits --seeds 0 1 2 3 4

DIR is a data set of pss-convert. Every arm is trained with every seed for as many epochs as the recipe has
(`--set train.epochs=N`), by runs of pss-train that take turns; what these took decides how many epochs each arm gets in
the time of the dense run of the same seed, and those runs are trained, too. An arm that fine-tunes starts from a run of
another arm, and has its epochs and its time counted with its own. Runs are resumed to the bit: what was stopped goes on
where it was. `--plan` says what would be trained, and how long that takes here, from a few steps of each.

Written are comparison.md, .csv, .json and .png, and, unless `--no-report`, pss-eval's report on the first seed's runs.
Arms of your own come from a TOML file (`--arms-file`); docs/rivals.md has an example.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import pipelines
from pss import recipes
from pss.planning.doctor import measure_training
from pss.planning.plan import plan
from pss.runtime import files
from tools.benchmarks.measure import environment
from tools.comparing.arms import ARMS, Arm, read
from tools.comparing.evaluation import accuracies, parameters, speeds, training_gflops
from tools.comparing.lengths import Entry, Maker, at_equal_time
from tools.comparing.picture import draw
from tools.comparing.results import COLUMNS, Line, as_csv, deviation, line, markdown, read_published
from tools.comparing.turns import Training, take_turns
from tools.demo import command

COMPARISON = "comparison.json"
SETTLED = "wanted.json"
"""What the folder's runs were asked for; another comparison needs another folder."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, required=True, help="a folder made by pss-convert")
    made.add_argument("--output", type=Path, required=True, help="folder of the runs; goes on with those it holds")
    made.add_argument("--recipe", default="digits", help="what to train")
    made.add_argument("--arms", nargs="+", default=list(ARMS), help="which arms, of those built in or in the file")
    made.add_argument("--arms-file", type=Path, help="arms of your own, in TOML")
    made.add_argument("--reference", default="dense", help="the arm that the others are compared with")
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--turn", type=int, help="epochs of a run before the next one has its turn; a fifth of all")
    made.add_argument("--loader", default="auto", help="as of pss-train")
    made.add_argument("--batch-size", type=int, default=32, help="of what is timed and evaluated")
    made.add_argument("--rounds", type=int, default=15, help="of the timing")
    made.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the recipe")
    made.add_argument("--published", type=Path, help="a TOML file of published figures, to set apart below the table")
    made.add_argument("--plan", action="store_true", help="say what would be trained and how long it takes, and stop")
    made.add_argument("--no-report", action="store_true", help="leave out pss-eval's report")
    return made


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run as the arguments say (the command line's if None), write and print what was found, and return it.

    Raises:
        SystemExit: 2, with one sentence, for what cannot be compared.
    """
    arguments = parser().parse_args(argv)
    try:
        return _compare(arguments)
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def _compare(arguments: argparse.Namespace) -> dict[str, Any]:
    arms = chosen(arguments)
    config = recipes.get(arguments.recipe).with_settings(arguments.set)
    dataset = pipelines.open_dataset(arguments.data)
    num_images, num_classes = sum(dataset.per_class["train"]), len(dataset.classes)
    steps, epochs = num_images // config.train.batch_size, config.train.epochs
    turn = arguments.turn or max(1, -(-epochs // 5))
    if turn < 1:
        raise ValueError(f"--turn is {arguments.turn}; a turn has at least 1 epoch")
    maker = Maker(arms, arguments.output, arguments.recipe, arguments.set)
    entries = [maker.entry(arm, seed, epochs) for seed in arguments.seeds for arm in arms]
    if arguments.plan:
        return _plan(arguments, entries, num_images, num_classes)
    settle(arguments, arms, epochs)
    where: dict[str, Any] = {"data": arguments.data, "loader": arguments.loader, "steps_per_epoch": steps}
    take_turns(_runs(entries), turn, what="equal epochs", **where)
    timed = at_equal_time(maker, entries, arguments.reference)
    take_turns(_runs(timed), turn, what="equal training time", **where)
    result = _found(arguments, {"epochs": entries, "time": timed}, num_images, num_classes)
    result["img_size"] = config.data.img_size
    text = markdown(result)
    files.write(arguments.output / COMPARISON, json.dumps(result, indent=1) + "\n")
    files.write(arguments.output / "comparison.md", text + "\n")
    files.write(arguments.output / "comparison.csv", as_csv(result))
    files.write(arguments.output / "comparison.png", draw(result))
    print(f"\n{text}\n\nthe picture: {arguments.output / 'comparison.png'}")
    if not arguments.no_report:
        first = [str(one.run.folder) for one in entries if one.seed == arguments.seeds[0]]
        command("eval", *first, "--data", str(arguments.data), "--output", str(arguments.output), "--report")
    return result


def chosen(arguments: argparse.Namespace) -> dict[str, Arm]:
    """The arms that are asked for, in order; the reference first.

    Raises:
        ValueError: there is none of such a name, or not the reference among them.
    """
    known = dict(ARMS) if arguments.arms_file is None else ARMS | read(arguments.arms_file)
    names = list(dict.fromkeys(arguments.arms))
    if arguments.arms_file is not None and arguments.arms == list(ARMS):  # not asked for by name
        names = list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"--arms has {name}, which is none; there are {', '.join(known)}")
    if arguments.reference not in names:
        raise ValueError(f"--reference is {arguments.reference}, which is not compared; add it to --arms")
    if len(arguments.seeds) != len(set(arguments.seeds)):
        raise ValueError(f"--seeds has {' '.join(map(str, arguments.seeds))}; name each once")
    return {name: known[name] for name in sorted(names, key=lambda name: name != arguments.reference)}


def settle(arguments: argparse.Namespace, arms: dict[str, Arm], epochs: int) -> None:
    """Note what the folder's runs are, or see that it is what is asked for.

    Raises:
        ValueError: they are others.
    """
    path = arguments.output / SETTLED
    wanted = {
        "recipe": arguments.recipe,
        "settings": arguments.set,
        "epochs": epochs,
        "reference": arguments.reference,
        "data": str(arguments.data.resolve()),
        "arms": {name: asdict(arm) | {"settings": list(arm.settings)} for name, arm in arms.items()},
    }
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        same = {**wanted["arms"], **before["arms"]} == {**before["arms"], **wanted["arms"]}
        differing = [key for key in wanted if key != "arms" and wanted[key] != before.get(key)] + ["arms"] * (not same)
        if differing:
            raise ValueError(
                f"{arguments.output} holds a comparison with other {differing[0]}; name another --output, or go on "
                "with what it was begun with"
            )
        wanted["arms"] = before["arms"] | wanted["arms"]
    arguments.output.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(wanted, indent=1) + "\n")


def _runs(entries: Sequence[Entry]) -> list[Training]:
    """All that have to be trained, each once."""
    return list({run.folder: run for entry in entries for run in entry.runs}.values())


def _plan(arguments: argparse.Namespace, entries: Sequence[Entry], num_images: int, num_classes: int) -> dict[str, Any]:
    """What would be trained, and about how long: from a few steps of one seed's arms, on random images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first: dict[str, float] = {}
    for run in _runs([entry for entry in entries if entry.seed == arguments.seeds[0]]):
        began = time.monotonic()
        # Weights to start from are not there yet, and their values are nothing to the speed.
        own = [one for one in run.settings if not one.startswith("model.weights=") and str(arguments.output) not in one]
        config = recipes.get(run.recipe).with_settings([*own, f"train.epochs={run.epochs}"])
        planned = plan(config, num_images=num_images, num_classes=num_classes)
        speeds_of = measure_training(config, planned, num_classes, device)
        an_image = sum(level.share / speeds_of[level] for level in planned.levels)
        first[run.name] = an_image * planned.steps_per_epoch * planned.batch_size * run.epochs
        print(
            f"{run.name}: about {first[run.name] / 60:.1f} min ({time.monotonic() - began:.0f} s measured)", flush=True
        )
    equal = sum(first.values()) * len(arguments.seeds)
    arms = len({entry.arm for entry in entries})
    dense = next(first[entry.run.name] for entry in entries if entry.arm == arguments.reference)
    same_time = dense * (arms - 1) * len(arguments.seeds)
    print(
        f"{len(_runs(entries))} runs at equal epochs, about {equal / 60:.0f} min of training, and as many at equal "
        f"time, about {same_time / 60:.0f} min; starting processes, loading and validation come on top"
    )
    return {"equal_epochs_seconds": equal, "equal_time_seconds": same_time}


def _found(
    arguments: argparse.Namespace, columns: dict[str, list[Entry]], num_images: int, num_classes: int
) -> dict[str, Any]:
    """All figures of the comparison."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines, seeds, arms = [], list(arguments.seeds), list(dict.fromkeys(one.arm for one in columns["epochs"]))
    by: dict[tuple[str, str], dict[int, Line]] = {}
    for column, entries in columns.items():
        for number, one in enumerate(entries, 1):
            print(f"evaluating {one.run.name} ({number} of {len(entries)}, {COLUMNS[column].lower()})", flush=True)
            by.setdefault((column, one.arm), {})[one.seed] = {
                "points": accuracies(
                    one.run, arguments.data, loader=arguments.loader, batch_size=arguments.batch_size, device=device
                ),
                "epochs": one.epochs,
                "own_epochs": one.run.epochs,
                "seconds": one.seconds(),
                "training": training_gflops(one.runs, num_images, num_classes),
            }
    for column in columns:
        lines += [line(column, arm, by[column, arm], by[column, arguments.reference]) for arm in arms]
    points = {arm: _points([by["epochs", arm][seed]["points"] for seed in seeds]) for arm in arms}
    first = {one.arm: one.run for one in columns["epochs"] if one.seed == seeds[0]}
    return {
        "command": "python -m tools.compare_methods " + " ".join(_words(arguments)),
        "recipe": arguments.recipe,
        "settings": arguments.set,
        "reference": arguments.reference,
        "seeds": seeds,
        "num_images": num_images,
        "batch_size": arguments.batch_size,
        "lines": lines,
        "points": points,
        "speeds": speeds(first, batch_size=arguments.batch_size, device=device, rounds=arguments.rounds),
        "parameters": {arm: parameters(run) for arm, run in first.items()},
        "runs": {
            column: {
                one.run.name: {"epochs": one.run.rows(), "points": by[column, one.arm][one.seed]["points"]}
                for one in entries
            }
            for column, entries in columns.items()
        },
        "published": None if arguments.published is None else read_published(arguments.published),
        "environment": environment(device),
    }  # fmt: skip


def _words(arguments: argparse.Namespace) -> list[str]:
    """The arguments that make the same comparison, in words, with folders left out."""
    words = ["--data", "DIR", "--output", "DIR", "--recipe", arguments.recipe, "--arms", *arguments.arms]
    words += ["--seeds", *map(str, arguments.seeds)]
    return words + [word for setting in arguments.set for word in ("--set", setting)]


def _points(by_seed: Sequence[Sequence[Line]]) -> list[Line]:
    """Of each operating point, the seeds' accuracies."""
    found = []
    for same in zip(*by_seed, strict=True):
        top1 = [one["top1"] for one in same]
        mean = {"top1_mean": statistics.fmean(top1), "top1_deviation": deviation(top1)}
        found.append({"point": same[0]["point"], "top1": top1, **mean})
    return found


if __name__ == "__main__":
    main()
