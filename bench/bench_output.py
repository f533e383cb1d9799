"""``tiledcore generate`` in bounded memory: the peak of its process over an idle one, and what others read in its file.

``python -m bench.bench_output --size 16384x8192 --steps 2`` runs the command on the embedded model in a process of its
own, takes the high-water mark of that process' resident memory, and subtracts what a process holds that has only opened
the model. Then the file is read back, every level of its pyramid, by libtiff (Pillow) and libvips.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench import timing

IDLE = "from tiledcore import TiledPipeline\nkept = TiledPipeline.from_pretrained('earth')\n"
RUN = "import sys\nfrom tiledcore.cli.main import main\ncode = main(sys.argv[1:])\nif code: sys.exit(code)\n"
# The kernel's own figures, on the last line. A high-water mark of getrusage would not do: it outlives an exec.
REPORT = """
import gc; gc.collect()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(*(int(status[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM")))
"""
LEVELS_DIFFER = 1.0
"""Largest change of the mean between levels, of 255: each rounds half up, and repeats the pixels of an odd end."""


def resident(code: str, *arguments: str) -> tuple[int, int]:
    """Bytes that a Python process holds after ``code``, and the most that it held. Linux alone."""
    command = [sys.executable, "-c", f"{code}{REPORT}", *arguments]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        raise SystemExit(child.returncode)  # it has said why
    held, peak = map(int, child.stdout.splitlines()[-1].split())
    return held, peak


def check_pyramid(path: Path) -> dict[str, Any]:
    """What readers that did not write the file say of it, all pixels of all levels read.

    Raises:
        SystemExit: it is not a BigTIFF of tiled pages of which each is half of the one before, or they do not show
            the same picture.
    """
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    with path.open("rb") as file:
        require(file.read(4) in (b"II\x2b\0", b"MM\0\x2b"), f"{path}: not a BigTIFF")
    sizes: list[tuple[int, int]] = []
    with Image.open(path) as image:
        for page in range(getattr(image, "n_frames", 1)):
            image.seek(page)
            tags: Any = getattr(image, "tag_v2", {})
            require(322 in tags and 323 in tags, f"{path}: page {page} has no tiles")
            require(tags.get(254, 0) == min(page, 1), f"{path}: page {page} has the subfile type {tags.get(254, 0)}")
            half = [(-(-w // 2), -(-h // 2)) for w, h in sizes[-1:]]
            require(not half or image.size == half[0], f"{path}: page {page} is {image.size}, not {half}")
            sizes.append(image.size)
    reader, means = page_means(path, len(sizes))
    differ = max((abs(a - b) for a, b in pairwise(means)), default=0.0)
    require(differ <= LEVELS_DIFFER, f"{path}: the means of the levels are {means}")
    return {"reader": reader, "levels": ["x".join(map(str, size)) for size in sizes], "means": means}


def page_means(path: Path, pages: int) -> tuple[str, list[float]]:
    """The mean of all pixels of each page: by libvips in strips, or by Pillow, which holds a page whole."""
    try:
        import pyvips
    except ImportError:
        import numpy as np
        from PIL import Image

        means = []
        with Image.open(path) as image:
            for page in range(pages):
                image.seek(page)
                means.append(float(np.asarray(image).mean(dtype=np.float64)))
        return "Pillow", means
    opened = (pyvips.Image.new_from_file(str(path), page=page, access="sequential") for page in range(pages))
    return "Pillow, libvips", [picture.avg() for picture in opened]


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(otherwise)


def measure(size: str, steps: int, out: Path) -> dict[str, Any]:
    """One run of the command, and its file."""
    idle, _ = resident(IDLE)
    start = time.perf_counter()
    call = ["generate", "topographic map of islands in the ocean", "--size", size, "--steps", str(steps)]
    _, peak = resident(RUN, *call, "--seed", "0", "--device", "cpu", "--out", str(out))
    seconds = time.perf_counter() - start
    row = {"size": size, "steps": steps, "seconds": seconds, "file_bytes": out.stat().st_size}
    return row | {"idle_bytes": idle, "peak_bytes": peak, "above_idle_bytes": peak - idle} | check_pyramid(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", default="4096x2048", help="width x height; over 2048x2048 rows are streamed")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path, help="keep the TIFF there; else it is removed")
    parser.add_argument("--json", type=Path, help="also write the results there")
    args = parser.parse_args()
    if args.out is not None and args.out.suffix not in (".tif", ".tiff"):
        parser.error(f"--out {args.out}: must end in .tif or .tiff")
    with tempfile.TemporaryDirectory(prefix="tiledcore-") as folder:
        row = measure(args.size, args.steps, args.out or Path(folder, "out.tif"))
    print(f"{'size':>12}{'steps':>6}{'seconds':>9}{'idle GiB':>10}{'peak GiB':>10}{'above':>8}{'file MiB':>10}  levels")
    memory = (row[name] / 2**30 for name in ("idle_bytes", "peak_bytes", "above_idle_bytes"))
    print(
        f"{row['size']:>12}{row['steps']:>6}{row['seconds']:>9.0f}{next(memory):>10.2f}{next(memory):>10.2f}"
        f"{next(memory):>8.2f}{row['file_bytes'] / 2**20:>10.1f}  {len(row['levels'])}, read by {row['reader']}"
    )
    timing.save(args.json, torch.device("cpu"), [row])


if __name__ == "__main__":
    main()
