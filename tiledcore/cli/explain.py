"""What would be done, before it is done: ``generate --explain``, and the memory that ``plan`` predicts."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tiledcore.cli.console import DTYPES, quiet, say
from tiledcore.cli.model import MEET, check_size, default_dtype
from tiledcore.geometry import both

if TYPE_CHECKING:
    from tiledcore.memory.planner import Plan
    from tiledcore.pipeline import TiledPipeline

LARGE = 2048 * 2048
"""Pixels. Larger images are decoded in bands of rows."""
MANY = 10_000
"""Tiles in one step. A step with more of them is not simulated, because that takes minutes."""


def explain(args: argparse.Namespace, pipe: TiledPipeline, metadata: dict[str, Any], whole: str | None) -> str:
    """The plan of a call, one line for each decision; ``whole`` is why the image is decoded whole, or None.

    ``metadata`` is what would be stored in the file.
    """
    from tiledcore.tiles.families import network_of

    network, family = network_of(pipe.pipe)
    native = [pipe.vae_scale_factor * side for side in both(family.native(pipe.pipe, network))]
    tiling, given = metadata["tiling"], [name for name in ("tile", *MEET) if getattr(args, name) is not None]
    height, width = (pipe.vae_scale_factor * side for side in tiling["tile"])
    chosen = f"asked for by --{', --'.join(given)}" if given else f"the default for {type(network).__name__}"
    if tiling["tiles"] == 1:
        ways = "the image is not larger than one tile"
    elif tiling["mode"] == "canvas":
        ways = "the network runs once over the whole canvas, and attention sees a tile and its halo"
    elif tiling["motion"] == "still":
        ways = "tiles keep their places, and their overlaps are blended"
    else:
        ways = "tiles lie elsewhere in each step but the first and last ones, so that no seam stays at one place"
    steps = "--steps" if args.steps is not None else "the model's own default"
    lines = [
        ("size", f"{args.size[0]}x{args.size[1]} px; {args.model} was trained at {native[1]}x{native[0]} px"),
        ("tiles", f"{tiling['tiles']} of {width}x{height} px, area factor {tiling['area_factor']:.2f}"),
        ("", f"{ways}; {chosen}"),
        ("steps", f"{metadata['steps']} of {metadata['scheduler']}, guidance {metadata['guidance']}; {steps}"),
        *(("stage", line) for line in metadata.get("stages", [])),
        ("decode", f"whole: {whole}" if whole else "row by row into the file; the whole image is not needed"),
        ("memory", memory(args, pipe, tiling["tiles"], whole is not None)),
        ("seed", f"{metadata['seed']}" + ("" if args.seed is not None else "; random, because there is no --seed")),
    ]
    if tiling["tiles"] > 1 and args.stages is None and args.init_image is None:
        lines.append(("hint", "tiles alone repeat the subject; --stages auto makes one composition"))
    lines.append(("then", f"tiledcore view {shlex.quote(str(args.out))}"))
    return "\n".join(f"{name:<8}{text}" for name, text in lines)


def memory(args: argparse.Namespace, pipe: TiledPipeline, tiles: int, whole: bool) -> str:
    """The predicted peak of tensors on the device, in words; takes seconds, because one step is simulated."""
    from tiledcore.io.stream import CPU_BUDGET
    from tiledcore.memory.architectures import architecture
    from tiledcore.memory.planner import COUNTED_BYTES, Planner
    from tiledcore.memory.prediction import Predictor, parse_bytes, show_bytes

    if tiles > MANY and pipe.tiling.mode == "tiles":
        return f"not predicted: to simulate a step of {tiles} tiles would take minutes"
    try:
        predictor = Predictor(architecture(pipe.pipe), pipe.device.type)
        found = Planner(predictor, parse_bytes(args.budget or "1024TiB")).plan(args.size, pipe.tiling, pipe.execution)
    except TypeError as error:  # of a network that cannot be simulated
        return f"not predicted: {error}"
    peaks, more = {phase.name: phase.peak for phase in found.phases}, ""
    if args.budget is None and not whole and args.size[0] * args.size[1] > LARGE:
        peaks.pop("decode")
        room = f"at most {show_bytes(CPU_BUDGET)} more" if pipe.device.type == "cpu" else "as much as is free"
        more = f"; the decode takes {room}, in bands of rows"
    each = ", ".join(f"{name} {show_bytes(peak)}" for name, peak in peaks.items())
    return f"{show_bytes(max(peaks.values()))} predicted ({each}){more}; {COUNTED_BYTES}"


def plan(args: argparse.Namespace) -> None:
    """Print the memory that an image is predicted to need, and the choices that make it fit a budget."""
    if isinstance(args.size, int):
        raise ValueError(f"--size {args.size}x: give WIDTHxHEIGHT, such as 2048x1024")
    say(f"planning {args.model} at {args.size[0]}x{args.size[1]} px: one step is simulated, up to a minute")
    quiet()
    import torch

    from tiledcore.config import TilingConfig
    from tiledcore.memory.architectures import architecture
    from tiledcore.memory.planner import DoesNotFit, Planner
    from tiledcore.memory.prediction import Predictor, parse_bytes
    from tiledcore.parallel.forecast import forecast_for

    dtype = getattr(torch, DTYPES[args.dtype or default_dtype(args.device)])
    # With several GPUs tiles: canvas mode is one call of the network, which one GPU makes.
    tiling = TilingConfig(mode=args.mode or "tiles") if args.mode or args.gpus > 1 else None
    problem = shared = None
    try:
        predictor = Predictor(architecture(args.model, dtype), args.device)
        check_size(args.size, predictor.unit)
        found = Planner(predictor, parse_bytes(args.budget), args.images).plan(args.size, tiling)
    except DoesNotFit as error:
        found, problem = error.leanest, error
    if args.gpus > 1:
        rows = args.images * predictor.model.branches
        shared = forecast_for(predictor, found.tiling, found.execution, found.size, rows, args.gpus)
    if args.json:
        content = asdict(found) | {"peak": found.peak, "needs": found.needs, "fits": found.fits}
        print(json.dumps(content | ({} if shared is None else {"gpus": asdict(shared)}), indent=2))
    else:
        print(table(found) if shared is None else f"{table(found)}\n{shared}")
    if problem is not None:
        raise problem


def table(found: Plan) -> str:
    """A plan as text: each phase, its peak with and without the safety factor, and the choice made for it."""
    from tiledcore.memory.planner import COUNTED_BYTES
    from tiledcore.memory.prediction import show_bytes

    width, height = found.size
    lines = [
        f"{found.model}, {width}x{height} px, {found.dtype} on {found.device}, budget {show_bytes(found.budget)}",
        f"{'phase':<15}{'predicted peak':>15}{f'x {found.safety}':>12}{'area factor':>13}{'TFLOP':>14}  choice",
    ]
    for phase in found.phases:
        network, peak = phase.name == "network", phase.peak * found.safety
        flops = "-" if not phase.flops else f"{phase.flops / 1e12:.2f}" + ("/step" if network else "")
        factor = f"{found.area_factor:.2f}" if network else "-"
        choice = phase.choice if peak <= found.budget else f"{phase.choice}  (does not fit)"
        start = f"{phase.name:<15}{show_bytes(phase.peak):>15}{show_bytes(peak):>12}"
        lines.append(f"{start}{factor:>13}{flops:>14}  {choice}")
    where = "come and go, one on the device at a time" if found.offload else "all stay on the device"
    lines.append(f"{found.tiles} tiles a step; modules: {where}; the plan needs {show_bytes(found.needs)}")
    return "\n".join([*lines, COUNTED_BYTES])
