"""One composition: staged generation against one tiled stage, judged by the model's own native image.

    python -m bench.stages --model earth-flux --size 2048 --json bench/results/stages_flux.json

Each prompt and seed has a native image, which the staged ways start from; enlarged to the final size it is what the
composition should be, and the first row. Images are kept in ``--work`` and not made again, so a run that was stopped
goes on, and more seeds cost only their own images. Columns, means over images, ± their standard deviation:

- of the floor: network evaluations of all stages in units of the floor, the last stage's steps with no pixel
  evaluated twice (of a single stage: its own steps). Calculated from the plan; tests count them.
- low: power at one to two cycles per image side, over that of the enlarged native image (of all images together, and
  the images furthest from 1). Pictures that are matched are given these back; the others show what refining kept.
- alike: how far distant tiles show the same things (bench/repetition.py, `likeness`), and the same as a ratio to that
  of the enlarged native image, mean over the pairs. 1 is what the composition has; a picture in every tile has more.
- copies: whether tiles are copies of each other, and what that is by chance (`repetition`).
- more: by how much the first is above the second, ± its standard error; beyond two of these it is no chance.
- layout: PSNR in dB to the native image, at its size.
- seam: worst line on which tiles met (of the last stage: in its last partition, and where steps are blended after it)
  over the limit, the 99.9th percentile of ordinary lines (bench/quality.py).

Where the subject of a picture is a texture, as with these models, tiles that do not know of each other do not copy
each other pixel by pixel: each draws a small picture of the whole prompt. That is seen in low, alike and layout.

Tiles meet as they do by default; or, with ``--blend-steps``, they move and those of the last steps overlap.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bench import timing
from bench.modes import PX, kept, meeting_lines, period, run
from bench.quality import low_frequency_power, seam_check
from bench.repetition import likeness, repetition, repetition_by_chance
from tiledcore import TiledPipeline, TilingConfig
from tiledcore.compose.stage_plan import Staging
from tiledcore.compose.stages import plan_call
from tiledcore.hook import default_tiling
from tiledcore.models import call_defaults
from tiledcore.models.architecture import NATIVE
from tiledcore.schedulers.pull import Pull

PROMPTS = [
    "relief map of a rugged coast",
    "topographic map of islands in the ocean",
    "satellite view of continents and oceans",
]
Images = NDArray[np.floating[Any]]


def ways() -> dict[str, Staging | None]:
    """``stages=`` of each row of the table."""
    return {
        "one stage": None,
        "stages without a pull": Staging(pull=None),
        "stages": Staging(),
        "stages without a match": Staging(match=False),
        "stages of up to 4x": Staging(factor=4),
        "stages, latents enlarged": Staging(upscale="latent"),
        "stages, sharper pull": Staging(pull=Pull(sigma=NATIVE / 32)),
    }


def of_floor(pipe: Any, staging: Staging | None, tiling: TilingConfig, size: int, steps: int) -> float:
    if staging is None:
        return tiling.area_factor(tiling.grid(size // PX, size // PX, NATIVE), steps)
    call = {"stages": staging, "tiling": tiling, "height": size, "width": size, "num_inference_steps": steps}
    return float(plan_call(pipe, call).rows(steps)[-1]["of_floor"])


def enlarged(native: Images, size: int) -> Images:
    picture = Image.fromarray((native * 255).round().astype(np.uint8))
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255


def judge(image: Images, native: Images, lines: list[list[int]], grid: int) -> dict[str, float]:
    """Figures of one image; the powers are pooled over images later."""
    size, side = len(image), len(native)
    seams = seam_check(image, lines[0], lines[1], period=grid)
    block = size // side
    small = image.reshape(side, block, side, block, 3).mean((1, 3))
    wanted = enlarged(native, size)
    return {
        "power": low_frequency_power(image[None]),
        "power_native": low_frequency_power(wanted[None]),
        "alike": likeness(image, side),
        "alike_native": likeness(wanted, side),
        "repetition": repetition(image, side),
        "chance": repetition_by_chance(image, side),
        "layout": float(-10 * np.log10(((small - native) ** 2).mean())),
        "seam": seams.worst / seams.limit,
    }


def row(name: str, found: list[dict[str, float]], floor: float | None) -> dict[str, Any]:
    ratios = [f["power"] / f["power_native"] for f in found]
    excess = [f["repetition"] - f["chance"] for f in found]
    spread = _spread(excess)
    result: dict[str, Any] = {
        "name": name,
        "images": len(found),
        "of_floor": floor,
        "low": sum(f["power"] for f in found) / sum(f["power_native"] for f in found),
        "low_least": min(ratios),
        "low_most": max(ratios),
        "excess": fmean(excess),
        "excess_error": None if spread is None else spread / len(found) ** 0.5,
        "layout": fmean(f["layout"] for f in found),
        "seam": max(f["seam"] for f in found),
    }
    result["alike_ratio"] = fmean(f["alike"] / f["alike_native"] for f in found)
    for key in ("alike", "repetition", "chance"):
        values = [f[key] for f in found]
        result |= {key: fmean(values), f"{key}_sd": _spread(values)}
    return result


def _spread(values: list[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _with_spread(value: str, spread: float | None, digits: int) -> str:
    return value if spread is None else f"{value} ± {spread:.{digits}f}"


def table(rows: list[dict[str, Any]]) -> str:
    head = [
        "way",
        "of the floor",
        "low",
        "least, most",
        "alike",
        "of native",
        "copies",
        "by chance",
        "more",
        "layout, dB",
        "seam / limit",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in rows:
        whole = r["of_floor"] is None  # the native image itself, which is smooth, and its own layout
        cells = [
            *(r["name"], "–" if whole else f"{r['of_floor']:.2f}"),
            *(f"{r['low']:.2f}", f"{r['low_least']:.2f}, {r['low_most']:.2f}"),
            _with_spread(f"{r['alike']:.2f}", r["alike_sd"], 2),
            f"{r['alike_ratio']:.2f}",
            *(_with_spread(f"{r[key]:.2f}", r[f"{key}_sd"], 2) for key in ("repetition", "chance")),
            _with_spread(f"{r['excess']:+.3f}", r["excess_error"], 3),
            *(["–", "–"] if whole else [f"{r['layout']:.1f}", f"{r['seam']:.2f}"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="earth-flux", help="earth or earth-flux")
    parser.add_argument("--size", type=int, default=2048, help="px, at least 3 native sizes")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--seeds", type=int, default=1, help="images of each prompt")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--blend-steps", type=int, help="of moving tiles that do not fade; otherwise the default tiling"
    )
    parser.add_argument("--only", nargs="+", help="names of ways")
    parser.add_argument("--work", type=Path, default=Path("runs/stages"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.size < 3 * NATIVE * PX or args.size % (NATIVE * PX):
        parser.error(f"--size {args.size}: must be a multiple of {NATIVE * PX} from {3 * NATIVE * PX}")
    Image.MAX_IMAGE_PIXELS = None
    pipe = TiledPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    call = call_defaults(args.model) | {"num_inference_steps": args.steps, "output_type": "np"}
    work = args.work / args.model
    chosen = {name: way for name, way in ways().items() if name in (args.only or [name])}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("native, enlarged", *chosen)}
    side = NATIVE * PX
    tiling = replace(default_tiling(pipe.pipe, fades=True), tile=NATIVE)
    if args.blend_steps is not None:
        tiling = TilingConfig(tile=NATIVE, shift=True, blend_steps=args.blend_steps)
    blends = "fading" if args.blend_steps is None else args.blend_steps

    def judged(name: str, image: Images, native: Images, prompt: str, seed: int) -> None:
        meets = tiling if chosen.get(name) is None else tiling.refining()
        lines = meeting_lines(pipe, meets, args.size, args.steps)
        found[name].append(judge(image, native, lines, period(pipe)))
        print(name, prompt, seed, {k: round(v, 3) for k, v in found[name][-1].items()}, flush=True)

    for seed in range(args.seeds):
        for prompt in args.prompts:
            native = kept(
                work / f"native {args.steps} {prompt} {seed}.png",
                lambda p=prompt, s=seed: run(pipe, p, side, s, TilingConfig(tile=NATIVE), **call),
            )
            judged("native, enlarged", enlarged(native, args.size), native, prompt, seed)
            for name, way in chosen.items():
                image = kept(
                    work / f"{args.size} {args.steps} {blends} {name} {prompt} {seed}.png",
                    lambda w=way, p=prompt, s=seed: run(pipe, p, args.size, s, tiling, stages=w, **call),
                )
                judged(name, image, native, prompt, seed)
    rows = [row("native, enlarged", found["native, enlarged"], None)]
    rows += [row(name, found[name], of_floor(pipe, way, tiling, args.size, args.steps)) for name, way in chosen.items()]
    print(table(rows))
    if args.json:
        about = {"size": args.size, "tile": NATIVE, "blend_steps": args.blend_steps, "call": call}
        about |= {"prompts": args.prompts, "seeds": args.seeds}
        machine = timing.machine(torch.device("cpu"))
        args.json.write_text(json.dumps({"machine": machine, "about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
