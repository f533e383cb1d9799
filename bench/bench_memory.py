"""Predicted peaks against the CPU allocator's: ``python -m bench.bench_memory [--size 512] [--json FILE]``.

The measurement shares nothing with the prediction: torch's profiler records every allocation and release of the
CPU allocator, and the peak is that of their running sum at the end of operations, plus the weights. Between an
operation's begin and end there is more: oneDNN's convolutions pad few channels to sixteen, which is a workspace of that
kernel, not a tensor.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tiledcore import TiledPipeline, TilingConfig
from tiledcore.memory.prediction import show_bytes
from tiledcore.utils import LABELS, PREFIX

Call = dict[str, Any]
MARKS = {PREFIX + name for name in LABELS}  # around operations, but none


def allocated(pipe: Callable[..., Any], call: Call) -> int:
    """Peak bytes of tensors on the CPU during ``pipe("a coast", **call)``, the pipeline's weights included."""
    parts = getattr(pipe, "components").values()  # noqa: B009 - of a TiledPipeline, which passes it on
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
        # Operations that are not inside of another one: what a kernel frees again before it returns is its workspace.
        if event.name() == "[memory]" or event.name() in MARKS or event.start_ns() < outer:
            continue
        outer = event.start_ns() + event.duration_ns()
        while done < len(changes) and changes[done].start_ns() <= outer:
            now += changes[done].nbytes()
            done += 1
        peak = max(peak, now)
    return weights + peak


def rows(size: int) -> list[dict[str, Any]]:
    """One row for each way over the canvas of the embedded model."""
    found: list[dict[str, Any]] = []
    for name, tiling, budget in (
        ("tiles, 4 at a time", TilingConfig(), "8GiB"),
        ("tiles, 1 at a time", TilingConfig(tile_batch=1), "8GiB"),
        ("canvas", TilingConfig(mode="canvas"), "8GiB"),
        ("canvas, guidance split", TilingConfig(mode="canvas", guidance_batch=False), "8GiB"),
    ):
        for output in ("latent", "pt"):
            pipe = TiledPipeline.from_pretrained(tiling=tiling, memory_budget=budget)
            pipe.set_progress_bar_config(disable=True)
            call: Call = {"height": size, "width": size, "num_inference_steps": 2, "output_type": output}
            real = allocated(pipe, call)
            assert pipe.report is not None and pipe.report.plan is not None
            phases = pipe.report.plan.phases
            predicted = max(p.peak for p in phases if output == "pt" or p.name != "decode")
            until = "network" if output == "latent" else "image"
            found.append(dict(way=name, until=until, predicted=predicted, allocated=real, ratio=predicted / real))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    table = rows(args.size)
    print(f"earth, {args.size}x{args.size}, fp32, 2 steps with guidance")
    print(f"{'way':<24}{'until':<10}{'predicted':>12}{'allocated':>12}{'ratio':>8}")
    for row in table:
        print(
            f"{row['way']:<24}{row['until']:<10}{show_bytes(row['predicted']):>12}"
            f"{show_bytes(row['allocated']):>12}{row['ratio']:>8.3f}"
        )
    if args.json:
        args.json.write_text(json.dumps({"size": args.size, "rows": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
