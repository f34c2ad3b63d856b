"""A run: built, resumed, trained phase by phase, saved. It knows no method and no loader by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.base import DataError, Loader
from pipelines.loaders.prefetch import Inputs
from pss import methods
from pss.config import Config
from pss.inference.accuracy import accuracy, evaluation_inputs
from pss.methods import Method, Phase, Progress, Step
from pss.models.settings import TrainedOn
from pss.models.weights import Remedies, Report, start_from
from pss.runtime.precision import autocast
from pss.runtime.processes import Vote, World
from pss.runtime.seeds import seed_generator
from pss.runtime.shards import whole
from pss.training import setup
from pss.training.guard import Guard, Statistics, average_of_frozen, skipping, update_average
from pss.training.inputs import StepInputs, TrainingInputs
from pss.training.optim import build_optimizer, set_rates
from pss.training.parts import Parts, share_buffers
from pss.training.reporting import Reporter, score_of
from pss.training.saving import Saver
from pss.training.setup import Interrupted
from pss.training.sharding import reshard, scatter_optimizer, shard
from pss.training.tensors import Inventory, clip_gradients, total_norm

_REMEDIES = Remedies(
    no_file="--set model.weights=FILE names one, none starts anew",
    other_head="--set model.own_head=true starts with a new classifier",
    other_model="--set model.name=NAME, and the other settings of model, describe the one that it belongs to",
    other_bias="--set model.rel_pos={kind} gives it one",
    other_images="--set data.mean={mean} --set data.std={std}",
)


class Trainer:
    """One run in one folder. `fit` trains it to its end, from its newest checkpoint where there is one."""

    def __init__(
        self,
        config: Config,
        train_loader: Loader,
        val_loader: Loader | None,
        *,
        classes: list[str],
        output: Path,
        world: World,
        quiet: bool = False,
    ) -> None:
        self.config, self.world = config, world
        self.train_loader, self.val_loader = train_loader, val_loader
        if config.train.accumulate > 1:
            train_loader.set_parts(config.train.accumulate)
        self.steps_per_epoch = train_loader.steps_per_epoch
        self.epochs = config.train.epochs
        self.step = self.epoch = self.phase = 0
        self.sharded = config.train.parallel == "fsdp" and world.size > 1
        self.autocast = autocast(config, world.device, keep_copies=not self.sharded)
        seed = config.train.seed
        seed_generator(seed)  # the same on every process: they must begin with the same weights
        self.method: Method = methods.build(config, len(classes), self.steps_per_epoch)
        self.method.model.trained_on = TrainedOn.images(classes, config.data)
        setup.check_phases(self.method)
        if self.sharded:
            self._check_shards()
        else:
            self.method.to(world.device)
        self.method.model.checkpoint_activations = config.train.checkpoint_activations
        for teacher in self.method.teachers.values():
            teacher.load(world.device)
        self.saver = Saver(config, output, classes=classes, loader=train_loader, world=world, sharded=self.sharded)
        self._saved = self.saver.find()
        self.started_from: Report | None = None
        """What became of the weights that a new run starts from."""
        if self._saved is None and config.model.weights is not None:
            self.started_from = start_from(
                self.method.model, config.model.weights, ignore_head=config.model.own_head, remedies=_REMEDIES
            )
        self.compiled = not self.sharded and setup.compile_levels(
            self.method, config.compile, world.device, self.total_steps
        )
        pixels = self.method.mixes(config) == "pixels"
        mixing = setup.build_mixing(config, len(classes), world.rank) if pixels else None
        self.inputs = Inputs(
            train_loader,
            TrainingInputs(config, self.method, mixing, self.steps_per_epoch),
            world.device,
            prefetch_bytes=config.data.prefetch_bytes(world.device.type),
        )
        self.val_inputs = None if val_loader is None else evaluation_inputs(val_loader, config.data, world.device)
        decay = config.train.ema_decay
        self.ema: ModelEmaV3 | None = ModelEmaV3(self.method, decay=decay) if decay else None
        self.guard = Guard(world.device, config.train.max_skipped)
        self.reporter = Reporter(config, output, self.method, world, quiet=quiet)
        if self._saved is not None:
            self.saver.restore(self._saved, self.method, self.ema, self.guard)
            self.step, self.epoch = self._saved["step"], self._saved["epoch"]
            if measured := self._saved.get("measured"):
                self.reporter.load_state(measured)
        if self.sharded:
            shard(self.method, world)
            if self.ema is not None:
                shard(self.ema.module, world)

    def _check_shards(self) -> None:
        if not self.method.shards:
            raise ValueError(f"method {self.method.name} cannot be sharded; set train.parallel=ddp")
        if self.val_loader is not None and self.val_loader.num_samples < self.world.size:
            raise DataError(
                f"the validation split has {self.val_loader.num_samples} images for {self.world.size} processes with a "
                "sharded model; use fewer processes, or train.parallel=ddp"
            )

    @property
    def moved(self) -> str | None:
        """Why a resumed run goes on from the end of an epoch, where its newest checkpoint is from the middle of one."""
        return self.saver.moved

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def last_step(self) -> int:
        """Where this run stops: its end, or `train.max_steps`."""
        return min(self.total_steps, self.config.train.max_steps or self.total_steps)

    def fit(self) -> dict[str, Any]:
        """Train to the end and return the last epoch's row of the log."""
        about = {"continuation": self.saver.continuation, "loader": self.train_loader.backend}
        about |= {"device": self.world.device_name}
        self.reporter.open(step=self.step, last_step=self.last_step, epochs=self.epochs, **about)
        self.row: dict[str, Any] = {}
        try:
            self.saver.open()
            setup.check_masks(self.world.device, self.reporter.say)
            self.vote = Vote(self.world, num_questions=3)
            with setup.catch_signals() as stop:
                if self.reporter.pending is not None:
                    self._conclude_resumed(stop)
                first_epoch = 0
                for number, phase in enumerate(self.method.phases()):
                    end_epoch = first_epoch + phase.epochs
                    if self.epoch < end_epoch and self.step < self.last_step:
                        self._run_phase(number, phase, first_epoch, stop)
                    first_epoch = end_epoch
            self._finish()
            self._check_learnt()
        finally:
            self.inputs.rest()
            if self.val_inputs is not None:
                self.val_inputs.rest()
            self.reporter.close()
            self.saver.close()
        return self.row

    def _run_phase(self, number: int, phase: Phase, first_epoch: int, stop: list[int]) -> None:
        self.phase = number
        self.method.check_phase(phase)
        self.method.begin_phase(phase)
        if self.ema is not None:
            average_of_frozen(self.ema.module, self.method)
        self.optimizer, self.lr_schedule = build_optimizer(
            self.method, phase, batch_size=self.config.train.batch_size, steps_per_epoch=self.steps_per_epoch
        )
        if self._saved is not None and self._saved["phase"] == number:
            state = self._saved["optimizer"]
            self.optimizer.load_state_dict(scatter_optimizer(state, self.optimizer) if self.sharded else state)
        self._saved = None
        engine = self.method if self.sharded else setup.wrap(self.method, self.world)
        first_step = first_epoch * self.steps_per_epoch
        while self.epoch < first_epoch + phase.epochs and self.step < self.last_step:
            self._run_epoch(engine, phase, first_step, stop)

    def _run_epoch(self, engine: nn.Module, phase: Phase, first_step: int, stop: list[int]) -> None:
        """The loop: one epoch, or what is left of it."""
        engine.train()
        self.method.begin_epoch(self._position())
        self.inputs.set_epoch(self.epoch, self.step - self.epoch * self.steps_per_epoch)
        self.reporter.begin_epoch(resumed=self.step > self.epoch * self.steps_per_epoch)
        every_inputs = iter(self.inputs)
        held = Inventory(self.method)  # parameters neither come nor go within an epoch: the optimizer has them
        averaged = None if self.ema is None else Inventory(self.ema.module)
        self.guard.watch(held, self.step)
        while self.step < min((self.epoch + 1) * self.steps_per_epoch, self.last_step):
            inputs, waited = self._next(every_inputs)
            at = self._position()
            set_rates(self.optimizer, self.lr_schedule, self.step - first_step, self.method.lr_factors(at))
            if self.step == 0:
                first = inputs.images.chunk(self.config.train.accumulate)[0]
                setup.begin_run(self.method, None if self.ema is None else self.ema.module, first)
                self.reporter.picture(inputs.images, self.total_steps, self.autocast)
            statistics = Statistics(held)
            self.method.begin_step(at)
            out = self._gradients(engine, inputs, at)
            self.method.mask_gradients(at)
            gradients = held.gradients()
            norm = whole(total_norm(gradients, alike=held.alike))
            skip, measured = self.guard.judge(out["loss"], norm, phase.optim.clip_grad)
            skipping(self.optimizer, skip)
            statistics.settle(skip)
            if phase.optim.clip_grad is not None:
                clip_gradients(gradients, phase.optim.clip_grad, norm, alike=held.alike)
            self.optimizer.advance(held.parameters, gradients)
            taken = Step(self.optimizer, skip)
            self.method.after_optimizer(at, taken)
            if self.ema is not None and averaged is not None:
                update_average(averaged, held, self.ema.get_decay(self.step), skip)
                self.ema.module.after_average(at)
            self.method.end_step(at, taken)
            held.forget_gradients()
            del gradients  # they would live on through the next backward pass
            self.step += 1
            self._report_step(inputs.images, measured, waited, at, out)
            if self.step < (self.epoch + 1) * self.steps_per_epoch:  # then with its row, which others could not make
                self._stop_or_save(stop)
        self._end_epoch(stop)

    def _position(self) -> Progress:
        seed, rank = self.config.train.seed, self.world.rank
        return Progress(self.step, self.total_steps, self.epoch, self.epochs, seed, rank, self.phase)

    def _next(self, every_inputs: Iterator[StepInputs]) -> tuple[StepInputs, float]:
        """What the next step takes, and the seconds it was waited for."""
        before = self.inputs.seconds_waited
        inputs = next(every_inputs, None)
        if inputs is None:
            raise DataError(f"the {self.inputs.backend} loader ended at step {self.step}, before its epoch did")
        return inputs, self.inputs.seconds_waited - before

    def _gradients(self, engine: nn.Module, inputs: StepInputs, at: Progress) -> dict[str, Tensor]:
        """Forward and backward, in `train.accumulate` parts; returns the means of what the method returns for them.

        A part is what the process would compute that had it as its batch, were there as many: it draws the same random
        numbers, and sees buffers as that process would.
        """
        parts, sums = self.config.train.accumulate, dict[str, Tensor]()
        buffers = Parts(self.method, parts)
        for number, piece in enumerate(inputs.chunk(parts)):
            extra = () if piece.dense is None else (piece.dense,)
            rank = at.rank * parts + number
            # Dropout is then a function of (seed, step, rank), whatever else drew random numbers before.
            seed_generator(at.seed, at.step, rank)
            last = number + 1 == parts
            apart = nullcontext() if last or not isinstance(engine, DistributedDataParallel) else engine.no_sync()
            with apart, buffers.part(number):
                with self.autocast:
                    out: dict[str, Tensor] = engine(piece.images, piece.targets, at._replace(rank=rank), *extra)
                self.guard.backward(out["loss"] if parts == 1 else out["loss"] / parts)
            for name, value in out.items():
                if value.ndim == 0:
                    share = value.detach() if parts == 1 else value.detach() / parts
                    sums[name] = sums[name] + share if number else share
        return sums

    def _report_step(
        self, images: Tensor, measured: Tensor, waited: float, at: Progress, out: dict[str, Tensor]
    ) -> None:
        self.reporter.add(images, measured, waited, at)
        if self.step % self.config.train.log_every_steps == 0:
            lr = max(group["lr"] for group in self.optimizer.param_groups)
            self.reporter.step(self.step, at, out, lr=lr, skipped=self.guard.check(self.step))

    def _stop_or_save(self, stop: list[int]) -> None:
        stopping, saving, failed = self.vote.cast(bool(stop), self.saver.is_due(), self.saver.failed())
        if failed:
            self.saver.raise_failure()
        if stopping or saving:
            self._save()
        if stopping:
            self._finish()
            raise Interrupted(self.step, stop)

    def _end_epoch(self, stop: list[int]) -> None:
        complete = self.step == (self.epoch + 1) * self.steps_per_epoch
        if complete:
            self._check_delivered()
            self.epoch += 1
        self.reporter.end_training(
            step=self.step,
            epoch=self.epoch,
            complete=complete,
            skipped=self.guard.check(self.step),
            delivered_hash=self.inputs.delivered_hash,
        )
        self._save()  # whatever becomes of its validation, the epoch has been trained
        self._conclude(stop)

    def _conclude_resumed(self, stop: list[int]) -> None:
        """Conclude the epoch that the checkpoint ends with, unless the run was stopped after its row was written."""
        told = self.reporter.told() if self.world.is_main else None
        if self.world.broadcast("told" if told is not None else None) is None:
            self._conclude(stop)
            return
        self.reporter.pending = None
        if told is not None:
            self._settle(told)

    def _conclude(self, stop: list[int]) -> None:
        """Validate what is saved, and report on it."""
        pending = self.reporter.pending
        assert pending is not None
        where = f"epoch {self.epoch}/{self.epochs}" if pending["complete"] else f"step {self.step}/{self.total_steps}"
        self._settle(self.reporter.epoch(self._validate(stop), where))

    def _settle(self, row: dict[str, Any]) -> None:
        self.row = row
        if (best := score_of(row)) is not None:
            self.saver.note_best(step=self.step, score=best[0], weights=best[1])

    def _check_delivered(self) -> None:
        """Every sample of the plan, each as often as planned, also where the epoch was resumed in the middle."""
        delivered, planned = self.inputs.delivered_hash, self.inputs.planned_hash(self.epoch)
        if delivered != planned:
            raise DataError(
                f"the {self.train_loader.backend} loader delivered other samples in epoch {self.epoch} than planned "
                f"(hash {delivered:08x}, not {planned:08x}); this is a fault of pss, please report it"
            )

    def _validate(self, stop: list[int]) -> dict[str, float]:
        """Accuracy of the weights and, where there is one, of their moving average, at the first operating point;
        nothing of the kind without a validation split.

        Raises:
            Interrupted: the run is to stop; it does within a batch.
        """
        self.vote.close()  # what was asked of the last training step is asked again
        if self.val_inputs is None:
            return self.method.facts()

        def between() -> None:
            if self.vote.cast(bool(stop), False, False)[0]:
                self._finish()
                raise Interrupted(self.step, stop)

        models = {"": self.method} | ({"ema_": self.ema.module} if self.ema is not None else {})
        share_buffers(*models.values())
        row: dict[str, float] = {}
        for passed, (prefix, model) in enumerate(models.items()):
            model.eval()
            (result,) = accuracy(
                model.predict_with_cost if self.method.costs_vary else model.predict,
                self.val_inputs,
                self.world,
                points=self.method.points()[:1],
                autocast=self.autocast,
                in_step=self.sharded,
                with_cost=self.method.costs_vary,
                between=between,
                observe=self.reporter.watch(passed, len(models), self.val_inputs.num_samples),
            )
            if self.sharded:
                reshard(model)
            if result.macs is not None:
                row[f"{prefix}gflops"] = result.macs.mean / 1e9
            row |= {f"{prefix}top1": result.top1, f"{prefix}top5": result.top5}
            row[f"{prefix}val_loss"] = result.loss
        return row | self.method.facts()

    def _save(self) -> None:
        self.guard.check(self.step)  # weights that are not finite are in no checkpoint
        self.saver.save(
            step=self.step,
            epoch=self.epoch,
            phase=self.phase,
            method=self.method,
            ema=self.ema,
            optimizer=self.optimizer,
            guard=self.guard,
            measured=self.reporter.state(),
        )

    def _finish(self) -> None:
        """Nobody leaves before the last checkpoint is on the disk."""
        self.vote.close()
        self.saver.wait()
        if self.world.is_main:
            skipped = self.guard.skipped
            self.reporter.summarise(step=self.step, epoch=self.epoch, total_steps=self.total_steps, skipped=skipped)
        self.world.barrier()

    def _check_learnt(self) -> None:
        """Raise `ValueError` where a run is over that skipped most of its steps."""
        skipped = self.guard.skipped
        if self.step == self.last_step and 2 * skipped > self.step:
            raise ValueError(
                f"{skipped} of the run's {self.step} steps were skipped, as their loss or gradients were not finite; "
                "what it has learnt is of the others alone: lower optim.lr, set optim.clip_grad or "
                "train.precision=fp32, or look at the data"
            )
