"""Which loader, format, queue and period keep a run's steps fed, and what others lose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from pss.config import Config
from pss.planning.plan import Plan, plan
from pss.planning.simulation import KEPT_UP, Simulated, batches_in, simulate

CORE_RATES = {
    "torch": 650.0,
    "dali": 625.0,
    "ffcv jpg500": 1000.0,
    "ffcv jpg400": 1440.0,
    "ffcv mix400": 1940.0,
    "ffcv raw256": 3690.0,
}
"""Images per second that a core decodes to 224 px where 16 of them work, by loader and format."""

_DECODING = {"torch": 0.8, "dali": 0.7, "ffcv jpg": 0.57, "ffcv mix": 0.5, "ffcv raw": 0.46}
"""The share of an image's work that is done once however many crops are cut from it, by how names begin; measured with
three crops, that of mix taken to lie between."""

DEPTHS_GB = (2.0, 8.0, 21.0, 35.0)
"""Queues to compare with the one that is set; at 224 px the last holds a fifth of an ImageNet epoch."""

_SHOWN_STEPS = 12_000  # simulated of a longer run, in whole epochs spread over it


@dataclass(frozen=True)
class Feed:
    """A loader with its format."""

    name: str
    """The loader, and what of it: as in `CORE_RATES`, or `dali` on the GPU, the CPU or both."""
    images_per_second: float
    """Decoded for the whole run, by all nodes."""
    source: str
    """`measured`, `given` or `assumed`."""

    @property
    def backend(self) -> str:
        return self.name.split()[0].rstrip(",")


@dataclass(frozen=True)
class Row:
    """How a run fares with a feed."""

    feed: Feed
    waits: tuple[float, ...]
    """Shares of the time in which steps wait for data, by depth of the queue, under the schedule as it is set."""
    seconds: float
    """Of the whole run, with the queue that is set."""
    fed_seconds: float
    """The same if data were always at hand."""
    images_per_second: float
    """Trained on average, with the queue that is set."""
    even: str | None
    """What keeps it fed: `as set`, or the setting of the schedule that does; None if nothing does."""
    even_gb: float
    """With which queue: the one that is set, or the next larger one that will do."""


def crops_at_once(feed: Feed, crops: int) -> Feed | None:
    """The feed where `crops` are cut from each image that is decoded; None for a format of which it is not known."""
    share = next((share for name, share in _DECODING.items() if feed.name.startswith(name)), None)
    if share is None:
        return None
    return replace(
        feed,
        name=f"{feed.name}, {crops} crops",
        images_per_second=feed.images_per_second / (share / crops + 1 - share),
    )


def assumed_feeds(cores: int, gpus: int, nodes: int, gpu_decodes: float, crops: int = 1) -> list[Feed]:
    """What loaders and formats deliver on nodes of so many cores and GPUs, from `CORE_RATES`.

    `gpu_decodes`: images per second that a GPU decodes; 0 leaves it out. `crops`: cut from each image.
    """
    rates = {name: rate * cores for name, rate in CORE_RATES.items()}
    dali = rates.pop("dali")
    feeds = {"torch": rates.pop("torch")}
    if gpu_decodes:
        on_gpus = gpu_decodes * gpus
        feeds["dali GPU"] = on_gpus
        feeds["dali GPU+CPU"] = dali + on_gpus
    feeds |= {"dali CPU": dali} | rates
    made = [Feed(name, rate * nodes, "assumed") for name, rate in feeds.items()]
    return made if crops == 1 else [several for feed in made if (several := crops_at_once(feed, crops))]


def estimated_feeds(measured: Sequence[Feed]) -> list[Feed]:
    """Formats that are not at hand, from what is measured: `CORE_RATES`, all by the same factor."""
    known = {feed.name: feed.images_per_second for feed in measured}
    factors = [known[name] / rate for name, rate in CORE_RATES.items() if name in known]
    if not factors:
        return []
    factor = sum(factors) / len(factors)
    return [Feed(name, rate * factor, "assumed") for name, rate in CORE_RATES.items() if name not in known]


def keeping_up(
    config: Config,
    planned: Plan,
    feeds: Sequence[Feed],
    level_seconds: Callable[[Feed], Sequence[float]],
    processes: int,
    depths: Sequence[float],
    *,
    own: float,
    prepared: int = 0,
) -> list[Row]:
    """A row for each feed.

    Args:
        config: Of the run.
        planned: Its plan.
        feeds: Loaders to compare.
        level_seconds: How long a step takes at each level of the plan with a feed, data at hand.
        processes: GPUs over all nodes, each with a queue.
        depths: Of a process's queue in GB.
        own: The depth that is set.
        prepared: Of each, what augmented batches take, in decoded ones.
    """
    evened = [("as set", sample(planned)[0]), *_evened(config, planned)]

    def batches(gigabytes: float) -> int:
        return batches_in(int(gigabytes * 1e9), planned, processes, config.data.img_size, prepared)

    rows = []
    for feed in feeds:
        of_level, batch_seconds = level_seconds(feed), planned.batch_size / feed.images_per_second

        def run(
            levels: Sequence[int], gigabytes: float, of_level: Sequence[float] = of_level, batch: float = batch_seconds
        ) -> Simulated:
            return simulate([of_level[number] for number in levels], batch, batches(gigabytes))

        _, waits = zip(*(_whole(planned, of_level, batch_seconds, batches(depth)) for depth in depths), strict=True)
        at_set = _whole(planned, of_level, batch_seconds, batches(own))[0]
        fed = sum(of_level[number] for number in planned.level_of_step)
        mean = fed / planned.total_steps
        kept_up = (
            (name, depth)
            for depth in sorted({own, *(depth for depth in depths if depth > own)})
            for name, levels in evened
            if run(levels, depth).data_wait <= KEPT_UP
        )
        even, even_gb = next(kept_up, (None, own)) if batch_seconds <= mean * (1 + KEPT_UP) else (None, own)
        rate = planned.total_steps * planned.batch_size / at_set
        rows.append(Row(feed, waits, at_set, fed, rate, even, even_gb))
    return rows


def sample(planned: Plan) -> tuple[tuple[int, ...], int]:
    """Levels of the steps before the last epochs at rho = 1: of epochs that lie evenly in a long run. And the first
    step of those last epochs."""
    head = planned.total_steps - planned.cooldown_epochs * planned.steps_per_epoch
    epochs, room = -(-head // planned.steps_per_epoch), max(1, _SHOWN_STEPS // planned.steps_per_epoch)
    if epochs <= room:
        return planned.level_of_step[:head], head
    steps: list[int] = []
    for number in range(room):
        first = (2 * number + 1) * epochs // (2 * room) * planned.steps_per_epoch
        steps += planned.level_of_step[first : min(first + planned.steps_per_epoch, head)]
    return tuple(steps), head


def _whole(planned: Plan, of_level: Sequence[float], batch_seconds: float, capacity: int) -> tuple[float, float]:
    """Seconds of the whole run, and the share of them that it waits for data."""
    steps, head = sample(planned)
    ran = simulate([of_level[number] for number in steps], batch_seconds, capacity)
    tail = [of_level[number] for number in planned.level_of_step[head:]]
    scale = head / len(steps)
    fed = scale * (ran.seconds - sum(ran.waited)) + sum(tail)
    seconds = scale * ran.seconds + sum(max(step, batch_seconds) for step in tail)
    return seconds, 1 - fed / seconds


def _evened(config: Config, planned: Plan) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Schedules with as many steps at each level whose demand is more even, what changes least first: the setting, and
    levels of the first steps."""
    number_of = {(level.img_size, level.stage): number for number, level in enumerate(planned.levels)}
    if len(number_of) == 1:
        return
    kinds = [list(choices) for section in config.own for choices in section.evened(planned.steps_per_epoch)]
    for choices in reversed(kinds):  # a shorter period first: steps stay in their order
        for setting, even in choices:
            most = min(planned.total_steps, _SHOWN_STEPS)
            changed = config.having(even)
            changed = replace(changed, train=replace(changed.train, max_steps=most))
            of = plan(changed, num_images=planned.num_images)
            keys = [(level.img_size, level.stage) for level in of.levels]
            if all(key in number_of for key in keys):
                yield setting, tuple(number_of[keys[level]] for level in of.level_of_step)
