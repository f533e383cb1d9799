"""Peak memory of a pipeline's call as torch's profiler saw it."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tiledcore.utils import LABELS, PREFIX

Call = dict[str, Any]
MARKS = {PREFIX + name for name in LABELS}  # around operations, but none


def allocated(pipe: Callable[..., Any], call: Call) -> int:
    """Peak bytes of tensors on the CPU during ``pipe("a coast", **call)``, the pipeline's weights included.

    This shares nothing with the prediction: torch's profiler records every allocation and release. The peak is that of
    their running sum at the end of operations, plus the weights. Within an operation there can be more: oneDNN's
    convolutions pad few channels to sixteen, which is a workspace of that kernel and not a tensor.
    """
    parts = getattr(pipe, "components").values()  # noqa: B009 - a TiledPipeline passes it on
    weights = sum(
        tensor.nbytes
        for module in parts
        if isinstance(module, torch.nn.Module)
        for tensor in (*module.parameters(), *module.buffers())
    )
    gc.collect()  # or what others left would be released meanwhile, and count as negative
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        pipe("a coast", **call)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    changes = [e for e in events if e.name() == "[memory]"]
    now = peak = done = outer = 0
    for event in events:
        # Only operations that are not inside another one: what a kernel frees before it returns is its workspace.
        if event.name() == "[memory]" or event.name() in MARKS or event.start_ns() < outer:
            continue
        outer = event.start_ns() + event.duration_ns()
        while done < len(changes) and changes[done].start_ns() <= outer:
            now += changes[done].nbytes()
            done += 1
        peak = max(peak, now)
    return weights + peak
