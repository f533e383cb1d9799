"""Time and memory of a whole generation against the canvas' area, on the embedded model.

    python -m bench.scaling [--sizes 512 1024 2048 4096 8192] [--steps 2] [--json bench/results/scaling_earth.json]

Each size runs in a process of its own, so that its peak is its own; a size that was measured is kept in ``--work`` and
not run again. Time is that of the call, decoding included, without starting Python and loading weights. Memory is the
largest resident set of the process (CUDA: the largest allocation), and what that is above the process before its call.
The exponents are the slopes of straight lines through the logarithms: 1 is linear in the area.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import timing

SIZES = (512, 1024, 2048, 4096, 8192)
WAYS: dict[str, dict[str, Any]] = {
    "ramp": {},
    "shift": {"shift": True},
    "canvas": {"mode": "canvas"},
}


def measure(size: int, way: str, steps: int, device: str) -> dict[str, Any]:
    """One generation in this process: seconds, peak and growth in bytes."""
    from tiledcore import TiledPipeline, TilingConfig
    from tiledcore.models import call_defaults

    pipe = TiledPipeline.from_pretrained("earth", tiling=TilingConfig(**WAYS[way])).to(device)
    pipe.set_progress_bar_config(disable=True)
    call = call_defaults("earth") | {"num_inference_steps": steps, "output_type": "np"}
    generator = torch.Generator().manual_seed(0)
    prompt = "relief map of a rugged coast"
    pipe(prompt, height=256, width=256, **call)  # what is set up once belongs to no size
    seconds = 0.0

    def run() -> None:
        nonlocal seconds
        begin = time.perf_counter()
        pipe(prompt, height=size, width=size, generator=generator, **call)
        seconds = time.perf_counter() - begin

    growth = timing.peak_growth(run, torch.device(device))
    return {"size": size, "way": way, "steps": steps, "seconds": seconds, "growth_bytes": growth} | peak(device)


def peak(device: str) -> dict[str, int]:
    if device.startswith("cuda"):
        return {"peak_bytes": torch.cuda.max_memory_allocated()}
    lines = Path("/proc/self/status").read_text().splitlines()
    return {"peak_bytes": next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))}


def elsewhere(size: int, args: argparse.Namespace) -> dict[str, Any]:
    """:func:`measure` in a process of its own, or what is kept of it."""
    path = args.work / f"{args.way} {size} {args.steps} steps {args.device} {args.threads or 'default'} threads.json"
    if not path.exists():
        command = [sys.executable, "-m", "bench.scaling", "--one", str(size), "--way", args.way]
        command += ["--steps", str(args.steps), "--device", args.device]
        command += ["--threads", str(args.threads)] if args.threads else []
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(command, capture_output=True, text=True, cwd=root)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            return {"size": size, "way": args.way, "not_run": reason[0]}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(done.stdout.splitlines()[-1])
        path.with_suffix(".tmp").rename(path)
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def fits(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The power of the area that each column grows by; of two sizes or more."""
    ran = [row for row in rows if "seconds" in row]
    if len(ran) < 2:
        return {}
    areas = [float(row["size"]) ** 2 for row in ran]
    columns = ("seconds", "growth_bytes", "peak_bytes")
    return {column: timing.exponent(areas, [max(1e-9, row[column]) for row in ran]) for column in columns}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| size | s | s / megapixel | peak MB | growth MB |", "|---|---|---|---|---|"]
    for row in rows:
        if "seconds" not in row:
            lines.append(f"| {row['size']}² | not run: {row['not_run']} | | | |")
            continue
        each = row["seconds"] / (row["size"] ** 2 / 1e6)
        lines.append(
            f"| {row['size']}² | {row['seconds']:.1f} | {each:.2f} | {row['peak_bytes'] / 1e6:.0f} "
            f"| {row['growth_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="px")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, default="ramp")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--work", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # what the other processes are started with
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(measure(args.one, args.way, args.steps, args.device)))
        return
    rows = []
    for size in args.sizes:
        rows.append(elsewhere(size, args))
        print(rows[-1], flush=True)
    powers = fits(rows)
    print(f"{args.way}, {args.steps} steps\n{table(rows)}")
    print("fitted powers of the area: " + ", ".join(f"{name} {power:.2f}" for name, power in powers.items()))
    if args.json:
        about = {"way": args.way, "steps": args.steps, "fitted_powers_of_the_area": powers}
        machine = timing.machine(torch.device(args.device))
        args.json.write_text(json.dumps({"machine": machine, "about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
