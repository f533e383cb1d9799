"""Several processes that make one image: measured on this machine, and simulated for GPUs from counts.

    python -m bench.ranks [--size 1024] [--counts 1 2] [--rounds 3] [--json FILE]
    python -m bench.ranks --simulate

Measured: the embedded UNet on a CPU, processes of one thread, in turns; medians. In the first call every process
prepares its convolutions, which ranks cannot share. "loop" is from the first call of the network to the decode. More
processes than cores say only whether the picture is the same.

Simulated: a step is the counted FLOPs of the slowest GPU's tiles, then the counted bytes over one link, then the fused
step, which each GPU makes for the whole canvas. Time is taken as proportional to a tile's area.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import measure
from tiledcore import Execution, TiledPipeline, TilingConfig
from tiledcore.memory.architectures import architecture
from tiledcore.memory.prediction import Predictor
from tiledcore.models import call_defaults
from tiledcore.parallel.forecast import forecast_for
from tiledcore.parallel.ranks import joined

# An H100 SXM: dense bf16 and the share of it that such networks reach; memory; links as they are reached, one way.
FLOPS, REACHED, MEMORY = 989e12, 0.45, 3.35e12
LINKS = {"NVLink": 350e9, "PCIe 5": 45e9}
MESSAGE = 50e-6  # seconds until a message of a GPU is at the others, beside its bytes
STEP_BYTES = 12  # per element of the canvas that the fused step moves, in canvases of float32
GPUS = (1, 2, 4, 8, 16, 32, 64)


def worker(size: int) -> None:
    """One process: make the picture twice, and print what rank 0 measured."""
    torch.set_num_threads(1)
    with nullcontext(None) if "RANK" not in os.environ else joined("cpu") as ranks:
        pipe = TiledPipeline.from_pretrained("earth")
        pipe.set_progress_bar_config(disable=True)
        marks: list[float] = []
        pipe.unet.register_forward_pre_hook(lambda *_: marks.append(time.perf_counter()))
        pipe.vae.decoder.register_forward_pre_hook(lambda *_: marks.append(time.perf_counter()))
        call: dict[str, Any] = {"height": size, "width": size, **call_defaults("earth")}
        row: dict[str, Any] = {}
        for name in ("first call", "call"):
            if ranks is not None:
                ranks.all(None)  # all are here
            marks.clear()
            began = time.perf_counter()
            image = pipe("relief map of mountains", generator=torch.Generator().manual_seed(0), **call).images[0]
            row |= {name: time.perf_counter() - began, "loop": marks[-1] - marks[0]}
        if pipe.report is not None and (times := pipe.report.ranks) is not None:
            row |= {"received": times.bytes_per_step, "waiting": times.waiting}
        if ranks is None or ranks.leads:
            print(json.dumps(row | {"sha256": hashlib.sha256(image.tobytes()).hexdigest()}))


def command(count: int, size: int) -> dict[str, Any]:
    """Run ``count`` processes; what rank 0 measured."""
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"] if count > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-m", *launch, "bench.ranks", "--worker", f"--size={size}"]
    out = subprocess.run(run, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(out.splitlines()[-1]))


def measured(counts: Sequence[int], size: int, rounds: int) -> list[dict[str, Any]]:
    turns = [[command(count, size) for count in counts] for _ in range(rounds)]
    rows: list[dict[str, Any]] = []
    for count, *found in zip(counts, *turns, strict=True):
        same = {one["sha256"] for one in found} == {turn[0]["sha256"] for turn in turns}
        row: dict[str, Any] = {"ranks": count, "same": same}
        for name in ("loop", "call", "first call"):
            row[name] = median(one[name] for one in found)
            row[f"{name} x"] = rows[0][name] / row[name] if rows else 1.0
        row |= {name: median(one.get(name, 0) for one in found) for name in ("received", "waiting")}
        rows.append(row)
    return rows


def simulated() -> list[dict[str, Any]]:
    """Seconds of one step, mean over 30, at the best tile batch of 4, 2 and 1."""
    rows = []
    for name in ("sdxl", "flux"):
        predictor = Predictor(architecture(name, torch.bfloat16), "cuda")
        model, moving = predictor.model, TilingConfig(motion="moving")
        side = model.native if isinstance(model.native, int) else model.native[0]
        tile_flops = predictor.evaluation((side, side), TilingConfig(), Execution(), 1, model.branches).flops
        for size in (4096, 8192, 16384):
            latent = size // model.factor
            canvas = (4 if name == "sdxl" else 16) * latent**2 * 4  # bytes of float32
            for gpus in GPUS:
                given = ((size, size), model.branches, gpus)
                ways = [forecast_for(predictor, moving, Execution(n), *given) for n in (4, 2, 1)]
                best = max(ways, key=lambda way: way.speedup)
                flops = tile_flops * best.area_factor * (latent / side) ** 2
                alone = flops / (FLOPS * REACHED)
                row = {"model": name, "size": size, "gpus": gpus, "TFLOP": flops / 1e12, "received": best.received}
                for link, speed in LINKS.items():
                    sent = best.received / speed + (gpus > 1) * gpus * MESSAGE
                    seconds = alone / best.speedup + sent + STEP_BYTES * canvas / MEMORY
                    row |= {link: seconds, f"{link} x": (alone + STEP_BYTES * canvas / MEMORY) / seconds}
                rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Bytes in MiB, shares in percent, the rest as it is."""
    shown = {"received": lambda v: f"{v / 2**20:.2f} MiB", "waiting": lambda v: f"{v:.0%}"}

    def cell(key: str, value: Any) -> str:
        return shown[key](value) if key in shown else f"{value:.3g}" if isinstance(value, float) else str(value)

    return measure.markdown([*rows[0]], ([cell(*item) for item in row.items()] for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="px")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.worker:
        return worker(args.size)
    if args.simulate:
        rows = simulated()
        about = {"flops": FLOPS, "reached": REACHED, "memory": MEMORY, "message": MESSAGE, "links": LINKS}
    else:
        rows = measured(args.counts, args.size, args.rounds)
        about = {"size": args.size, "rounds": args.rounds}
    print(", ".join(f"{name}: {value}" for name, value in about.items()), table(rows), sep="\n")
    measure.save(args.json, torch.device("cpu"), about=about, rows=rows)


if __name__ == "__main__":
    main()
