"""Held-out map crops enlarged four times, and drawn again in another style: is the structure kept, are there seams?

    python -m bench.restyle --model earth-flux --json bench/results/restyle_flux.json

The crops are of longitudes that the embedded models never saw (``pip install 'tiledcore[train]'`` has the rasters).
``upscale`` enlarges one in stages; ``restyle`` first draws it in another style at its own size, then enlarges that.
Images are kept in ``--work``. Columns:

- structure: PSNR in dB of the low-pass (Gaussian of 4 px, at the crop's size) to that of the crop. For ``restyle``
  the crop's colours are first mapped to the result's by the best affine map, and the PSNR of the crop's mean colour
  mapped likewise is given after it: what a picture without structure would have.
- seam: worst line on which tiles met (in the last step in which they moved, and where steps are blended after it) over
  the limit, the 99.9th percentile of ordinary lines (bench/quality.py). The tiling is what both models have by default.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bench import timing
from bench.modes import kept, meeting_lines, period
from bench.quality import seam_check
from tiledcore import TiledPipeline, TilingConfig
from tiledcore.compose.pictures import to_tensor
from tiledcore.hook import default_tiling
from tiledcore.io import images
from tiledcore.models import call_defaults, data
from tiledcore.models.architecture import NATIVE
from tiledcore.schedulers.pull import low_pass, low_pass_matrix

CROP = NATIVE * 8  # px
# Longitude and latitude of the middle; at 15 px per degree all of it lies within 10 to 40 degrees east.
PLACES = {"Greece": (23.0, 38.0), "Southern Africa": (25.0, -30.0), "Baltic": (25.0, 55.0)}
SOURCE, PROMPT = "shadedrelief", "shaded relief map of a rugged coast"
RESTYLED = "topographic map of a rugged coast"

Images = NDArray[np.floating[Any]]


def crop(place: str) -> Image.Image:
    """A crop of ``CROP`` px, stretched as in training (``tiledcore/models/data.py``)."""
    longitude, latitude = PLACES[place]
    with images._any_size(), Image.open(data._folder() / f"{SOURCE}.jpg") as raster:
        per_degree = raster.width / 360
        half = CROP / data.PX_PER_DEGREE / 2
        wide = half / np.cos(np.radians(latitude))
        assert longitude - wide >= data.HELD_OUT[0] and longitude + wide <= data.HELD_OUT[1], place
        box = (longitude + 180 - wide, 90 - latitude - half, longitude + 180 + wide, 90 - latitude + half)
        x0, y0, x1, y1 = (per_degree * degrees for degrees in box)
        return raster.convert("RGB").resize((CROP, CROP), Image.Resampling.BICUBIC, (x0, y0, x1, y1))


def smooth(image: Images, sigma: float = 4.0) -> Images:
    """The low-pass of a picture, at the crop's size."""
    block = len(image) // CROP
    small = image.reshape(CROP, block, CROP, block, 3).mean((1, 3))
    filters = [low_pass_matrix(CROP, sigma, False).float()] * 2
    return low_pass(to_tensor(small[None]), *filters)[0].movedim(0, -1).numpy()


def psnr(a: Images, b: Images) -> float:
    return float(-10 * np.log10(((a - b) ** 2).mean()))


def structure(result: Images, source: Images, recoloured: bool) -> tuple[float, float | None]:
    """PSNR of the low-passes, and of the low-pass' mean colour where colours are mapped."""
    found, wanted = smooth(result), smooth(source)
    if not recoloured:
        return psnr(found, wanted), None
    pixels = np.concatenate([wanted.reshape(-1, 3), np.ones((CROP * CROP, 1))], 1)
    mapped = pixels @ np.linalg.lstsq(pixels, found.reshape(-1, 3), rcond=None)[0]
    return psnr(mapped, found.reshape(-1, 3)), psnr(found.mean((0, 1)), found)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| place | way | structure, dB | without structure | worst seam / limit |", "|---" * 5 + "|"]
    for r in rows:
        without = "–" if r["without"] is None else f"{r['without']:.1f}"
        lines.append(f"| {r['place']} | {r['way']} | {r['structure']:.1f} | {without} | {r['seam']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="earth-flux", help="earth or earth-flux")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--strength", type=float, default=0.4, help="of the stages that enlarge")
    parser.add_argument("--redraw", type=float, default=0.4, help="strength with which restyle draws the crop again")
    parser.add_argument("--work", type=Path, default=Path("runs/restyle"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pipe = TiledPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    call = call_defaults(args.model) | {"num_inference_steps": args.steps, "output_type": "np"}
    size, work = 4 * CROP, args.work / args.model
    tiling = replace(default_tiling(pipe.pipe, fades=True), tile=NATIVE).refining()
    lines = meeting_lines(pipe, tiling, size, args.steps)

    def enlarge(prompt: str, picture: Image.Image) -> Any:
        options = call | {"stages": "auto", "strength": args.strength, "height": size, "width": size, "tiling": tiling}
        return pipe(prompt, image=picture, generator=torch.Generator().manual_seed(0), **options).images

    def draw(prompt: str, picture: Image.Image) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe(
            prompt, image=picture, strength=args.redraw, tiling=TilingConfig(tile=NATIVE), generator=generator, **call
        )

    rows: list[dict[str, Any]] = []
    for place in args.places:
        source = crop(place)
        pixels = np.asarray(source, dtype=np.float32) / 255
        name = f"{args.steps} {place}.png"
        drawn = kept(work / f"drawn {args.redraw} {name}", lambda s=source: draw(RESTYLED, s).images)
        redrawn = Image.fromarray((drawn * 255).round().astype(np.uint8))
        results = {
            "upscale": kept(work / f"upscale {args.strength} {name}", lambda s=source: enlarge(PROMPT, s)),
            "restyle": kept(
                work / f"restyle {args.redraw} {args.strength} {name}", lambda r=redrawn: enlarge(RESTYLED, r)
            ),
        }
        for way, image in results.items():
            kept_db, flat_db = structure(image, pixels, way == "restyle")
            seams = seam_check(image, lines[0], lines[1], period=period(pipe))
            seam = seams.worst / seams.limit
            rows.append({"place": place, "way": way, "structure": kept_db, "without": flat_db, "seam": seam})
    print(table(rows))
    if args.json:
        about = {
            "size": size,
            "strength": args.strength,
            "redraw": args.redraw,
            "call": call,
            "prompts": [PROMPT, RESTYLED],
        }
        machine = timing.machine(torch.device("cpu"))
        args.json.write_text(json.dumps({"machine": machine, "about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
