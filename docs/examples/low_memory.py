"""Little memory: the call is planned to fit, or refused before it runs, and the image is written row by row."""

import argparse
from collections.abc import Iterator

import numpy as np
import torch

from tiledcore import TiledPipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="earth", help="an embedded model, a folder, or a name on the hub")
parser.add_argument("--size", type=int, default=1024, help="of each side, in px")
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--budget", default="2GiB", help="of tensors on the device")
args = parser.parse_args()

pipe = TiledPipeline.from_pretrained(args.model, memory_budget=args.budget)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def write(bands: Iterator[np.ndarray]) -> None:
    """Take the rows from top to bottom, as arrays [rows, width, 3]; the whole image is never in memory."""
    with open("low_memory.ppm", "wb") as file:
        file.write(f"P6 {args.size} {args.size} 255\n".encode())
        for band in bands:
            file.write(band.tobytes())


pipe("relief map of islands", height=args.size, width=args.size, num_inference_steps=args.steps, rows=write)
print(pipe.report.plan.summary)
print(f"predicted {pipe.report.plan.needs / 2**20:.0f} MiB, measured {pipe.report.measured_bytes / 2**20:.0f} MiB")
