"""Feature: something that a call does besides denoising; Features: all of them, in order.

The fused loop and the fallback loop both run them, so a feature is written once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import, and the command line checks a preview's path before that
    from torch import Tensor

    from tiledcore.geometry import Tiling


class Feature:
    """What one call does besides. Every method does nothing unless a feature overrides it."""

    every_step = False  # Whether it acts on steps: then the fallback loop watches the scheduler's ``step`` for it

    def enter(self, stack: ExitStack) -> None:
        """The call begins: change what must be changed for it; ``stack`` undoes that when the call ends."""

    def begin(self, scheduler: Any, timesteps: Tensor) -> None:
        """Before the first of the evaluations, at ``timesteps``; a ValueError where the scheduler does not suffice."""

    def active(self, index: int) -> bool:
        """Whether :meth:`after_prediction` does anything at this evaluation."""
        return False

    def after_prediction(self, index: int, sample: Tensor, tiles: Tiling, prediction: Tensor) -> Tensor:
        """The guided prediction, changed; float32 or float64, ``[B, C, H, W]``.

        ``sample``, of the same shape, is the canvas as the scheduler has it, not scaled for the network.
        """
        return prediction

    def after_step(self, index: int, sample: Tensor) -> None:
        """``index`` evaluations are done, and this is the canvas ``[B, C, H, W]``."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold to go on."""
        return {}

    def resume(self, tensors: dict[str, Tensor], tiles: Tiling) -> None:
        """Go on after the evaluation that left these :meth:`tensors` and used these tiles."""


class Features(list[Feature]):
    """The features of one call; they act in their order."""

    @classmethod
    @contextmanager
    def entered(cls, parts: Sequence[Feature | AbstractContextManager[Any]]) -> Iterator[Features]:
        """Features and other contexts, entered in their order for as long as the ``with`` block lasts."""
        with ExitStack() as stack:
            for part in parts:
                if isinstance(part, Feature):
                    part.enter(stack)
                else:
                    stack.enter_context(part)
            yield cls(part for part in parts if isinstance(part, Feature))

    @property
    def watches(self) -> bool:
        return any(feature.every_step for feature in self)

    def begin(self, scheduler: Any, timesteps: Tensor) -> None:
        for feature in self:
            feature.begin(scheduler, timesteps)

    def active(self, index: int) -> bool:
        return any(feature.active(index) for feature in self)

    def after_prediction(self, index: int, sample: Tensor, tiles: Tiling, prediction: Tensor) -> Tensor:
        for feature in self:
            if feature.active(index):
                prediction = feature.after_prediction(index, sample, tiles, prediction)
        return prediction

    def after_step(self, index: int, sample: Tensor) -> None:
        for feature in self:
            feature.after_step(index, sample)

    def resume(self, tensors: dict[str, Tensor], tiles: Tiling) -> None:
        for feature in self:
            feature.resume(tensors, tiles)

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for feature in self for name, tensor in feature.tensors().items()}
