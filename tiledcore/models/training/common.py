"""What all training scripts share: a schedule in minutes, batches made ahead, safe saving, averaged weights."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: Checkpoints, caches and logs.
WORK = Path.home() / "tiledcore-training"
#: The folder of the embedded models.
MODELS = Path(__file__).parents[1]


class Schedule:
    """Minutes used so far, over restarts. ``tick`` returns the factor for the learning rates.

    The factor rises over ``warmup`` steps, stays at 1, and falls to 1 % over the last ``fall`` of the budget.
    """

    def __init__(self, minutes: float, used: float = 0.0, warmup: int = 100, fall: float = 0.5) -> None:
        self.budget, self.used, self.warmup, self.fall = 60 * minutes, used, warmup, fall
        self.last, self.steps = time.monotonic(), 0

    def tick(self) -> float:
        now = time.monotonic()
        self.used += min(now - self.last, 10.0)  # a suspended process does not use up its budget
        self.last, self.steps = now, self.steps + 1
        left = max(1 - self.used / self.budget, 0.0) / self.fall
        return min(1.0, self.steps / self.warmup) * min(1.0, 0.01 + left)

    @property
    def progress(self) -> float:
        return self.used / self.budget

    @property
    def done(self) -> bool:
        return self.used >= self.budget


def prefetch(make: Callable[[], Any], depth: int = 4) -> Iterator[Any]:
    """Run ``make`` in a background thread, a few batches ahead."""
    batches: queue.Queue[Any] = queue.Queue(depth)

    def work() -> None:
        while True:
            batches.put(make())

    threading.Thread(target=work, daemon=True).start()
    while True:
        yield batches.get()


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write beside and rename, so that a kill at any moment leaves a whole file."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def to_float(images: np.ndarray[Any, Any]) -> torch.Tensor:
    """``uint8 [N,H,W,3]`` -> ``float32 [N,3,H,W]`` in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def update_ema(ema: torch.nn.Module, model: torch.nn.Module, step: int, longest: float) -> None:
    """Move the averaged weights towards the model's. Early steps move them more."""
    decay = min(longest, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
