"""The figures and tables of the papers in kind, from the runs of a comparison.

    python -m tools.seed_figures runs/figures --data digits --output figures
    python -m tools.seed_figures runs/comparison --output figures

With --data all that the figures need is trained first, on a data set of pss-convert: a comparison of every arm that
there is, at few epochs, which goes on where it was stopped. Without it they are made of a comparison that is there;
tables that are of arms of their own need those of the files in tools/figures/ (--arms-file of tools.compare_methods).

Each is labelled with the command that made its runs, the number of seeds, and what of their spread it shows. A manifest
lists what was made, figures.json and figures.md, and what has no maker here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pss.runtime import files
from tools import compare_methods
from tools.comparing.comparison import EPOCHS
from tools.figures import dynamicvit, kept, sampling, sparsifiner, svite, toe
from tools.figures.figure import Figure, Source

FIGURES: tuple[Figure, ...] = (
    *dynamicvit.FIGURES, *sparsifiner.FIGURES, *toe.FIGURES, *svite.FIGURES, *sampling.FIGURES,
    *kept.FIGURES,
)  # fmt: skip
WANTED = (*range(1, 14), *range(15, 36))
"""Numbers in the list of figures: those of methods that are here."""
_RESULT = "comparison.json"
ARMS_FILES = tuple(sorted(Path(__file__).parent.glob("figures/*.toml")))
_HOW = "compare them; tables have theirs in the arms files of tools/figures/"


def read(folder: Path) -> Source:
    """The result of a comparison. Raises `ValueError` where there is none."""
    path = folder / _RESULT
    try:
        return Source(folder, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise ValueError(f"{path} cannot be read; name the --output of a finished tools.compare_methods") from None


def manifest(source: Source, figures: Sequence[Figure]) -> dict[str, Any]:
    """What was made from what, and which numbers were not."""
    seeds = len(source.result["plan"]["seeds"])
    made = [
        {
            "numbers": list(one.numbers),
            "file": one.name,
            "original": one.original,
            "shows": one.shows,
            "spread": one.spread,
            "n": seeds,
            "command": source.command,
        }
        for one in figures
    ]
    here = {number for one in figures for number in one.numbers}
    return {"figures": made, "left": [number for number in WANTED if number not in here]}


def page(told: dict[str, Any], title: str) -> str:
    """The manifest for people."""
    parts = [
        "# Figures of the papers, in kind",
        "",
        f"{title}. Small runs: shapes can be compared, numbers cannot.",
        "",
    ]
    for one in told["figures"]:
        numbers = ", ".join(map(str, one["numbers"]))
        shown = (
            f"![{one['shows']}]({one['file']})" if one["file"].endswith(".png") else f"[{one['file']}]({one['file']})"
        )
        parts += [f"## {one['original']} (numbers {numbers})", "", shown, ""]
        seeds = f"{one['n']} seed" + "s" * (one["n"] != 1)
        parts += [f"{one['shows']}. {seeds}; {one['spread']}. Runs of:", "", "```sh", one["command"], "```", ""]
    parts += ["## Not made", "", f"Numbers {', '.join(map(str, told['left']))}."]
    return "\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Make the figures that the arguments ask for (the command line's if None), and return the manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="the --output of tools.compare_methods; with --data its runs")
    parser.add_argument("--output", type=Path, required=True, help="folder of pictures and manifest")
    parser.add_argument("--numbers", nargs="+", type=int, help="which of the list; all that can be made by default")
    trained = parser.add_argument_group("training")
    trained.add_argument("--data", type=Path, help="a folder made by pss-convert: train what the figures need")
    trained.add_argument("--recipe", default="digits", help="with --data: what to train")
    trained.add_argument("--epochs", type=int, default=6, help="with --data: of every run")
    trained.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="with --data: each is a run of every arm")
    arguments = parser.parse_args(argv)
    if arguments.data is None:
        for name in ("recipe", "epochs", "seeds"):
            if getattr(arguments, name) != parser.get_default(name):
                parser.error(f"--{name} is of what is trained; name --data too, or leave it out")
    known = {number for one in FIGURES for number in one.numbers}
    if unknown := [number for number in arguments.numbers or () if number not in known]:
        parser.error(f"no figure {unknown[0]} can be made; there are {', '.join(map(str, sorted(known)))}")
    if arguments.data is not None:
        words = ["--data", arguments.data, "--output", arguments.comparison, "--recipe", arguments.recipe]
        words += ["--epochs", arguments.epochs, "--turn", arguments.epochs, "--seeds", *arguments.seeds, "--rounds", 3]
        compare_methods.main([str(word) for word in (*words, "--arms-file", *ARMS_FILES)], [EPOCHS])
    try:
        source = read(arguments.comparison)
    except ValueError as error:
        parser.error(str(error))
    wanted = [one for one in FIGURES if arguments.numbers is None or set(one.numbers) & set(arguments.numbers)]
    chosen = [one for one in wanted if one.can_be_made(source)]
    if arguments.numbers is not None and len(chosen) < len(wanted):
        lacking = next(one for one in wanted if one not in chosen)
        parser.error(f"{lacking.original} ({lacking.shows}) is of the arms {', '.join(lacking.arms)}; {_HOW}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for one in chosen:
        files.write(arguments.output / one.name, one.make(source))
        print(f"wrote {arguments.output / one.name}", flush=True)
    told = manifest(source, chosen)
    files.write(arguments.output / "figures.json", json.dumps(told, indent=1) + "\n")
    files.write(arguments.output / "figures.md", page(told, source.result["title"]))
    return told


if __name__ == "__main__":
    main()
