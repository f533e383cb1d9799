"""The ``generate`` command: check the arguments, open the model, run it, write the file.

torch and diffusers take seconds to import, so they are imported only after the arguments are checked.
"""

from __future__ import annotations

import argparse
import secrets
import shlex
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from tiledcore import __version__
from tiledcore.cli.choices import SCHEDULERS, STRENGTH
from tiledcore.cli.console import CommandError, launched, leads, quiet, say
from tiledcore.cli.model import check_size, check_tile
from tiledcore.cli.opening import open_pipeline
from tiledcore.cli.request import check
from tiledcore.geometry import TileGrid, both
from tiledcore.io.images import save_image
from tiledcore.io.writers import FORMATS, write_rows
from tiledcore.models import call_defaults

if TYPE_CHECKING:
    from tiledcore.loop.checkpoint import Checkpoint
    from tiledcore.pipeline import TiledPipeline


def generate(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    image = check(args)
    say(f"loading {args.model}")
    quiet()
    from tiledcore.cli.explain import explain
    from tiledcore.loop.checkpoint import Checkpoint, locked
    from tiledcore.parallel.launch import joined

    checkpoint = None if args.checkpoint is None else Checkpoint(args.checkpoint, args.checkpoint_every or 1)
    group = joined(args.device) if launched() else nullcontext()  # the processes that torchrun started
    with group as ranks, locked(checkpoint) if checkpoint is not None and leads() else nullcontext():
        seed = _seed(args, checkpoint)
        seed = seed if ranks is None else ranks.first(seed)
        pipe = open_pipeline(args, seed)
        call = call_arguments(args, pipe, image)
        grid = pipe.grid(args.size[1], args.size[0])
        metadata = _describe(args, pipe, call, grid, seed)
        if args.stages is not None:
            metadata["stages"] = _stages(pipe, call)
        whole = _why_whole(args, pipe)
        if args.explain:
            if leads():
                say("predicting the memory: one step is simulated")
                print(explain(args, pipe, metadata, whole))
            return
        _announce(args, pipe, call, metadata, whole)
        call |= {"checkpoint": checkpoint, "preview": args.preview}
        _make(args, pipe, call, metadata, whole is not None)
        if checkpoint is not None and leads():
            checkpoint.remove()
    if args.budget is not None:
        _say_memory(pipe)
    if pipe.report is not None and pipe.report.ranks is not None:
        say(str(pipe.report.ranks))
    if FORMATS[args.out.suffix.lower()][0] not in ("PNG", "TIFF"):
        say(f"{args.out}: without its settings, which only a PNG or TIFF can hold")
    elapsed = time.perf_counter() - started
    say(
        f"{args.out}: {args.size[0]}x{args.size[1]}, seed {seed}, {len(grid)} tiles, "
        f"area factor {metadata['tiling']['area_factor']:.2f}, {elapsed:.1f} s"
    )
    say(f"next: tiledcore view {shlex.quote(str(args.out))}")


def _announce(
    args: argparse.Namespace, pipe: TiledPipeline, call: dict[str, Any], metadata: dict[str, Any], whole: str | None
) -> None:
    """Say what will happen; ``whole`` is why the image is decoded whole, or None. The progress bar shows the time."""
    from tiledcore.cli.explain import LARGE, memory

    (width, height), tiling = args.size, metadata["tiling"]
    tiles = f"{tiling['tiles']} tiles of {tiling['tile'][0]}x{tiling['tile'][1]} latent pixels"
    say(f"denoising {width}x{height} px: {tiles}, {call['num_inference_steps']} steps, seed {metadata['seed']}")
    if width * height <= LARGE:
        return
    if args.device == "cpu" and args.budget is None:  # there the simulation is short beside the run
        say(f"memory: {memory(args, pipe, whole is not None)}")
    if whole is not None:
        say(f"decoding the whole image in memory: {whole}")


def _seed(args: argparse.Namespace, checkpoint: Checkpoint | None) -> int:
    """The seed that was asked for, or that of the saved run, or a random one."""
    from tiledcore.loop.checkpoint import load

    seed: int = secrets.randbelow(2**32) if args.seed is None else args.seed
    saved = load(checkpoint) if checkpoint is not None and leads() else None
    if checkpoint is None or saved is None:
        return seed
    say(f"{checkpoint.file}: {saved.index} of {saved.steps} steps are done")
    return saved.seeds[0] if args.seed is None else seed


def _say_memory(pipe: TiledPipeline) -> None:
    from tiledcore.memory.prediction import show_bytes

    report = pipe.report
    if report is not None and report.plan is not None:
        say(
            f"memory: {show_bytes(report.measured_bytes or 0)} of tensors at the peak, {show_bytes(report.plan.needs)} "
            f"predicted, {show_bytes(report.plan.budget)} allowed; this counts tensors, not the whole process"
        )


def _why_whole(args: argparse.Namespace, pipe: TiledPipeline) -> str | None:
    """Why the image must be decoded whole, or None where it goes into the file row by row."""
    from tiledcore.io.stream import why_not_streamed

    if args.stages is not None or args.keep_colour or args.mask is not None:
        return "--stages, --keep-colour and --mask work on the whole picture"
    return why_not_streamed(pipe.pipe)


def _make(
    args: argparse.Namespace, pipe: TiledPipeline, call: dict[str, Any], metadata: dict[str, Any], whole: bool
) -> None:
    """Make the image and write it."""
    import torch

    def write(bands: Iterator[Any]) -> None:
        say("decoding")
        with writing(args.out):
            write_rows(args.out, args.size, bands, metadata)

    # Drawn on the CPU, so that a seed means the same noise on every device.
    generator = torch.Generator().manual_seed(metadata["seed"])
    if not whole:
        pipe(**call, generator=generator, rows=write)
        return
    output = pipe(**call, generator=generator)
    if any(getattr(output, "nsfw_content_detected", None) or []):
        say("the model's safety checker made the image black")
    picture = output.images[0]
    if "mask_image" in call:  # what is outside of it went through the autoencoder all the same
        picture = Image.composite(picture, call["image"].resize(picture.size), call["mask_image"])
    if leads():
        with writing(args.out):
            save_image(picture, args.out, metadata)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"{path} was not written: {error.strerror or error}") from error


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
        value = getattr(args, option[2:].replace("-", "_"))
        if value is not None and name not in known:
            raise CommandError(f"{option}: {cls.__name__} takes no {name}")
        if value is not None:
            call[name] = value
    if guidance in known:
        call.setdefault(guidance, known[guidance])
    call.update(prompt=args.prompt, width=args.size[0], height=args.size[1])
    for region in [None, *(args.scene if args.regions is not None else [])]:
        _check_prompt(pipe, args.prompt if region is None else region.prompt, call)
    if image is not None:
        strength = STRENGTH if args.strength is None else args.strength
        if int(strength * call["num_inference_steps"]) < 1:
            steps = call["num_inference_steps"]
            raise CommandError(f"--strength {strength}: leaves none of {steps} steps")
        call.update(image=image, strength=strength)
        if args.keep_colour:
            call["keep_colour"] = True
        if args.mask is not None:
            call["mask_image"] = args.mask.resize(args.size)
    elif args.strength is not None:
        call["strength"] = args.strength
    if args.stages is not None:
        from tiledcore.compose.stages import Staging

        call["stages"] = "auto" if args.stages == "auto" else Staging(factor=args.stages)
    if args.regions is not None:
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
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipe, name, None)
        if tokenizer is None or getattr(pipe, name.replace("tokenizer", "text_encoder"), None) is None:
            continue
        limit = tokenizer.model_max_length
        if default is not None and "CLIP" not in type(tokenizer).__name__:  # T5 and language models
            limit = call.get("max_sequence_length", default.default)
        read.append((len(tokenizer(prompt).input_ids), limit))
    if read and all(length > limit for length, limit in read):
        length, limit = max(read, key=lambda pair: pair[1])
        start = textwrap.shorten(prompt, 40, placeholder=" ...")
        say(f"the prompt has {length} tokens, of which the model reads the first {limit}: {start}")


def _describe(
    args: argparse.Namespace, pipe: TiledPipeline, call: dict[str, Any], grid: TileGrid, seed: int
) -> dict[str, Any]:
    """The settings that are stored in the file: what makes the image again, and where seams could be."""
    scheduler = type(pipe.scheduler).__name__
    short = {name: key for key, name in SCHEDULERS.items()}
    metadata = {
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "seed": seed,
        "model": args.model,
        "size": list(args.size),
        "steps": call["num_inference_steps"],
        "guidance": call.get("true_cfg_scale", call.get("guidance_scale")),
        "scheduler": short.get(scheduler, scheduler),
    }
    if args.init_image is not None:
        metadata.update(init_image=str(args.init_image), strength=call["strength"])
    if args.regions is not None:
        # A mask's pixels are not stored, but where they lie: a viewer can show that.
        metadata["regions"] = [
            region.describe() | ({} if region.mask is None else {"bounds": list(region.bounds())})
            for region in args.scene
        ]
    return metadata | {
        "device": args.device,
        "dtype": args.dtype,
        "version": __version__,
        "tiling": _describe_tiling(pipe, grid, call),
    }


def _describe_tiling(pipe: TiledPipeline, grid: TileGrid, call: dict[str, Any]) -> dict[str, Any]:
    from tiledcore.tiles.families import network_of

    network, family = network_of(pipe.pipe)
    config, factor = pipe.tiling, pipe.vae_scale_factor
    # Of a shifted grid the lines are those of the unshifted one: each step has its own.
    lines_y, lines_x = grid.lines
    if config.mode == "canvas":  # its windows are a regular partition, cut off at the border
        lines_y, lines_x = (
            tuple(range(tile, size, tile)) for tile, size in zip(grid.tile_size, (grid.height, grid.width), strict=True)
        )
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
