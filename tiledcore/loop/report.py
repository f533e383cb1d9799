"""Report: how the last call of a TiledPipeline ran."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tiledcore.loop.graph import Counters


@dataclass
class Report:
    """How a call ran."""

    fused: bool  # The engine moved the canvas; otherwise the pipeline's own loop and the scheduler's ``step`` did
    reason: str | None  # Why it did not
    evaluations: int  # Of the network on the whole canvas, by the engine
    graph: Counters
    resumed: int = 0  # Evaluations before them that a checkpoint spared
    reductions: tuple[str, ...] = ()  # What was lowered because memory ran out, in order
    plan: Any = None  # With a ``memory_budget``: the :class:`~tiledcore.memory.planner.Plan`, with its predicted peak
    measured_bytes: int | None = None  # With a plan: the peak of tensors alive on the device, weights included
    ranks: Any = None  # With several processes: the :class:`~tiledcore.parallel.ranks.Times` of each
    region_tiles: int | None = None
    """With regions, in tile mode: tiles evaluated in the last step, each once for every prompt in it."""
