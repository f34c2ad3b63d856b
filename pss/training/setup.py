"""The parts of a run that its settings and its machine decide, built before the first step."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import FrameType

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.parallel import DistributedDataParallel

from pipelines.augment import Mixing, MixingConfig
from pss.attention.attend import gets_masks_right
from pss.config import CompileConfig, Config
from pss.methods import Method, Progress, Stage, mean_tokens
from pss.models.compiled import Graphs
from pss.runtime.processes import World, share
from pss.training.sharding import reshard


def check_masks(device: torch.device, say: Callable[[str], None]) -> None:
    """Try, before anything is compiled, whether cuDNN gets attention with a mask right, and say so if it does not.

    `pss.attention.attend` asks for the outcome, which is kept, and gives a mask to other kernels then.
    """
    if device.type == "cuda" and not gets_masks_right(SDPBackend.CUDNN_ATTENTION, "cuda"):
        say("cuDNN fails a self-test of attention with a mask here; where there is a mask, other kernels compute it")


def stages_of(method: Method, total_steps: int) -> Counter[tuple[Stage, int]]:
    """How many steps of a run each stage has, at each size of its images, in the order in which they come up."""
    return Counter(
        (method.stage(at), method.config.data.train_size(at.epoch)) for at in positions_of(method, range(total_steps))
    )


def positions_of(method: Method, steps: Iterable[int]) -> Iterator[Progress]:
    """Where a run is at each of these steps, as the main process sees it."""
    train, per_epoch = method.config.train, method.steps_per_epoch
    total, phases = train.epochs * per_epoch, phase_of_epochs(method)
    for step in steps:
        epoch = step // per_epoch
        yield Progress(step, total, epoch, train.epochs, train.seed, 0, phases[epoch])


def position_of(method: Method, step: int) -> Progress:
    """Where a run is at a step, as the main process sees it."""
    return next(positions_of(method, [step]))


def phase_of_epochs(method: Method) -> list[int]:
    """For every epoch of the run, the number of its phase."""
    return [number for number, phase in enumerate(method.phases()) for _ in range(phase.epochs)]


def check_phases(method: Method) -> None:
    """Raise `ValueError` where a method's phases are not the run, or have no room for their warm-up."""
    epochs = sum(phase.epochs for phase in method.phases())
    if epochs != method.config.train.epochs:
        raise ValueError(
            f"the phases of method {method.name} have {epochs} epochs, and train.epochs is "
            f"{method.config.train.epochs}; they must be as many"
        )
    for phase in method.phases():
        if phase.optim.warmup_epochs + phase.optim.cooldown_epochs > phase.epochs:
            raise ValueError(
                f"phase {phase.name} of method {method.name} has {phase.epochs} epochs, too few for a warm-up of "
                f"{phase.optim.warmup_epochs:g} and a cool-down of {phase.optim.cooldown_epochs:g}; lower "
                "optim.warmup_epochs"
            )


def compile_levels(method: Method, settings: CompileConfig, device: torch.device, total_steps: int) -> bool:
    """Have the method's model compile what it computes of every stage of the run; says whether it will.

    Raises:
        ValueError: training and validation together have more token counts than `settings` allow.
    """
    usual = device.type == "cuda" and find_spec("triton") is not None
    if settings.mode == "off" or (settings.mode == "auto" and not usual):
        return False
    if not method.compiles:
        if settings.mode == "on":
            raise ValueError(
                f"compile.mode is on, and method {method.name} has no part of constant shapes; set compile.mode=auto"
            )
        return False
    if settings.cuda_graphs and device.type != "cuda":
        raise ValueError(f"compile.cuda_graphs needs a GPU and this run is on the {device.type}; leave it false")
    model, full_size = method.model, method.config.data.img_size
    graphs = set()
    for stage, size in stages_of(method, total_steps):
        counts = method.training_tokens(stage, size)
        # All patches of small images lie at the same places, others at each image's own; see `Graphs`.
        graphs.add((counts, max(counts) == model.num_kept_tokens(1.0, size) and size < full_size))
    told = [str(mean_tokens(counts)) for counts, _ in sorted(graphs)]
    if len(told) + 1 > settings.max_graphs:
        raise ValueError(
            f"this run trains at {len(told)} token counts ({', '.join(told)}) and validates at one, and "
            f"compile.max_graphs is {settings.max_graphs}; raise it to {len(told) + 1}, or set compile.mode=off"
        )
    model.graphs = Graphs(max_graphs=settings.max_graphs, backend=settings.backend, cuda_graphs=settings.cuda_graphs)
    return True


@torch.no_grad()
def begin_run(method: Method, average: Method | None, images: Tensor) -> None:
    """Let the method see the first images, and all processes and the average have what the first one made of them."""
    if type(method).begin_run is Method.begin_run:
        return
    method.begin_run(images)
    reshard(method)
    averages = [None] * len(list(method.buffers())) if average is None else list(average.buffers())
    for buffer, averaged in zip(method.buffers(), averages, strict=True):
        share(buffer)
        if averaged is not None:
            averaged.copy_(buffer)


def wrap(method: Method, world: World) -> nn.Module:
    """The method as the loop calls it: in DDP where there are several processes."""
    if world.size == 1:
        return method
    devices = [world.device.index] if world.device.type == "cuda" else None
    engine = DistributedDataParallel(method, device_ids=devices, gradient_as_bucket_view=True)
    _settle_buckets(engine, method)
    return engine


def _settle_buckets(engine: nn.Module, method: Method) -> None:
    """Have DDP sort the gradients into buckets now, from the last parameter to the first, and not after a step.

    In which order three processes or more add up a gradient depends on where in its bucket it lies. DDP sorts them once
    more after its first backward pass: the first step after each start would be rounded as no other.
    """
    learnt, attributes = [p for p in method.parameters() if p.requires_grad], vars(method)
    own = {"forward": attributes["forward"]} if "forward" in attributes else {}
    attributes["forward"] = lambda: torch.stack([p.sum() for p in learnt]).sum() * 0
    try:
        engine().backward()
    finally:
        del attributes["forward"]
        attributes.update(own)
    for parameter in learnt:
        parameter.grad = None


def build_mixing(config: Config, num_classes: int, rank: int) -> Mixing | None:
    """Mixup and CutMix as configured, or None where both are off."""
    loss = config.loss
    if not loss.mixup and not loss.cutmix:
        return None
    mixing = MixingConfig(
        mixup_alpha=loss.mixup,
        cutmix_alpha=loss.cutmix,
        switch_probability=loss.mix_switch_prob,
        mode=loss.mix_mode,
    )
    return Mixing(
        mixing,
        num_classes,
        seed=config.train.seed,
        rank=rank,
        label_smoothing=loss.label_smoothing,
        parts=config.train.accumulate,
    )


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint."""

    def __init__(self, step: int, signals: list[int]) -> None:
        super().__init__(f"stopped at step {step}; continue with --resume")
        self.by_user = signal.SIGINT in signals
        """Whether it was Ctrl-C, here, and not a scheduler's SIGTERM."""


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying; a second SIGINT dies as usual."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
