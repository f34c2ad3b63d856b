"""What predicting from fewer patches gains: images per second at each operating point, the model alone.

    python -m tools.benchmarks.rho
    python -m tools.benchmarks.rho --model deit_small_patch16_224 --rel-pos bias --batch-size 16 --rounds 9
    python -m tools.benchmarks.rho --method dynamicvit --rho 0.7 --batch-size 1
    python -m tools.benchmarks.rho --method avit --set avit.gate_center=7

Rounds are interleaved, and each ratio is of two neighbours in the same round, so that a machine whose speed drifts does
not favour either. The last column is what the arithmetic allows: of the images that are predicted, where cost depends
on them. Weights are random, so that where tokens halt is a matter of settings. A method's rate is over that of the
dense model with the same settings; one without an operating point is timed as it is.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial

import torch

from pss import methods
from pss.config import Config
from pss.inference.timing import call_seconds
from tools.benchmarks.measure import Result, conclude, over, page, parser, spread

_RHO = "0.7,0.5"
# On an A100: McDanel & Huynh (2022) for DeiT-S at 224 pixels.
_PUBLISHED = {("sampled", 0.7): 1.40, ("sampled", 0.5): 1.73}


def measured(arguments: argparse.Namespace) -> Result:
    """Seconds of every round of the dense model, then at each operating point."""
    device = torch.device(arguments.device)
    model = [f"model.name={arguments.model}", f"model.rel_pos={arguments.rel_pos}"]
    config = Config(recipe="rho").with_settings([*model, f"data.img_size={arguments.img_size}"])
    torch.manual_seed(0)  # how many tokens halt follows from weights and images
    dense, method = (
        methods.build(config.with_settings([f"method={name}", *own]), 1000, 1).to(device).eval()
        for name, own in (("dense", ()), (arguments.method, arguments.set))
    )
    images = torch.randn(arguments.batch_size, 3, arguments.img_size, arguments.img_size, device=device)
    fixed = method.points() == (None,)
    if fixed and arguments.rho is not None:
        raise SystemExit(f"--rho means nothing for method {arguments.method}, which has one operating point")
    points = (None,) if fixed else tuple(map(float, (arguments.rho or _RHO).split(",")))
    with torch.no_grad():
        whole = dense.cost(1.0).forward
        cases = [partial(dense.predict, images, 1.0), *(partial(method.predict, images, point) for point in points)]
        costs = [whole, *(float(method.predict_with_cost(images, point)[1].mean()) for point in points)]
        timed = call_seconds(cases, device, rounds=arguments.rounds)
    tokens = [dense.tokens(1.0), *(method.tokens(point) for point in points)]
    levels = [
        {"point": point, "tokens": sum(counts) / len(counts), "arithmetic": whole / cost, "seconds": seconds}
        for point, counts, cost, seconds in zip(("dense", *points), tokens, costs, timed, strict=True)
    ]
    return {"levels": levels}


def report(result: Result) -> str:
    """The result as markdown."""
    settings, rows = result["settings"], []
    for level in result["levels"]:
        point, seconds = level["point"], level["seconds"]
        rate = f"{settings['batch_size'] / statistics.median(seconds):,.1f}"
        ratio = spread(over(result["levels"][0]["seconds"], seconds), ".3f")
        published = _PUBLISHED.get((settings["method"], point))
        name = "as trained" if point is None else point if isinstance(point, str) else f"{point:g}"
        rows.append(
            f"{name} | {level['tokens']:.4g} | {rate} | {ratio} | "
            f"{'–' if published is None else f'{published:.2f}'} | {level['arithmetic']:.3f}"
        )
    head = "point | tokens of a block, at most | images/s | × dense: median (quartiles) | published | FLOPs allow"
    own = "".join(f", {setting}" for setting in settings["set"])
    title = (
        f"{settings['model']}, {settings['img_size']} px, rel_pos {settings['rel_pos']}, method {settings['method']}"
        f"{own}, batch {settings['batch_size']}, {settings['rounds']} rounds"
    )
    return page(result, title, head, rows)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run as the arguments say (the command line's if None), print and write the report, and return the result."""
    command = parser(__doc__, rounds=15, device="auto", threads=0)
    command.add_argument("--model", default="deit_small_patch16_224")
    command.add_argument("--img-size", type=int, default=224)
    command.add_argument("--rel-pos", default="none", choices=["none", "bias", "separable", "rope"])
    command.add_argument("--method", default="sampled", choices=sorted(methods.METHODS), help="set against dense")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method's")
    command.add_argument("--rho", help=f"operating points, with commas (default: {_RHO})")
    command.add_argument("--batch-size", type=int, default=8)
    return conclude(command.parse_args(argv), measured, report)


if __name__ == "__main__":
    main()
