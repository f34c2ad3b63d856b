"""What attention with a position bias costs, forward and backward, in every implementation and at every length.

    python -m tools.benchmarks.attention --lengths 39 79 118 158 197 --batch 8 --json a.json --markdown a.md

The lengths are those of rho = 0.2 to 1 at 224 pixels (39 to 197 tokens) and 384 pixels (115 to 577), class token
included; below rho = 1 every image keeps patches of its own. Input and gradient are the tensor that the projection to
queries, keys and values writes, as in training, so that copies to other layouts count. Per length, a round times every
implementation once, in alternating order; the tables give medians and quartiles over the rounds in milliseconds, and
the ratio to attention without a bias, formed within a round.

`--dry-run` times one narrow head for one image once, for no other purpose than to see that everything runs; on a CPU
the fused kernels take part if TRITON_INTERPRET=1, in Triton's interpreter.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from unittest.mock import patch

import torch
from torch import Tensor

from pss.attention.attend import attend, attend_packed, relpos
from tools.benchmarks.measure import Result, conclude, in_turns, over, page, parser, spread, wait_for

LENGTHS = {14: (39, 79, 118, 158, 197), 24: (115, 231, 346, 462, 577)}
"""Tokens at each rho, by the side of the patch grid."""

PLAIN = "no bias"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def implementations(device: torch.device) -> list[str]:
    """What can be timed there, apart from attention without a bias."""
    runs = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return ["reference", "materialised"] + ["fused"] * (runs and find_spec("triton") is not None)


def attention(name: str, qkv: Tensor, table: Tensor, where: Tensor) -> Tensor:
    """Attention by the implementation of that name, for `qkv` (B, K, 3, H, head width)."""
    by_role = qkv.permute(2, 0, 3, 1, 4)
    if name == PLAIN:
        return attend(*by_role)
    with patch.dict(os.environ, PSS_ATTENTION=name):
        return attend_packed(by_role, table=table, positions=where)


def seconds_of(compute: Callable[[], Tensor], direction: Tensor) -> tuple[float, float]:
    """How long a forward and a backward pass take."""
    wait_for(direction.device)
    begin = time.perf_counter()
    result = compute()
    wait_for(direction.device)
    middle = time.perf_counter()
    result.backward(direction)
    wait_for(direction.device)
    return middle - begin, time.perf_counter() - middle


def measure_length(num_tokens: int, arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of every implementation, direction and round."""
    side = next(side for side, lengths in LENGTHS.items() if num_tokens in lengths)
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    kept = torch.rand(arguments.batch, side**2).argsort(1)[:, : num_tokens - 1].sort().values
    where = relpos.positions((side, side), 1, None if num_tokens == side**2 + 1 else kept).to(device)
    shape = (arguments.batch, num_tokens, 3, arguments.heads, arguments.width)
    qkv = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    table = torch.randn(relpos.num_table_rows((side, side)), arguments.heads, device=device, requires_grad=True)
    direction = torch.randn_like(qkv[:, :, 0]).transpose(1, 2)

    def timed(name: str) -> tuple[float, float]:
        qkv.grad = table.grad = None
        return seconds_of(lambda: attention(name, qkv, table, where), direction)

    names = [PLAIN, *implementations(device)]
    seconds = in_turns({name: partial(timed, name) for name in names}, arguments.rounds)
    ways = ("forward", "backward")
    return {name: dict(zip(ways, map(list, zip(*pairs, strict=True)), strict=True)) for name, pairs in seconds.items()}


def measured(arguments: argparse.Namespace) -> Result:
    """Seconds by length."""
    torch.manual_seed(0)
    return {"seconds": {length: measure_length(length, arguments) for length in arguments.lengths}}


def report(result: Result) -> str:
    """The result as markdown."""
    settings, rows = result["settings"], []
    for length, by_name in result["seconds"].items():
        both = {name: [sum(pair) for pair in zip(*ways.values(), strict=True)] for name, ways in by_name.items()}
        for name, ways in by_name.items():
            milliseconds = " | ".join(spread([1e3 * value for value in values], ".3f") for values in ways.values())
            ratio = spread(over(both[name], both[PLAIN]), ".3f")
            rows.append(f"{length} | {name} | {milliseconds} | {ratio}")
    head = "tokens | implementation | forward ms | backward ms | both / no bias"
    heads = f"{settings['heads']} heads {settings['width']} wide"
    title = f"Batch {settings['batch']}, {heads}, {settings['dtype']}, {settings['rounds']} rounds"
    return page(result, title, head, rows)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run as the arguments say (the command line's if None), print and write the report, and return the result."""
    command = parser(__doc__, rounds=15, device="auto", threads=0)
    every = [length for lengths in LENGTHS.values() for length in lengths]
    command.add_argument("--lengths", type=int, nargs="+", choices=every, help="tokens per image; all")
    command.add_argument("--batch", type=int, default=8, help="images")
    command.add_argument("--heads", type=int, default=6)
    command.add_argument("--width", type=int, default=64, help="of a head")
    command.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    command.add_argument("--dry-run", action="store_true", help="one narrow head, one image, one round")
    arguments = command.parse_args(argv)
    arguments.lengths = arguments.lengths or (every[:1] if arguments.dry_run else every)
    if arguments.dry_run:
        arguments.batch = arguments.heads = arguments.rounds = 1
        arguments.width = 16
    return conclude(arguments, measured, report)


if __name__ == "__main__":
    main()
