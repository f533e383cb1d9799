"""Checks of public arguments: each raises one ValueError that names the argument, its value and what is valid."""

import math
from collections.abc import Sequence
from typing import Any

Pair = tuple[int, int]


def integer(name: str, value: object, least: int) -> int:
    """An int of at least ``least``; a bool is refused."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an int of at least {least}")
    return value


def pair(name: str, value: object, least: int) -> Pair:
    """An int for both axes, or a (y, x) pair; as a pair."""
    both = value if isinstance(value, tuple | list) else (value, value)
    valid = [v for v in both if isinstance(v, int) and not isinstance(v, bool) and v >= least]
    if len(both) != 2 or len(valid) != 2:
        raise ValueError(f"{name}={value!r} must be an int of at least {least}, or a (y, x) pair of them")
    return valid[0], valid[1]


def flags(name: str, value: object) -> tuple[bool, bool]:
    """A bool for both axes, or a (y, x) pair; as a pair."""
    both = value if isinstance(value, tuple | list) else (value, value)
    valid = [v for v in both if isinstance(v, bool)]
    if len(both) != 2 or len(valid) != 2:
        raise ValueError(f"{name}={value!r} must be a bool, or a (y, x) pair of bools")
    return valid[0], valid[1]


def choice(name: str, value: object, valid: Sequence[Any]) -> None:
    """One of some values."""
    if not any(value is v or (type(value) is type(v) and value == v) for v in valid):
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, valid))}")


def real(name: str, value: object, low: float, high: float = math.inf) -> float:
    """A finite number from ``low`` to ``high``."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:  # type: ignore[operator]
        valid = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise ValueError(f"{name}={value!r} must be a number {valid}")
    return float(value)  # type: ignore[arg-type]
