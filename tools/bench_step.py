"""What one training step costs at each kept share, beside timm's plain model and beside other ways of doing it.

    python -m tools.bench_step --model deit_small_patch16_224 --rel-pos bias --batch 8 --rounds 5 --json step.json

Everything runs in one process. A round times one step (forward, cross entropy, backward, AdamW) of every case, so that
whatever else the machine does falls on all of them; the table gives medians and quartiles over the rounds. Ratios are
formed within a round first, for the same reason. The cases are our model, timm's, and as `--beside` says:

* `none`: our model without a position bias;
* `naive`: with a bias that is written out for all pairs of patches of every image, then cut down to the kept ones by
  rows and by columns, as in the code that McDanel & Huynh (2022) published.

Goals of the project: an epoch of the published cycle takes at most 0.652 of a dense one (arithmetic alone allows 0.637
for DeiT-S, and 0.652 is 0.96 of that saving); at rho = 1 a step takes at most 1.03 of timm's; a bias costs at most
0.04 of a step at any rho.
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pss import relpos
from pss.attention import Attention, RelPos
from pss.flops import training_saving
from pss.schedules import Cyclic, histogram
from pss.vit import VisionTransformer, create_model

STEPS = 1251  # of an epoch of ImageNet in batches of 1024
CYCLE = Cyclic.published(steps_per_epoch=STEPS, epochs=1)
PLAIN = "timm"
CYCLIC = "cyclic epoch / dense epoch"
GOALS = {CYCLIC: "0.652", "ours at rho 1 / timm": "1.03", "with / without bias": "1.04"}


class NaiveAttention(Attention):
    """Attention with a bias table the expensive way; its `positions` are the kept patches."""

    def __init__(self, source: Attention, num_prefix: int) -> None:
        super().__init__(source)
        assert source.grid is not None
        rows = relpos.pair_rows(relpos.positions(source.grid, num_prefix), relpos.num_table_rows(source.grid))
        self.register_buffer("rows", rows[0], persistent=False)
        self.num_prefix = num_prefix

    def forward(self, x: Tensor, positions: Tensor | None = None, *, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.project_in(x)
        bias = self.relative_position_bias_table[self.rows].repeat(len(x), 1, 1, 1)  # (B, N, N, H)
        if positions is not None:
            prefix = torch.arange(self.num_prefix, device=x.device).expand(len(x), -1)
            kept = torch.cat((prefix, positions + self.num_prefix), dim=1)[:, :, None, None]
            bias = bias.gather(1, kept.expand(-1, -1, *bias.shape[2:]))  # (B, K, N, H)
            kept = kept.transpose(1, 2)
            bias = bias.gather(2, kept.expand(-1, bias.shape[1], -1, bias.shape[3]))  # (B, K, K, H)
        logits = q @ k.transpose(-2, -1) * self.head_dim**-0.5 + bias.permute(0, 3, 1, 2)
        return self.project_out(logits.softmax(dim=-1).to(v.dtype) @ v)


def naive_model(model: VisionTransformer) -> VisionTransformer:
    """A copy of `model` that computes its bias the expensive way."""
    naive = copy.deepcopy(model)
    for block in naive.blocks:
        block.attn = NaiveAttention(block.attn, naive.num_prefix_tokens)
    naive.positions = lambda kept: kept  # type: ignore[method-assign]
    return naive


def training_step(model: nn.Module, images: Tensor, labels: Tensor, autocast: bool) -> Callable[..., None]:
    """A function that trains `model` for one step on these images; its arguments go to the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(**options: Any) -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(images, **options), labels)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_rounds(cases: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every case in every round, after one round to warm up; every other round goes backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        order = list(cases)[:: 1 if number % 2 else -1]
        for name in order:
            wait_for(device)
            begin = time.perf_counter()
            cases[name]()
            wait_for(device)
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratios(seconds: dict[str, list[float]], shares: dict[float, float]) -> dict[str, list[float]]:
    """Ratios of times, once per round."""
    rounds = range(len(seconds[PLAIN]))

    def epoch(prefix: str, i: int) -> float:
        return sum(share * seconds[f"{prefix}rho {rho}"][i] for rho, share in shares.items())

    dense = seconds["rho 1.0"]
    found = {
        CYCLIC: [epoch("", i) / dense[i] for i in rounds],
        "ours at rho 1 / timm": [dense[i] / seconds[PLAIN][i] for i in rounds],
    }
    if "none, rho 1.0" in seconds:
        for rho in shares:
            with_bias, without = seconds[f"rho {rho}"], seconds[f"none, rho {rho}"]
            found[f"with / without bias, rho {rho}"] = [with_bias[i] / without[i] for i in rounds]
    if "naive, rho 1.0" in seconds:
        found["naive: " + CYCLIC] = [epoch("naive, ", i) / seconds["naive, rho 1.0"][i] for i in rounds]
        for rho in shares:
            ours, naive = seconds[f"rho {rho}"], seconds[f"naive, rho {rho}"]
            found[f"ours / naive, rho {rho}"] = [ours[i] / naive[i] for i in rounds]
        found["ours / naive, cyclic epoch"] = [epoch("", i) / epoch("naive, ", i) for i in rounds]
    return found


def wait_for(device: torch.device) -> None:
    """Until everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what the figures were taken."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    cpu = [line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")]
    return {
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else None,
        "timm": timm.__version__,
        "cpu": cpu[0] if cpu else platform.processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time all cases; the result holds every single timing."""
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shares = histogram(CYCLE, STEPS)
    size = {"img_size": arguments.img_size}
    models = {"": create_model(arguments.model, rel_pos=arguments.rel_pos, sort=arguments.sort, **size)}
    if "none" in arguments.beside:
        models["none, "] = create_model(arguments.model, rel_pos="none", sort=arguments.sort, **size)
    if "naive" in arguments.beside:
        models["naive, "] = naive_model(models[""])
    plain = timm.create_model(arguments.model, **size).to(device)
    images = torch.randn(arguments.batch, 3, arguments.img_size, arguments.img_size, device=device)
    labels = torch.randint(1000, (arguments.batch,), device=device)

    cases: dict[str, Callable[[], None]] = {PLAIN: training_step(plain, images, labels, arguments.bf16)}
    for prefix, model in models.items():
        step = training_step(model.to(device), images, labels, arguments.bf16)
        cases |= {f"{prefix}rho {rho}": partial(step, rho=rho) for rho in shares}
    seconds = time_rounds(cases, arguments.rounds, device)
    found = ratios(seconds, shares)
    limit = training_saving(models[""], CYCLE, STEPS)
    return {
        "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
        "environment": environment(device),
        "arithmetic_limit": 1 - limit,
        "share_of_limit": [(1 - ratio) / limit for ratio in found[CYCLIC]],
        "seconds": seconds,
        "ratios": found,
    }


def report(result: dict[str, Any]) -> str:
    """The result as markdown."""
    settings = result["settings"]
    lines = [
        f"{settings['model']}, {settings['img_size']} pixels, batch {settings['batch']}, "
        f"rel_pos {settings['rel_pos']}, sort {settings['sort']}, "
        f"{'bf16 autocast' if settings['bf16'] else 'float32'}, {settings['rounds']} rounds",
        ", ".join(f"{key} {value}" for key, value in result["environment"].items()),
        "",
        "| step | median ms | quartiles ms | images/s |",
        "|---|---|---|---|",
    ]
    for name, values in result["seconds"].items():
        first, median, third = quartiles(values)
        rate = settings["batch"] / median
        lines.append(f"| {name} | {1e3 * median:.1f} | {1e3 * first:.1f} to {1e3 * third:.1f} | {rate:.1f} |")
    lines += ["", "| ratio | median | quartiles | goal |", "|---|---|---|---|"]
    for name, values in result["ratios"].items():
        first, median, third = quartiles(values)
        goal = GOALS.get(name.split(", rho")[0], "")
        lines.append(f"| {name} | {median:.3f} | {first:.3f} to {third:.3f} | {goal} |")
    first, median, third = quartiles(result["share_of_limit"])
    lines.append(
        f"\nArithmetic alone: {result['arithmetic_limit']:.3f} of a dense epoch. Share of that saving reached: "
        f"{median:.3f} ({first:.3f} to {third:.3f})."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="a plain ViT of timm")
    parser.add_argument("--img-size", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of every case")
    parser.add_argument("--rel-pos", choices=get_args(RelPos), default="bias", help="our model's positions")
    parser.add_argument("--beside", nargs="*", choices=("none", "naive"), default=[], help="what else to time")
    parser.add_argument("--sort", choices=("magnitude", "random"), default="magnitude", help="which patches are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--json", type=Path, help="where to write every single timing")
    arguments = parser.parse_args()
    if "naive" in arguments.beside and arguments.rel_pos != "bias":
        parser.error("--beside naive needs --rel-pos bias")
    result = measure(arguments)
    print(report(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
