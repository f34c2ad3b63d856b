"""How many epochs an arm gets for a given training time."""

from __future__ import annotations

from dataclasses import dataclass

from tools.comparing.arms import Arm


@dataclass(frozen=True)
class Pace:
    """What an epoch of an arm took, in seconds of training."""

    before: float
    """In the run that it starts from; not read where there is none."""
    own: float

    def seconds(self, arm: Arm, epochs: int) -> float:
        """Of so many epochs in all, at this pace."""
        before, own = arm.split(epochs)
        return before * self.before * bool(before) + own * self.own


def epochs_for(arm: Arm, pace: Pace, seconds: float) -> int:
    """The number of epochs, those of a run that the arm starts from included, whose time is nearest to `seconds`.

    At this pace they differ from it by at most half of an epoch.

    Raises:
        ValueError: even the shortest run takes longer than that by more than half of its epoch.
    """
    epochs = arm.fewest_epochs
    if pace.seconds(arm, epochs) - seconds > max(pace.own, pace.before * (epochs > 1)) / 2:
        raise ValueError(
            f"{epochs} epochs, the fewest of {arm.name}, take {pace.seconds(arm, epochs):.3g} s, and the training time "
            f"that all are given is {seconds:.3g} s; compare with more --epochs"
        )
    while pace.seconds(arm, epochs + 1) <= seconds:
        epochs += 1
    over, under = pace.seconds(arm, epochs + 1) - seconds, seconds - pace.seconds(arm, epochs)
    return epochs + 1 if over < under else epochs
