"""What one training step costs at each kept share, beside timm's plain model.

    python -m tools.bench_step --model deit_small_patch16_224 --batch 8 --rounds 5 --json step.json

Everything runs in one process. A round times one step (forward, cross entropy, backward, AdamW) of every case, so that
whatever else the machine does falls on all of them; the table gives medians and quartiles over the rounds. Ratios are
formed within a round first, for the same reason. Two of them are goals of the project:

* an epoch of the published cycle over a dense epoch: at most 0.70 (arithmetic alone allows 0.637 for DeiT-S);
* our model at rho = 1 over timm's: at most 1.05.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pss.flops import training_saving
from pss.schedules import Cyclic, histogram
from pss.vit import create_model

STEPS = 1251  # of an epoch of ImageNet in batches of 1024
CYCLE = Cyclic.published(steps_per_epoch=STEPS, epochs=1)
GOALS = {"cyclic epoch / dense epoch": 0.70, "ours at rho 1 / timm": 1.05}
PLAIN = "timm"


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
            begin = _now(device)
            cases[name]()
            if number:
                seconds[name].append(_now(device) - begin)
    return seconds


def ratios(
    seconds: dict[str, list[float]], levels: dict[float, str], shares: dict[float, float]
) -> dict[str, list[float]]:
    """The goals' two ratios, once per round."""
    dense = levels[1.0]
    rounds = range(len(seconds[dense]))
    epoch = [sum(share * seconds[levels[rho]][i] for rho, share in shares.items()) for i in rounds]
    return {
        "cyclic epoch / dense epoch": [epoch[i] / seconds[dense][i] for i in rounds],
        "ours at rho 1 / timm": [seconds[dense][i] / seconds[PLAIN][i] for i in rounds],
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what the figures were taken."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    cpu = [line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")]
    return {
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
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
    ours = create_model(arguments.model, rel_pos=arguments.rel_pos, sort=arguments.sort, **size)
    plain = timm.create_model(arguments.model, **size)
    images = torch.randn(arguments.batch, 3, arguments.img_size, arguments.img_size, device=device)
    labels = torch.randint(1000, (arguments.batch,), device=device)
    ours, plain = ours.to(device), plain.to(device)

    levels = {rho: f"rho {rho}" for rho in shares}
    step = training_step(ours, images, labels, arguments.bf16)
    cases: dict[str, Callable[[], None]] = {name: partial(step, rho=rho) for rho, name in levels.items()}
    cases[PLAIN] = training_step(plain, images, labels, arguments.bf16)
    seconds = time_rounds(cases, arguments.rounds, device)
    return {
        "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
        "environment": environment(device),
        "arithmetic_limit": 1 - training_saving(ours, CYCLE, STEPS),
        "seconds": seconds,
        "ratios": ratios(seconds, levels, shares),
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
        lines.append(f"| {name} | {median:.3f} | {first:.3f} to {third:.3f} | {GOALS[name]} |")
    lines.append(f"\nArithmetic alone: {result['arithmetic_limit']:.3f} of a dense epoch.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="a plain ViT of timm")
    parser.add_argument("--img-size", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of every case")
    parser.add_argument("--rel-pos", choices=("none", "bias"), default="none", help="our model's position bias")
    parser.add_argument("--sort", choices=("magnitude", "random"), default="magnitude", help="which patches are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--json", type=Path, help="where to write every single timing")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(report(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
