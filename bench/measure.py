"""Time, memory and machine: what every benchmark measures and writes down.

Times come from ``torch.utils.benchmark`` on a CPU, and on a GPU from ``triton.testing.do_bench``, which clears the L2
cache before each call.
"""

import ctypes
import json
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

Run = Callable[[], Any]
LONG = 0.05
"""Seconds. A longer call is timed as on a CPU, since ``do_bench`` makes eight calls or more."""


def interleaved(runs: Mapping[str, Run], device: torch.device, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Time all providers in turns, so that a machine that slows down is slower for all of them.

    ``seconds`` is for all providers and rounds together, about; a long call is made at least once a round.

    Returns:
        Provider -> one sample a round, in seconds: the median of the calls in that round.
    """
    share = seconds / rounds / max(len(runs), 1)
    turns = [{name: median_seconds(run, device, share) for name, run in runs.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in runs}


def median_seconds(run: Run, device: torch.device, seconds: float) -> float:
    """Median time of one call, over about ``seconds`` of calls."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    if device.type == "cuda" and timer.blocked_autorange(min_run_time=1e-3).median < LONG:
        from triton.testing import do_bench

        return float(do_bench(run, warmup=200 * seconds, rep=1000 * seconds, return_mode="median")) / 1e3
    return float(timer.blocked_autorange(min_run_time=seconds).median)


def ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> dict[str, float]:
    """What the device reaches at most, measured now: bytes per second of a copy, FLOP per second of a matrix product.

    The copy is much larger than any cache.
    """
    big = device.type == "cuda"
    source = torch.empty(1 << 30 if big else 1 << 27, dtype=torch.uint8, device=device)
    target, side = torch.empty_like(source), 8192 if big else 1024
    square = torch.randn(side, side, device=device).to(dtype)
    runs: dict[str, Run] = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(square, square)}
    best = {name: min(times) for name, times in interleaved(runs, device, seconds, rounds=5).items()}
    return {
        "copy_bytes_per_second": 2 * source.nbytes / best["copy"],
        "matmul_flops_per_second": 2 * side**3 / best["matmul"],
    }


def peak_growth(run: Run, device: torch.device) -> tuple[int, Any]:
    """Bytes by which memory grows at most while ``run`` runs, and its result. On a CPU this needs Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result

    def high_water() -> int:
        return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) << 10

    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed earlier would hide growth
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again at what is resident now
    before = high_water()
    result = run()
    return high_water() - before, result


def machine(device: torch.device) -> dict[str, str]:
    """Device and versions, without which figures cannot be compared."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        about = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
        models = [*re.findall(r"model name\s*: (.*\S)", about), platform.processor()]
        name = f"{models[0]}, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def save(path: Path | None, device: torch.device, **data: Any) -> None:
    """Write the machine and ``data`` as JSON, if there is a path."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(device)} | data, indent=1) + "\n")


def markdown(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])
