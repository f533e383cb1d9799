"""The commands ``generate`` and ``profile``: check the arguments, open the model, run it, write the file.

torch and diffusers take seconds to import, so they are imported only after the arguments are checked.
"""

from __future__ import annotations

import argparse
import secrets
import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tiledcore import __version__
from tiledcore.cli.console import SCHEDULERS, STRENGTH, launched, leads, quiet, say
from tiledcore.cli.model import check_size, open_pipeline, unit_of
from tiledcore.geometry import both
from tiledcore.io.images import check_regular, load_image
from tiledcore.io.preview import Preview
from tiledcore.io.writers import Band, check_target, write_rows
from tiledcore.models import call_defaults

if TYPE_CHECKING:
    from tiledcore.pipeline import TiledPipeline


def generate(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    image = check(args)
    say(f"loading {args.model}")
    quiet()
    from diffusers.utils.logging import set_verbosity_warning

    from tiledcore.cli.explain import LARGE, explain, memory
    from tiledcore.io.stream import why_not_streamed
    from tiledcore.loop.checkpoint import Checkpoint, load, locked
    from tiledcore.memory.prediction import show_bytes
    from tiledcore.parallel.ranks import joined

    checkpoint = None if args.checkpoint is None else Checkpoint(args.checkpoint)
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
        if leads():
            set_verbosity_warning()  # such as of a prompt that is cut off
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
        (width, height), tiling = args.size, metadata["tiling"]
        tiles = f"{tiling['tiles']} tiles of {tiling['tile'][0]}x{tiling['tile'][1]} latent pixels"
        say(f"denoising {width}x{height} px: {tiles}, {metadata['steps']} steps, seed {seed}")
        if width * height > LARGE and args.device == "cpu" and args.budget is None:  # short beside the run there
            say(f"memory: {memory(args, pipe, tiling['tiles'], whole is not None)}")
        _make(args, pipe, call | {"checkpoint": checkpoint, "preview": args.preview}, metadata, whole)
        if kept is not None:
            kept.remove()
    report = pipe.report
    if report is not None and report.plan is not None:
        say(
            f"memory: {show_bytes(report.measured_bytes or 0)} of tensors at the peak, {show_bytes(report.plan.needs)} "
            f"predicted, {show_bytes(report.plan.budget)} allowed; this counts tensors, not the whole process"
        )
    if report is not None and report.ranks is not None:
        say(str(report.ranks))
    area = f"area factor {tiling['area_factor']:.2f}"
    say(f"{args.out}: {width}x{height}, seed {seed}, {area}, {time.perf_counter() - started:.1f} s")
    say(f"next: tiledcore view {shlex.quote(str(args.out))}")


def profile(args: argparse.Namespace) -> None:
    """Run it under torch.profiler and print where the time went."""
    image = check(args)
    say(f"loading {args.model}")
    quiet()
    import torch

    pipe = open_pipeline(args, args.seed or 0)
    call = call_arguments(args, pipe, image)
    with torch.profiler.profile() as profiler:  # of CPU and, where there is one, GPU
        pipe(**call, generator=torch.Generator().manual_seed(args.seed or 0))
    print(_times(profiler.key_averages(), torch.device(args.device).type == "cuda"))


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


def check(args: argparse.Namespace) -> Image.Image | None:
    """Check what can be known before torch is imported; returns the init image.

    ``args`` gets the ``size``, ``mask``, ``preview`` and ``scene`` of the call.
    """
    for option, text in (("PROMPT", args.prompt), ("--negative-prompt", args.negative_prompt)):
        if text is not None and text != text.encode(errors="ignore").decode():
            raise ValueError(f"{option}: is not valid UTF-8")
    for option, given, other, there in (
        ("--strength", args.strength, "--init-image or --stages", args.init_image or args.stages),
        ("--mask", args.mask, "--init-image", args.init_image),
        ("--keep-colour", args.keep_colour, "--init-image", args.init_image),
        ("--preview-every", args.preview_every, "--preview", args.preview),
        (f"--size {args.size}x", isinstance(args.size, int), "--init-image", args.init_image),
    ):
        if given and not there:
            raise ValueError(f"{option}: only used with {other}")
    image, unit = None, unit_of(args.model)
    if args.init_image is not None:
        image = load_image(args.init_image)
        if args.size is None or isinstance(args.size, int):
            args.size = tuple(max(unit, side * (args.size or 1) // unit * unit) for side in image.size)
        if args.mask is not None:
            args.mask = _mask(args.mask, image.size)
    args.size = args.size or (1024, 1024)
    width, height = args.size
    check_size(args.size, unit)
    if args.out is not None:
        check_target(args.out, args.size)
    if args.preview is not None:
        for option, path in (("--out", args.out), ("--init-image", args.init_image)):
            if path is not None and args.preview.resolve() == path.resolve():
                raise ValueError(f"--preview {args.preview}: is {option}; give it another name")
        args.preview = Preview(args.preview, args.preview_every or Preview.every)
    args.scene = []
    if args.regions is not None:
        from tiledcore.compose.regions import load_scene

        check_regular(args.regions)
        args.scene = load_scene(args.regions, width, height, ("y" in args.wrap, "x" in args.wrap))
    return image


def _mask(path: Path, size: tuple[int, int]) -> Image.Image:
    mask = load_image(path, opaque=True).convert("L")  # on white, its transparent parts would all be drawn anew
    if mask.size != size:
        raise ValueError(f"--mask {path}: is {mask.width}x{mask.height} px, --init-image {size[0]}x{size[1]} px")
    if not any(mask.histogram()[128:]):
        raise ValueError(f"--mask {path}: nothing in it is white, so there is nothing to change")
    return mask


def _make(
    args: argparse.Namespace, pipe: TiledPipeline, call: dict[str, Any], metadata: dict[str, Any], whole: str | None
) -> None:
    """Make the image and write it; ``whole`` is why it is decoded whole, or None."""
    import torch

    def write(bands: Iterable[Band], size: tuple[int, int]) -> None:
        try:
            write_rows(args.out, size, bands, metadata)
        except OSError as error:
            raise OSError(f"{args.out} was not written: {error.strerror or error}") from error

    def rows(bands: Iterator[Band]) -> None:
        say("decoding")
        write(bands, args.size)

    # Drawn on the CPU, so that a seed means the same noise on every device.
    generator = torch.Generator().manual_seed(metadata["seed"])
    output = pipe(**call, generator=generator, rows=rows if whole is None else None)
    if whole is None:
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
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    from tiledcore.call import size_unit
    from tiledcore.compose.stages import Staging
    from tiledcore.tiles.families import network_of

    check_size(args.size, size_unit(pipe.pipe))
    network, family = network_of(pipe.pipe)
    native, cls = both(family.native(pipe.pipe, network)), type(pipe.pipe)
    if args.tile is not None and any(4 * side < own for side, own in zip(args.tile, native, strict=True)):
        raise ValueError(  # an image would take a hundred thousand of them, and show nothing
            f"--tile {args.tile[0]}x{args.tile[1]}: each side must be at least a quarter of the model's own "
            f"{native[0]}x{native[1]} latent pixels"
        )
    known = {k: v.default for k, v in signature(cls.__call__).parameters.items()}
    alone = cls in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values() and "ControlNet" not in cls.__name__
    if image is None and "image" in known and not alone:
        raise ValueError(f"--model {args.model}: {cls.__name__} starts from an image; give --init-image")
    call: dict[str, Any] = {"num_inference_steps": known["num_inference_steps"]} | call_defaults(args.model)
    # The name of guidance with two branches, for a transformer without distilled guidance.
    guidance = "true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale"
    given = {"num_inference_steps": args.steps, guidance: args.guidance, "negative_prompt": args.negative_prompt}
    call |= {name: value for name, value in given.items() if value is not None}
    if guidance in known:
        call.setdefault(guidance, known[guidance])
    call.update(prompt=args.prompt, width=args.size[0], height=args.size[1])
    if image is not None:
        call.update(image=image, strength=args.strength or STRENGTH, keep_colour=args.keep_colour)
        if args.mask is not None:
            call["mask_image"] = args.mask.resize(args.size)
    elif args.strength is not None:
        call["strength"] = args.strength
    if args.stages is not None:
        call["stages"] = "auto" if args.stages == "auto" else Staging(factor=args.stages)
    if args.scene:
        call["regions"] = args.scene
    return call


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


def _stages(pipe: TiledPipeline, call: dict[str, Any]) -> list[str]:
    """The stages of a call in words."""
    from tiledcore.compose.stages import plan_call

    lines = []
    for index, cost in enumerate(plan_call(pipe, call).costs(call["num_inference_steps"]), 1):
        strength = "" if cost.stage.strength is None else f" from strength {cost.stage.strength:g}"
        lines.append(f"{cost.stage.width}x{cost.stage.height}, {cost.steps} steps{strength}, {cost.tiles} tiles")
        say(f"stage {index}: {lines[-1]}")
    return lines


def _describe_tiling(args: argparse.Namespace, pipe: TiledPipeline, call: dict[str, Any]) -> dict[str, Any]:
    from tiledcore.call import size_unit

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
        "period": size_unit(pipe.pipe),  # of the grid that the network draws by itself
    }
