"""Interleaved timing: what a kernel benchmark needs, and nothing more."""

import argparse
import ctypes
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def interleaved(candidates: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each candidate.

    The candidates take turns, so that a machine that slows down slows all of them down. Each turn has an
    untimed run first: what the candidate before it left in the caches and the allocator is not its fault.
    """
    for run in candidates.values():  # compile
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            run()
            if device.type == "cuda":
                begin = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                begin.record()
                run()
                end.record()
                end.synchronize()
                seconds[name].append(begin.elapsed_time(end) / 1e3)
            else:
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_growth(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes by which memory grows at its peak while ``run`` runs, its result included. On a CPU, Linux alone."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    def high_water() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

    ctypes.CDLL(None).malloc_trim(0)  # else the run may grow into what was freed before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts at what is resident now
    before = high_water()
    run()
    return high_water() - before


def exponent(areas: Sequence[float], values: Sequence[float]) -> float:
    """The power of the area that fits the values best: the slope between their logarithms."""
    return statistics.linear_regression([math.log(a) for a in areas], [math.log(v) for v in values]).slope


def machine(device: torch.device) -> dict[str, str]:
    """What a reader must know to compare: the device and the versions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every kernel benchmark has."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--dtype", default="float32", help="float16, bfloat16, float32 or float64")
    result.add_argument("--rounds", type=int, default=30, help="timed turns of each candidate")
    result.add_argument("--json", type=Path, help="also write the results there")
    return result


def report(case: str, seconds: dict[str, float], moved: dict[str, int], baseline: str) -> list[dict[str, Any]]:
    """Print one case as a table; return it as rows. ``moved`` has bytes; ``copy`` must be in it."""
    copy = moved["copy"] / seconds["copy"]
    print(f"\n{case}\n{'':14}{'median ms':>10}{'speed-up':>10}{'MB moved':>10}{'of copy':>9}")
    rows = []
    for name, value in seconds.items():
        share = moved[name] / value / copy
        speedup = seconds[baseline] / value
        print(f"{name:14}{value * 1e3:10.3f}{speedup:10.2f}{moved[name] / 1e6:10.2f}{share:9.0%}")
        rows.append(
            {"case": case, "name": name, "seconds": value, "speedup": speedup}
            | {"bytes": moved[name], "copy_bandwidth_share": share}
        )
    return rows


def save(path: Path | None, device: torch.device, rows: list[dict[str, Any]]) -> None:
    """Write the rows and the machine as JSON, where a path was given."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(device), "results": rows}, indent=2) + "\n")
