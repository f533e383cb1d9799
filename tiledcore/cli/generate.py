"""The ``generate`` command: check everything that can be checked, open the model, run it, write the file.

torch and diffusers take seconds to import, so they are imported only once the arguments are known
to be good.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from tiledcore import __version__
from tiledcore.cli.request import CommandError, check, check_size
from tiledcore.geometry import TileGrid
from tiledcore.io.files import FORMATS
from tiledcore.io.images import save_image
from tiledcore.io.writers import write_rows
from tiledcore.models import EMBEDDED, call_defaults

if TYPE_CHECKING:
    from tiledcore.config import TilingConfig
    from tiledcore.io.stream import Rows
    from tiledcore.loop.checkpoint import Checkpoint
    from tiledcore.pipeline import TiledPipeline

STRENGTH = 0.6
WHOLE = 2048 * 2048  # up to so many pixels the image is decoded and written whole

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "dpm++2s": "DPMSolverSinglestepScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2-a": "KDPM2AncestralDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "tcd": "TCDScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# What a model was trained with, and what a scheduler must therefore know of.
CONVENTIONS = ("prediction_type", "timestep_spacing", "rescale_betas_zero_snr")


def generate(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    image = check(args)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    checkpoint = None
    if args.checkpoint is not None:
        checkpoint, seed = _open_checkpoint(args, seed)
    with quiet():
        pipe = open_pipeline(args, seed)
        call = call_arguments(args, pipe, image)
        grid = pipe.grid(args.size[1], args.size[0])
        metadata = _describe(args, pipe, call, grid, seed)
        if checkpoint is not None:
            call["checkpoint"] = checkpoint
        if args.preview is not None:
            call["preview"] = args.preview
        if args.stages is not None:
            metadata["stages"] = _stages(pipe, call)
        picture = _run(pipe, call, grid, seed, _rows_writer(args, pipe, metadata))
    if picture is not None:
        with writing(args.out):
            save_image(picture, args.out, metadata)
    if checkpoint is not None:
        checkpoint.remove()
    if FORMATS[args.out.suffix.lower()][0] not in ("PNG", "TIFF"):
        say(f"{args.out}: without its settings, which only a PNG or TIFF can hold")
    elapsed = time.perf_counter() - started
    say(
        f"{args.out}: {args.size[0]}x{args.size[1]}, seed {seed}, {len(grid)} tiles, "
        f"area factor {metadata['tiling']['area_factor']:.2f}, {elapsed:.1f} s"
    )


def _open_checkpoint(args: argparse.Namespace, seed: int) -> tuple[Checkpoint, int]:
    """Also the seed of the run that is there, unless one was asked for."""
    from tiledcore.loop.checkpoint import Checkpoint, load

    checkpoint = Checkpoint(args.checkpoint, args.checkpoint_every or 1)
    saved = load(checkpoint)
    if saved is not None:
        say(f"{checkpoint.file}: {saved.index} of {saved.steps} steps are done")
        if args.seed is None:
            seed = saved.seeds[0]
    return checkpoint, seed


def _rows_writer(args: argparse.Namespace, pipe: TiledPipeline, metadata: dict[str, Any]) -> Rows | None:
    """What writes the decoded rows of a large image as they come; None where it is small, or must be whole."""
    from tiledcore.io.stream import why_not_streamed

    if args.size[0] * args.size[1] <= WHOLE:
        return None
    reason = why_not_streamed(pipe.pipe)
    if args.stages is not None or args.keep_colour or args.mask is not None:
        reason = "--stages, --keep-colour and --mask work on the whole picture"
    if reason is not None:
        say(f"decoding the whole image in memory: {reason}")
        return None

    def write(bands: Iterator[Any]) -> None:
        say("decoding")
        with writing(args.out):
            write_rows(args.out, args.size, bands, metadata)

    return write


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"{path} was not written: {error.strerror or error}") from error


def open_pipeline(args: argparse.Namespace, seed: int) -> TiledPipeline:
    import torch

    from tiledcore.config import Execution, TilingConfig
    from tiledcore.pipeline import TiledPipeline

    _config(args, seed, TilingConfig())  # what is wrong with it comes out before the model is opened
    _settle_device(args)
    dtype = getattr(torch, DTYPES[args.dtype])
    say(f"loading {args.model}")
    try:
        pipe = TiledPipeline.from_pretrained(args.model, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        if args.model in EMBEDDED or Path(args.model).is_dir():
            raise
        raise CommandError(f"--model {args.model}: {_why_not_from_hub(error)}") from error
    pipe.execution = Execution(tile_batch=args.tile_batch)
    pipe.tiling = _config(args, seed, pipe.tiling)
    if args.scheduler is not None:
        _set_scheduler(pipe, args.scheduler)
    return pipe.to(args.device)


def _config(args: argparse.Namespace, seed: int, default: TilingConfig) -> TilingConfig:
    """The tiling that was asked for; where it was not said how tiles meet, they do so as in ``default``."""
    from tiledcore.config import Motion, TilingConfig

    meet = ("mode", "overlap", "window", "ramp", "motion", "halo")
    given = {name: value for name in meet if (value := getattr(args, name)) is not None}
    wrap = ("y" in args.wrap, "x" in args.wrap)
    base = TilingConfig() if given else default
    config = replace(base, tile=args.tile, wrap=wrap, **given)
    return replace(config, motion=Motion(seed=seed)) if config.motion == "moving" else config


def _settle_device(args: argparse.Namespace) -> None:
    import torch

    cuda = torch.cuda.is_available()
    args.device = args.device or ("cuda" if cuda else "cpu")
    try:
        on_cuda = torch.device(args.device).type == "cuda"
    except RuntimeError as error:
        raise CommandError(f"--device {args.device}: torch knows no such device") from error
    if on_cuda and not cuda:
        raise CommandError(f"--device {args.device}: torch sees no CUDA device; use --device cpu")
    args.dtype = args.dtype or ("fp16" if on_cuda else "fp32")


def _why_not_from_hub(error: BaseException) -> str:
    from huggingface_hub.constants import is_offline_mode

    reason = "no such folder, and it cannot be had from the Hugging Face hub"
    if is_offline_mode():
        return f"{reason}: HF_HUB_OFFLINE allows only models that were downloaded before"
    while error.__cause__ is not None:  # diffusers' own message is "see the stacktrace above"
        error = error.__cause__
    return f"{reason}: {textwrap.shorten(str(error), 200, placeholder=' ...')}"


def _set_scheduler(pipe: TiledPipeline, name: str) -> None:
    import diffusers

    scheduler, config = getattr(diffusers, SCHEDULERS[name]), pipe.scheduler.config
    pipe.scheduler = scheduler.from_config(config)
    known = signature(scheduler.__init__).parameters
    lost = [f"{k}={config[k]}" for k in CONVENTIONS if config.get(k) and k not in known]
    if lost:
        say(f"--scheduler {name} does not support the model's {', '.join(lost)}")


def call_arguments(args: argparse.Namespace, pipe: TiledPipeline, image: Image.Image | None) -> dict[str, Any]:
    """The arguments of the pipeline's call, with nothing left to its defaults that is stored."""
    check_size(args.size, pipe.vae_scale_factor)
    _check_prompt(pipe, args.prompt)
    known = {k: v.default for k, v in signature(type(pipe.pipe).__call__).parameters.items()}
    call = {"num_inference_steps": known["num_inference_steps"]} | call_defaults(args.model)
    # A transformer that was not distilled takes its guidance under another name.
    guidance = "true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale"
    wanted = {"num_inference_steps": args.steps, guidance: args.guidance, "negative_prompt": args.negative_prompt}
    call.update((k, v) for k, v in wanted.items() if v is not None)
    call.setdefault(guidance, known[guidance])
    call.update(prompt=args.prompt, width=args.size[0], height=args.size[1])
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
        from tiledcore.compose.stage_plan import Staging

        call["stages"] = "auto" if args.stages == "auto" else Staging(factor=args.stages)
    if args.regions is not None:
        call["regions"] = args.scene
    return call


def _stages(pipe: TiledPipeline, call: dict[str, Any]) -> list[str]:
    """The stages of a call in words; says what they cost."""
    from tiledcore.compose.stages import plan_call

    *rows, total = plan_call(pipe, call).rows(call["num_inference_steps"])
    lines = [
        f"{row['size']}, {row['steps']} steps"
        + ("" if row["strength"] is None else f" from strength {row['strength']:g}")
        + f", {row['tiles']} tiles"
        for row in rows
    ]
    for row, line in zip(rows, lines, strict=True):
        say(f"stage {row['stage']}: {line}")
    say(f"all stages: {total['of_floor']} x the floor of the last one's steps")
    return lines


def _check_prompt(pipe: TiledPipeline, prompt: str) -> None:
    tokenizer = getattr(pipe, "tokenizer", None) or getattr(pipe, "tokenizer_2", None)
    if tokenizer is None:
        return
    length, limit = len(tokenizer(prompt).input_ids), tokenizer.model_max_length
    if length > limit:
        say(f"the prompt has {length} tokens, of which the model reads the first {limit}")


def _describe(
    args: argparse.Namespace,
    pipe: TiledPipeline,
    call: dict[str, Any],
    grid: TileGrid,
    seed: int,
) -> dict[str, Any]:
    """The PNG's text chunk: enough to make the image again, and where to look for seams."""
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


def _run(pipe: TiledPipeline, call: dict[str, Any], grid: TileGrid, seed: int, rows: Rows | None) -> Any:
    """The image, or None if it went to ``rows``."""
    import torch

    def decoding(*_: Any) -> None:
        hook.remove()  # diffusers' tiled decoder comes here once per tile
        say("decoding")

    h, w = grid.tile_size
    say(f"denoising {len(grid)} tiles of {h}x{w} latent pixels, seed {seed}")
    # Drawn on the CPU, so that a seed means the same noise on every device.
    generator = torch.Generator().manual_seed(seed)
    if rows is not None:
        pipe(**call, generator=generator, rows=rows)
        return None
    hook = pipe.vae.decoder.register_forward_pre_hook(decoding)
    if "stages" in call or "preview" in call:
        hook.remove()  # each of them decodes
    output = pipe(**call, generator=generator)
    if any(getattr(output, "nsfw_content_detected", None) or []):
        say("the model's safety checker made the image black")
    picture = output.images[0]
    if "mask_image" in call:  # what is outside of it went through the autoencoder all the same
        picture = Image.composite(picture, call["image"].resize(picture.size), call["mask_image"])
    return picture


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' remarks on themselves; a RuntimeWarning is on the image, and stays."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        enable_progress_bars()  # of downloads: transformers has just switched them off, too
        yield


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
