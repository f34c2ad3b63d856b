"""Plans of epochs, made before they are needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from pipelines.loaders.order import EpochPlan


class Plans:
    """Makes each epoch's plan once, in a thread, and keeps two: of the epoch that is delivered, and of the next.

    A plan of 13 million samples takes a second, for which neither the training thread nor the first batch should wait.
    """

    def __init__(self, make: Callable[[int], EpochPlan]) -> None:
        """`make` the plan of an epoch: pure, and called from another thread."""
        self._make = make
        self._plans: dict[int, Future[EpochPlan]] = {}
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def prepare(self, epoch: int) -> None:
        """Begin to plan `epoch`, unless that has been done."""
        self._begun(epoch)

    def of(self, epoch: int) -> EpochPlan:
        """The plan of `epoch`, when it is there."""
        return self._begun(epoch).result()

    def _begun(self, epoch: int) -> Future[EpochPlan]:
        with self._lock:
            if epoch in self._plans:
                return self._plans[epoch]
            while len(self._plans) > 1:
                del self._plans[next(iter(self._plans))]
            plan = self._plans[epoch] = Future()
            # A daemon, for which the end of the process need not wait.
            self._thread = threading.Thread(target=partial(self._fulfil, plan, epoch), name="pss-plan", daemon=True)
            self._thread.start()
        return plan

    def _fulfil(self, plan: Future[EpochPlan], epoch: int) -> None:
        try:
            made = self._make(epoch)
            made.hash  # noqa: B018 - computed here as well, and kept
        except BaseException as failure:  # whatever it is, whoever asks must hear of it
            plan.set_exception(failure)
        else:
            plan.set_result(made)

    def forget(self) -> None:
        """Make all plans anew, when they are next asked for: what they are made of has changed."""
        with self._lock:
            self._plans.clear()

    def close(self) -> None:
        """Keep none, and wait for the one that is being made."""
        self.forget()
        if self._thread is not None:
            self._thread.join()
