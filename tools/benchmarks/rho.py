"""What a smaller share of patches gains at inference: images per second at each rho against rho = 1, the model alone.

    python -m tools.benchmarks.rho
    python -m tools.benchmarks.rho --model deit_small_patch16_224 --rel-pos bias --batch-size 16 --rounds 9

Rounds are interleaved, and each ratio is of two neighbours in the same round, so that a machine whose speed drifts does
not favour either. The last column is what the arithmetic allows.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from functools import partial

import torch

import pss
from pss.inference.timing import call_seconds

# McDanel & Huynh (2022) for DeiT-S at 224 pixels on an A100.
_PUBLISHED = {0.7: 1.40, 0.5: 1.73}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--rel-pos", default="none", choices=["none", "bias", "separable", "rope"])
    parser.add_argument("--rho", default="0.7,0.5", help="shares of patches to compare with 1, with commas")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = pss.create_model(args.model, img_size=args.img_size, rel_pos=args.rel_pos).to(device).eval()
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    rhos = [1.0, *(float(text) for text in args.rho.split(","))]
    measured = call_seconds([partial(model, images, rho) for rho in rhos], device, rounds=args.rounds)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    print(
        f"{args.model}, {args.img_size} px, rel_pos {args.rel_pos}, batch {args.batch_size}, {args.rounds} rounds, "
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print("| ρ | tokens | images/s | × ρ 1: median (quartiles) | published | FLOPs allow |")
    print("|---|---|---|---|---|---|")
    for rho, seconds in zip(rhos, measured, strict=True):
        ratios = [whole / part for whole, part in zip(measured[0], seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        published = f"{_PUBLISHED[rho]:.2f}" if rho in _PUBLISHED else "–"
        print(
            f"| {rho:g} | {model.num_kept_tokens(rho)} | {args.batch_size / statistics.median(seconds):,.1f} | "
            f"{middle:.3f} ({low:.3f}–{high:.3f}) | {published} | {pss.macs(model) / pss.macs(model, rho):.3f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
