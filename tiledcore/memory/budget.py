"""``TiledPipeline(memory_budget=...)``: plan each call within a memory budget, run the plan, and measure its peak."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch

from tiledcore._diffusers import device_of, is_offloaded, offload_state
from tiledcore.config import Execution, TilingConfig
from tiledcore.geometry import Pair, both
from tiledcore.loop.graph import Counters
from tiledcore.loop.report import Report
from tiledcore.memory.architectures import architecture
from tiledcore.memory.planner import COUNTED_BYTES, SAFETY, Plan, Planner
from tiledcore.memory.prediction import Predictor, parse_bytes, show_bytes
from tiledcore.utils import replaced
from tiledcore.vae.live_bytes import LiveBytes

logger = logging.getLogger(__name__)


class Budget:
    """Plans the calls of one pipeline; predictions are cached.

    Args:
        limit: bytes of tensors on the device, see :func:`tiledcore.memory.prediction.parse_bytes`.

    Raises:
        ValueError: ``limit`` is not valid.
    """

    def __init__(self, limit: int | str) -> None:
        self.limit = parse_bytes(limit)
        self._predictor: Predictor | None = None

    def plan(
        self,
        pipe: Any,
        arguments: dict[str, Any],
        size: Pair | None,
        tiling: TilingConfig | None,
        execution: Execution,
    ) -> Plan:
        """The plan of ``pipe(**arguments)``; errors: :meth:`tiledcore.memory.planner.Planner.plan`.

        ``size`` is (height, width) of the image in px; None: by the arguments, or the model's own.
        """
        bound = signature(type(pipe).__call__).bind_partial(pipe, **arguments)
        bound.apply_defaults()
        call = bound.arguments
        model, device = architecture(pipe), device_of(pipe).type
        if self._predictor is None or (self._predictor.model, self._predictor.device) != (model, device):
            self._predictor = Predictor(model, device)
        guided = model.branches == 2 and (call.get("guidance_scale") or 0) > 1
        planner = Planner(
            self._predictor,
            self.limit,
            images=_images(call),
            branches=2 if guided else 1,
            offload=True if _offloaded(pipe) else None,
        )
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
    predicted, allowed = show_bytes(plan.peak), show_bytes(plan.budget)
    logger.info("%s predicted, %s allowed (%s): %s", predicted, allowed, COUNTED_BYTES, plan.summary)
    with ExitStack() as stack:
        if plan.offload and not _offloaded(pipe):
            stack.enter_context(_offload(pipe))
        peak = stack.enter_context(measured(pipe))
        yield
    wrapper.report = wrapper.report or Report(False, "fused=False", 0, Counters())
    wrapper.report.plan, wrapper.report.measured_bytes = plan, peak()


@contextmanager
def _offload(pipe: Any) -> Iterator[None]:
    """Model CPU offload inside the ``with`` block; afterwards hooks, devices and attributes are as before."""
    modules: list[Any] = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
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


@contextmanager
def measured(pipe: Any) -> Iterator[Callable[[], int]]:
    """The peak bytes of tensors on the pipeline's device, weights included, inside the ``with`` block.

    CUDA: from the allocator. CPU: counted, some microseconds per operation; a compiled network runs uncompiled.
    """
    device = device_of(pipe)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    modules = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
    with LiveBytes(modules) as live:
        yield lambda: live.peak
