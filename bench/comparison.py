"""What became slower or faster between two runs of the suite, told apart from noise."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEAST = 0.05
"""Smaller changes are never told."""


@dataclass(frozen=True)
class Change:
    case: str
    name: str
    before: float
    """Median seconds."""
    after: float
    noise: float
    """Relative: how far two medians of the same code may lie apart."""

    @property
    def ratio(self) -> float:
        return self.after / self.before

    @property
    def verdict(self) -> str:
        """``slower`` or ``faster`` past the larger of 5 % and the noise, else ``same``."""
        limit = 1 + max(LEAST, self.noise)
        return "slower" if self.ratio > limit else "faster" if self.ratio < 1 / limit else "same"


def spread(runs: list[dict[str, Any]]) -> float:
    """Relative noise of a row's median: the larger of half its samples' quartiles and half the range of its runs."""
    samples = [value for run in runs for value in run["samples"]]
    low, median, high = statistics.quantiles(samples, n=4)
    medians = [statistics.median(run["samples"]) for run in runs]
    return max(high - low, max(medians) - min(medians)) / 2 / median


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> tuple[list[Change], list[str]]:
    """Every row that both sides timed, and what only one of them has.

    Args:
        before: results of the suite, one or more runs of the same code.
        after: the same of the other code.
    """
    sides = [_rows(side) for side in (before, after)]
    changes = []
    for key in sides[0].keys() & sides[1].keys():
        a, b = (side[key] for side in sides)
        medians = [statistics.median(value for run in side for value in run["samples"]) for side in (a, b)]
        changes.append(Change(*key, medians[0], medians[1], spread(a) + spread(b)))
    only = [f"only in {'first' if key in sides[0] else 'second'}: {', '.join(key)}"
            for key in sorted(sides[0].keys() ^ sides[1].keys())]  # fmt: skip
    return sorted(changes, key=lambda change: (change.case, change.name)), only


def _rows(runs: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        for row in run["results"]:
            if row.get("samples"):
                found.setdefault((row["case"], row["name"]), []).append(row)
    return found


def load(path: Path) -> dict[str, Any]:
    """A file that ``run --json`` wrote.

    Raises:
        ValueError: it is not one.
    """
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or not any("samples" in row for row in data.get("results", ())):
        raise ValueError(f"{path}: not written by `python -m bench run --json`, which keeps its samples")
    return data


def checkouts(first: Path, second: Path, options: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run the suite in two checkouts in the order A, B, B, A, so that a drift of the machine is the same for both.

    Each runs in its own ``.venv`` where it has one, otherwise in this interpreter.
    """
    found: dict[Path, list[dict[str, Any]]] = {first: [], second: []}
    with tempfile.TemporaryDirectory() as folder:
        for number, root in enumerate((first, second, second, first)):
            own = root / ".venv" / "bin" / "python"
            out = Path(folder) / f"{number}.json"
            command = [str(own.absolute()) if own.exists() else sys.executable, "-m", "bench", "run", *options]
            subprocess.run([*command, "--json", str(out)], cwd=root, check=True, stdout=subprocess.DEVNULL)
            found[root].append(load(out))
    return found[first], found[second]


def text(changes: list[Change], only: list[str]) -> str:
    lines = [f"{'before ms':>10}{'after ms':>10}{'ratio':>7}{'noise':>7}  verdict"]
    for change in changes:
        lines.append(
            f"{change.before * 1e3:10.3f}{change.after * 1e3:10.3f}{change.ratio:7.2f}{change.noise:7.0%}  "
            f"{change.verdict:7} {change.name} of {change.case}"
        )
    return "\n".join([*lines, *only])
