"""Write image files from bands of rows, completely or not at all, without the whole image in memory.

PNG is encoded here, because Pillow and imagecodecs need the whole image and pypng is slow. TIFF is written by tifffile.
"""

import json
import os
import platform
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo, putchunk

from tiledcore import __version__

Band = NDArray[np.uint8]

# Pillow's JPEG and WebP encoders need the whole image, at 4 bytes per pixel: up to 256 MiB.
WHOLE_PIXELS = 8192 * 8192
# By extension: Pillow's format, and the longest side that the format can hold.
FORMATS = {
    ".png": ("PNG", 2**31 - 1),
    ".jpg": ("JPEG", 65_535),
    ".jpeg": ("JPEG", 65_535),
    ".webp": ("WEBP", 16_383),
    ".tif": ("TIFF", 2**31 - 1),
    ".tiff": ("TIFF", 2**31 - 1),
}
CHUNK = "tiledcore"
"""Keyword of the settings, which are JSON: of a PNG's text chunk, and in the JSON of a TIFF's description."""
TILE = 256
"""Rows that are written at a time, and side of a TIFF's tiles. Its last level is not larger than one."""
BUFFER = 1 << 24
"""Bytes of tiles that tifffile may collect to compress them in threads; its default is 256 MiB."""
LEVEL = 6  # zlib's default: a higher level takes twice the time and saves one per cent


def check_target(path: Path, size: tuple[int, int]) -> None:
    """Raise ValueError if an image of ``size`` (width, height) cannot be written to ``path``."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: the extension must be one of {', '.join(FORMATS)}")
    kind, longest = FORMATS[path.suffix.lower()]
    if max(size) > longest:
        raise ValueError(f"{path}: {kind} holds at most {longest} px a side, PNG and TIFF any size")
    if kind not in ("PNG", "TIFF") and size[0] * size[1] > WHOLE_PIXELS:
        raise ValueError(f"{path}: {kind} is only for up to 8192x8192 px, PNG and TIFF for any size")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if (path.exists() and not path.is_file()) or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: cannot be written: it is a folder, a device or a pipe, or its folder is protected")


def write_rows(path: Path, size: tuple[int, int], bands: Iterable[Band], metadata: dict[str, Any]) -> None:
    """Write an image from bands of rows; after an error ``path`` is as it was.

    PNG and TIFF need a few hundred rows in memory at a time; JPEG and WebP the whole image, 4 bytes per pixel. A TIFF
    is a BigTIFF of deflated RGB tiles of ``TILE`` px with a pyramid of reduced pages, each half of the one before.
    ``size`` is (width, height). ``bands`` are ``[rows, width, 3]`` uint8, any number of rows each, from top to bottom.
    ``metadata`` is stored in a PNG or TIFF as JSON; of a PNG, its ``prompt`` is the standard description too.

    Raises:
        OSError: it could not be written.
        ValueError: the bands do not add up to the size.
    """
    kind, _ = FORMATS[path.suffix.lower()]
    bands = _rebanded(bands, size)
    with replacing(path) as file:
        if kind == "PNG":
            _write_png(file, size, bands, metadata)
        elif kind == "TIFF":
            _write_tiff(file, size, bands, metadata, path.parent)
        else:
            image = Image.new("RGB", size)
            for index, band in enumerate(bands):
                image.paste(Image.fromarray(band), (0, index * TILE))
            image.save(file, format=kind, quality=95)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file for reading and writing; it replaces ``path`` when the block ends without an error.

    After an error ``path`` is as it was, and nothing else is left.
    """
    # In the same folder, because a rename is atomic only within one file system. Not made by tempfile, whose
    # files only their owner may read.
    start = f".tiledcore-{zlib.crc32(f'{platform.node()}/{path.name}'.encode(errors='surrogateescape')):08x}-"
    if os.name == "posix":  # on Windows os.kill(pid, 0) ends the process
        for stale in path.parent.glob(f"{start}*.tmp"):
            with suppress(ValueError, OverflowError, PermissionError):  # no number, or another user's process
                try:
                    os.kill(int(stale.stem.removeprefix(start)), 0)
                except ProcessLookupError:
                    stale.unlink(missing_ok=True)
    temporary = path.with_name(f"{start}{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _rebanded(bands: Iterable[Band], size: tuple[int, int]) -> Iterator[Band]:
    """The same rows, checked, in bands of ``TILE``; the last one may have fewer."""
    width, height = size
    rows, held = 0, np.empty((0, width, 3), np.uint8)
    for band in bands:
        rows += len(band)
        if band.shape[1:] != (width, 3) or band.dtype != np.uint8 or rows > height:
            raise ValueError(f"bands: {band.dtype} {list(band.shape)} up to row {rows} of an RGB image of {size}")
        held = np.concatenate([held, band]) if len(held) else band
        while len(held) >= TILE:
            yield held[:TILE]
            held = held[TILE:]
    if rows != height:
        raise ValueError(f"bands: {rows} rows, but the image has {height}")
    if len(held):
        yield held


def _write_png(file: IO[bytes], size: tuple[int, int], bands: Iterator[Band], metadata: dict[str, Any]) -> None:
    """PNG (ISO/IEC 15948): signature, header, texts, then one zlib stream over any number of IDAT chunks."""
    file.write(b"\x89PNG\r\n\x1a\n")
    putchunk(file, b"IHDR", struct.pack(">2I5B", *size, 8, 2, 0, 0, 0))  # 8 bits, RGB
    if metadata:
        texts = PngInfo()
        texts.add_text(CHUNK, json.dumps(metadata))
        texts.add_text("Description", metadata["prompt"])
        for name, data, *_ in texts.chunks:
            putchunk(file, name, data)
    packer = zlib.compressobj(LEVEL)
    above = np.zeros((1, 3 * size[0]), np.uint8)
    for band in bands:
        lines = band.reshape(len(band), -1)
        # Filter 2: each line minus the one above, modulo 256. On the embedded model's images the files are smaller
        # than with a filter chosen for each line.
        packed = np.full((len(lines), 1 + lines.shape[1]), 2, np.uint8)
        np.subtract(lines, np.concatenate([above, lines[:-1]]), out=packed[:, 1:])
        above = lines[-1:]
        if data := packer.compress(packed.data):
            putchunk(file, b"IDAT", data)
    putchunk(file, b"IDAT", packer.flush())
    putchunk(file, b"IEND")


def _write_tiff(
    file: IO[bytes], size: tuple[int, int], bands: Iterator[Band], metadata: dict[str, Any], folder: Path
) -> None:
    """Write the levels as pages, largest first, as libtiff, GDAL, OpenSlide and libvips read them.

    While one level is written, the next goes into a temporary file in ``folder``. It has no name, so that nothing is
    left of it if the process is killed.
    """
    import tifffile

    width, height = size
    more: dict[str, Any] = {"subfiletype": 0, "description": json.dumps({CHUNK: metadata})}
    more["software"] = f"tiledcore {__version__}"
    with tifffile.TiffWriter(file, bigtiff=True) as tiff, ExitStack() as spools:
        while True:
            below = spools.enter_context(TemporaryFile(dir=folder)) if max(width, height) > TILE else None
            tiff.write(
                _tiles(bands, below),
                shape=(height, width, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="rgb",
                compression="adobe_deflate",
                compressionargs={"level": LEVEL},
                predictor=True,
                metadata=None,
                buffersize=BUFFER,
                **more,
            )
            if below is None:
                return
            width, height = -(-width // 2), -(-height // 2)
            more = {"subfiletype": 1}  # a reduced version of another page
            bands = _spooled(below, width)


def _tiles(bands: Iterator[Band], below: IO[bytes] | None) -> Iterator[Band]:
    """Tiles row by row; also writes the halved image to ``below``: means of 2x2 pixels, rounded half up."""
    for band in bands:
        if below is not None:
            below.write(Image.fromarray(band).reduce(2).tobytes())
        for left in range(0, band.shape[1], TILE):
            yield np.ascontiguousarray(band[:, left : left + TILE])


def _spooled(spool: IO[bytes], width: int) -> Iterator[Band]:
    spool.seek(0)
    while data := spool.read(TILE * width * 3):
        yield np.frombuffer(data, np.uint8).reshape(-1, width, 3)
