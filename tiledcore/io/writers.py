"""Write PNG and TIFF from bands of rows, so that the whole image is never in memory.

PNG is encoded here, because Pillow and imagecodecs need the whole image and pypng is slow. TIFF is written by tifffile.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tiledcore import __version__
from tiledcore.io.files import FORMATS, replacing

Band = NDArray[np.uint8]

CHUNK = "tiledcore"
"""Keyword of the settings, which are JSON: of a PNG's text chunk, and in the JSON of a TIFF's description."""
TILE = 256
"""Side of a TIFF's tiles. Its last level is not larger than one."""
BUFFER = 1 << 24
"""Bytes of tiles that tifffile may collect to compress them in threads; its default is 256 MiB."""
LEVEL = 6  # zlib's default: a higher level takes twice the time and saves one per cent


def write_rows(path: Path, size: tuple[int, int], bands: Iterator[Band], metadata: dict[str, Any]) -> None:
    """Write an image from bands of rows; after an error ``path`` is as it was.

    PNG and TIFF need a few hundred rows in memory at a time; JPEG and WebP the whole image, 4 bytes per pixel. A TIFF
    is a BigTIFF of deflated RGB tiles of ``TILE`` px with a pyramid of reduced pages, each half of the one before.

    Args:
        path: its extension is one of :data:`tiledcore.io.files.FORMATS`.
        size: width and height.
        bands: ``[rows, width, 3]`` uint8, any number of rows each, from top to bottom.
        metadata: stored in a PNG or TIFF as JSON; of a PNG, its ``prompt`` is the standard description too.

    Raises:
        OSError: it could not be written.
        ValueError: the bands do not add up to the size.
    """
    kind, options, _ = FORMATS[path.suffix.lower()]
    bands = _checked(bands, size)
    with replacing(path) as file:
        if kind == "PNG":
            _write_png(file, size, bands, metadata)
        elif kind == "TIFF":
            _write_tiff(file, size, bands, metadata, path.parent)
        else:
            image, top = Image.new("RGB", size), 0
            for band in bands:
                image.paste(Image.fromarray(band), (0, top))
                top += len(band)
            image.save(file, format=kind, **options)


def _checked(bands: Iterator[Band], size: tuple[int, int]) -> Iterator[Band]:
    width, height = size
    rows = 0
    for band in bands:
        rows += len(band)
        if band.shape[1:] != (width, 3) or band.dtype != np.uint8 or rows > height:
            raise ValueError(f"bands: {band.dtype} {list(band.shape)} up to row {rows} of an RGB image of {size}")
        yield band
    if rows != height:
        raise ValueError(f"bands: {rows} rows, but the image has {height}")


def _rebanded(bands: Iterator[Band], rows: int) -> Iterator[Band]:
    """The same rows in bands of ``rows``; the last one may have fewer."""
    held: list[Band] = []
    count = 0
    for band in bands:
        while len(band):
            part, band = band[: rows - count], band[rows - count :]
            held.append(part)
            count += len(part)
            if count == rows:
                yield np.concatenate(held)
                held, count = [], 0
    if held:
        yield np.concatenate(held)


# ----------------------------------------------------------------------------- PNG


def _write_png(file: IO[bytes], size: tuple[int, int], bands: Iterator[Band], metadata: dict[str, Any]) -> None:
    """PNG (ISO/IEC 15948): signature, header, texts, then one zlib stream over any number of IDAT chunks."""

    def chunk(name: bytes, data: bytes) -> None:
        file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))

    file.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">2I5B", *size, 8, 2, 0, 0, 0))  # 8 bits, RGB
    if metadata:
        texts = PngInfo()
        texts.add_text(CHUNK, json.dumps(metadata))
        texts.add_text("Description", metadata["prompt"])
        for name, data, *_ in texts.chunks:
            chunk(name, data)
    packer = zlib.compressobj(LEVEL)
    above = np.zeros((1, 3 * size[0]), np.uint8)
    for band in _rebanded(bands, 64):  # 64 rows of 16384 px are 3 MiB
        lines = band.reshape(len(band), -1)
        # Filter 2: each line minus the one above, modulo 256. On the embedded model's images the files are smaller
        # than with a filter chosen for each line.
        packed = np.empty((len(lines), 1 + lines.shape[1]), np.uint8)
        packed[:, 0] = 2
        np.subtract(lines[:1], above, out=packed[:1, 1:])
        np.subtract(lines[1:], lines[:-1], out=packed[1:, 1:])
        above = lines[-1:].copy()
        data = packer.compress(packed.data)
        if data:
            chunk(b"IDAT", data)
    chunk(b"IDAT", packer.flush())
    chunk(b"IEND", b"")


# ----------------------------------------------------------------------------- TIFF


def _write_tiff(
    file: IO[bytes], size: tuple[int, int], bands: Iterator[Band], metadata: dict[str, Any], folder: Path
) -> None:
    """Write the levels as pages, largest first, as libtiff, GDAL, OpenSlide and libvips read them.

    While one level is written, the next goes into a temporary file in ``folder``. It has no name, so that nothing is
    left of it if the process is killed.
    """
    import tifffile

    (width, height), first = size, True
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
                subfiletype=0 if first else 1,  # 1: a reduced version of another page
                description=json.dumps({CHUNK: metadata}) if first else None,
                software=f"tiledcore {__version__}" if first else None,
                metadata=None,
                buffersize=BUFFER,
            )
            if below is None:
                return
            width, height, first = -(-width // 2), -(-height // 2), False
            bands = _spooled(below, width, height)


def _tiles(bands: Iterator[Band], below: IO[bytes] | None) -> Iterator[Band]:
    """Tiles row by row; also writes the halved image to ``below``: means of 2x2 pixels, rounded half up."""
    for band in _rebanded(bands, TILE):
        if below is not None:
            below.write(Image.fromarray(band).reduce(2).tobytes())
        for left in range(0, band.shape[1], TILE):
            yield np.ascontiguousarray(band[:, left : left + TILE])


def _spooled(spool: IO[bytes], width: int, height: int) -> Iterator[Band]:
    spool.seek(0)
    for top in range(0, height, TILE):
        rows = min(TILE, height - top)
        yield np.frombuffer(spool.read(rows * width * 3), np.uint8).reshape(rows, width, 3)
