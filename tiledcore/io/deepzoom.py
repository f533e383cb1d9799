"""Deep zoom: a picture of any size as tiles of 256x256 px on several levels.

Level 0 is the picture; each next level has half the size, down to a single tile.
"""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tiledcore.io.files import check_regular
from tiledcore.io.images import load_image
from tiledcore.io.writers import TILE

Pixels = NDArray[np.uint8]

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class Levels:
    """The tiles of one picture, for several threads; a context manager that closes the file.

    A TIFF with these levels as its pages (:func:`tiledcore.io.writers.write_rows`) is never read whole. Any other
    picture is decoded once and needs 5.3 bytes of memory per pixel.

    Args:
        path: any picture that Pillow opens.

    Raises:
        OSError, ValueError, SyntaxError: it cannot be read, or is not a picture.
    """

    def __init__(self, path: Path) -> None:
        self._lock = Lock()
        self._tiff: Any = None
        self._pages: list[Any] = []
        self._images: list[Image.Image] = []
        check_regular(path)
        with path.open("rb") as file:
            tiff = file.read(4) in TIFF_MAGIC
        if tiff:
            self._open_pages(path)
        if not self._pages:
            self._images = _halvings(load_image(path))
        #: (width, height) of each level.
        self.sizes = [(p.imagewidth, p.imagelength) for p in self._pages] or [image.size for image in self._images]

    def __enter__(self) -> Levels:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._tiff is not None:
            self._tiff.close()
            self._tiff = None

    @property
    def pyramid(self) -> bool:
        """Whether tiles are read from the file's own pages."""
        return bool(self._pages)

    def tile(self, level: int, x: int, y: int) -> Pixels:
        """The tile in column ``x`` and row ``y``: uint8 ``[h, w, 3]``, smaller than 256x256 at the last row and column.

        Raises:
            IndexError: there is no such tile.
            OSError, ValueError: the file is damaged there.
        """
        if not 0 <= level < len(self.sizes):
            raise IndexError(f"level {level} of {len(self.sizes)}")
        width, height = self.sizes[level]
        columns, rows = -(-width // TILE), -(-height // TILE)
        if not (0 <= x < columns and 0 <= y < rows):
            raise IndexError(f"tile ({x}, {y}) of {columns}x{rows}")
        w, h = min(TILE, width - x * TILE), min(TILE, height - y * TILE)
        if self._images:
            return np.asarray(self._images[level].crop((x * TILE, y * TILE, x * TILE + w, y * TILE + h)))
        page, index = self._pages[level], y * columns + x
        with self._lock:
            file = page.parent.filehandle
            file.seek(page.dataoffsets[index])
            data = file.read(page.databytecounts[index])
        try:
            decoded = page.decode(data, index)[0]
        except Exception as error:  # each decompressor has its own
            raise ValueError(f"tile ({x}, {y}) of level {level}: {error}") from error
        if decoded is None:
            raise ValueError(f"tile ({x}, {y}) of level {level}: there is nothing in the file")
        pixels: Pixels = decoded[0, :h, :w]
        return pixels

    def _open_pages(self, path: Path) -> None:
        import tifffile

        tiff = tifffile.TiffFile(path)
        pages = list(tiff.pages)
        if _is_pyramid(pages):
            self._tiff, self._pages = tiff, pages
        else:
            tiff.close()


def _is_pyramid(pages: list[Any]) -> bool:
    """Whether each page is RGB in tiles of 256x256 and half the size of the page before, down to one tile."""
    above: tuple[int, int] | None = None
    for page in pages:
        size = (page.imagewidth, page.imagelength)
        plain = (
            page.dtype == np.uint8 and page.samplesperpixel == 3 and page.planarconfig == 1 and page.photometric == 2
        )
        halved = above is None or size == (-(-above[0] // 2), -(-above[1] // 2))
        if not (plain and halved and page.is_tiled and (page.tilewidth, page.tilelength) == (TILE, TILE)):
            return False
        above = size
    return above is not None and max(above) <= TILE


def _halvings(image: Image.Image) -> list[Image.Image]:
    images = [image]
    while max(images[-1].size) > TILE:
        images.append(images[-1].reduce(2))
    return images
