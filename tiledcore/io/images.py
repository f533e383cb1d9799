"""Image files: written whole or not at all, PNG and TIFF with the settings that made them."""

from __future__ import annotations

import json
import os
import platform
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo

#: Keyword of the PNG text chunk that holds the settings, as JSON. In a TIFF, the key in its description's JSON.
CHUNK = "tiledcore"

# Pillow's JPEG and WebP encoders take the image whole, at 4 bytes per pixel: up to 256 MiB.
WHOLE_PIXELS = 8192 * 8192
# By extension: Pillow's format, its options, and the longest side that the format can hold.
FORMATS: dict[str, tuple[str, dict[str, Any], int]] = {
    ".png": ("PNG", {}, 2**31 - 1),
    ".jpg": ("JPEG", {"quality": 95}, 65_535),
    ".jpeg": ("JPEG", {"quality": 95}, 65_535),
    ".webp": ("WEBP", {"quality": 95}, 16_383),
    ".tif": ("TIFF", {}, 2**31 - 1),
    ".tiff": ("TIFF", {}, 2**31 - 1),
}


def check_target(path: Path, size: tuple[int, int]) -> None:
    """Raise ValueError now if :func:`save_image` could not write ``size`` (width, height) later."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: the extension must be one of {', '.join(FORMATS)}")
    kind, _, longest = FORMATS[path.suffix.lower()]
    if max(size) > longest:
        raise ValueError(f"{path}: {kind} holds at most {longest} px a side, PNG and TIFF any size")
    if kind not in ("PNG", "TIFF") and size[0] * size[1] > WHOLE_PIXELS:
        raise ValueError(f"{path}: {kind} is only for up to 8192x8192 px, PNG and TIFF for any size")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: cannot be written, it is a folder or lies in a protected one")


def save_image(image: Image.Image, path: Path, metadata: dict[str, Any]) -> None:
    """Write an image so that ``path`` is either untouched or complete, whatever happens meanwhile.

    Args:
        image: the image.
        path: its extension is one of ``FORMATS``.
        metadata: stored in a PNG (with ``metadata["prompt"]`` as its standard description) or TIFF; the
            other formats are written without.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    kind, options, _ = FORMATS[path.suffix.lower()]
    if kind == "TIFF":
        import numpy as np

        from tiledcore.io.writers import write_rows

        write_rows(path, image.size, iter([np.asarray(image.convert("RGB"))]), metadata)
        return
    if kind == "PNG":
        options = {"pnginfo": png_texts(metadata)}
    with replacing(path) as file:
        image.save(file, format=kind, **options)


def png_texts(metadata: dict[str, Any]) -> PngInfo:
    """The text chunks of a PNG."""
    info = PngInfo()
    info.add_text(CHUNK, json.dumps(metadata))
    info.add_text("Description", metadata["prompt"])
    return info


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file, open to be written and read, that takes the place of ``path`` once it is complete.

    Raises:
        OSError: as writing raises it; then, or on any other error inside, ``path`` is as it was and
            nothing else is left behind. What a killed process of this machine left of the same target is removed.
    """
    # In the same folder, for only within one file system a rename replaces a file in one go. Opened
    # here rather than by tempfile, whose files only their owner may read.
    target = zlib.crc32(f"{platform.node()}/{path.name}".encode(errors="surrogateescape"))
    _remove_stale(path.parent, f".tiledcore-{target:08x}-")
    temporary = path.with_name(f".tiledcore-{target:08x}-{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_stale(folder: Path, start: str) -> None:
    """Remove the temporary files of one target whose process is gone."""
    if os.name != "posix":  # elsewhere the question whether a process lives may end it
        return
    name = re.compile(re.escape(start) + r"([1-9][0-9]{0,8})\.tmp")
    with suppress(OSError):  # not ours, or a folder that cannot be listed: as good as without
        for path in folder.iterdir():
            if (found := name.fullmatch(path.name)) is not None:
                try:
                    os.kill(int(found[1]), 0)
                except ProcessLookupError:
                    path.unlink(missing_ok=True)
                except PermissionError:  # it lives, and is another user's
                    continue


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    return image.convert("RGB")


def load_image(path: Path) -> Image.Image:
    """Read an image of any size as RGB, turned as its EXIF says.

    Raises:
        OSError: it is not there, not an image that Pillow knows, or damaged.
    """
    with _any_size(), Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def read_metadata(path: Path) -> dict[str, Any] | None:
    """The settings that :func:`save_image` stored, or None where there are none.

    Raises:
        OSError: it is not there, or not an image that Pillow knows.
    """
    with _any_size(), Image.open(path) as image:
        tagged = image.format == "TIFF"
        if tagged:
            text = getattr(image, "tag_v2", {}).get(ExifTags.Base.ImageDescription)
        else:
            text = image.info.get(CHUNK)
    try:
        metadata = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None
    if tagged and isinstance(metadata, dict):
        metadata = metadata.get(CHUNK)
    return metadata if isinstance(metadata, dict) else None


def readable(key: str, value: Any) -> str:
    """A setting for people, on one line; ``key`` says what it is."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "wrap" and isinstance(value, list):
        return "".join(axis for axis, on in zip("xy", value[::-1], strict=False) if on) or "no"
    if isinstance(value, list):
        return ("x" if key in ("size", "tile", "overlap", "halo") else " ").join(map(str, value)) or "-"
    return str(value)


@contextmanager
def _any_size() -> Iterator[None]:
    """Pillow refuses 16384x16384 as a decompression bomb; here that is an ordinary size."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
