"""Checks of what ``generate`` and ``profile`` are asked for, before torch is imported and a model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from tiledcore.cli.console import SIZE, CommandError
from tiledcore.cli.model import INPAINTED_CHANNELS, check_size, check_tile, read_model
from tiledcore.geometry import TileGrid
from tiledcore.io.images import PictureError, check_regular, is_transparent, load_image, opened, to_rgb
from tiledcore.io.preview import Preview
from tiledcore.io.writers import check_target


def check(args: argparse.Namespace) -> Image.Image | None:
    """Check all that can be known before loading; returns the init image.

    ``args`` gets the settled ``size``, ``mask``, ``preview`` and ``scene``, and a :class:`Model` as ``known``.
    An error (CommandError, ValueError) names the option, its value and what is valid.
    """
    for option, text in (("PROMPT", args.prompt), ("--negative-prompt", args.negative_prompt)):
        if text is not None and not text.isascii() and text != text.encode(errors="ignore").decode():
            raise CommandError(f"{option}: is not valid UTF-8")
    for option, given, other, there in (
        ("--strength", args.strength, "--init-image or --stages", args.init_image or args.stages),
        ("--mask", args.mask, "--init-image", args.init_image),
        ("--keep-colour", args.keep_colour, "--init-image", args.init_image),
        ("--halo", args.halo, "--mode canvas", args.mode == "canvas"),
        ("--checkpoint-every", args.checkpoint_every, "--checkpoint", args.checkpoint),
        ("--preview-every", args.preview_every, "--preview", args.preview),
    ):
        if given and not there:
            raise CommandError(f"{option}: only used with {other}")
    if args.mask is not None and args.stages is not None:
        raise CommandError("--stages: not used with --mask, whose surroundings are there already")
    if args.checkpoint is not None and (args.stages is not None or args.keep_colour):
        raise CommandError("--checkpoint: saves one stage; not used with --stages or --keep-colour")
    if args.tile is not None:
        height, width = args.tile
        TileGrid(height, width, tile=args.tile, overlap=args.overlap or 0)
    model = args.known = read_model(args.model)
    if model.native is not None:
        check_tile(args.tile, model.native)
    unet = model.network == "UNet2DConditionModel"
    if args.mask is not None and unet and model.channels not in INPAINTED_CHANNELS:
        raise CommandError(
            f"--mask: the network of --model {args.model} takes {model.channels} channels, and can only be "
            f"inpainted with {' or '.join(map(str, INPAINTED_CHANNELS))}; --model earth-flux can be"
        )
    image, unit = None, model.unit
    if args.init_image is not None:
        with reading(args.init_image):
            image = load_image(args.init_image)
        if args.size is None or isinstance(args.size, int):
            args.size = tuple(max(unit, side * (args.size or 1) // unit * unit) for side in image.size)
    if isinstance(args.size, int):
        raise CommandError(f"--size {args.size}x: only used with --init-image, of whose size it is a multiple")
    args.size = args.size or SIZE
    if args.mask is not None and image is not None:
        args.mask = _mask(args.mask, image.size)
    check_size(args.size, unit)
    if args.out is not None:
        check_target(args.out, args.size)
    if args.preview is not None:
        if args.budget is not None:
            raise CommandError("--preview: its decode is not counted by --budget; give only one of them")
        for option, path in (("--out", args.out), ("--init-image", args.init_image)):
            if path is not None and args.preview.resolve() == path.resolve():
                raise CommandError(f"--preview {args.preview}: is {option}; give it another name")
        args.preview = Preview(args.preview, args.preview_every or Preview.every)
    args.scene = [] if args.regions is None else _scene(args)
    return image


def _mask(path: Path, size: tuple[int, int]) -> Image.Image:
    with reading(path), opened(path) as image:
        if is_transparent(image):
            raise PictureError(f"--mask {path}: has transparent pixels; make it white where to change, else black")
        mask = to_rgb(image, f"--mask {path}").convert("L")
    if mask.size != size:
        raise CommandError(f"--mask {path}: is {mask.width}x{mask.height} px, --init-image {size[0]}x{size[1]} px")
    if not any(mask.histogram()[128:]):
        raise CommandError(f"--mask {path}: nothing in it is white, so there is nothing to change")
    return mask


def _scene(args: argparse.Namespace) -> list[Any]:
    from tiledcore.compose.regions import load_scene

    width, height = args.size
    try:
        check_regular(args.regions)
        scene = load_scene(args.regions, width, height, ("y" in args.wrap, "x" in args.wrap))
    except OSError as error:
        raise CommandError(f"{args.regions}: cannot be read: {error.strerror or error}") from error
    seeds = [region.seed for region in scene if region.seed is not None]
    if seeds and args.init_image is not None:
        raise CommandError(f"{args.regions}: seed={seeds[0]}: regions have no noise of their own with --init-image")
    return scene


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of reading a picture file as a CommandError."""
    try:
        yield
    except PictureError as error:
        raise CommandError(str(error)) from error
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises on broken files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not an image"
        raise CommandError(f"{path}: cannot be read: {reason}") from error
