"""Check an image of ``tiledcore generate`` for seams: ``python -m bench.seams demo.png``; exits with 1 if one shows.

Where tiles meet is noted in the PNG.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.quality import PERCENTILE, Pixels, SeamCheck, seam_check

HEADER = f"{'axis':<6}{'lines':>5}{'mean':>8}{'worst':>8}{'at px':>8}{'limit':>8}  seams"


def read(path: Path) -> tuple[Pixels, dict[str, Any]]:
    """The pixels of a PNG, and the tiling from its ``tiledcore`` text chunk."""
    with Image.open(path) as image:
        image.load()  # text chunks may follow the pixels
        noted = image.info.get("tiledcore")
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    if noted is None:
        raise SystemExit(f"{path}: no tiledcore text chunk; only images of `tiledcore generate` have one")
    return pixels, json.loads(noted)["tiling"]


def table(check: SeamCheck) -> str:
    """One row for each axis."""
    text = [f"seam ratio: 1 is an ordinary line; limit: the {PERCENTILE}th percentile of ordinary lines", HEADER]
    for label, axis in (("y", check.y), ("x", check.x)):
        shown = "VISIBLE" if axis.lines and axis.worst > check.limit else "none"
        where = "-" if axis.worst_line is None else axis.worst_line
        figures = f"{axis.mean:>8.3f}{axis.worst:>8.3f}{where:>8}{check.limit:>8.3f}"
        text.append(f"{label:<6}{axis.lines:>5}{figures}  {shown}")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.seams", description=__doc__)
    parser.add_argument("image", type=Path, help="PNG of `tiledcore generate`")
    args = parser.parse_args(argv)
    Image.MAX_IMAGE_PIXELS = None  # large images are what this is for
    pixels, tiling = read(args.image)
    wrap_y, wrap_x = tiling.get("wrap", (False, False))
    check = seam_check(pixels, tiling["lines_y"], tiling["lines_x"], (wrap_y, wrap_x), tiling["period"])
    print(table(check))
    return 0 if check.passes else 1


if __name__ == "__main__":
    sys.exit(main())
