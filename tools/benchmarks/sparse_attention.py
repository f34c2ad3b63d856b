"""What attention to few keys costs in time: Sparsifiner's, with hidden keys computed and left out, and dense attention.

    python -m tools.benchmarks.sparse_attention
    python -m tools.benchmarks.sparse_attention --device cuda --batch-size 64 --keep 0.25 --rounds 15

One attention layer of a DeiT-S, projections included, on random tokens, at each image size. `hidden` computes all keys
and masks them, `gathered` fetches the keys of each query and computes no others; both ask the predictor, whose parts
have rows of their own. Rounds are interleaved, and ratios are of neighbours in the same round. The sparsities of
coefficients and basis are those published (0.87 and 0.908), and change no time here: zeros are multiplied. The last
columns are the arithmetic that is done, and that is needed at least, of attention and predictor over dense attention.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pss
from pss.inference.timing import call_seconds
from pss.methods.parts.connectivity import Connection, Thresholds, places_of_strongest, strongest
from pss.methods.parts.predictors import KeepRates, Predictors
from pss.models.flops import attention_macs
from tools.benchmarks.measure import Result, conclude, over, page, parser, spread

_SPARSITIES = 0.87, 0.908  # of coefficients and basis
_TOP = 4  # of 32 coefficients


def measured(arguments: argparse.Namespace) -> Result:
    """Seconds of every round in each case, at each image size."""
    device = torch.device(arguments.device)
    return {"sizes": [_at_size(arguments, int(size), device) for size in arguments.img_size.split(",")]}


def _at_size(arguments: argparse.Namespace, size: int, device: torch.device) -> Result:
    torch.manual_seed(0)
    model = pss.create_model(arguments.model, img_size=size, depth=1).eval()
    predictors = Predictors(model, 32, "heads", Thresholds(0.0, 0.0, _TOP))
    (predictor,) = predictors.each()
    basis = float(predictor.up.detach().abs().flatten().quantile(_SPARSITIES[1]))
    predictor.thresholds = Thresholds(basis, 0.0, _TOP)
    model.to(device)
    predictors.to(device)
    rates = KeepRates.of([arguments.keep], of_all=False)
    (budget,) = rates.budgets(arguments.keep, model.num_patches, model.num_prefix_tokens)
    attention: Any = model.blocks[0].attn
    tokens = torch.randn(arguments.batch_size, model.num_tokens, model.embed_dim, device=device)
    hidden = Connection(predictor, model.num_prefix_tokens, budget)
    with torch.inference_mode():
        q, k, _ = attention.project_in(tokens)
        scores = predictor.scores(q[:, :, model.num_prefix_tokens :], k)[0]
    cases: dict[str, Callable[[], Tensor]] = {
        "dense": partial(attention, tokens),
        "hidden": partial(attention, tokens, connection=hidden),
        "gathered": partial(attention, tokens, connection=hidden._replace(gathered=True)),
        "part: predictor": partial(predictor.scores, q[:, :, model.num_prefix_tokens :], k),
        "part: mask": partial(strongest, scores, budget),
        "part: keys": partial(places_of_strongest, scores, budget),
    }
    with torch.inference_mode():
        timed = call_seconds(list(cases.values()), device, rounds=arguments.rounds)
    return {
        "img_size": size,
        "tokens": model.num_tokens,
        "budget": budget,
        "arithmetic": _arithmetic(predictors, model.num_tokens, model.num_patches, budget),
        "seconds": dict(zip(cases, timed, strict=True)),
    }


def _arithmetic(predictors: Predictors, num_tokens: int, num_patches: int, budget: int) -> dict[str, list[float]]:
    """Of attention and predictor over dense attention: what is done, and what is needed at least."""
    width = predictors.num_heads * predictors.product_width
    dense = attention_macs(num_tokens, num_tokens, width)
    extra, fewer = predictors.macs(num_tokens, [budget]), attention_macs(num_patches, num_tokens - budget, width)
    needed = predictors.needed_macs(num_tokens, [budget], *_SPARSITIES) / dense
    return {
        "dense": [1.0, 1.0],
        "hidden": [(dense + extra) / dense, needed],
        "gathered": [(dense - fewer + extra) / dense, needed],
    }


def report(result: Result) -> str:
    """The result as markdown."""
    settings, rows = result["settings"], []
    for size in result["sizes"]:
        dense = size["seconds"]["dense"]
        for name, seconds in size["seconds"].items():
            done, needed = size["arithmetic"].get(name, (None, None))
            told = ["–" if one is None else f"{one:.2f}" for one in (done, needed)]
            ratio, time = spread(over(seconds, dense), ".2f"), f"{1e3 * statistics.median(seconds):.2f}"
            rows.append(f"{size['tokens']} | {size['budget']} | {name} | {time} | {ratio} | {' | '.join(told)}")
    head = "tokens | keys | attention | ms | × dense: median (quartiles) | arithmetic: done | needed"
    title = (
        f"One attention layer of {settings['model']}, keep rate {settings['keep']:g}, batch {settings['batch_size']}, "
        f"{settings['rounds']} rounds"
    )
    return page(result, title, head, rows)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run as the arguments say (the command line's if None), print and write the report, and return the result."""
    command = parser(__doc__, rounds=9, device="auto", threads=0)
    command.add_argument("--model", default="deit_small_patch16_224")
    command.add_argument("--img-size", default="224,384", help="sides of images, with commas")
    command.add_argument("--keep", type=float, default=0.25, help="keys of a patch, as a share of the patches")
    command.add_argument("--batch-size", type=int, default=4)
    return conclude(command.parse_args(argv), measured, report)


if __name__ == "__main__":
    main()
