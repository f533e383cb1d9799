"""What ``generate --explain`` prints: what would be done, and why."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from tiledcore.geometry import both
from tiledcore.tiles.families import network_of

if TYPE_CHECKING:
    from tiledcore.pipeline import TiledPipeline

LARGE = 2048 * 2048
"""Pixels. To decode more of them whole takes gigabytes."""
HINT = "tiles alone repeat the subject, because none of them sees the whole; --stages auto makes one composition"
# That decide how tiles meet.
OPTIONS = ("mode", "tile", "overlap", "window", "ramp", "motion", "halo")


def explain(args: argparse.Namespace, pipe: TiledPipeline, metadata: dict[str, Any], whole: str | None) -> str:
    """The plan of a call, one line for each decision; ``whole`` is why the image is decoded whole, or None.

    ``metadata`` is what would be stored in the file.
    """
    network, family = network_of(pipe.pipe)
    native = [pipe.vae_scale_factor * side for side in both(family.native(pipe.pipe, network))]
    tiling, given = metadata["tiling"], [name for name in OPTIONS if getattr(args, name) is not None]
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
        ("memory", memory(args, pipe, whole is not None)),
        ("seed", f"{metadata['seed']}" + ("" if args.seed is not None else "; random, because there is no --seed")),
        *((("hint", HINT),) if tiling["tiles"] > 1 and args.stages is None and args.init_image is None else ()),
        ("then", f"tiledcore view {shlex.quote(str(args.out))}"),
    ]
    return "\n".join(f"{name:<8}{text}" for name, text in lines)


def memory(args: argparse.Namespace, pipe: TiledPipeline, whole: bool) -> str:
    """The predicted peak of tensors on the device, in words; takes seconds, because one step is simulated."""
    from tiledcore.io.stream import CPU_BUDGET
    from tiledcore.memory.architectures import architecture
    from tiledcore.memory.planner import COUNTED_BYTES, Planner
    from tiledcore.memory.prediction import Predictor, parse_bytes, show_bytes

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
