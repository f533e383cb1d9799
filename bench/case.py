"""A case of the suite: what is timed, what it is compared with, and what it must compute."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bench.measure import Run
from tiledcore import ops

IMPLS: tuple[ops.Impl, ...] = ("reference", "native", "triton")  # that most ops have


@dataclass(frozen=True)
class Ready:
    """A case with its inputs on the device. Keys are providers: our implementations, rivals, and ``copy`` as a bound.

    Attributes:
        others: what a provider must compute, where that is not what is ``expected``.
        shown: a provider's result in the order, or the part of it, that is compared.
    """

    runs: dict[str, Run]
    baseline: str  # the provider that speed-ups are relative to
    bytes: dict[str, int]  # that have to be moved; may be empty
    expected: Callable[[], Tensor]  # the result by the oracle
    flops: int = 0  # what the result needs, whoever computes it
    others: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    shown: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    buffers: Sequence[Tensor] = ()  # results that are written in place: NaN before each check
    not_run: dict[str, str] = field(default_factory=dict)  # why a provider cannot run here


@dataclass(frozen=True)
class Case:
    """One entry of the suite. ``prepare`` makes the inputs."""

    op: str
    shapes: str
    oracle: str  # what results are compared with, in words
    prepare: Callable[[torch.device, torch.dtype], Ready]
    quick: bool = False  # also part of ``--quick``

    @property
    def name(self) -> str:
        return f"{self.op}: {self.shapes}"


def implementations(
    op: str, call: Callable[..., Tensor], device: torch.device, names: Sequence[ops.Impl] = IMPLS
) -> tuple[dict[str, Run], dict[str, str]]:
    """Our implementations that can run on the device as ``call(impl=name)``, and why the others cannot."""
    reasons = {name: ops.unavailable(op, name, device) for name in names}
    if "triton" in reasons and device.type == "cpu":
        reasons["triton"] = "interpreted, its time would mean nothing"
    runs: dict[str, Run] = {name: partial(call, impl=name) for name, reason in reasons.items() if reason is None}
    return runs, {name: reason for name, reason in reasons.items() if reason is not None}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``‖found - expected‖ / ‖expected‖``. Infinite where something is not finite, or the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    return error if error == error else float("inf")
