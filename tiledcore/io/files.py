"""Files: which formats can be written, and how a file is written completely or not at all."""

from __future__ import annotations

import os
import platform
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

# Pillow's JPEG and WebP encoders need the whole image, at 4 bytes per pixel: up to 256 MiB.
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
    """Raise ValueError if an image of ``size`` (width, height) cannot be written to ``path``."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: the extension must be one of {', '.join(FORMATS)}")
    kind, _, longest = FORMATS[path.suffix.lower()]
    if max(size) > longest:
        raise ValueError(f"{path}: {kind} holds at most {longest} px a side, PNG and TIFF any size")
    if kind not in ("PNG", "TIFF") and size[0] * size[1] > WHOLE_PIXELS:
        raise ValueError(f"{path}: {kind} is only for up to 8192x8192 px, PNG and TIFF for any size")
    check_replaceable(path)


def check_replaceable(path: Path) -> None:
    """Raise ValueError if :func:`replacing` cannot write ``path``: its folder, or what is there already."""
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: cannot be written, it is a folder or lies in a protected one")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is a device or a pipe; give the name of an ordinary file")


def check_regular(path: Path) -> None:
    """Raise OSError if ``path`` is not an ordinary file: to read a pipe or a device may never end."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder fails with a message of its own
        raise OSError(None, "Is a device or a pipe, not an ordinary file", str(path))


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file for reading and writing; it replaces ``path`` when the block ends without an error.

    Raises:
        OSError: it could not be written. After any error ``path`` is as it was, and nothing else is left.
    """
    # In the same folder, because a rename is atomic only within one file system. Not made by tempfile, whose
    # files only their owner may read.
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
    """Remove the temporary files of one target whose process has ended."""
    if os.name != "posix":  # on Windows os.kill(pid, 0) ends the process
        return
    for path in folder.glob(f"{start}*.tmp"):
        with suppress(ValueError, OverflowError, PermissionError):  # no number, or another user's process
            try:
                os.kill(int(path.stem.removeprefix(start)), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
