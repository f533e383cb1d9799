"""Compare two runs of the suite: what became slower or faster by more than the noise."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import quartiles

LEAST = 0.05
"""Smaller changes are never reported."""

Results = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """A provider of a case that both sides timed."""

    case: str
    name: str
    before: float
    """Median seconds."""
    after: float
    noise: float
    """Relative: half the distance of the quartiles, both runs added."""

    @property
    def verdict(self) -> str:
        """``slower`` or ``faster`` beyond the larger of 5 % and the noise, otherwise ``same``."""
        ratio, limit = self.after / self.before, 1 + max(LEAST, self.noise)
        return "slower" if ratio > limit else "faster" if ratio < 1 / limit else "same"

    def __str__(self) -> str:
        times = f"{self.before * 1e3:10.3f}{self.after * 1e3:10.3f}{self.after / self.before:7.2f}{self.noise:7.0%}"
        return f"{times}  {self.verdict:7} {self.name} of {self.case}"


HEADER = f"{'before ms':>10}{'after ms':>10}{'ratio':>7}{'noise':>7}  verdict"


def compare(before: Results, after: Results) -> tuple[list[Change], list[str]]:
    """Every row that both runs timed, and a line for each row that only one of them has."""
    sides = [{(row["case"], row["name"]): row["samples"] for row in run["results"] if row.get("samples")}
             for run in (before, after)]  # fmt: skip
    changes = []
    for key in sorted(sides[0].keys() & sides[1].keys()):
        (low, a, high), (low_after, b, high_after) = (quartiles(side[key]) for side in sides)
        changes.append(Change(*key, a, b, (high - low) / 2 / a + (high_after - low_after) / 2 / b))
    only = sorted(sides[0].keys() ^ sides[1].keys())
    return changes, [f"only in {'first' if key in sides[0] else 'second'}: {', '.join(key)}" for key in only]


def load(path: Path) -> Results:
    """A file of ``python -m bench run --json``; ValueError if it is another one."""
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or not any("samples" in row for row in data.get("results", ())):
        raise ValueError(f"{path}: not written by `python -m bench run --json`")
    return data
