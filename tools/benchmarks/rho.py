"""What a smaller share of patches gains at inference: images per second at each rho against rho = 1, the model alone.

    python -m tools.benchmarks.rho
    python -m tools.benchmarks.rho --model deit_small_patch16_224 --rel-pos bias --batch-size 16 --rounds 9

Rounds are interleaved, and each ratio is of two neighbours in the same round, so that a machine whose speed drifts does
not favour either. The last column is what the arithmetic allows.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial

import torch

import pss
from pss.inference.timing import call_seconds
from tools.benchmarks.measure import Result, conclude, over, page, parser, spread

# McDanel & Huynh (2022) for DeiT-S at 224 pixels on an A100.
_PUBLISHED = {0.7: 1.40, 0.5: 1.73}


def measured(arguments: argparse.Namespace) -> Result:
    """Seconds of every round at each rho, rho = 1 first."""
    device = torch.device(arguments.device)
    model = pss.create_model(arguments.model, img_size=arguments.img_size, rel_pos=arguments.rel_pos).to(device).eval()
    images = torch.randn(arguments.batch_size, 3, arguments.img_size, arguments.img_size, device=device)
    rhos = [1.0, *map(float, arguments.rho.split(","))]
    timed = call_seconds([partial(model, images, rho) for rho in rhos], device, rounds=arguments.rounds)
    levels = [
        {
            "rho": rho,
            "tokens": model.num_kept_tokens(rho),
            "arithmetic": pss.macs(model) / pss.macs(model, rho),
            "seconds": seconds,
        }
        for rho, seconds in zip(rhos, timed, strict=True)
    ]
    return {"levels": levels}


def report(result: Result) -> str:
    """The result as markdown."""
    settings, rows = result["settings"], []
    for level in result["levels"]:
        rho, seconds = level["rho"], level["seconds"]
        rate = f"{settings['batch_size'] / statistics.median(seconds):,.1f}"
        ratio = spread(over(result["levels"][0]["seconds"], seconds), ".3f")
        published = f"{_PUBLISHED[rho]:.2f}" if rho in _PUBLISHED else "–"
        rows.append(f"{rho:g} | {level['tokens']} | {rate} | {ratio} | {published} | {level['arithmetic']:.3f}")
    head = "ρ | tokens | images/s | × ρ 1: median (quartiles) | published | FLOPs allow"
    title = (
        f"{settings['model']}, {settings['img_size']} px, rel_pos {settings['rel_pos']}, batch "
        f"{settings['batch_size']}, {settings['rounds']} rounds"
    )
    return page(result, title, head, rows)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run as the arguments say (the command line's if None), print and write the report, and return the result."""
    command = parser(__doc__, rounds=15, device="auto", threads=0)
    command.add_argument("--model", default="deit_small_patch16_224")
    command.add_argument("--img-size", type=int, default=224)
    command.add_argument("--rel-pos", default="none", choices=["none", "bias", "separable", "rope"])
    command.add_argument("--rho", default="0.7,0.5", help="shares of patches to compare with 1, with commas")
    command.add_argument("--batch-size", type=int, default=8)
    return conclude(command.parse_args(argv), measured, report)


if __name__ == "__main__":
    main()
