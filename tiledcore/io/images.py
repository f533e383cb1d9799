"""Pictures: read any that Pillow opens as 8-bit RGB, write them, and read the settings stored in them."""

import json
import logging
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from tiledcore.io.writers import CHUNK

logger = logging.getLogger(__name__)

MOST_PIXELS = 2**30
"""Pixels of the largest picture that is read whole, 32768x32768: 3 GiB as RGB."""


class PictureError(ValueError):
    """A picture that cannot be read or used; the message says why."""


def check_regular(path: Path) -> None:
    """Raise OSError if ``path`` is not an ordinary file: to read a pipe or a device may never end."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder fails with a message of its own
        raise OSError(None, "Is a device or a pipe, not an ordinary file", str(path))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture in a file, without Pillow's limit of pixels: to it 16384x16384 is an attack."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        check_regular(path)
        with Image.open(path) as image:
            yield image
    except PictureError:
        raise
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's, of files that are damaged or no pictures
        raise PictureError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not an image'}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def load_image(path: Path, opaque: bool = False) -> Image.Image:
    """Read the first frame or page of a picture as RGB, rotated as its EXIF data says.

    Raises:
        PictureError: it is not there, not an ordinary file, not a picture, damaged, of more than :data:`MOST_PIXELS`,
            of colours that are not known, or ``opaque`` and has transparent pixels.
    """
    with _opened(path) as image:
        if image.width * image.height > MOST_PIXELS:
            raise PictureError(
                f"{path}: is {image.width}x{image.height} px; pictures are read up to {MOST_PIXELS:,} px (32768x32768)"
            )
        if image.format in ("GIF", "PNG", "WEBP", "AVIF") and getattr(image, "is_animated", False):
            logger.warning("%s: has several frames; the first one is used", path)
        return to_rgb(ImageOps.exif_transpose(image), str(path), opaque)


def to_rgb(image: Image.Image, name: str = "image", opaque: bool = False) -> Image.Image:
    """A PIL picture as 8-bit RGB; ``name`` is what messages call it.

    16 bits are scaled to 8, floats from 0..1. Transparent pixels are drawn on white, with a warning; not if ``opaque``.

    Raises:
        PictureError: other floats, integers of more than 16 bits, or colours that Pillow does not convert.
    """
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(image, name)).convert("RGB")
    if image.mode in ("LAB", "La"):
        raise PictureError(f"{name}: has colours of mode {image.mode}; convert it to RGB first")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image)[..., 3].min() < 255:
            if opaque:
                raise PictureError(f"{name}: has transparent pixels; make it white where to change, else black")
            logger.warning("%s: has transparent pixels, which are drawn on white", name)
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """Grey values of modes ``I``, ``I;16`` and ``F`` as uint8 ``[H, W]``."""
    values = np.asarray(image).astype(np.float64)
    white = 1 if image.mode == "F" else 65535
    low, high = float(values.min()), float(values.max())
    small = image.mode == "I" and high < 256  # 8 or 16 bits in 32: white is not known
    if small or not (low >= 0 and high <= white):  # also where one is not a number
        raise PictureError(f"{name}: has values from {low:g} to {high:g}; convert it to 8 or 16 bits a channel first")
    return np.asarray(np.rint(values * (255 / white)), np.uint8)


def read_metadata(path: Path) -> dict[str, Any] | None:
    """The settings that ``write_rows`` stored in a file, or None; a PictureError where there is no picture."""
    with _opened(path) as image:
        tags = getattr(image, "tag_v2", None)  # of a TIFF
        text: Any = image.info.get(CHUNK) if tags is None else tags.get(ExifTags.Base.ImageDescription)
    try:
        metadata = json.loads(text) if tags is None else json.loads(text)[CHUNK]
    except (TypeError, ValueError, LookupError):
        return None
    return metadata if isinstance(metadata, dict) else None
