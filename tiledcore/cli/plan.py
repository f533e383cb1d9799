"""The ``plan`` command: the memory that an image is predicted to need, and the choices that make it fit a budget."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tiledcore.cli.choices import DTYPES
from tiledcore.cli.console import CommandError, quiet, say

if TYPE_CHECKING:
    from tiledcore.memory.planner import Plan

# The configurations in tiledcore.memory.architectures, and the unit of their sizes in px.
BUILT_IN = {"sd15": 8, "sdxl": 8, "sd3": 16, "flux": 16}
HELP_MODELS = f"{', '.join(BUILT_IN)}, earth, earth-flux, or a folder in diffusers' format (weights are not read)"


def add_arguments(parser: argparse.ArgumentParser, size: Any, integer: Any) -> None:
    """The command's arguments; ``size`` and ``integer`` are the command line's converters."""
    add = parser.add_argument
    add("--model", default="earth", metavar="NAME", help=HELP_MODELS)
    add("--size", type=size, required=True, metavar="WIDTHxHEIGHT", help="of the image, in pixels")
    add("--budget", required=True, metavar="BYTES", help="of memory on the device, such as 24GiB or 24GB")
    add("--mode", choices=("tiles", "canvas"), help="default: whichever fits with the fewest FLOPs")
    add("--images", type=integer(1), default=1, metavar="N", help="made at a time; default 1")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="to plan for; it need not be there. Default cuda")
    add("--dtype", choices=DTYPES, help="default fp16 for cuda, fp32 for cpu")
    add("--json", action="store_true", help="as JSON")
    parser.set_defaults(command=plan_command)


def plan_command(args: argparse.Namespace) -> None:
    from tiledcore.cli.model import check_size, read_model

    if isinstance(args.size, int):
        raise CommandError(f"--size {args.size}x: give WIDTHxHEIGHT, such as 2048x1024")
    check_size(args.size, BUILT_IN.get(args.model) or read_model(args.model).unit)
    say(f"planning {args.model} at {args.size[0]}x{args.size[1]} px: one step is simulated, a large one takes minutes")
    import torch

    with quiet():
        from tiledcore.config import TilingConfig
        from tiledcore.memory.planner import DoesNotFit, plan

        dtype = getattr(torch, DTYPES[args.dtype or ("fp16" if args.device == "cuda" else "fp32")])
        tiling = TilingConfig(mode=args.mode) if args.mode else None
        options: dict[str, Any] = {"tiling": tiling, "device": args.device, "dtype": dtype, "images": args.images}
        problem = None
        try:
            found = plan(args.model, args.size, args.budget, **options)
        except DoesNotFit as error:
            found, problem = error.leanest, error
        except TypeError as error:
            raise CommandError(str(error)) from error
    print(json.dumps(as_json(found), indent=2) if args.json else table(found))
    if problem is not None:
        raise CommandError(str(problem))


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan as JSON can hold it; sizes in bytes."""
    return asdict(plan) | {"peak": plan.peak, "needs": plan.needs, "fits": plan.fits}


def table(plan: Plan) -> str:
    """A plan as text: each phase, its peak with and without the safety factor, and the choice made for it."""
    from tiledcore.memory.planner import COUNTED_BYTES
    from tiledcore.memory.prediction import show_bytes

    width, height = plan.size
    lines = [
        f"{plan.model}, {width}x{height} px, {plan.dtype} on {plan.device}, budget {show_bytes(plan.budget)}",
        f"{'phase':<15}{'predicted peak':>15}{f'x {plan.safety}':>12}{'area factor':>13}{'TFLOP':>14}  choice",
    ]
    for phase in plan.phases:
        network = phase.name == "network"
        flops = "-" if not phase.flops else f"{phase.flops / 1e12:.2f}" + ("/step" if network else "")
        factor = f"{plan.area_factor:.2f}" if network else "-"
        over = "" if phase.peak * plan.safety <= plan.budget else "  (does not fit)"
        lines.append(
            f"{phase.name:<15}{show_bytes(phase.peak):>15}{show_bytes(phase.peak * plan.safety):>12}"
            f"{factor:>13}{flops:>14}  {phase.choice}{over}"
        )
    where = "come and go, one on the device at a time" if plan.offload else "all stay on the device"
    lines.append(
        f"{plan.tiles} tile{'s' * (plan.tiles != 1)} a step; modules: {where}; the plan needs {show_bytes(plan.needs)}"
    )
    lines.append(COUNTED_BYTES)
    return "\n".join(lines)
