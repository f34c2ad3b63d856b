"""What one training step costs at each kept share, beside timm's plain model and beside other ways of doing it.

    python -m tools.benchmarks.step --model deit-s-224 vit-b-224 --beside none naive patch-drop --rounds 5 \\
        --json step.json --markdown step.md

Everything runs in one process. A round times one step (forward, cross entropy, backward, AdamW) of every case, so that
whatever else the machine does falls on all of them; the table gives medians and quartiles over the rounds. Ratios are
formed within a round first, for the same reason. The cases are our model and timm's, and as `--beside` says:

* `none`: our model without a position bias;
* `naive`: with a bias that is written out for all pairs of patches of every image, then cut down to the kept ones by
  rows and by columns, as in the code that McDanel & Huynh (2022) published;
* `patch-drop`: timm's model with its own `patch_drop_rate`, which drops patches at random and has no bias.

A cyclic epoch is the published cycle's, its levels weighted as they occur. Its saving is set beside what the arithmetic
allows; utilisation (MFU) is the arithmetic done in a second over what the device could do, where that is known. Memory
is the most that a step at rho = 0.8 has allocated at a time, and attention's share of it what the same step needs less
when every token attends to nothing but itself.

Goals of the project: a cyclic epoch takes at most 0.652 of a dense one (for DeiT-S, 0.96 of the saving that arithmetic
allows); at rho = 1 a step without a bias takes at most 1.03 of timm's; a bias costs at most 0.04 of a step at any rho,
and less than the naive way; attention takes at most half of the naive way's memory.

`--dry-run` takes two small blocks in place of each model, for no other purpose than to see that everything runs.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, get_args

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pss.attention import cpu as attention_cpu
from pss.attention.attend import Attention, RelPos, relpos
from pss.models.create import create_model
from pss.models.flops import macs, training_saving
from pss.models.vit import VisionTransformer
from pss.schedules import Cyclic, histogram
from tools.benchmarks.measure import cells, conclude, in_turns, over, parser, peak_tflops, spread, table, told, wait_for

MODELS = {
    "deit-s-224": ("deit_small_patch16_224", 224),
    "vit-b-224": ("vit_base_patch16_224", 224),
    "deit-s-384": ("deit_small_patch16_224", 384),
}
"""timm's name and pixels, by the names of the recipes."""

STEPS = 1251  # of an epoch of ImageNet in batches of 1024
CYCLE = Cyclic.published(steps_per_epoch=STEPS, epochs=1)
PLAIN = "timm"
CYCLIC = "cyclic epoch / dense epoch"
MEMORY_RHO = 0.8
GOALS = {
    CYCLIC: "0.652",
    "none at rho 1 / timm": "1.03",
    "with / without bias": "1.04",
    "ours / naive": "1",
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


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


class AttentionToItself(Attention):
    """What is left of attention when every token attends to nothing but itself."""

    def forward(self, x: Tensor, positions: Tensor | None = None, *, attn_mask: Tensor | None = None) -> Tensor:
        # A copy, as a view would keep the queries and keys.
        return self.project_out(self._project(x)[2].clone())


class PatchDrop(nn.Module):
    """timm's model with `patch_drop_rate`, which is set for every step."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, rho: float) -> Tensor:
        self.model.patch_drop.prob = 1 - rho
        logits: Tensor = self.model(images)
        return logits


def naive_model(model: VisionTransformer) -> VisionTransformer:
    """A copy of `model` that computes its bias the expensive way."""
    naive = copy.deepcopy(model)
    for block in naive.blocks:
        block.attn = NaiveAttention(block.attn, naive.num_prefix_tokens)
    naive.positions = lambda kept: kept  # type: ignore[method-assign]
    return naive


def model_without_attention(model: VisionTransformer) -> VisionTransformer:
    """A copy of `model` whose tokens attend to nothing but themselves."""
    without = copy.deepcopy(model)
    for block in without.blocks:
        block.attn = AttentionToItself(block.attn)
    return without


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


def time_rounds(
    cases: dict[str, Callable[[], None]], rounds: int, device: torch.device, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds a step of every case in every round, after one round to warm up.

    Short steps are repeated, and their mean taken, until they have taken about as long as the longest one: what the
    machine does besides then falls on all alike.
    """
    repeats = dict.fromkeys(cases, 1)

    def timed(name: str) -> float:
        wait_for(device)
        began = clock()
        for _ in range(repeats[name]):
            cases[name]()
        wait_for(device)
        return (clock() - began) / repeats[name]

    steps = {name: partial(timed, name) for name in cases}
    first = {name: seconds for name, (seconds,) in in_turns(steps, 1, warm_up=False).items()}
    repeats |= {name: max(1, round(max(first.values()) / seconds)) for name, seconds in first.items()}
    return in_turns(steps, rounds, warm_up=False)


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """The most bytes of tensors that a step has allocated at a time, beyond what was there before; it runs twice."""
    step()
    attention_cpu._memory.clear()  # or what it keeps for its next call would count as there before
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(change for _, change in changes))


def attention_memory(
    models: dict[str, VisionTransformer], images: Tensor, labels: Tensor, half: bool
) -> dict[str, Any]:
    """Peak bytes of a step by model, and how much of them is attention's."""
    peaks = {}
    for name, model in {**models, "without attention": model_without_attention(next(iter(models.values())))}.items():
        step = partial(training_step(model, images, labels, half), rho=MEMORY_RHO)
        peaks[name] = peak_bytes(step, images.device)
    nothing = peaks.pop("without attention")
    return {name: {"peak": peak, "attention": peak - nothing} for name, peak in peaks.items()}


def cyclic_epoch(seconds: dict[str, list[float]], shares: dict[float, float], prefix: str = "") -> list[float]:
    """Seconds of a mean step of the cycle, in every round."""
    levels = [[share * value for value in seconds[f"{prefix}rho {rho}"]] for rho, share in shares.items()]
    return [sum(parts) for parts in zip(*levels, strict=True)]


def ratios(seconds: dict[str, list[float]], shares: dict[float, float]) -> dict[str, list[float]]:
    """Ratios of times, once per round."""
    epoch = partial(cyclic_epoch, seconds, shares)
    dense = seconds["rho 1.0"]
    found = {CYCLIC: over(epoch(), dense), "ours at rho 1 / timm": over(dense, seconds[PLAIN])}
    if "none, rho 1.0" in seconds:
        found["none at rho 1 / timm"] = over(seconds["none, rho 1.0"], seconds[PLAIN])
        for rho in shares:
            found[f"with / without bias, rho {rho}"] = over(seconds[f"rho {rho}"], seconds[f"none, rho {rho}"])
    for name in ("naive", "patch-drop"):
        if f"{name}, rho 1.0" in seconds:
            found[f"{name}: {CYCLIC}"] = over(epoch(f"{name}, "), seconds[f"{name}, rho 1.0"])
    if "naive, rho 1.0" in seconds:
        for rho in shares:
            found[f"ours / naive, rho {rho}"] = over(seconds[f"rho {rho}"], seconds[f"naive, rho {rho}"])
        found["ours / naive, cyclic epoch"] = over(epoch(), epoch("naive, "))
    return found


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time all cases of one model; the result holds every single timing."""
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    shares = histogram(CYCLE, STEPS)
    timm_name, img_size = MODELS.get(name, (name, 224))
    img_size = arguments.img_size or img_size
    options: dict[str, Any] = {"img_size": img_size}
    if arguments.dry_run:
        options |= {"depth": 2, "embed_dim": 32, "num_heads": 2}
    ours = partial(create_model, timm_name, sort=arguments.sort, **options)
    models = {"ours": ours(rel_pos=arguments.rel_pos)}
    if "none" in arguments.beside:
        models["none"] = ours(rel_pos="none")
    if "naive" in arguments.beside:
        models["naive"] = naive_model(models["ours"])
    images = torch.randn(arguments.batch, 3, img_size, img_size, device=device)
    labels = torch.randint(1000, (arguments.batch,), device=device)
    for model in models.values():
        model.to(device)
    memory = attention_memory(models, images, labels, arguments.bf16)

    plain = timm.create_model(timm_name, **options).to(device)
    cases: dict[str, Callable[[], None]] = {PLAIN: training_step(plain, images, labels, arguments.bf16)}
    others: dict[str, nn.Module] = {**models}
    if "patch-drop" in arguments.beside:
        others["patch-drop"] = PatchDrop(timm.create_model(timm_name, patch_drop_rate=0.5, **options).to(device))
    for prefix, model in others.items():
        step = training_step(model, images, labels, arguments.bf16)
        prefix = "" if prefix == "ours" else f"{prefix}, "
        cases |= {f"{prefix}rho {rho}": partial(step, rho=rho) for rho in shares}
    seconds = time_rounds(cases, arguments.rounds, device, CLOCKS[arguments.clock])
    found = ratios(seconds, shares)
    limit = training_saving(models["ours"], CYCLE, STEPS)
    return {
        "model": timm_name,
        "img_size": img_size,
        "flops": {rho: 6 * macs(models["ours"], rho) * arguments.batch for rho in shares},
        "arithmetic_limit": 1 - limit,
        "share_of_limit": [(1 - ratio) / limit for ratio in found[CYCLIC]],
        "cycle": shares,
        "seconds": seconds,
        "ratios": found,
        "memory": memory,
    }


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """All models, one after the other."""
    return {"models": {name: measure(name, arguments) for name in arguments.model}}


def report(result: dict[str, Any]) -> str:
    """The result as markdown."""
    settings = result["settings"]
    lines = [
        f"Batch {settings['batch']}, rel_pos {settings['rel_pos']}, sort {settings['sort']}, "
        f"{'bf16 autocast' if settings['bf16'] else 'float32'}, {settings['rounds']} rounds, {settings['clock']} time",
        told(result),
    ]
    peak = peak_tflops(result["environment"]["device"]) if settings["bf16"] else None
    for name, found in result["models"].items():
        lines += ["", f"## {name}: {found['model']}, {found['img_size']} pixels", ""]
        lines += _report_of_model(found, settings["batch"], peak)
    return "\n".join(lines)


def _report_of_model(found: dict[str, Any], batch: int, peak: float | None) -> list[str]:
    seconds = dict(found["seconds"])
    for prefix in ("", "none, ", "naive, ", "patch-drop, "):
        if f"{prefix}rho 1.0" in seconds:
            seconds[f"{prefix}cyclic"] = cyclic_epoch(seconds, found["cycle"], prefix)
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        utilisation = "" if peak is None else f"{_mean_flops(name, found) / median / (1e12 * peak):.1%}"
        milliseconds = cells([1e3 * value for value in values], ".1f")
        rows.append(f"{name} | {milliseconds} | {batch / median:.1f} | {utilisation}")
    compared = [
        f"{name} | {cells(values, '.3f')} | {GOALS.get(name.split(', ')[0], '')}"
        for name, values in found["ratios"].items()
    ]
    memory = [
        f"{name} | {memory['peak'] / 1e6:.1f} | {memory['attention'] / 1e6:.1f}"
        for name, memory in found["memory"].items()
    ]
    lines = [
        *table("step | median ms | quartiles ms | images/s | MFU", rows),
        "",
        *table("ratio | median | quartiles | goal", compared),
        "",
        f"Arithmetic alone: {found['arithmetic_limit']:.3f} of a dense epoch. Share of that saving reached: "
        f"{spread(found['share_of_limit'], '.3f')}.",
        "",
        *table(f"memory at rho {MEMORY_RHO} | peak of a step, MB | attention's share, MB", memory),
    ]
    if "naive" in found["memory"]:
        ours, naive = (found["memory"][name]["attention"] for name in ("ours", "naive"))
        lines += ["", f"Attention's share, naive / ours: {naive / ours:.2f} (goal: at least 2)."]
    return lines


def _mean_flops(case: str, found: dict[str, Any]) -> float:
    """Operations of a step of the case of that name."""
    flops, shares = found["flops"], found["cycle"]
    if case.endswith("cyclic"):
        return sum(share * flops[rho] for rho, share in shares.items())
    return float(flops[1.0 if case == PLAIN else float(case.rpartition(" ")[2])])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run as the arguments say (the command line's if None), print and write the report, and return the result."""
    command = parser(__doc__, rounds=5, device="auto", threads=0)
    names = ", ".join(MODELS)
    command.add_argument("--model", nargs="+", default=["deit-s-224"], help=f"{names}, or plain ViTs of timm")
    command.add_argument("--img-size", type=int, help="pixels; as the name says, or 224")
    command.add_argument("--batch", type=int, default=8, help="images per step")
    command.add_argument("--rel-pos", choices=get_args(RelPos), default="bias", help="our model's positions")
    command.add_argument("--beside", nargs="*", choices=("none", "naive", "patch-drop"), default=[], help="what else")
    command.add_argument("--sort", choices=("magnitude", "random"), default="magnitude", help="which patches are kept")
    command.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: of this process, all threads")
    command.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    command.add_argument("--dry-run", action="store_true", help="two small blocks in place of each model")
    arguments = command.parse_args(argv)
    if "naive" in arguments.beside and arguments.rel_pos != "bias":
        command.error("--beside naive needs --rel-pos bias")
    if arguments.clock == "cpu" and arguments.device != "cpu":
        command.error("--clock cpu needs --device cpu")
    return conclude(arguments, measured, report)


if __name__ == "__main__":
    main()
