"""Shares of patches, as people write them: a list, or a range."""

from __future__ import annotations

from collections.abc import Sequence

_MOST_RHOS = 1000


def parse_rhos(text: str, option: str = "--rho") -> list[float]:
    """The rhos of `option`, in the order given. Raises `ValueError` for an empty list or a value outside (0, 1]."""
    how = "write numbers with commas, as in 1.0,0.6,0.2, or a range 0.2:1.0:0.1"
    try:
        values = [float(part) for part in text.split(":" if ":" in text else ",") if part.strip()]
    except ValueError:
        raise ValueError(f"{option} {text}: {how}") from None
    if not values:
        raise ValueError(f"{option} is empty; {how}")
    if ":" not in text:
        check_rhos(values, option)
    elif len(values) != 3 or text.count(":") != 2:
        raise ValueError(f"{option} {text}: {how}")
    else:
        low, high, step = values
        check_rhos((low, high), option)
        if not low <= high or not (high - low) / _MOST_RHOS <= step <= 1 or step <= 0:
            raise ValueError(
                f"{option} {text} is no range of at most {_MOST_RHOS + 1:,} values; write low:high:step, as in "
                "0.2:1.0:0.1"
            )
        count = int((high - low) / step + 1e-9)
        values = [round(low + number * step, 9) for number in range(count, -1, -1)]
    if len(values) > _MOST_RHOS + 1:
        raise ValueError(f"{option} holds {len(values):,} values; write at most {_MOST_RHOS + 1:,}")
    return list(dict.fromkeys(values))


def check_rhos(values: Sequence[float], option: str = "--rho") -> None:
    """Raise `ValueError` for one that is no share of patches."""
    for value in values:
        if not 0 < value <= 1:
            raise ValueError(f"{option} {value:g} is out of range; rho is the share of patches kept, in (0, 1]")
