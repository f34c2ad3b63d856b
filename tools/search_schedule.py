"""Search for the schedule that wins at equal training time: successive halving, reported on seeds that it did not see.

    python -m tools.search_schedule --data DIR --output runs/search --recipe cifar10 --seeds 0 1 --held-out 2 3 4 5 6

Candidates are the arms of tools/comparing/schedules.toml, and those of `--arms-file`. All are trained with `--seeds`
for a quarter of the dense run's time, the best `--keep` of them for half of it, and the best of those for all of it.
tools.study then holds the winner against dense training on the seeds of `--held-out`, at all and at half of the time.
Choosing the best of many favours the lucky: only what the held-out seeds say is a result.

The search goes on where it was stopped. `--plan` says how long it would take, and trains nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from pss.runtime import files
from tools import study
from tools.benchmarks.measure import table
from tools.comparing import comparison, estimate, evaluation
from tools.comparing.comparison import REFERENCE, Column
from tools.comparing.page import plain
from tools.comparing.statistics import Mean

RUNGS = (Column("time", 0.25), Column("time", 0.5), Column("time"))


class Search(study.Study):
    """Candidates that leave rung by rung."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Raises `ValueError` for arms, settings or data that do not go together."""
        super().__init__(arguments, RUNGS)
        if len(self.arms) < 3:
            raise ValueError(f"--arms leaves {len(self.arms) - 1} beside {REFERENCE}; name two schedules or more")

    def told(self) -> tuple[float, str]:
        """Seconds of all training, from a few measured steps of the dense model, and a sentence about them."""
        run = self.layout.run(self.layout.arms[REFERENCE], self.plan["seeds"][0], self.layout.epochs)
        each = estimate.epoch_seconds(run, self.layout.config, self.num_images, self.num_classes)
        whole, turns = each * self.layout.epochs, -(-self.layout.epochs // self.turn)
        count, seeds = len(self.arms) - 1, len(self.plan["seeds"])
        parts, pilots = [], sum(self.pilot(arm).epochs for arm in self.arms)
        seconds = pilots * (each + estimate.START_SECONDS)
        for rung in RUNGS:
            runs = (count + 1) * seeds
            seconds += runs * (rung.share * whole + math.ceil(rung.share * turns) * estimate.START_SECONDS)
            parts.append(f"{count} at {rung.share:g} of the dense run's time")
            count = survivors(count, self.arguments.keep)
        seconds += 2 * len(self.arguments.held_out) * (1.5 * whole + 2 * turns * estimate.START_SECONDS)
        return seconds, (
            f"{', '.join(parts)}, with {seeds} seed{'s' * (seeds != 1)} each, and the winner with "
            f"{len(self.arguments.held_out)} others: about {seconds / 60:,.0f} min of training; validation, evaluation "
            "and the loader are not counted"
        )

    def search(self) -> list[dict[str, Any]]:
        """Every rung, with its candidates from the best to the worst and how many of them go on."""
        rungs = []
        candidates = [arm for arm in self.arms if arm.name != REFERENCE]
        for rung in RUNGS:
            self.arms = [self.layout.arms[REFERENCE], *candidates]
            chosen = self.train([rung])
            scores = self._scores(chosen)
            ordered = sorted((arm for arm in candidates if arm.name in scores), key=lambda arm: -scores[arm.name].mean)
            if not ordered:
                raise ValueError(f"no schedule can be trained in {rung.share:g} of the dense run's time; add --epochs")
            candidates = ordered[: survivors(len(ordered), self.arguments.keep)] if rung != RUNGS[-1] else ordered[:1]
            rungs.append(
                {
                    "share": rung.share,
                    "scores": {name: scores[name] for name in [arm.name for arm in ordered] + [REFERENCE]},
                    "epochs": chosen[rung.key][str(self.plan["seeds"][0])],
                    "kept": [arm.name for arm in candidates],
                }
            )
        return rungs

    def _scores(self, chosen: dict[str, dict[str, dict[str, int]]]) -> dict[str, Mean]:
        """Of every arm: top-1 accuracy, averaged over the rhos of the search, by seed."""
        trained = self.trained(chosen)
        found = evaluation.accuracies(
            list(trained.values()), self.options(), self.arguments.rhos, self.output / "accuracy"
        )
        values: dict[str, list[float]] = {}
        for (_, arm, _), run in trained.items():
            values.setdefault(arm, []).append(statistics.fmean(found[run.name].values()))
        return {arm: Mean.of(of_seeds) for arm, of_seeds in values.items()}


def survivors(count: int, keep: float) -> int:
    """Of so many candidates, how many go on: at least one, and fewer than there are."""
    return max(1, min(count - 1, math.ceil(keep * count)))


def markdown(result: dict[str, Any]) -> str:
    """The page of a search."""
    rhos = ", ".join(f"{rho:g}" for rho in result["rhos"])
    parts = [f"# {result['title']}", "", f"Score: top-1 accuracy at ρ = {rhos}, in the mean, mean ± standard deviation "
             f"over seeds {', '.join(map(str, result['seeds']))}.", ""]  # fmt: skip
    for rung in result["rungs"]:
        parts += [f"## At {rung['share']:g} of the dense run's time", ""]
        rows = [
            " | ".join([name, str(rung["epochs"][name]), score.told(".2f"), "yes" if name in rung["kept"] else ""])
            for name, score in rung["scores"].items()
        ]
        parts += [*table("schedule | epochs | score | goes on", rows), ""]
    parts += [f"The winner is `{result['winner']}`. What it is worth, the held-out seeds say: held-out/study.md."]
    return "\n".join(parts) + "\n"


def held_out(arguments: argparse.Namespace, found: Search, winner: str) -> list[str]:
    """The words for tools.study that hold the winner against dense training."""
    words = ["--data", str(arguments.data), "--output", str(arguments.output / "held-out")]
    words += ["--recipe", arguments.recipe, "--arms", REFERENCE, winner, "--epochs", str(found.layout.epochs)]
    words += ["--seeds", *map(str, arguments.held_out), "--equal", "time", "time:0.5", "--turn", str(found.turn)]
    words += ["--loader", str(found.plan["loader"]), "--batch-size", str(arguments.batch_size)]
    words += ["--arms-file", *map(str, arguments.arms_file)] if arguments.arms_file else []
    words += [] if arguments.device is None else ["--device", arguments.device]
    words += ["--ema"] if arguments.ema else []
    return words + [word for setting in arguments.set for word in ("--set", setting)]


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Run as the arguments say (the command line's if None), write the results and return them; None with --plan."""
    parser = comparison.parser(__doc__)
    parser.add_argument("--held-out", nargs="+", type=int, required=True, help="seeds of the report")
    parser.add_argument("--keep", type=float, default=0.34, help="share of the candidates that goes on from each rung")
    parser.add_argument("--rhos", nargs="+", type=float, default=[1.0], help="the score is the mean accuracy at these")
    arguments = parser.parse_args(argv)
    comparison.check(arguments, parser)
    if not all(0 < rho <= 1 for rho in arguments.rhos):
        parser.error("--rhos are shares of patches, in (0, 1]")
    if not 0 < arguments.keep < 1:
        parser.error(f"--keep is {arguments.keep:g}; it is a share of the candidates, between 0 and 1")
    if set(arguments.held_out) & set(arguments.seeds) or len(set(arguments.held_out)) < len(arguments.held_out):
        parser.error("--held-out are seeds that --seeds does not name, each once")
    with comparison.leaving(parser):
        found = Search(arguments)
        if arguments.plan:
            print(found.told()[1], flush=True)
            return None
        found.admit()
        rungs = found.search()
    winner = rungs[-1]["kept"][0]
    result = {
        "title": f"A schedule for `{arguments.recipe}`, from {len(found.plan['arms']) - 1}",
        "rhos": arguments.rhos,
        "seeds": arguments.seeds,
        "held_out": arguments.held_out,
        "rungs": rungs,
        "winner": winner,
    }
    files.write(found.output / "search.json", json.dumps(plain(result), indent=1) + "\n")
    files.write(found.output / "search.md", markdown(result))
    print(f"\n{markdown(result)}\nwrote {found.output}/search.md, .json", flush=True)
    result["report"] = study.main(held_out(arguments, found, winner))
    return result


if __name__ == "__main__":
    main()
