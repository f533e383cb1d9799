"""What is asked of ``generate``, checked before a model is opened."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from tiledcore.geometry import TileGrid
from tiledcore.io.files import check_target
from tiledcore.io.images import load_image
from tiledcore.io.preview import EVERY, Preview
from tiledcore.models import EARTH, EMBEDDED

if TYPE_CHECKING:
    from tiledcore.compose.regions import Region


SIZE = (1024, 1024)
VAE_FACTOR = 8  # until the model is open; all of Stable Diffusion has it


class CommandError(Exception):
    """The user can mend it; the message says how."""


def check(args: argparse.Namespace) -> Image.Image | None:
    """Whatever can be known before loading; completes ``args.size``, returns the init image."""
    if args.strength is not None and args.init_image is None and args.stages is None:
        raise CommandError("--strength: only used with --init-image or --stages")
    for option, value in (("--mask", args.mask), ("--keep-colour", args.keep_colour or None)):
        if value is not None and args.init_image is None:
            raise CommandError(f"{option}: only used with --init-image")
    if args.mask is not None and args.stages is not None:
        raise CommandError("--stages: not used with --mask, whose surroundings are there already")
    if args.checkpoint is not None and (args.stages is not None or args.keep_colour):
        raise CommandError("--checkpoint: saves one stage; not used with --stages or --keep-colour")
    if args.mode != "canvas" and args.halo is not None:
        raise CommandError("--halo: only used with --mode canvas")
    if args.tile is not None:
        h, w = args.tile
        TileGrid(h, w, tile=(h, w), overlap=args.overlap or 0)
    factor = _factor(args.model)
    image = None
    if args.init_image is not None:
        image = read_image(load_image, args.init_image)
        if args.size is None or isinstance(args.size, int):
            args.size = tuple(max(factor, side * (args.size or 1) // factor * factor) for side in image.size)
    if isinstance(args.size, int):
        raise CommandError(f"--size {args.size}x: only used with --init-image, of whose size it is a multiple")
    args.size = args.size or SIZE
    if args.mask is not None and image is not None:
        args.mask = _mask(args.mask, image.size)
    check_size(args.size, factor)
    if args.out is not None:
        check_target(args.out, args.size)
        if args.checkpoint_every is not None and args.checkpoint is None:
            raise CommandError("--checkpoint-every: only used with --checkpoint")
        _check_preview(args)
    if args.regions is not None:
        args.scene = _scene(args)
    return image


def _check_preview(args: argparse.Namespace) -> None:
    if args.preview_every is not None and args.preview is None:
        raise CommandError("--preview-every: only used with --preview")
    if args.preview is not None:
        args.preview = Preview(args.preview, args.preview_every or EVERY)
        for option, path in (("--out", args.out), ("--init-image", args.init_image)):
            if path is not None and args.preview.path.resolve() == path.resolve():
                raise CommandError(f"--preview {args.preview.path}: is {option}; give it another name")


def _mask(path: Path, size: tuple[int, int]) -> Image.Image:
    mask = read_image(load_image, path).convert("L")
    if mask.size != size:
        raise CommandError(f"--mask {path}: is {mask.width}x{mask.height} px, --init-image {size[0]}x{size[1]} px")
    if mask.getextrema()[1] < 128:
        raise CommandError(f"--mask {path}: nothing in it is white, so there is nothing to change")
    return mask


def _scene(args: argparse.Namespace) -> list[Region]:
    from tiledcore.compose.regions import scene_for

    try:
        width, height = args.size
        scene = scene_for(args.regions, width, height, ("y" in args.wrap, "x" in args.wrap))
    except OSError as error:
        raise CommandError(f"{args.regions}: cannot be read: {error.strerror or error}") from error
    seeds = [region for region in scene if region.seed is not None]
    if seeds and args.init_image is not None:
        raise CommandError(
            f"{args.regions}: seed={seeds[0].seed}: regions have no noise of their own with --init-image"
        )
    return scene


def _factor(model: str) -> int:
    """Pixels per latent pixel, as far as it can be told from a folder without opening the model."""
    folder = EMBEDDED.get(model, Path(model))
    if not folder.is_dir():
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
            raise CommandError(f"--model {model}: no such folder, and no name on the hub either")
        return VAE_FACTOR
    index = _json(folder / "model_index.json")
    if index is None:
        raise CommandError(f"--model {model}: there is no model_index.json in {folder}")
    if not {"unet", "transformer"} & set(index):
        raise CommandError(f"--model {model}: has neither a UNet nor a transformer, and cannot be tiled")
    vae = EARTH / "vae" if model in EMBEDDED else folder / "vae"
    levels = (_json(vae / "config.json") or {}).get("block_out_channels")
    return int(2 ** (len(levels) - 1)) if levels else VAE_FACTOR


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def check_size(size: tuple[int, int], factor: int) -> None:
    below = [max(factor, side // factor * factor) for side in size]
    above = [-(-side // factor) * factor for side in size]
    if above != list(size):
        raise CommandError(
            f"--size {size[0]}x{size[1]}: each side must be a multiple of {factor} px, such as "
            f"{below[0]}x{below[1]} or {above[0]}x{above[1]}"
        )


def read_image(reader: Callable[[Path], Any], path: Path) -> Any:
    try:
        return reader(path)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all of them on broken files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not an image"
        raise CommandError(f"{path}: cannot be read: {reason}") from error
