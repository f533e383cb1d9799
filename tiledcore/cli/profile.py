"""The ``profile`` command: run ``generate`` under torch.profiler and print where the time went."""

from __future__ import annotations

import argparse
from typing import Any

from tiledcore.cli.console import quiet, say
from tiledcore.cli.generate import call_arguments
from tiledcore.cli.opening import open_pipeline
from tiledcore.cli.request import check

# Parts of the network, which are not added to the total again.
INSIDE = ("attention",)


def profile(args: argparse.Namespace) -> None:
    image = check(args)
    say(f"loading {args.model}")
    quiet()
    import torch
    from torch.profiler import ProfilerActivity

    seed = 0 if args.seed is None else args.seed
    pipe = open_pipeline(args, seed)
    call = call_arguments(args, pipe, image)
    on_cuda = torch.device(args.device).type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_cuda else [])
    with torch.profiler.profile(activities=activities) as profiler:
        pipe(**call, generator=torch.Generator().manual_seed(seed))
    print(table(profiler.key_averages(), on_cuda))


def table(events: Any, on_cuda: bool) -> str:
    """Time of each labelled part as text, and the shares of the engine and the network.

    ``events`` is ``torch.profiler.profile(...).key_averages()``; ``on_cuda``: the time of the device.
    """
    from tiledcore.utils import LABELS, PREFIX

    found = {e.key.removeprefix(PREFIX): e for e in events if e.key.startswith(PREFIX)}
    seconds = {
        name: (found[name].device_time_total if on_cuda else found[name].cpu_time_total) / 1e6
        for name in LABELS
        if name in found
    }
    total = sum(value for name, value in seconds.items() if name not in INSIDE)
    lines = [f"{'part':<22}{'calls':>7}{'seconds':>10}{'share':>9}"]
    for name, value in seconds.items():
        shown = f"  of it, {name}" if name in INSIDE else name
        lines.append(f"{shown:<22}{found[name].count:>7}{value:>10.3f}{value / total:>9.1%}")
    loop = total - seconds.get("decode", 0.0)
    network = seconds.get("network", 0.0) / loop
    return "\n".join([*lines, f"of the loop: network {network:.1%}, engine {1 - network:.1%}"])
