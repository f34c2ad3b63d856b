"""What the back ends have in common: the plan of an epoch, and the state a resumed run compares.

A back end derives from `PlannedLoader` and turns planned steps into pixels; it decides neither order nor crops.
"""

from __future__ import annotations

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.base import Batch, DataConfig, DataError, View
from pipelines.loaders.geometry import Int64, as_shares, crop_boxes
from pipelines.loaders.order import (
    ORDER_VERSION,
    EpochPlan,
    copy_numbers,
    evaluation_plan,
    evaluation_samples,
    keys_hash,
    sample_numbers,
    train_plan,
    train_steps,
)
from pipelines.loaders.plans import Plans
from pipelines.loaders.threads import PixelMemory
from pipelines.loaders.waiting import Signs
from pipelines.remote.tars import RemoteTars
from pipelines.remote.uses import Uses
from pipelines.remote.windows import windows_of
from pipelines.storage.maps import LabelMaps
from pipelines.storage.source import Table

_log = logging.getLogger(__name__)

Decoded = tuple[torch.Tensor, NDArray[np.int64]]
"""Images of a batch, uint8 (B, 3, S, S), and the keys (see `pipelines.loaders.order`) of its rows."""


class PlannedLoader(ABC):
    """Base of the loaders; see `pipelines.base.Loader` for the contract."""

    backend: str
    stall_seconds = 30.0
    """How long nothing may be decoded before the loader gives up with a `DataError`."""

    def __init__(
        self,
        table: Table,
        *,
        config: DataConfig,
        batch_size: int,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        num_workers: int | None = None,
        label_maps: str | Path | None = None,
        epochs: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"the batch size is {batch_size}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not exist among {world_size}; ranks count from 0")
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"the data seed is {seed}; it must lie in 0 ... 2^63 - 1")
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"the number of workers is {num_workers}; it must be at least 0")
        self.table, self.config, self.train = table, config, train
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.device = with_index(device)
        self.memory = PixelMemory(pin_memory=self.device.type == "cuda")
        self.num_workers = cores_of_this_rank() if num_workers is None else num_workers
        self.num_classes = len(table.classes)
        self.num_samples = table.num_samples
        self.batch_size = batch_size
        self.label_maps = None if label_maps is None else LabelMaps(label_maps, self.num_samples)
        if train and batch_size % config.decode_once:
            raise ValueError(
                f"data.decode_once is {config.decode_once} and the batch size {batch_size}; "
                "make the batch size a multiple: a batch holds all crops of its images"
            )
        self.windows = None
        if train:
            self.steps_per_epoch = train_steps(self.num_samples, batch_size, world_size)
            self.windows = windows_of(table, config, seed=seed, batch_size=batch_size * world_size, ranks=world_size)
            if self.windows is not None:
                self.steps_per_epoch = self.windows.steps_per_epoch
        else:
            own = len(evaluation_samples(self.num_samples, rank, world_size))
            self.steps_per_epoch = -(-own // batch_size)
        self.parts, self.epochs = 1, epochs
        self.epoch = self.start_step = 0
        self._plans = Plans(self._plan)
        self._plans.prepare(0)
        self._iteration = 0
        self._delivered: int | None = 0  # None: what comes before the first batch, which no one has asked for yet
        self._closed = False
        self.signs = Signs()
        """Of life, for whoever waits for a batch from another thread."""

    def set_parts(self, parts: int) -> None:
        """Have every batch consist of the batches of `parts` ranks; see `Loader`."""
        if parts < 1 or self.batch_size % parts:
            raise ValueError(
                f"a batch of {self.batch_size} images cannot be {parts} equal parts; change train.accumulate"
            )
        if self.train and self.batch_size // parts % self.config.decode_once:
            raise ValueError(
                f"data.decode_once is {self.config.decode_once} and a batch of {self.batch_size} has {parts} parts "
                f"(train.accumulate) of {self.batch_size // parts}; make that a multiple of it: a part holds all crops "
                "of its images"
            )
        if self.windows is not None:
            self.windows.check_ranks(self.world_size * parts, "parts of a batch, of all processes (train.accumulate),")
        if parts != self.parts:
            self._plans.forget()
        self.parts = parts
        self.set_epoch(self.epoch, self.start_step)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose what the next iteration delivers: `epoch`, from its batch `start_step` on."""
        if epoch < 0 or not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(
                f"epoch {epoch}, step {start_step} does not exist; an epoch has {self.steps_per_epoch} steps"
            )
        self.epoch, self.start_step = epoch, start_step
        self._plans.prepare(epoch)
        self._delivered = None if start_step else 0

    @property
    def delivered_hash(self) -> int:
        """Of what has been delivered in this epoch; see `Loader`."""
        if self._delivered is None:
            self._delivered = self._plans.of(self.epoch).until(self.start_step).hash
        return self._delivered

    def planned_hash(self, epoch: int) -> int:
        """Of everything that `epoch` delivers; see `Loader`."""
        return self._plans.of(epoch).hash

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the next iteration starts."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        if self._closed:
            raise DataError(f"the {self.backend} loader has been closed; build a new one")
        self._iteration += 1
        if isinstance(self.table, RemoteTars):
            self.table.follow(
                partial(self._uses, self.epoch), self.start_step, self.steps_per_epoch, self.signs.advance
            )
        plan = self._plans.of(self.epoch)
        if self.train:
            self._plans.prepare(self.epoch + 1)
        self._delivered = plan.until(self.start_step).hash
        return self._supervised(self._iteration, self.epoch, self._batches(self.epoch, plan.since(self.start_step)))

    def _supervised(self, iteration: int, epoch: int, batches: Generator[Decoded]) -> Iterator[Batch]:
        """A failure is final: what a library delivers after one cannot be trusted. What an iteration has started ends
        with it, also where it is left early."""
        ended = False
        try:
            for images, keys in batches:
                batch = self._batch(images, epoch, keys)
                self._delivered = (self.delivered_hash + keys_hash(keys)) & 0xFFFFFFFF
                if isinstance(self.table, RemoteTars):
                    self.table.advance()
                yield batch
                if iteration != self._iteration:
                    raise RuntimeError("this loader has been iterated anew; only its latest iterator goes on")
            ended = True
        except DataError:
            self.close()
            raise
        finally:
            batches.close()
            if iteration == self._iteration:
                self._rest(ended)

    @abstractmethod
    def _batches(self, epoch: int, steps: EpochPlan) -> Generator[Decoded]:
        """Decode `steps`."""

    @abstractmethod
    def _rest(self, ended: bool) -> None:
        """Stop all threads until the next iteration. `ended`: the last one came to its end, and was not left early."""

    @property
    @abstractmethod
    def batches_ahead(self) -> int:
        """Batches that may have been begun, or be ready, beyond the one handed out last."""

    @abstractmethod
    def library_versions(self) -> dict[str, str]:
        """The libraries that decode and resize, noted in the state."""

    def _plan(self, epoch: int) -> EpochPlan:
        """What this rank delivers in `epoch`."""
        share = {"batch_size": self.batch_size, "rank": self.rank, "world_size": self.world_size}
        if not self.train:
            return evaluation_plan(self.num_samples, **share)
        if self.windows is not None:
            samples, numbers = self.windows.samples(epoch, self.windows.groups_of(self.rank, self.world_size))
            return EpochPlan(samples, self.batch_size, numbers)
        copies = {"repeats": self.config.repeats, "decode_once": self.config.decode_once}
        return train_plan(self.num_samples, self.seed, epoch, parts=self.parts, **share, **copies)

    def _uses(self, epoch: int) -> tuple[Uses, Uses | None]:
        """When this rank reads tars in `epoch` and in the one after it; None where nobody knows when that comes."""
        assert isinstance(self.table, RemoteTars)
        counts = self.table.tar_counts()
        if not self.train:
            return Uses.in_turn(counts, self.rank, self.world_size, self.batch_size), None
        if self.windows is None:
            return (every := Uses.throughout(len(counts), self.steps_per_epoch)), every
        groups = self.windows.groups_of(self.rank, self.world_size)
        last = epoch + 1 == self.epochs
        following = Uses.none(len(counts)) if last else self.windows.uses(epoch + 1, groups)
        return self.windows.uses(epoch, groups), following

    @property
    def crops_per_image(self) -> int:
        """How many rows of a batch, one after the other, are cut from the same decoded image."""
        return self.config.decode_once if self.train else 1

    def side(self, epoch: int) -> int:
        """Of the images of `epoch`, in pixels."""
        return self.config.train_size(epoch) if self.train else self.config.img_size

    def _crop_boxes(self, epoch: int, keys: Int64) -> tuple[Int64, Int64]:
        """What is planned to be cut for the rows `keys`; see `geometry.crop_boxes`."""
        heights, widths = self.table.sizes(sample_numbers(keys))
        return crop_boxes(heights, widths, keys, seed=self.seed, epoch=epoch, config=self.config, train=self.train)

    def _batch(self, images: torch.Tensor, epoch: int, keys: Int64) -> Batch:
        """Put beside `images` what the plan knows of them.

        Windows are planned anew, 2 us an image, and not handed over by the back ends: so they cannot differ.
        """
        index = sample_numbers(keys)
        crop = torch.from_numpy(as_shares(*self._crop_boxes(epoch, keys)))
        maps = None
        if self.label_maps is not None:
            maps = self.label_maps.rows(index, pin_memory=self.device.type == "cuda")
        copies = self.train and self.config.repeats * self.config.decode_once > 1
        return Batch(
            images,
            torch.from_numpy(self.table.labels_of(index)),
            torch.from_numpy(index),
            torch.from_numpy(copy_numbers(keys)) if copies else None,
            View(crop, torch.zeros(len(keys), dtype=torch.bool)),
            maps,
        )

    def state_dict(self) -> dict[str, Any]:
        """What decides which data is delivered. Resuming with another number of ranks is possible while the global
        batch stays the same."""
        maps = {} if self.label_maps is None else {"label_maps": self.label_maps.fingerprint}
        return {
            "backend": self.backend,
            "libraries": self.library_versions(),
            "order_version": ORDER_VERSION,
            "data": self.table.fingerprint,
            "num_samples": self.num_samples,
            "train": self.train,
            "global_batch": self.batch_size * self.world_size,
            "seed": self.seed,
            "config": json.dumps(self._deciding_settings(), sort_keys=True),
            **maps,
        }

    def _deciding_settings(self) -> dict[str, Any]:
        """The configuration, less what changes pixels no more than another version of a library."""
        settings = asdict(self.config)
        for other in ("gpu_decoding", "prefetch_gb", "label_maps"):  # the state has the maps' fingerprint
            del settings[other]
        if self.config.progressive.start_size is None:  # as runs have it that know of no other sizes
            del settings["progressive"]
        if self.windows is None:  # likewise of no other order
            del settings["window"], settings["groups"]
        return settings

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check `state` against this loader; `DataError` names what differs. Other library versions are only logged:
        they change neither the order nor the crops."""
        own = self.state_dict()
        before, now = _fields(state), _fields(own)
        differing = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in {**now, **before}
            if before.get(name) != now.get(name)
        ]
        if differing:
            raise DataError(f"the run was started with other data settings: {'; '.join(differing)}")
        if state.get("libraries") != own["libraries"]:
            _log.warning("decoded by %s, until now by %s", own["libraries"], state.get("libraries"))

    def close(self) -> None:
        """Stop and join all threads and processes."""
        self._closed = True
        if isinstance(self.table, RemoteTars):
            self.table.leave()
        self._plans.close()
        self.memory.clear()


def with_index(device: str | torch.device) -> torch.device:
    """`device`, with its number: "cuda" alone means another one in a thread that has not been told."""
    named = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if str(named) == "cuda" else named


def cores_of_this_rank() -> int:
    """The processor cores this process may use, shared evenly among the ranks on this machine (torchrun's count)."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _fields(state: dict[str, Any]) -> dict[str, Any]:
    """A state's entries that must not differ, those of the configuration one by one."""
    config = {f"config.{name}": value for name, value in json.loads(state.get("config", "{}")).items()}
    return {name: value for name, value in state.items() if name not in ("config", "libraries")} | config
