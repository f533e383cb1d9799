"""Interleaved timing: what a kernel benchmark needs, and nothing more."""

import argparse
import ctypes
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

SHORTEST = 1e-3
"""Seconds that one sample lasts at least on a CPU: a shorter call is repeated within it."""
SMALL = 100e-6
"""Seconds below which a GPU call is replayed as a graph, lest its launch is what is timed."""
L2_TIMES = 3
"""Rotated buffers are together this many times the L2 cache, so that no call finds its input there."""


def interleaved(candidates: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each candidate, see :func:`samples`."""
    return {name: statistics.median(values) for name, values in samples(candidates, device, rounds).items()}


def samples(
    candidates: dict[str, Callable[[], Any]],
    device: torch.device,
    rounds: int,
    calls: dict[str, int] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round.

    The candidates take turns, so that a machine that slows down slows all of them down. Each turn has an
    untimed run first: what the candidate before it left in the caches and the allocator is not its fault.

    Args:
        candidates: what to time.
        device: CUDA is timed by events.
        rounds: turns of each candidate.
        calls: how many calls of the op a candidate stands for, or makes one after the other in a turn; 1 where missing.
    """
    for run in candidates.values():  # compile
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            run()
            count = (calls or {}).get(name, 1)
            if device.type == "cuda":
                begin = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                begin.record()
                run()
                end.record()
                end.synchronize()
                seconds[name].append(begin.elapsed_time(end) / 1e3 / count)
            else:
                start = time.perf_counter()
                for _ in range(count):
                    run()
                seconds[name].append((time.perf_counter() - start) / count)
    return seconds


def repeats(run: Callable[[], Any]) -> int:
    """Calls that make up a CPU sample of at least :data:`SHORTEST` seconds."""
    run()
    start = time.perf_counter()
    run()
    return max(1, min(1000, math.ceil(SHORTEST / max(time.perf_counter() - start, 1e-9))))


def copies(moved: int, device: torch.device) -> int:
    """How many sets of buffers a call that moves so many bytes needs to be rotated through; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, 1 + L2_TIMES * cache // max(moved, 1))


def rotation(runs: list[Callable[[], Any]], device: torch.device) -> tuple[Callable[[], Any], str]:
    """One candidate that calls all of ``runs``, each on buffers of its own, and how: ``graph`` or ``eager``.

    Replayed as one CUDA graph where a call is small and can be captured.
    """

    def eager() -> None:
        for run in runs:
            run()

    if device.type != "cuda":
        return eager, "eager"
    eager()
    if statistics.median(samples({"": eager}, device, 3, {"": len(runs)})[""]) > SMALL:
        return eager, "eager"
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            eager()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            eager()
    except RuntimeError:  # it waits for the device, as a loop over offsets that are there does
        torch.cuda.synchronize()
        return eager, "eager"
    return graph.replay, "graph"


def ceilings(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> dict[str, float]:
    """What the device can do at most, measured now: bytes per second of a copy, FLOP/s of a matrix product.

    The copy is far larger than any cache. A single precision product runs as torch is set up to run it.
    """
    big = device.type == "cuda"
    source = torch.empty((1 << 30 if big else 1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if big else 1024
    square = torch.randn(side, side, device=device).to(dtype)
    runs = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(square, square)}
    best = {name: min(values) for name, values in samples(runs, device, rounds).items()}
    return {
        "copy_bytes_per_second": 2 * source.nbytes / best["copy"],
        "matmul_flops_per_second": 2 * side**3 / best["matmul"],
    }


def clocks(device: torch.device) -> str | None:
    """The clock now, where it can be read."""
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv,noheader"]
        try:
            found = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return None
        return "SM, memory, power, temperature: " + found.strip().splitlines()[device.index or 0]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    mhz = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return f"{min(mhz):.0f} to {max(mhz):.0f} MHz" if mhz else None


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
