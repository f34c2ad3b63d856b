"""A run with its loader, simulated: how long the step waits for data, and what would let it wait less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pss.config import Config
from pss.planning.plan import Plan, plan


@dataclass(frozen=True)
class Simulated:
    """A run with its loader, as `simulate` saw it."""

    seconds: float
    waited: tuple[float, ...]  # seconds before each step

    @property
    def data_wait(self) -> float:
        """The share of the time in which the step waits for data."""
        return sum(self.waited) / self.seconds


def simulate(step_seconds: Sequence[float], batch_seconds: float, capacity: int) -> Simulated:
    """A run as three events a step: a batch is decoded, finds room in the queue, is taken.

    The loader decodes one batch at a time, at a constant rate, and holds it while the queue, of `capacity` batches, is
    full; then it does nothing. Deterministic; time and memory go with the number of steps.

    Args:
        step_seconds: how long each step takes once it has its data.
        batch_seconds: how long the loader takes for a batch.
        capacity: batches that the queue holds, at least 1.
    """
    if capacity < 1:
        raise ValueError(f"a queue holds at least 1 batch, got {capacity}")
    taken: list[float] = []
    waited: list[float] = []
    now = placed = 0.0
    for number, seconds in enumerate(step_seconds):
        decoded = placed + batch_seconds
        placed = max(decoded, taken[number - capacity]) if number >= capacity else decoded
        begins = max(now, placed)
        waited.append(begins - now)
        taken.append(begins)
        now = begins + seconds
    return Simulated(now, tuple(waited))


KEPT_UP = 0.01
"""The share of waiting up to which a loader counts as keeping up."""

_SHOWN_STEPS = 20_000  # simulated for a remedy; more of the same cycles would not change the share


@dataclass(frozen=True)
class Machine:
    """What a run is to be simulated on."""

    processes: int
    """GPUs over all nodes."""
    images_per_second: float
    """Trained by all of them at rho = 1, data always at hand."""
    loader_images_per_second: float
    """Decoded by all nodes."""
    queue_bytes: int
    """Of decoded images kept ready, per process."""
    prepared_batches: int = 0
    """Of that memory, what augmented batches take, in decoded ones; see `prepared_batches`."""


@dataclass(frozen=True)
class Remedy:
    """A change after which the loader no longer holds training up, and the share of waiting that is left."""

    what: str
    data_wait: float


def run_on(planned: Plan, machine: Machine, img_size: int) -> Simulated:
    """The whole run, simulated."""
    return simulate(
        planned.step_seconds(machine.images_per_second),
        planned.batch_size / machine.loader_images_per_second,
        queue_batches(planned, machine, img_size),
    )


def queue_batches(planned: Plan, machine: Machine, img_size: int) -> int:
    """Global batches that the queues of all processes hold together; at least one, as each queue does."""
    return batches_in(machine.queue_bytes, planned, machine.processes, img_size, machine.prepared_batches)


def batches_in(num_bytes: int, planned: Plan, processes: int, img_size: int, prepared: int) -> int:
    """Decoded global batches in so much memory of each of `processes`, where augmented ones take the room of
    `prepared`."""
    return max(1, num_bytes * processes // (planned.batch_size * 3 * img_size**2) - prepared)


def prepared_batches(device: str) -> int:
    """Decoded batches that have no room in the queue of such a device for the augmented ones that wait there: two, of
    four bytes a number (see `pipelines.loaders.prefetch.Inputs`)."""
    return 8 if device == "cuda" else 0


def remedies(config: Config, planned: Plan, machine: Machine) -> list[Remedy]:
    """What would let the loader keep up, the cheapest first: the schedule, then memory, then the loader itself.

    Each is tried on its own, by simulation, and returned only if it leaves at most 1 % of waiting. Where the loader is
    slower than the average step, only a faster one helps.
    """
    found = []
    side = config.data.img_size

    def shown(of: Config) -> Plan:
        limited = replace(of, train=replace(of.train, max_steps=min(planned.total_steps, _SHOWN_STEPS)))
        return plan(limited, num_images=planned.num_images)

    def wait(of: Plan, on: Machine) -> float:
        return run_on(of, on, side).data_wait

    unchanged = shown(config)
    demand = planned.average_demand * machine.images_per_second
    if machine.loader_images_per_second >= demand:
        for section in config.own:
            for choices in section.evened(planned.steps_per_epoch) if len(planned.levels) > 1 else ():
                for setting, even in choices:
                    if (left := wait(shown(config.having(even)), machine)) <= KEPT_UP:
                        found.append(Remedy(f"--set {setting}", left))
                        break
        for gigabytes in (2**power for power in range(10)):
            larger = replace(machine, queue_bytes=gigabytes * 10**9)
            if larger.queue_bytes > machine.queue_bytes and (left := wait(unchanged, larger)) <= KEPT_UP:
                found.append(Remedy(f"--set data.prefetch_gb={gigabytes}", left))
                break
    for factor in (1.05**power for power in range(1, 60)):
        faster = replace(machine, loader_images_per_second=max(demand, machine.loader_images_per_second) * factor)
        if (left := wait(unchanged, faster)) <= KEPT_UP:
            rate = faster.loader_images_per_second
            found.append(
                Remedy(f"a loader of {rate:,.0f} images/s (another --format or more decoding on the GPU)", left)
            )
            break
    return found
