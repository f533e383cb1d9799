"""Pictures: read any that Pillow opens as 8-bit RGB, write them, and read the settings stored in them."""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import ExifTags, Image, ImageOps

from tiledcore.io.writers import CHUNK, write_rows

logger = logging.getLogger(__name__)

MOST_PIXELS = 2**30
"""Pixels of the largest picture that is read whole, 32768x32768: 3 GiB as RGB."""


class PictureError(ValueError):
    """A picture that is read without fault but cannot be used; the message says why."""


def load_image(path: Path) -> Image.Image:
    """Read the first frame or page of a picture as RGB, rotated as its EXIF data says; errors as in :func:`opened`."""
    with opened(path) as image:
        return to_rgb(image, str(path))


def check_regular(path: Path) -> None:
    """Raise OSError if ``path`` is not an ordinary file: to read a pipe or a device may never end."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder fails with a message of its own
        raise OSError(None, "Is a device or a pipe, not an ordinary file", str(path))


@contextmanager
def _unlimited(path: Path) -> Iterator[Image.Image]:
    """The picture in a file, without Pillow's limit of pixels: to it 16384x16384 is an attack."""
    check_regular(path)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The picture in a file as Pillow opens it, rotated as its EXIF data says.

    Raises:
        OSError: not there, not an ordinary file, not a picture, or damaged.
        PictureError: more than :data:`MOST_PIXELS`.
    """
    with _unlimited(path) as image:
        if image.width * image.height > MOST_PIXELS:
            raise PictureError(
                f"{path}: is {image.width}x{image.height} px; pictures are read up to {MOST_PIXELS:,} px (32768x32768)"
            )
        if image.format in ("GIF", "PNG", "WEBP", "AVIF") and getattr(image, "is_animated", False):
            logger.warning("%s: has several frames; the first one is used", path)
        rotated = ImageOps.exif_transpose(image)
        rotated.format = image.format  # a rotated copy has none
        yield rotated


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """A PIL picture of any mode as 8-bit RGB; ``name`` is what messages call it.

    16 bits are scaled to 8. Floats are scaled from 0..1, or taken as they are where they go up to 255. Transparent
    pixels are drawn on white, with a warning.

    Raises:
        PictureError: integers or floats outside of these ranges, so that white is not known.
    """
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(image, name)).convert("RGB")
    if is_transparent(image):
        logger.warning("%s: has transparent pixels, which are drawn on white", name)
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, _plain(image).convert("RGBA")).convert("RGB")
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return cast(Image.Image, ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB"))
    return _plain(image).convert("RGB")


def is_transparent(image: Image.Image) -> bool:
    """Whether a picture of any mode has pixels that are not opaque."""
    if not image.has_transparency_data or image.mode.startswith(("I", "F")):  # Pillow cannot apply theirs
        return False
    return bool(np.asarray(_plain(image).convert("RGBA"))[..., 3].min() < 255)


def _plain(image: Image.Image) -> Image.Image:
    """Modes with premultiplied alpha must become plain ones before any other conversion."""
    return image.convert(image.mode.upper()) if image.mode in ("La", "RGBa") else image


def _eight_bits(image: Image.Image, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Grey values of modes ``I``, ``I;16`` and ``F`` as uint8 ``[H, W]``."""
    values = np.asarray(image).astype(np.float64)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if image.mode == "F":
        white = 1 if high <= 1 else 255
    else:  # Pillow opens some 16-bit files as 32 bits
        sixteen = image.mode != "I" or image.format in ("PNG", "PPM") or high > 255
        white = 65535 if sixteen else 255
    if not (low >= 0 and high <= white):  # also where one is not a number
        raise PictureError(f"{name}: has values from {low:g} to {high:g}; convert it to 8 or 16 bits a channel first")
    return np.asarray(np.rint(values * (255 / white)), np.uint8)


def save_image(image: Image.Image, path: Path, metadata: dict[str, Any]) -> None:
    """:func:`~tiledcore.io.writers.write_rows` for a picture that is there whole."""
    write_rows(path, image.size, [np.asarray(image.convert("RGB"))], metadata)


def read_metadata(path: Path) -> dict[str, Any] | None:
    """The settings that :func:`save_image` stored, or None; an OSError where there is no picture."""
    with _unlimited(path) as image:
        tags = getattr(image, "tag_v2", None)  # of a TIFF
        text: Any = image.info.get(CHUNK) if tags is None else tags.get(ExifTags.Base.ImageDescription)
    try:
        metadata = json.loads(text) if tags is None else json.loads(text)[CHUNK]
    except (TypeError, ValueError, LookupError):
        return None
    return metadata if isinstance(metadata, dict) else None


def readable(key: str, value: Any) -> str:
    """One setting as text on one line; ``key`` is its name."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "wrap" and isinstance(value, list):
        return "".join(axis for axis, on in zip("xy", value[::-1], strict=False) if on) or "no"
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {readable(name, item)}" for name, item in value.items())
    if isinstance(value, list):
        return ("x" if key in ("size", "tile", "overlap", "halo") else " ").join(map(str, value)) or "-"
    return str(value)
