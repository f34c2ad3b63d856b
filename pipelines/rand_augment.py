"""RandAugment in timm's notation: what a text such as "rand-m9-mstd0.5-inc1-n2" asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

MAX_LEVEL = 10
"""The largest strength of an operation."""
_MOST_OPERATIONS = 100
_PARTS: dict[str, tuple[str, Callable[[str], float]]] = {
    "m": ("magnitude", int),
    "mstd": ("magnitude_std", float),
    "n": ("num_ops", int),
    "p": ("probability", float),
    "inc": ("increasing", int),
}


@dataclass(frozen=True, kw_only=True)
class RandAugmentSpec:
    """RandAugment (Cubuk et al., 2020) as timm applies it to the list of operations that grow with the magnitude."""

    magnitude: int = 10
    """Mean strength, 0 to 10."""
    magnitude_std: float = 0.0
    """Standard deviation of an operation's strength, which is then clipped to 0-10."""
    num_ops: int = 2
    """Operations drawn per image, with replacement."""
    probability: float = 0.5
    """Of carrying out an operation once it is drawn."""

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude <= MAX_LEVEL:
            raise ValueError(f"RandAugment's magnitude is {self.magnitude}; it must lie between 0 and {MAX_LEVEL}")
        if not 0 <= self.magnitude_std <= 100:
            raise ValueError(f"RandAugment's magnitude_std is {self.magnitude_std}; it must lie between 0 and 100")
        if not 1 <= self.num_ops <= _MOST_OPERATIONS:
            raise ValueError(f"RandAugment's num_ops is {self.num_ops}; it must lie between 1 and {_MOST_OPERATIONS}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"RandAugment's probability is {self.probability}; it must lie between 0 and 1")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From timm's notation, such as "rand-m9-mstd0.5-inc1-n2"; `ValueError` for any part that is not known here.

        m magnitude, mstd its standard deviation, n operations per image, p probability of each; inc1 is required,
        because only the increasing operations exist here. What is left out has timm's default.
        """
        family, *parts = text.split("-")
        if family != "rand":
            raise ValueError(f"{text!r} is no RandAugment specification; it must begin with 'rand-'")
        values: dict[str, Any] = {}
        for part in parts:
            name = part.rstrip("0123456789.")
            try:
                field, convert = _PARTS[name]
                value = convert(part.removeprefix(name))
            except (KeyError, ValueError):
                message = (
                    f"{part!r} in {text!r} is unknown; the parts are m<int>, mstd<number>, n<int>, p<number>, inc1"
                )
                raise ValueError(message) from None
            if field in values:
                raise ValueError(f"{text!r} sets the {field} twice; remove one part")
            values[field] = value
        if values.pop("increasing", 0) != 1:
            raise ValueError(
                f"{text!r} asks for operations that do not grow with the magnitude; only -inc1 is known here"
            )
        return cls(**values)
