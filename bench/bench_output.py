"""``tiledcore generate`` in bounded memory: the peak of its process over that of an idle one, and who reads its file.

``python -m bench.bench_output --size 16384x8192 --steps 2 --out big.tif`` runs the command as a child, prints its peak
resident memory above a child that has only opened the model, and opens the file with libtiff (Pillow), and with libvips
where it is installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

IDLE = "import resource, sys\nfrom tiledcore import TiledPipeline\nTiledPipeline.from_pretrained('earth')\n"
RUN = "import resource, sys\nfrom tiledcore.cli import main\ncode = main(sys.argv[1:])\n"
REPORT = "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"


def peak_bytes(code: str, *arguments: str) -> int:
    """Peak resident memory of a Python process that runs ``code``."""
    command = [sys.executable, "-c", f"{code}{REPORT}", *arguments]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout) * 1024


def describe_file(path: Path) -> list[str]:
    """What readers that did not write it say of the file, reading all of its pixels once."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    lines = []
    with Image.open(path) as image:
        sizes = []
        for page in range(getattr(image, "n_frames", 1)):
            image.seek(page)
            sizes.append("x".join(map(str, image.size)))
        lines.append(f"Pillow: {image.format}, {', '.join(sizes)}")
    try:
        import pyvips
    except ImportError:
        return [*lines, "libvips: not installed"]
    picture = pyvips.Image.new_from_file(str(path), access="sequential")
    return [*lines, f"libvips: {picture.width}x{picture.height}, mean {picture.avg():.2f} over all pixels"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", default="4096x2048")
    parser.add_argument("--steps", default="2")
    parser.add_argument("--out", type=Path, default=Path("big.tif"))
    args = parser.parse_args()
    idle = peak_bytes(IDLE)
    start = time.perf_counter()
    call = ["generate", "topographic map of islands in the ocean", "--size", args.size, "--steps", args.steps]
    peak = peak_bytes(RUN, *call, "--seed", "0", "--device", "cpu", "--out", str(args.out))
    seconds = time.perf_counter() - start
    if not args.out.exists():
        sys.exit(1)
    print(f"{args.size}, {args.steps} steps: {seconds:.0f} s, file {args.out.stat().st_size / 2**20:.1f} MiB")
    print(f"idle {idle / 2**30:.2f} GiB, peak {peak / 2**30:.2f} GiB, above idle {(peak - idle) / 2**30:.2f} GiB")
    print("\n".join(describe_file(args.out)))


if __name__ == "__main__":
    main()
