"""The training loop: build, resume, step, log, validate, save. It knows no method and no loader by name."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.parallel import DistributedDataParallel

from pipelines.augment import Mixing, MixingConfig
from pipelines.augment.device import DeviceTransform
from pipelines.base import Batch, DataError, Loader
from pss import methods
from pss.attention.attend import gets_masks_right
from pss.config import CompileConfig, Config
from pss.inference.evaluate import accuracy
from pss.methods import Method, Phase, Progress
from pss.models.compiled import CompiledTrunk
from pss.models.weights import Remedies, Report, start_from
from pss.runs import checkpoint
from pss.runs.log import RunLog, read_rows
from pss.runtime.precision import autocast
from pss.runtime.processes import Vote, World
from pss.runtime.seeds import seed_generator
from pss.training.console import TrainView
from pss.training.guard import Guard, skipping, update_average
from pss.training.meter import Meter
from pss.training.optim import build_optimizer
from pss.training.sharding import gather, scatter_optimizer, shard, whole
from pss.version import __version__

_REMEDIES = Remedies(
    no_file="--set model.weights=FILE names one, none starts anew",
    other_head="--set model.own_head=true starts with a new classifier",
    other_model="--set model.name=NAME, and the other settings of model, describe the one that it belongs to",
    other_bias="--set model.rel_pos={kind} gives it one",
)


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint."""


class Trainer:
    """One run in one folder. `fit` trains it to its end, from its newest checkpoint where there is one."""

    def __init__(
        self,
        config: Config,
        train_loader: Loader,
        val_loader: Loader,
        *,
        classes: list[str],
        output: Path,
        world: World,
    ) -> None:
        self.config, self.world, self.output, self.classes = config, world, output, classes
        self.train_loader, self.val_loader = train_loader, val_loader
        self.steps_per_epoch = train_loader.steps_per_epoch
        self.epochs = config.train.epochs
        self.step = self.epoch = 0
        self.sharded = config.train.parallel == "fsdp" and world.size > 1
        self.autocast = autocast(config, world.device, keep_copies=not self.sharded)
        seed = config.train.seed
        self.prepare = DeviceTransform(config.data, seed=seed, train=True)
        self.prepare_val = DeviceTransform(config.data, seed=seed, train=False)
        seed_generator(seed)  # the same on every process: they must begin with the same weights
        if self.sharded and val_loader.num_samples < world.size:
            raise DataError(
                f"the validation split has {val_loader.num_samples} images for {world.size} processes with a sharded "
                "model; use fewer processes, or train.parallel=ddp"
            )
        self.method: Method = methods.build(config, len(classes), self.steps_per_epoch)
        if not self.sharded:
            self.method.to(world.device)
        self.method.model.checkpoint_activations = config.train.checkpoint_activations
        self.moved: str | None = None
        """Why a resumed run goes on from the end of an epoch, where its newest checkpoint is from the middle of one."""
        saved = self._find_checkpoint()
        self.started_from: Report | None = None
        """What became of the weights that a new run starts from."""
        if saved is None and config.model.weights is not None:
            self.started_from = start_from(
                self.method.model, config.model.weights, ignore_head=config.model.own_head, remedies=_REMEDIES
            )
        self.compiled = not self.sharded and compile_levels(self.method, config.compile, world.device, self.total_steps)
        self.mixing = build_mixing(config, len(classes), world.rank)
        decay = config.train.ema_decay
        self.ema: ModelEmaV3 | None = ModelEmaV3(self.method, decay=decay) if decay else None
        self.guard = Guard(world.device, config.train.max_skipped)
        self._macs: dict[tuple[float, int], int] = {}
        self._saved = saved
        if saved is not None:
            self._restore(saved)
        if self.sharded:
            shard(self.method, world)
            if self.ema is not None:
                shard(self.ema.module, world)
        self._last_save = time.monotonic()
        self._save_asked = False

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def last_step(self) -> int:
        """Where this run stops: its end, or `train.max_steps`."""
        return min(self.total_steps, self.config.train.max_steps or self.total_steps)

    def fit(self) -> dict[str, Any]:
        """Train to the end and return the last epoch's row of the log."""
        main = self.world.is_main
        self.log = RunLog(self.output, resume_step=self.step) if main else None
        self.writer = (
            checkpoint.Writer(
                self.output / "checkpoints",
                keep=self.config.train.keep_checkpoints,
                epoch_steps=self.steps_per_epoch,
            )
            if main
            else None
        )
        self.view = TrainView(total_steps=self.last_step, done_steps=self.step, epochs=self.epochs, enabled=main)
        self.row: dict[str, Any] = {}
        check_masks(self.world.device, self.view.say)
        self.vote = Vote(self.world, num_questions=2)
        try:
            with catch_signals() as stop:
                first_epoch = 0
                for number, phase in enumerate(self.method.phases()):
                    end_epoch = first_epoch + phase.epochs
                    if self.epoch < end_epoch and self.step < self.last_step:
                        self._run_phase(number, phase, first_epoch, stop)
                    first_epoch = end_epoch
            self._finish()
        finally:
            self.view.close()
            if self.writer is not None:
                self.writer.close()
            if self.log is not None:
                self.log.close()
        return self.row

    def _finish(self) -> None:
        """Nobody leaves before the last checkpoint is on the disk."""
        self.vote.close()
        if self.writer is not None:
            self.writer.wait()
            self._summarise()
        self.world.barrier()

    def _summarise(self) -> None:
        """Write `summary.json`: the run in a few numbers, over all its epochs, however often it was resumed."""
        epochs = read_rows(self.output, "epoch")
        seconds = sum(row["train_seconds"] for row in epochs)
        best = max(epochs, key=_score, default=None)
        summary = {
            "recipe": self.config.recipe,
            "version": __version__,
            "finished": self.step == self.total_steps,
            "step": self.step,
            "epoch": self.epoch,
            "processes": self.world.size,
            "train_seconds": seconds,
            "skipped": self.guard.check(self.step),
            "best": None if best is None else {"epoch": best["epoch"], "step": best["step"], "top1": _score(best)},
            "last": epochs[-1] if epochs else None,
        }
        partial = self.output / "summary.partial"
        partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.output / "summary.json")

    def _run_phase(self, number: int, phase: Phase, first_epoch: int, stop: list[int]) -> None:
        self.phase = number
        self.method.begin_phase(phase)
        self.optimizer, self.lr_schedule = build_optimizer(
            self.method, phase, batch_size=self.config.train.batch_size, steps_per_epoch=self.steps_per_epoch
        )
        if self._saved is not None and self._saved["phase"] == number:
            state = self._saved["optimizer"]
            self.optimizer.load_state_dict(scatter_optimizer(state, self.optimizer) if self.sharded else state)
        self._saved = None
        engine = self.method if self.sharded else wrap(self.method, self.world)
        first_step = first_epoch * self.steps_per_epoch
        while self.epoch < first_epoch + phase.epochs and self.step < self.last_step:
            self._run_epoch(engine, phase, first_step, stop)

    def _run_epoch(self, engine: nn.Module, phase: Phase, first_step: int, stop: list[int]) -> None:
        """The loop: one epoch, or what is left of it."""
        train, world = self.config.train, self.world
        engine.train()
        self.train_loader.set_epoch(self.epoch, self.step - self.epoch * self.steps_per_epoch)
        epoch_meter, meter = Meter(world), Meter(world)
        batches = iter(self.train_loader)
        while self.step < min((self.epoch + 1) * self.steps_per_epoch, self.last_step):
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                raise DataError(
                    f"the {self.train_loader.backend} loader ended at step {self.step}, before its epoch did"
                )
            wait = time.perf_counter() - began

            at = Progress(self.step, self.total_steps, self.epoch, self.epochs, train.seed, world.rank)
            self.lr_schedule.step_update(self.step - first_step)
            images, targets = self._inputs(batch)
            out = self._gradients(engine, images, targets, at)
            norm = whole(nn.utils.get_total_norm([p.grad for p in self.method.parameters() if p.grad is not None]))
            skip, measured = self.guard.judge(out["loss"], norm)
            skipping(self.optimizer, skip)
            if phase.optim.clip_grad is not None:
                nn.utils.clip_grads_with_norm_(self.method.parameters(), phase.optim.clip_grad, norm)
            self.optimizer.step()
            self.method.after_optimizer(at)
            if self.ema is not None:
                update_average(self.ema, self.method, self.step, skip)
            self.method.end_step(at)
            self.optimizer.zero_grad(set_to_none=True)

            self.step += 1
            rho = self.method.rho(at)
            for m in (meter, epoch_meter):
                m.add(len(images), measured, wait, rho, self._cost(rho, images.shape[-1]))
            if self.step % train.log_every_steps == 0:
                self._log_step(meter, at, out)
            stopping, saving = self.vote.cast(bool(stop), self._is_save_due())
            if stopping or saving:
                self._save()
            if stopping:
                self._finish()
                raise Interrupted
        complete = self.step == (self.epoch + 1) * self.steps_per_epoch
        if complete:
            self._check_delivered()
            self.epoch += 1
        where = f"epoch {self.epoch}/{self.epochs}" if complete else f"step {self.step}/{self.total_steps}"
        self._end_epoch(epoch_meter, where)

    def _is_save_due(self) -> bool:
        """Whether to ask for a checkpoint. All processes write it together, so the main one asks, once."""
        due = time.monotonic() - self._last_save > 60 * self.config.train.checkpoint_every_minutes
        if not due or self._save_asked or not self.world.is_main:
            return False
        self._save_asked = True
        return True

    def _gradients(self, engine: nn.Module, images: Tensor, targets: Tensor, at: Progress) -> dict[str, Tensor]:
        """Forward and backward, in `train.accumulate` parts; returns the means of what the method returns for them.

        A part draws the random numbers that the process would draw which had it as its batch, were there as many.
        """
        parts, sums = self.config.train.accumulate, dict[str, Tensor]()
        for number, (some, their_targets) in enumerate(zip(images.chunk(parts), targets.chunk(parts), strict=True)):
            rank = at.rank * parts + number
            # Dropout is then a function of (seed, step, rank), whatever else drew random numbers before.
            seed_generator(at.seed, at.step, rank)
            last = number + 1 == parts
            with nullcontext() if last or not isinstance(engine, DistributedDataParallel) else engine.no_sync():
                with self.autocast:
                    out: dict[str, Tensor] = engine(some, their_targets, replace(at, rank=rank))
                self.guard.backward(out["loss"] / parts)
            for name, value in out.items():
                if value.ndim == 0:
                    sums[name] = sums.get(name, 0) + value.detach() / parts
        return sums

    def _cost(self, rho: float, image_size: int) -> int:
        level = rho, image_size
        if level not in self._macs:
            self._macs[level] = self.method.cost(rho, image_size)
        return self._macs[level]

    def _check_delivered(self) -> None:
        """Every sample of the plan, each as often as planned, also where the epoch was resumed in the middle."""
        delivered, planned = self.train_loader.delivered_hash, self.train_loader.planned_hash(self.epoch)
        if delivered != planned:
            raise DataError(
                f"the {self.train_loader.backend} loader delivered other samples in epoch {self.epoch} than planned "
                f"(hash {delivered:08x}, not {planned:08x}); this is a fault of pss, please report it"
            )

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, targets = self.prepare(batch, self.epoch), batch.labels
        if self.mixing is not None:
            images, targets = self.mixing(images, targets, self.step)
        return images, targets

    def _log_step(self, meter: Meter, at: Progress, out: dict[str, Tensor]) -> None:
        summary = meter.summary()
        skipped = self.guard.check(self.step)
        rho, size = self.method.rho(at), self.config.data.train_size(at.epoch)
        tokens = self.method.num_tokens(rho, size)
        extra = {name: float(value) for name, value in out.items() if name != "loss"}
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        if self.log is not None:
            where = {"epoch": at.epoch, "rho": rho, "img_size": size, "tokens": tokens}
            self.log.write("step", self.step, **where, lr=lr, skipped=skipped, **summary, **extra)
        self.view.step(self.step, epoch=at.epoch, rho=rho, img_size=size, tokens=tokens, skipped=skipped, **summary)
        meter.reset()

    def _end_epoch(self, meter: Meter, where: str) -> None:
        seconds, summary = meter.seconds, meter.summary()
        skipped = self.guard.check(self.step)
        row: dict[str, Any] = {"epoch": self.epoch, "train_seconds": seconds, **summary, **meter.saving()}
        row |= {"skipped": skipped, **self._validate()}
        self.row = {"step": self.step, **row}
        if self.log is not None:
            delivered = f"{self.train_loader.delivered_hash:08x}"
            self.log.write("epoch", self.step, **row, by_rho=meter.by_rho(), samples_hash=delivered)
        averaged = f"  (average {row['ema_top1']:.2f} %)" if "ema_top1" in row else ""
        self.view.say(
            f"{where}  loss {row['loss']:.3f}  val loss {row['val_loss']:.3f}  "
            f"top-1 {row['top1']:.2f} %{averaged}  {seconds:.1f} s  data wait {row['data_wait']:.0%}"
            + (f"  {skipped} steps skipped so far" if skipped else "")
        )
        self._save(_score(row))

    def _validate(self) -> dict[str, float]:
        """Accuracy at rho = 1 of the weights and, where there is one, of their moving average."""
        models = {"": self.method} | ({"ema_": self.ema.module} if self.ema is not None else {})
        row: dict[str, float] = {}
        for prefix, model in models.items():
            model.eval()
            (result,) = accuracy(
                model.predict,
                self.val_loader,
                self.prepare_val,
                self.world,
                rhos=[1.0],
                autocast=self.autocast,
                in_step=self.sharded,
            )
            row |= {f"{prefix}top1": result.top1, f"{prefix}top5": result.top5}
            row[f"{prefix}val_loss"] = result.loss
        return row

    def _save(self, score: float | None = None) -> None:
        """Write a checkpoint of this step. Every process must call it."""
        tensors = {}
        if self.writer is not None or self.sharded:
            tensors = {
                "method": self.method.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
        if self.sharded:
            tensors = gather(tensors, self.world)
        if self.writer is not None:
            state = {
                "version": __version__,
                "config": asdict(self.config),
                "classes": self.classes,
                "step": self.step,
                "epoch": self.epoch,
                "phase": self.phase,
                "world_size": self.world.size,
                "loader": self.train_loader.state_dict(),
                "skipped": self.guard.counts,
                **tensors,
            }
            self.writer.save(state, step=self.step, score=score)
        self._last_save = time.monotonic()
        self._save_asked = False

    def _find_checkpoint(self) -> dict[str, Any] | None:
        """The state to go on from; None for a new run.

        It is the newest whole checkpoint, or, where other processes or another loader go on, the newest of the end of
        an epoch.
        """
        folder = self.output / "checkpoints"
        found = checkpoint.load_latest(folder)
        if found is None:
            return None
        state, _ = found
        own = {
            "processes": self.world.size,
            "parts": self.config.train.accumulate,
            "parallel": self.config.train.parallel,
            "loader": self.train_loader.state_dict().get("backend"),
        }
        theirs = {
            "processes": state["world_size"],
            "parts": state["config"]["train"]["accumulate"],
            "parallel": state["config"]["train"].get("parallel", "ddp"),
            "loader": state["loader"].get("backend"),
        }
        if own == theirs or state["step"] % self.steps_per_epoch == 0:
            return state
        found = checkpoint.load_latest(folder, lambda step: step % self.steps_per_epoch == 0)
        changed = ", ".join(
            f"{name} {theirs[name]} before and {own[name]} now" for name in own if own[name] != theirs[name]
        )
        back = found[0]["step"] if found is not None else 0
        self.moved = (
            f"{changed}: the run goes on from the end of an epoch, step {back}, and not from step {state['step']}"
        )
        return None if found is None else found[0]

    def _restore(self, saved: dict[str, Any]) -> None:
        if saved["classes"] != self.classes:
            raise DataError(
                f"the run in {self.output} was trained on {len(saved['classes'])} classes "
                f"and the data has {len(self.classes)}, or other ones; resume with the data it began with"
            )
        loader = saved["loader"]
        if "backend" in loader:
            loader = loader | {"backend": self.train_loader.backend}
        self.train_loader.load_state_dict(loader)
        self.method.load_state_dict(saved["method"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["ema"])
        self.step, self.epoch = saved["step"], saved["epoch"]
        self.guard.counts.copy_(saved["skipped"])


def _score(row: dict[str, Any]) -> float:
    """What the best checkpoint is best in: top-1 of the weights or of their average, whichever is higher."""
    return max(float(row["top1"]), float(row.get("ema_top1", 0.0)))


def check_masks(device: torch.device, say: Callable[[str], None]) -> None:
    """Try, before anything is compiled, whether cuDNN gets attention with a mask right, and say so if it does not.

    `pss.attention.attend` asks for the outcome, which is kept, and gives a mask to other kernels then.
    """
    if device.type == "cuda" and not gets_masks_right(SDPBackend.CUDNN_ATTENTION, "cuda"):
        say("cuDNN fails a self-test of attention with a mask here; where there is a mask, other kernels compute it")


def compile_levels(method: Method, settings: CompileConfig, device: torch.device, total_steps: int) -> bool:
    """Have the method's model compile its blocks for every token count of the run; says whether it will.

    Raises:
        ValueError: training and validation together have more token counts than `settings` allow.
    """
    usual = device.type == "cuda" and find_spec("triton") is not None
    if settings.mode == "off" or (settings.mode == "auto" and not usual):
        return False
    if settings.cuda_graphs and device.type != "cuda":
        raise ValueError(f"compile.cuda_graphs needs a GPU and this run is on the {device.type}; leave it false")
    epochs = range(-(-total_steps // method.steps_per_epoch))
    sizes = {method.config.data.train_size(epoch) for epoch in epochs}
    graphs = set()
    for rho, size in product(method.rhos(total_steps), sizes):
        count, most = method.num_tokens(rho, size), method.num_tokens(1.0, size)
        # All patches of small images lie at the same places, others at each image's own; see `CompiledTrunk`.
        graphs.add((count, count == most and size < method.config.data.img_size))
    counts = sorted(count for count, _ in graphs)
    if len(counts) + 1 > settings.max_graphs:
        raise ValueError(
            f"this run trains at {len(counts)} token counts ({', '.join(map(str, counts))}) and validates at one, and "
            f"compile.max_graphs is {settings.max_graphs}; raise it to {len(counts) + 1}, or set compile.mode=off"
        )
    method.model.compiled_trunk = CompiledTrunk(
        max_graphs=settings.max_graphs, backend=settings.backend, cuda_graphs=settings.cuda_graphs
    )
    return True


def wrap(method: Method, world: World) -> nn.Module:
    """The method as the loop calls it: in DDP where there are several processes."""
    if world.size == 1:
        return method
    devices = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(method, device_ids=devices, gradient_as_bucket_view=True)


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
    return Mixing(mixing, num_classes, seed=config.train.seed, rank=rank, label_smoothing=loss.label_smoothing)


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
