"""Mean, spread and paired differences over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""The 97.5 % quantile of Student's t for 1 to 30 degrees of freedom."""


@dataclass(frozen=True)
class Mean:
    """Of values over seeds."""

    mean: float
    deviation: float | None
    """Standard deviation of a sample; None of a single one."""
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % confidence interval of the mean; None of a single value."""
        if self.deviation is None:
            return None
        return t_975(self.count - 1) * self.deviation / math.sqrt(self.count)

    def told(self, form: str) -> str:
        """The mean ± the standard deviation."""
        return f"{self.mean:{form}}" + ("" if self.deviation is None else f" ± {self.deviation:{form}}")


def t_975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; above 30 degrees of freedom that of 30, a little wide."""
    return _T_975[min(freedom, len(_T_975)) - 1]


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Mean:
    """Of the differences, ours less theirs, by seed; both have the same seeds."""
    assert ours.keys() == theirs.keys()
    return Mean.of([value - theirs[seed] for seed, value in ours.items()])
