"""Seam check of an image that `tiledcore generate` wrote, or of two that it makes itself.

python -m bench.seams demo.png     reads where tiles meet from the PNG; exits with 1 if a seam shows
python -m bench.seams --generate   the demo's tiling, a ramp over 25 %, next to tiles without overlap, same seed
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.quality import PERCENTILE, SeamCheck, seam_check

HEADER = f"{'tiling':<28}{'axis':<6}{'lines':>5}{'mean':>8}{'worst':>8}{'at px':>8}{'limit':>8}  seams"


def table(rows: dict[str, SeamCheck]) -> str:
    """One row for each check and axis."""
    text = [
        f"seam ratio: 1 is an ordinary line on the same grid (plain: any); limit: their {PERCENTILE}th percentile",
        HEADER,
    ]
    for name, check in rows.items():
        for label, axis in (("y", check.y), ("x", check.x)):
            if not axis.lines:
                text.append(f"{name:<28}{label:<6}{0:>5}{'-':>8}{'-':>8}{'-':>8}{'-':>8}  none")
                continue
            verdict = "none" if axis.worst <= check.limit else "VISIBLE"
            text.append(
                f"{name:<28}{label:<6}{axis.lines:>5}{axis.mean:>8.3f}{axis.worst:>8.3f}"
                f"{axis.worst_line:>8}{check.limit:>8.3f}  {verdict}"
            )
    return "\n".join(text)


def read(path: Path) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """The pixels of a PNG, and the tiling noted in its `tiledcore` text chunk."""
    with Image.open(path) as image:
        image.load()  # text chunks may follow the pixels
        noted = image.info.get("tiledcore")
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    if noted is None:
        raise SystemExit(f"{path}: no tiledcore text chunk; only images of `tiledcore generate` have one")
    tiling = json.loads(noted)["tiling"]
    return pixels, tiling


def check_file(path: Path, period: int | None = None) -> SeamCheck:
    """The check with the period that is noted in the file, or with another: 1 takes all lines alike."""
    pixels, tiling = read(path)
    wrap_y, wrap_x = tiling.get("wrap", (False, False))
    return seam_check(pixels, tiling["lines_y"], tiling["lines_x"], (wrap_y, wrap_x), period or tiling["period"])


def generate(args: argparse.Namespace) -> dict[str, SeamCheck]:
    """Two images of one seed by the command itself: the default tiling, and none of its means."""
    from tiledcore.cli import main as cli

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, extra in (("25 % ramp", ["--overlap", "8"]), ("overlap 0, no shift", ["--overlap", "0"])):
            path = Path(folder, f"{name}.png")
            size = f"{args.size}x{args.size}"
            command = ["generate", args.prompt, "--size", size, "--seed", str(args.seed), "--steps", str(args.steps)]
            if cli.main([*command, "--out", str(path), "--model", args.model, *extra]) != 0:
                raise SystemExit(2)  # the command has said why
            rows[f"{name}, plain"] = check_file(path, period=1)
            rows[name] = check_file(path)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.seams",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", type=Path, nargs="?", help="PNG written by `tiledcore generate`")
    parser.add_argument("--generate", action="store_true", help="make both images and compare")
    parser.add_argument("--model", default="earth", help="with --generate: as for the command")
    parser.add_argument("--prompt", default="relief map of a rugged coast")
    parser.add_argument("--size", type=int, default=2048, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args(argv)
    if (args.image is None) != args.generate:
        parser.error("give either an image or --generate")
    Image.MAX_IMAGE_PIXELS = None  # large images are what this is for
    if args.generate:
        rows = generate(args)
        print(table(rows))
        return 0 if rows["25 % ramp"].passes else 1
    check = check_file(args.image)
    print(table({"plain": check_file(args.image, period=1), args.image.name: check}))
    return 0 if check.passes else 1


if __name__ == "__main__":
    sys.exit(main())
