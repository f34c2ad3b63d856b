"""Who does the work of a conversion: processes of this machine, or the nodes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from pipelines.conversion.processes import PATIENCE, map_processes
from pipelines.conversion.ray_tasks import map_ray

Engine = Literal["processes", "ray"]
Task = TypeVar("Task")
Result = TypeVar("Result")


def map_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    jobs: int,
    on_result: Callable[[Result], None],
    engine: Engine = "processes",
    patience: float = PATIENCE,
) -> list[Result]:
    """`[function(task) for task in tasks]`, `jobs` at a time; `on_result` hears of each as it is done.

    `patience`: as of `map_processes`; Ray looks after its tasks itself.
    """
    if not tasks:
        return []
    if engine == "ray":
        return map_ray(function, tasks, on_result)
    return map_processes(function, tasks, jobs, on_result, patience)
