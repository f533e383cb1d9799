"""One entry of the suite: what is timed, against what, and what it must move and compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tiledcore import ops


@dataclass(frozen=True)
class Ready:
    """A case with its inputs on the device."""

    runs: dict[str, Callable[[], Any]]
    """Provider -> one call: the implementations, the baseline, rivals, and what bounds them, such as ``copy``."""
    baseline: str
    """The provider that speed-ups are over."""
    bytes: dict[str, int]
    """Provider -> bytes that it has to move; what others are charged with where it is missing."""
    flops: int = 0
    """Useful ones: what the result needs, whoever computes it."""
    errors: Callable[[], dict[str, float]] = dict
    """Provider -> largest |difference| from the oracle over its largest entry."""
    not_run: dict[str, str] = field(default_factory=dict)
    """Provider -> why it cannot run here."""


@dataclass(frozen=True)
class Case:
    """What can be prepared on any device.

    ``prepare`` makes new inputs at each call, so that buffers can be rotated.
    """

    op: str
    shapes: str
    oracle: str
    """What results are compared with before anything is timed."""
    prepare: Callable[[torch.device, torch.dtype], Ready]
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.op}: {self.shapes}"


def why_not(op: str, impl: ops.Impl, device: torch.device) -> str | None:
    """Why an implementation cannot be timed on a device, or None where it can."""
    if impl == "triton" and device.type == "cpu":
        return "interpreted, its time would mean nothing"
    return ops.unavailable(op, impl, device)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest |difference| over the largest |expected|; infinite where something is not finite."""
    difference = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
    return difference if difference == difference else float("inf")
