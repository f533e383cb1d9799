"""Plan an image so that it fits a memory budget: tiles or whole canvas, batch sizes, VAE bands, offload.

``TiledPipeline(memory_budget=...)`` plans each call, runs it as planned and measures its peak.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch

from tiledcore._diffusers import device_of, is_offloaded, offload_state
from tiledcore.config import Execution, TilingConfig
from tiledcore.geometry import Pair, both
from tiledcore.loop.engine import Report
from tiledcore.loop.graph import Counters
from tiledcore.memory.architectures import architecture
from tiledcore.memory.prediction import Phase, Predictor, parse_bytes, show_bytes
from tiledcore.utils import replaced
from tiledcore.vae.live_bytes import LiveBytes

logger = logging.getLogger(__name__)

SAFETY = 1.1
"""A predicted peak times this must fit: fragmentation, kernel workspaces and the CUDA context are not predicted."""
COUNTED_BYTES = "tensors on the device are counted, not the whole process"


@dataclass(frozen=True)
class Plan:
    """How to make an image within a budget, and its predicted memory."""

    model: str
    size: Pair  # (width, height) of the image, px
    budget: int
    device: str
    dtype: str
    tiling: TilingConfig
    execution: Execution
    offload: bool  # each module is on the device only while it runs (``enable_model_cpu_offload``)
    vae_band: int | None  # rows of the image that are decoded at a time; None: all
    vae_room: int | None  # with bands: bytes for them, without weights, latents and the image
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
        branches: 2 with classifier-free guidance, 1 without; 0: as the pipeline does.
        offload: each module is on the device only while it runs. Default: only if needed.
    """

    def __init__(
        self, predictor: Predictor, budget: int, images: int = 1, branches: int = 0, offload: bool | None = None
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
        plans = []
        for way in self._ways(tiling, execution or Execution()):
            plans.append(self._assemble(size, *way))
            if plans[-1].fits:
                return plans[-1]
        raise DoesNotFit(min(plans, key=lambda found: (found.peak, sum(phase.peak for phase in found.phases))))

    def _ways(
        self, tiling: TilingConfig | None, execution: Execution
    ) -> Iterator[tuple[TilingConfig, Execution, bool]]:
        """Ways to make the image, with or without offload; per mode from the fastest to the least memory."""
        if tiling is None:
            modes = (TilingConfig(motion="moving"), TilingConfig(mode="canvas"))
            for mode in modes[::-1] if self.predictor.model.network.role == "transformer" else modes:
                yield from self._ways(mode, execution)
            return
        batches = [execution]
        if tiling.mode == "canvas":
            if execution.guidance_batch and self.images * self.branches > 1:
                batches.append(replace(execution, guidance_batch=False))
        else:
            while batches[-1].tile_batch > 1:
                batches.append(replace(execution, tile_batch=batches[-1].tile_batch // 2))
        for offload in self.offloads:
            for batch in batches:
                yield tiling, batch, offload

    def _assemble(self, size: Pair, tiling: TilingConfig, execution: Execution, offload: bool) -> Plan:
        predictor, model = self.predictor, self.predictor.model
        weights = {part.role: predictor.weights(part.role) for part in model.parts}
        resident = sum(weights.values())

        def beside(role: str) -> int:
            return weights[role] if offload else resident

        texts = predictor.text(self.images)
        canvas, room = (size[1] // model.factor, size[0] // model.factor), None
        evaluation = predictor.evaluation(canvas, tiling, execution, self.images, self.branches)
        others = beside("vae") - weights["vae"] + evaluation.kept
        decode = predictor.decode(canvas, self.images, None)
        if (decode.peak + others) * SAFETY > self.budget:
            room = max(1, int(self.budget / SAFETY) - others - decode.base)
            decode = predictor.decode(canvas, self.images, room)
        if tiling.mode == "canvas":
            choice = "canvas, guidance " + ("together" if execution.guidance_batch else "one branch at a time")
        else:
            choice = f"tiles, {execution.tile_batch} at a time"
        bands = "whole image" if decode.band is None else f"exact VAE bands of {decode.band} px"
        phases = [
            Phase("network", beside(model.network.role) + evaluation.peak, evaluation.flops, choice),
            Phase("decode", decode.peak + others, decode.flops, bands),
        ]
        if texts:
            peak = max(beside(role) + activations for role, (activations, _) in texts.items())
            flops = sum(one for _, one in texts.values()) * self.branches
            where = "one at a time on the device" if offload else "stay on the device"
            phases.insert(0, Phase("text encoders", peak, flops, where))
        return Plan(
            model=model.name,
            size=size,
            budget=self.budget,
            device=predictor.device,
            dtype=str(model.network.dtype).removeprefix("torch."),
            tiling=tiling,
            execution=execution,
            offload=offload,
            vae_band=decode.band,
            vae_room=room,
            tiles=evaluation.tiles,
            area_factor=evaluation.area_factor,
            phases=tuple(phases),
        )


class Budget:
    """Plans the calls of one pipeline within ``limit``, a size for :func:`parse_bytes`; predictions are cached."""

    def __init__(self, limit: int | str) -> None:
        self.limit = parse_bytes(limit)
        self._predictor: Predictor | None = None

    def plan(
        self, pipe: Any, arguments: dict[str, Any], size: Pair | None, tiling: TilingConfig | None, execution: Execution
    ) -> Plan:
        """The plan of ``pipe(**arguments)``; errors: :meth:`Planner.plan`.

        ``size`` is (height, width) of the image in px; None: by the arguments, or the model's own.
        """
        bound = signature(type(pipe).__call__).bind_partial(pipe, **arguments)
        bound.apply_defaults()
        call = bound.arguments
        model, device = architecture(pipe), device_of(pipe).type
        if self._predictor is None or (self._predictor.model, self._predictor.device) != (model, device):
            self._predictor = Predictor(model, device)
        guided = model.branches == 2 and (call.get("guidance_scale") or 0) > 1
        offload = True if _offloaded(pipe) else None
        planner = Planner(self._predictor, self.limit, _images(call), 1 + guided, offload)
        tall, wide = (side * pipe.vae_scale_factor for side in both(model.native))
        height, width = size or (call.get("height") or tall, call.get("width") or wide)
        return planner.plan((width, height), tiling, execution)

    def keeps_off(self, pipe: Any, *args: Any, **kwargs: Any) -> bool:
        """Called before ``pipe.to(...)``: if the weights exceed the budget, enable offload and return True.

        Offload stays enabled until ``pipe.remove_all_hooks()``.
        """
        device = kwargs.get("device", next((a for a in args if isinstance(a, str | torch.device)), None))
        if device is None or torch.device(device).type != "cuda":
            return False
        weights = sum(part.weight_bytes or 0 for part in architecture(pipe).parts)
        if weights * SAFETY <= self.limit:
            return False
        logger.info("%s of weights: each module is on the device only while it runs", show_bytes(weights))
        pipe.enable_model_cpu_offload(device=device)
        return True


def _offloaded(pipe: Any) -> bool:
    return any(is_offloaded(module) for module in pipe.components.values())


def _modules(pipe: Any) -> list[Any]:
    return [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]


def _images(call: dict[str, Any]) -> int:
    prompts, embeds = call.get("prompt"), call.get("prompt_embeds")
    count = len(prompts) if isinstance(prompts, list) else 1 if embeds is None else len(embeds)
    return int(count * (call.get("num_images_per_prompt") or 1))


@contextmanager
def within(wrapper: Any, pipe: Any, plan: Plan | None) -> Iterator[None]:
    """Run a call as planned; the report then has the plan and the measured peak. None: only run it.

    Offload that the plan needs is on for this call only; afterwards ``pipe`` is as before, also after an error.
    """
    if plan is None:
        yield
        return
    sizes = show_bytes(plan.peak), show_bytes(plan.budget)
    logger.info("%s predicted, %s allowed (%s): %s", *sizes, COUNTED_BYTES, plan.summary)
    cuda = device_of(pipe).type == "cuda"
    with ExitStack() as stack:
        if plan.offload and not _offloaded(pipe):
            stack.enter_context(_offload(pipe))
        if cuda:
            torch.cuda.reset_peak_memory_stats(device_of(pipe))
        else:  # counted, some microseconds per operation; a compiled network runs uncompiled
            live = stack.enter_context(LiveBytes(_modules(pipe)))
        yield
    wrapper.report = wrapper.report or Report(False, "fused=False", 0, Counters())
    wrapper.report.plan = plan
    wrapper.report.measured_bytes = torch.cuda.max_memory_allocated(device_of(pipe)) if cuda else live.peak


@contextmanager
def _offload(pipe: Any) -> Iterator[None]:
    """Model CPU offload inside the ``with`` block; afterwards hooks, devices and attributes are as before."""
    modules = _modules(pipe)
    places = [module.device for module in modules]
    with ExitStack() as stack:
        stack.enter_context(replaced(pipe, **offload_state(pipe)))
        for module in modules:  # accelerate leaves its own forward behind
            stack.enter_context(replaced(module, forward=module.forward))
        try:
            pipe.enable_model_cpu_offload(device=device_of(pipe))
            yield
        finally:
            pipe.remove_all_hooks()
            for module, device in zip(modules, places, strict=True):
                if module.device != device:  # quantised modules never moved
                    module.to(device)
