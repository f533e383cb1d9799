"""The ``profile`` command: one run of ``generate`` under torch.profiler, and where its time went."""

from __future__ import annotations

import argparse
from typing import Any

from tiledcore.cli.generate import call_arguments, open_pipeline, quiet, say
from tiledcore.cli.request import CommandError, check

# Nested in the network, so that they do not add to the total.
INSIDE = ("attention",)


def profile(args: argparse.Namespace) -> None:
    image = check(args)
    if args.trace is not None and not args.trace.parent.is_dir():
        raise CommandError(f"--trace {args.trace}: there is no folder {args.trace.parent}")
    import torch
    from torch.profiler import ProfilerActivity

    seed = 0 if args.seed is None else args.seed
    with quiet():
        pipe = open_pipeline(args, seed)
        call = call_arguments(args, pipe, image)
        on_cuda = torch.device(args.device).type == "cuda"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_cuda else [])
        with torch.profiler.profile(activities=activities) as profiler:
            pipe(**call, generator=torch.Generator().manual_seed(seed))
    print(table(profiler.key_averages(), on_cuda))
    if args.trace is not None:
        part = args.trace.with_name(args.trace.name + ".part")
        try:
            profiler.export_chrome_trace(str(part))
            part.replace(args.trace)
        except OSError as error:
            raise CommandError(f"{args.trace} was not written: {error.strerror or error}") from error
        finally:
            part.unlink(missing_ok=True)
        say(f"{args.trace}: open it at chrome://tracing or ui.perfetto.dev")


def table(events: Any, on_cuda: bool) -> str:
    """Time of each labelled part, and what share the engine and the network have.

    Args:
        events: ``torch.profiler.profile(...).key_averages()``.
        on_cuda: read the device's time and not the host's.
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
    loop = {name: value for name, value in seconds.items() if name not in (*INSIDE, "decode")}
    engine = sum(loop.values()) - loop.get("network", 0.0)
    lines.append(
        f"of the loop: network {1 - engine / sum(loop.values()):.1%}, engine {engine / sum(loop.values()):.1%}"
    )
    return "\n".join(lines)
