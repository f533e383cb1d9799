"""Forecast: how evenly the tile batches of a run can be dealt to ranks, and what they exchange."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from tiledcore.config import Execution, TilingConfig
from tiledcore.geometry import Pair
from tiledcore.memory.prediction import Predictor, show_bytes
from tiledcore.parallel.ranks import few, owners
from tiledcore.tiles.denoiser import TileDenoiser

STEPS = 30


@dataclass(frozen=True)
class Forecast:
    """The steps of a run on several ranks."""

    ranks: int
    batches: int  # Tile batches of the last step, which overlaps most
    shares: tuple[float, ...]  # Of the network's work, by rank; mean over the steps
    area_factor: float  # Tile area over the area of the canvas, mean over the steps
    speedup: float  # Of the network's part of the time, if that is proportional to the tiles' area
    received: int  # Bytes of predictions that a rank gets from the others per step, mean over ranks and steps
    buffers: int  # Bytes that a rank needs for the exchange, at the most

    def __str__(self) -> str:
        shares = " ".join(f"{share:.1%}" for share in self.shares)
        more = f"; {few(self.batches)}" if self.batches < self.ranks else ""
        return (
            f"{self.ranks} GPUs: the network {self.speedup:.2f} x as fast, shares {shares}; {self.batches} calls in "
            f"the last step; {show_bytes(self.received)} received per step and GPU, {show_bytes(self.buffers)} more "
            f"memory on each{more}"
        )


def forecast(
    denoiser: TileDenoiser, size: Pair, rows: int, channels: int, itemsize: int, ranks: int, steps: int = STEPS
) -> Forecast:
    """Deal the steps of a run as they will be dealt: on a canvas of ``size`` in canvas pixels, by its ``denoiser``.

    ``rows`` is guidance branches times images of the call; ``channels`` and ``itemsize`` (bytes) are of a prediction.
    """
    times = list(range(steps, 0, -1))
    denoiser.timesteps = lambda: times
    loads, costs = [], []
    for time in times:
        denoiser.place(size, time, torch.device("cpu"))
        assert denoiser.placed is not None
        whole = denoiser.config.mode == "canvas" or len(denoiser.placed) == 1
        parts = [(rows, *size)] if whole else [part.shape for part in denoiser.batches(denoiser.placed, rows)]
        costs = [math.prod(shape) for shape in parts]
        loads.append([0] * ranks)
        for cost, owner in zip(costs, owners(costs, ranks), strict=True):
            loads[-1][owner] += cost
    work, item = [sum(step) for step in loads], channels * itemsize
    return Forecast(
        ranks,
        batches=len(costs),
        shares=tuple(sum(own) / sum(work) for own in zip(*loads, strict=True)),
        area_factor=sum(work) / (steps * rows * math.prod(size)),
        speedup=sum(work) / sum(map(max, loads)),
        received=int(sum(work) * (ranks - 1) / ranks / steps * item),
        buffers=2 * max(work) * item,
    )


def forecast_for(
    predictor: Predictor, tiling: TilingConfig, execution: Execution, size: Pair, rows: int, ranks: int
) -> Forecast:
    """:func:`forecast` for a model and a ``size`` (width, height) in px."""
    model, family = predictor.model, predictor.family
    network: Any = predictor.module(model.network.role)
    unit, patch = family.unit(network), family.patch(network)
    denoiser = TileDenoiser(tiling, execution, model.native, model.factor, patch, unit)
    canvas = (size[1] // model.factor // unit, size[0] // model.factor // unit)
    channels = network.config.in_channels if family.packed else network.config.out_channels
    return forecast(denoiser, canvas, rows, channels, model.network.dtype.itemsize, ranks)
