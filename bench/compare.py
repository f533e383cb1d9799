"""Compare two runs of the suite: what became slower or faster by more than the noise."""

import json
from pathlib import Path

import numpy as np

LEAST = 0.05
"""Smaller changes are never reported."""


def load(path: Path) -> dict[tuple[str, str], list[float]]:
    """(case, provider) -> its samples, of a file of ``python -m bench run --json``; ValueError if it is another one."""
    data = json.loads(path.read_text())
    rows = data.get("results", ()) if isinstance(data, dict) else ()
    if not any("samples" in row for row in rows):
        raise ValueError(f"{path}: not written by `python -m bench run --json`")
    return {(row["case"], row["name"]): row["samples"] for row in rows if row.get("samples")}


def verdict(before: list[float], after: list[float]) -> tuple[str, str]:
    """``slower`` or ``faster`` by more than 5 % and the noise, otherwise ``same``; and the figures as text.

    The noise is half the distance of the quartiles, relative to the median, both runs added.
    """
    (low, a, high), (low_after, b, high_after) = (np.percentile(samples, (25, 50, 75)) for samples in (before, after))
    noise = (high - low) / 2 / a + (high_after - low_after) / 2 / b
    limit = 1 + max(LEAST, noise)
    told = "slower" if b / a > limit else "faster" if b / a < 1 / limit else "same"
    return told, f"{a * 1e3:10.3f}{b * 1e3:10.3f}{b / a:7.2f}{noise:7.0%}  {told:7}"


def compare(before: Path, after: Path) -> bool:
    """Print a line for each provider of a case. Returns whether one became slower."""
    one, two = load(before), load(after)
    both = {key: verdict(one[key], two[key]) for key in sorted(one.keys() & two.keys())}
    print(f"{'before ms':>10}{'after ms':>10}{'ratio':>7}{'noise':>7}  verdict")
    for (case, name), (_, line) in both.items():
        print(f"{line} {name} of {case}")
    for key in sorted(one.keys() ^ two.keys()):
        print(f"only in {'first' if key in one else 'second'}: {', '.join(key)}")
    return any(told == "slower" for told, _ in both.values())
