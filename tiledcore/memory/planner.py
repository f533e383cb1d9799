"""Plan an image so that it fits a memory budget: tiles or whole canvas, batch sizes, VAE bands, offload."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tiledcore.config import Execution, TilingConfig
from tiledcore.geometry import Pair
from tiledcore.memory.prediction import Phase, Predictor, show_bytes

SAFETY = 1.1
"""A predicted peak times this must fit the budget: fragmentation, kernel workspaces and the CUDA context are not
predicted."""
COUNTED_BYTES = "tensors on the device are counted, not the whole process"
MOVING, CANVAS = TilingConfig(motion="moving"), TilingConfig(mode="canvas")
Way = tuple[TilingConfig, Execution]


@dataclass(frozen=True)
class Plan:
    """How to make an image within a budget, and its predicted memory."""

    model: str
    size: Pair
    """(width, height) of the image, px."""
    budget: int
    device: str
    dtype: str
    tiling: TilingConfig
    execution: Execution
    offload: bool
    """Each module is on the device only while it runs (``enable_model_cpu_offload``)."""
    vae_band: int | None
    """Rows of the image that are decoded at a time; None: all."""
    vae_room: int | None
    """With bands: bytes for them, without weights, latents and the image."""
    tiles: int
    area_factor: float
    phases: tuple[Phase, ...]
    safety: float = SAFETY

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.phases)

    @property
    def needs(self) -> int:
        """The smallest budget that this plan fits."""
        return math.ceil(self.peak * self.safety)

    @property
    def summary(self) -> str:
        """The choices in one line."""
        return "; ".join(dict.fromkeys(phase.choice for phase in self.phases))

    @property
    def fits(self) -> bool:
        return self.needs <= self.budget


class DoesNotFit(ValueError):  # noqa: N818 - the public name
    """No plan fits; the message says which budget would."""

    def __init__(self, leanest: Plan) -> None:
        self.leanest = leanest
        worst = max(leanest.phases, key=lambda phase: phase.peak)
        needs = leanest.needs
        enough = f"{math.ceil(needs / 2**28) / 4:g}GiB" if needs > 2**30 else f"{math.ceil(needs / 2**20)}MiB"
        super().__init__(
            f"{leanest.model} at {leanest.size[0]}x{leanest.size[1]} does not fit {show_bytes(leanest.budget)}: "
            f"{worst.name} needs {show_bytes(worst.peak)} x {leanest.safety} at the least ({COUNTED_BYTES}). "
            f"What would fit: budget {enough}"
        )


class Planner:
    """Chooses mode, tile batch, guidance split, VAE band and offload so that images of one model fit a budget.

    Args:
        predictor: of the model and the device; on a CPU nothing is offloaded.
        budget: bytes of tensors on the device.
        images: images per call.
        branches: 2 with classifier-free guidance, 1 without. Default: as the pipeline does.
        offload: each module is on the device only while it runs. Default: only if needed.
    """

    def __init__(
        self,
        predictor: Predictor,
        budget: int,
        images: int = 1,
        branches: int | None = None,
        offload: bool | None = None,
    ) -> None:
        self.predictor, self.budget, self.images = predictor, budget, images
        self.branches = branches or predictor.model.branches
        on_cpu = predictor.device == "cpu"
        self.offloads = (False,) if on_cpu else (False, True) if offload is None else (offload,)

    def plan(self, size: Pair, tiling: TilingConfig | None = None, execution: Execution | None = None) -> Plan:
        """The first plan that fits.

        Order: the mode that was measured best for the kind of network (for transformers canvas mode, for UNets moving
        tiles, see docs/benchmarks.md), then no offload, then large batches.

        Args:
            size: (width, height) of the image, px.
            tiling: kept as it is. Default: both modes are tried.
            execution: its tile batch is the largest that is tried.

        Raises:
            DoesNotFit: no plan fits; the message names the smallest budget that would.
            ValueError: the size is not valid.
        """
        unit = self.predictor.unit
        if any(n < 1 or n % unit for n in size):
            raise ValueError(f"size={size[0]}x{size[1]}: both sides must be multiples of {unit} px")
        execution = execution or Execution()
        plans = []
        for found in self._candidates(size, self._ways(tiling, execution)):
            if found.fits:
                return found
            plans.append(found)
        raise DoesNotFit(min(plans, key=lambda found: (found.peak, sum(phase.peak for phase in found.phases))))

    def _ways(self, tiling: TilingConfig | None, execution: Execution) -> list[list[Way]]:
        """Per mode, the ways to process the canvas, from the fastest to the one with the least memory."""
        if tiling is None:
            first = (CANVAS, MOVING) if self.predictor.model.network.role == "transformer" else (MOVING, CANVAS)
            return [ways for each in first for ways in self._ways(each, execution)]
        if tiling.mode == "canvas":
            splits = execution.guidance_batch and self.images * self.branches > 1
            split = [(tiling, replace(execution, guidance_batch=False))] if splits else []
            return [[(tiling, execution), *split]]
        batch, ways = execution.tile_batch, []
        while batch >= 1:
            ways.append((tiling, replace(execution, tile_batch=batch)))
            batch //= 2
        return [ways]

    def _candidates(self, size: Pair, modes: list[list[Way]]) -> Iterator[Plan]:
        for ways in modes:
            for offload in self.offloads:
                for way in ways:
                    yield self._assemble(size, way, offload)

    def _assemble(self, size: Pair, way: Way, offload: bool) -> Plan:
        predictor, model = self.predictor, self.predictor.model
        weights = {part.role: predictor.weights(part.role) for part in model.parts}
        resident = sum(weights.values())

        def beside(role: str) -> int:
            return weights[role] if offload else resident

        texts = predictor.text(self.images)
        canvas, room = (size[1] // model.factor, size[0] // model.factor), None
        evaluation = predictor.evaluation(canvas, *way, self.images, self.branches)
        others = (0 if offload else resident - weights["vae"]) + evaluation.kept
        decode = predictor.decode(canvas, self.images, None)
        if (decode.peak + others) * SAFETY > self.budget:
            room = max(1, int(self.budget / SAFETY) - others - decode.base)
            decode = predictor.decode(canvas, self.images, room)
        network = model.network.role
        phases = [
            Phase("network", beside(network) + evaluation.peak, evaluation.flops, _choice(*way)),
            Phase("decode", decode.peak + others, decode.flops, _bands(decode.band)),
        ]
        if texts:
            peak = max(beside(role) + activations for role, (activations, _) in texts.items())
            choice = "one at a time on the device" if offload else "stay on the device"
            flops = sum(one for _, one in texts.values()) * self.branches
            phases.insert(0, Phase("text encoders", peak, flops, choice))
        return Plan(
            model=model.name,
            size=size,
            budget=self.budget,
            device=predictor.device,
            dtype=str(model.network.dtype).removeprefix("torch."),
            tiling=way[0],
            execution=way[1],
            offload=offload,
            vae_band=decode.band,
            vae_room=room,
            tiles=evaluation.tiles,
            area_factor=evaluation.area_factor,
            phases=tuple(phases),
        )


def _bands(band: int | None) -> str:
    return "whole image" if band is None else f"exact VAE bands of {band} px"


def _choice(tiling: TilingConfig, execution: Execution) -> str:
    if tiling.mode == "canvas":
        return "canvas, guidance " + ("together" if execution.guidance_batch else "one branch at a time")
    return f"tiles, {execution.tile_batch} at a time"
