"""The ``plan`` command: the memory that an image is predicted to need, and the choices that make it fit a budget."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tiledcore.cli.choices import DTYPES
from tiledcore.cli.console import CommandError, quiet, say
from tiledcore.cli.model import check_size
from tiledcore.cli.opening import default_dtype

if TYPE_CHECKING:
    from tiledcore.memory.planner import Plan


def plan_command(args: argparse.Namespace) -> None:
    if isinstance(args.size, int):
        raise CommandError(f"--size {args.size}x: give WIDTHxHEIGHT, such as 2048x1024")
    say(f"planning {args.model} at {args.size[0]}x{args.size[1]} px: one step is simulated, up to a minute")
    quiet()
    import torch

    from tiledcore.config import TilingConfig
    from tiledcore.memory.architectures import architecture
    from tiledcore.memory.planner import DoesNotFit, Planner
    from tiledcore.memory.prediction import Predictor, parse_bytes

    dtype = getattr(torch, DTYPES[args.dtype or default_dtype(args.device)])
    tiling = TilingConfig(mode=args.mode) if args.mode else None
    if tiling is None and args.gpus > 1:  # canvas mode is one call of the network, which one GPU makes
        tiling = TilingConfig()
    problem = None
    try:
        planner = Planner(
            Predictor(architecture(args.model, dtype), args.device), parse_bytes(args.budget), args.images
        )
        check_size(args.size, planner.predictor.unit)
        found = planner.plan(args.size, tiling)
    except DoesNotFit as error:
        found, problem = error.leanest, error
    except TypeError as error:
        raise CommandError(str(error)) from error
    shared = None
    if args.gpus > 1:
        from tiledcore.parallel.forecast import forecast_of

        shared = forecast_of(planner.predictor, found, args.images, args.gpus)
    if args.json:
        print(json.dumps(as_json(found) | ({} if shared is None else {"gpus": asdict(shared)}), indent=2))
    else:
        print(table(found) if shared is None else f"{table(found)}\n{shared}")
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
        network, peak = phase.name == "network", phase.peak * plan.safety
        flops = "-" if not phase.flops else f"{phase.flops / 1e12:.2f}" + ("/step" if network else "")
        factor = f"{plan.area_factor:.2f}" if network else "-"
        choice = phase.choice if peak <= plan.budget else f"{phase.choice}  (does not fit)"
        start = f"{phase.name:<15}{show_bytes(phase.peak):>15}{show_bytes(peak):>12}"
        lines.append(f"{start}{factor:>13}{flops:>14}  {choice}")
    where = "come and go, one on the device at a time" if plan.offload else "all stay on the device"
    tiles = f"{plan.tiles} tile{'s' * (plan.tiles != 1)} a step"
    lines.append(f"{tiles}; modules: {where}; the plan needs {show_bytes(plan.needs)}")
    return "\n".join([*lines, COUNTED_BYTES])
