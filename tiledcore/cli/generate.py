"""The commands ``generate`` and ``profile``: check the arguments, open the model, run it, write the file.

torch and diffusers take seconds to import, so they are imported only after the arguments are checked.
"""

from __future__ import annotations

import argparse
import secrets
import shlex
import textwrap
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tiledcore import __version__
from tiledcore.cli.console import SCHEDULERS, STRENGTH, CommandError, launched, leads, quiet, say
from tiledcore.cli.model import check_size, check_tile, open_pipeline
from tiledcore.cli.request import check
from tiledcore.geometry import both
from tiledcore.io.writers import FORMATS, Band, write_rows
from tiledcore.models import call_defaults

if TYPE_CHECKING:
    from tiledcore.pipeline import TiledPipeline


def generate(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    image = check(args)
    say(f"loading {args.model}")
    quiet()
    from tiledcore.cli.explain import explain
    from tiledcore.io.stream import why_not_streamed
    from tiledcore.loop.checkpoint import Checkpoint, load, locked
    from tiledcore.memory.prediction import show_bytes
    from tiledcore.parallel.ranks import joined

    checkpoint = None if args.checkpoint is None else Checkpoint(args.checkpoint, args.checkpoint_every or 1)
    kept = checkpoint if leads() else None  # by one of the processes
    group = joined(args.device) if launched() else nullcontext()  # the processes that torchrun started
    with group as ranks, nullcontext() if kept is None else locked(kept):
        saved, seed = None if kept is None else load(kept), args.seed
        if kept is not None and saved is not None:
            say(f"{kept.file}: {saved.index} of {saved.steps} steps are done")
            seed = saved.seeds[0] if seed is None else seed
        seed = secrets.randbelow(2**32) if seed is None else seed
        seed = seed if ranks is None else ranks.first(seed)
        pipe = open_pipeline(args, seed)
        call = call_arguments(args, pipe, image)
        metadata = _describe(args, pipe, call, seed)
        whole = why_not_streamed(pipe.pipe)
        if args.stages is not None or args.keep_colour or args.mask is not None:
            whole = "--stages, --keep-colour and --mask work on the whole picture"
        if args.explain:
            if leads():
                say("predicting the memory: one step is simulated")
                print(explain(args, pipe, metadata, whole))
            return
        _announce(args, pipe, metadata, whole)
        _make(args, pipe, call | {"checkpoint": checkpoint, "preview": args.preview}, metadata, whole is not None)
        if kept is not None:
            kept.remove()
    report, tiling = pipe.report, metadata["tiling"]
    if report is not None and report.plan is not None:
        say(
            f"memory: {show_bytes(report.measured_bytes or 0)} of tensors at the peak, {show_bytes(report.plan.needs)} "
            f"predicted, {show_bytes(report.plan.budget)} allowed; this counts tensors, not the whole process"
        )
    if report is not None and report.ranks is not None:
        say(str(report.ranks))
    if FORMATS[args.out.suffix.lower()][0] not in ("PNG", "TIFF"):
        say(f"{args.out}: without its settings, which only a PNG or TIFF can hold")
    tiles = f"{tiling['tiles']} tiles, area factor {tiling['area_factor']:.2f}"
    elapsed = time.perf_counter() - started
    say(f"{args.out}: {args.size[0]}x{args.size[1]}, seed {seed}, {tiles}, {elapsed:.1f} s")
    say(f"next: tiledcore view {shlex.quote(str(args.out))}")


def profile(args: argparse.Namespace) -> None:
    """Run it under torch.profiler and print where the time went."""
    image = check(args)
    say(f"loading {args.model}")
    quiet()
    import torch
    from torch.profiler import ProfilerActivity

    seed = 0 if args.seed is None else args.seed
    pipe = open_pipeline(args, seed)
    call = call_arguments(args, pipe, image)
    on_cuda = torch.device(args.device).type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_cuda else [])
    with torch.profiler.profile(activities=activities) as profiler:
        pipe(**call, generator=torch.Generator().manual_seed(seed))
    print(_times(profiler.key_averages(), on_cuda))


def _times(events: Any, on_cuda: bool) -> str:
    """Time of each labelled part of ``key_averages()`` as text, and the shares of the engine and the network."""
    from tiledcore.utils import LABELS, PREFIX

    found = {e.key.removeprefix(PREFIX): e for e in events if e.key.startswith(PREFIX)}
    clock = "device_time_total" if on_cuda else "cpu_time_total"
    seconds = {name: getattr(found[name], clock) / 1e6 for name in LABELS if name in found}
    total = sum(value for name, value in seconds.items() if name != "attention")  # a part of the network
    lines = [f"{'part':<22}{'calls':>7}{'seconds':>10}{'share':>9}"]
    for name, value in seconds.items():
        shown = "  of it, attention" if name == "attention" else name
        lines.append(f"{shown:<22}{found[name].count:>7}{value:>10.3f}{value / total:>9.1%}")
    network = seconds.get("network", 0.0) / (total - seconds.get("decode", 0.0))
    return "\n".join([*lines, f"of the loop: network {network:.1%}, engine {1 - network:.1%}"])


def _announce(args: argparse.Namespace, pipe: TiledPipeline, metadata: dict[str, Any], whole: str | None) -> None:
    """Say what will happen; ``whole`` is why the image is decoded whole, or None. The progress bar shows the time."""
    from tiledcore.cli.explain import LARGE, memory

    (width, height), tiling = args.size, metadata["tiling"]
    tiles = f"{tiling['tiles']} tiles of {tiling['tile'][0]}x{tiling['tile'][1]} latent pixels"
    say(f"denoising {width}x{height} px: {tiles}, {metadata['steps']} steps, seed {metadata['seed']}")
    if width * height <= LARGE:
        return
    if args.device == "cpu" and args.budget is None:  # there the simulation is short beside the run
        say(f"memory: {memory(args, pipe, tiling['tiles'], whole is not None)}")
    if whole is not None:
        say(f"decoding the whole image in memory: {whole}")


def _make(
    args: argparse.Namespace, pipe: TiledPipeline, call: dict[str, Any], metadata: dict[str, Any], whole: bool
) -> None:
    """Make the image and write it."""
    import torch

    def write(bands: Iterable[Band], size: tuple[int, int]) -> None:
        try:
            write_rows(args.out, size, bands, metadata)
        except OSError as error:
            raise CommandError(f"{args.out} was not written: {error.strerror or error}") from error

    def rows(bands: Iterator[Band]) -> None:
        say("decoding")
        write(bands, args.size)

    # Drawn on the CPU, so that a seed means the same noise on every device.
    output = pipe(**call, generator=torch.Generator().manual_seed(metadata["seed"]), rows=None if whole else rows)
    if not whole:
        return
    if any(getattr(output, "nsfw_content_detected", None) or []):
        say("the model's safety checker made the image black")
    picture = output.images[0]
    if "mask_image" in call:  # what is outside of it went through the autoencoder all the same
        picture = Image.composite(picture, call["image"].resize(picture.size), call["mask_image"])
    if leads():
        write([np.asarray(picture.convert("RGB"))], picture.size)


def call_arguments(args: argparse.Namespace, pipe: TiledPipeline, image: Image.Image | None) -> dict[str, Any]:
    """The arguments of the pipeline's call; what is stored in the file is always given, never left to a default."""
    from tiledcore.tiles.families import network_of

    network, family = network_of(pipe.pipe)
    native = family.native(pipe.pipe, network)
    check_size(args.size, pipe.vae_scale_factor * family.patch(network))
    check_tile(args.tile, both(native))
    cls = type(pipe.pipe)
    known = {k: v.default for k, v in signature(cls.__call__).parameters.items()}
    call: dict[str, Any] = {"num_inference_steps": known["num_inference_steps"]} | call_defaults(args.model)
    # The name of guidance with two branches, for a transformer without distilled guidance.
    guidance = "true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale"
    wanted = {"--steps": "num_inference_steps", "--guidance": guidance, "--negative-prompt": "negative_prompt"}
    for option, name in wanted.items():
        if (value := getattr(args, option[2:].replace("-", "_"))) is None:
            continue
        if name not in known:
            raise CommandError(f"{option}: {cls.__name__} takes no {name}")
        call[name] = value
    if guidance in known:
        call.setdefault(guidance, known[guidance])
    call.update(prompt=args.prompt, width=args.size[0], height=args.size[1])
    for prompt in [args.prompt, *(region.prompt for region in args.scene)]:
        _check_prompt(pipe, prompt, call)
    if image is not None:
        strength, steps = STRENGTH if args.strength is None else args.strength, call["num_inference_steps"]
        if int(strength * steps) < 1:
            raise CommandError(f"--strength {strength}: leaves none of {steps} steps")
        call.update(image=image, strength=strength, keep_colour=args.keep_colour)
        if args.mask is not None:
            call["mask_image"] = args.mask.resize(args.size)
    elif args.strength is not None:
        call["strength"] = args.strength
    if args.stages is not None:
        from tiledcore.compose.stages import Staging

        call["stages"] = "auto" if args.stages == "auto" else Staging(factor=args.stages)
    if args.scene:
        call["regions"] = args.scene
    return call


def _stages(pipe: TiledPipeline, call: dict[str, Any]) -> list[str]:
    """The stages of a call in words; says what they cost."""
    from tiledcore.compose.stages import plan_call

    costs = plan_call(pipe, call).costs(call["num_inference_steps"])
    lines = []
    for index, cost in enumerate(costs, 1):
        strength = "" if cost.stage.strength is None else f" from strength {cost.stage.strength:g}"
        lines.append(f"{cost.stage.width}x{cost.stage.height}, {cost.steps} steps{strength}, {cost.tiles} tiles")
        say(f"stage {index}: {lines[-1]}")
    floor = sum(cost.canvases for cost in costs) / costs[-1].steps
    say(f"all stages: {floor:.2f} x the floor of the last one's steps")
    return lines


def _check_prompt(pipe: TiledPipeline, prompt: str, call: dict[str, Any]) -> None:
    """Say so if every text encoder reads only the beginning of a prompt."""
    default = signature(type(pipe.pipe).__call__).parameters.get("max_sequence_length")
    read = []
    for number in ("", "_2", "_3"):
        tokenizer, encoder = (getattr(pipe, f"{part}{number}", None) for part in ("tokenizer", "text_encoder"))
        if tokenizer is None or encoder is None:
            continue
        limit = tokenizer.model_max_length
        if default is not None and "CLIP" not in type(tokenizer).__name__:  # T5 and language models
            limit = call.get("max_sequence_length", default.default)
        read.append((len(tokenizer(prompt).input_ids), limit))
    if read and all(length > limit for length, limit in read):
        length, limit = max(read, key=lambda pair: pair[1])
        start = textwrap.shorten(prompt, 40, placeholder=" ...")
        say(f"the prompt has {length} tokens, of which the model reads the first {limit}: {start}")


def _describe(args: argparse.Namespace, pipe: TiledPipeline, call: dict[str, Any], seed: int) -> dict[str, Any]:
    """The settings that are stored in the file: what makes the image again, and where seams could be."""
    scheduler = type(pipe.scheduler).__name__
    metadata = {
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "seed": seed,
        "model": args.model,
        "size": list(args.size),
        "steps": call["num_inference_steps"],
        "guidance": call.get("true_cfg_scale", call.get("guidance_scale")),
        "scheduler": next((key for key, name in SCHEDULERS.items() if name == scheduler), scheduler),
    }
    if args.init_image is not None:
        metadata.update(init_image=str(args.init_image), strength=call["strength"])
    if args.regions is not None:
        # A mask's pixels are not stored, but where they lie: a viewer can show that.
        metadata["regions"] = [
            region.describe() | ({} if region.mask is None else {"bounds": list(region.bounds())})
            for region in args.scene
        ]
    tiling = _describe_tiling(args, pipe, call)
    metadata.update(device=args.device, dtype=args.dtype, version=__version__, tiling=tiling)
    if args.stages is not None:
        metadata["stages"] = _stages(pipe, call)
    return metadata


def _describe_tiling(args: argparse.Namespace, pipe: TiledPipeline, call: dict[str, Any]) -> dict[str, Any]:
    from tiledcore.tiles.families import network_of

    network, family = network_of(pipe.pipe)
    config, factor, grid = pipe.tiling, pipe.vae_scale_factor, pipe.grid(args.size[1], args.size[0])
    # Of a shifted grid the lines are those of the unshifted one: each step has its own.
    lines_y, lines_x = grid.lines
    if config.mode == "canvas":  # its windows are a regular partition, cut off at the border
        (tall, wide), height, width = grid.tile_size, grid.height, grid.width
        lines_y, lines_x = tuple(range(tall, height, tall)), tuple(range(wide, width, wide))
    blends = config.mode == "tiles" and (config.moving is None or config.moving.blended > 0)
    steps = max(1, int(call["num_inference_steps"] * call.get("strength", 1.0)))
    return {
        "mode": config.mode,
        "tile": list(grid.tile_size),
        "overlap": list(grid.overlap),
        "halo": config.halo,
        "window": config.window if blends else None,
        "ramp": (config.ramp or max(1, min(grid.overlap))) if blends and config.window == "ramp" else None,
        "motion": "still" if config.moving is None else asdict(config.moving),
        "wrap": list(grid.wrap),
        "tiles": len(grid),
        "area_factor": round(config.area_factor(grid, steps), 4),
        "lines_y": [factor * y for y in lines_y],
        "lines_x": [factor * x for x in lines_x],
        "period": factor * family.patch(network),  # of the grid that the network draws by itself
    }
