"""Work spread over the nodes of a Ray cluster that share the file system of the data set."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipelines.conversion.processes import WorkerLost
from pipelines.extras import require

Task = TypeVar("Task")
Result = TypeVar("Result")


def map_ray(
    function: Callable[[Task], Result], tasks: Sequence[Task], on_result: Callable[[Result], None]
) -> list[Result]:
    """`[function(task) for task in tasks]` as Ray tasks of one core each.

    Joins the cluster that RAY_ADDRESS or Ray's own settings name, and starts one on this machine where there is none.
    """
    ray = need_ray()
    if not ray.is_initialized():
        # Workers on other nodes import this program from the same place as here.
        here = Path(__file__).resolve().parents[2]
        path = os.pathsep.join(filter(None, (str(here), os.environ.get("PYTHONPATH"))))
        ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": {"PYTHONPATH": path}})
    remote = ray.remote(num_cpus=1, max_retries=3)(_call)
    references = [remote.remote(function, task) for task in tasks]
    waiting = references
    try:
        while waiting:
            done, waiting = ray.wait(waiting)
            for reference in done:
                on_result(ray.get(reference))
        return list(ray.get(references))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise WorkerLost(f"a Ray worker was lost ({str(error).splitlines()[0]}); the same command continues") from error
    finally:
        for reference in waiting:
            ray.cancel(reference)


def need_ray() -> Any:
    """The module; `DataError` where it is missing."""
    return require("ray", "ray", "--engine ray")


def _call(function: Callable[[Task], Result], task: Task) -> Result:
    """A plain function, which Ray insists on; `function` may be a partial one."""
    return function(task)
