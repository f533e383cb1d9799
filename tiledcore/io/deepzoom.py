"""Deep zoom: a picture of any size as tiles of 256x256 px on several levels.

Level 0 is the picture; each next level has half the size, down to a single tile.
"""

from itertools import pairwise
from pathlib import Path
from threading import RLock
from typing import Any, Self

import numpy as np
import tifffile
from PIL import Image

from tiledcore.io.images import load_image
from tiledcore.io.writers import TILE, Band


class Levels:
    """The tiles of one picture, for several threads; a context manager that closes the file.

    A TIFF with these levels as its pages (:func:`tiledcore.io.writers.write_rows`) is never read whole. Any other
    picture that Pillow opens is decoded once and needs 5.3 bytes of memory per pixel.

    Raises:
        OSError, ValueError: it cannot be read, or is not a picture.
    """

    def __init__(self, path: Path) -> None:
        self._lock = RLock()
        self.pages = _pyramid(path)
        self._images: list[Image.Image] = []
        if not self.pages:
            self._images = [load_image(path)]
            while max(self._images[-1].size) > TILE:
                self._images.append(self._images[-1].reduce(2))
        #: (width, height) of each level.
        self.sizes = [(p.imagewidth, p.imagelength) for p in self.pages] or [image.size for image in self._images]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pages:
            self.pages[0].parent.close()

    def tile(self, level: int, x: int, y: int) -> Band:
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
        left, top = x * TILE, y * TILE
        if self._images:
            whole = np.asarray(self._images[level].crop((left, top, left + TILE, top + TILE)))
        else:
            page, index = self.pages[level], y * columns + x
            place = [page.dataoffsets[index]], [page.databytecounts[index]]
            data, _ = next(page.parent.filehandle.read_segments(*place, lock=self._lock))
            try:
                whole = page.decode(data, index)[0][0]
            except Exception as error:  # each decompressor has its own
                raise ValueError(f"tile ({x}, {y}) of level {level}: {error}") from error
        return whole[: height - top, : width - left]


def _pyramid(path: Path) -> list[Any]:
    """The pages of a TIFF, each RGB in tiles of 256x256 and half the size of the one before; [] for any other file."""
    try:
        tiff = tifffile.TiffFile(path)
    except tifffile.TiffFileError:
        return []
    pages: list[Any] = list(tiff.pages)
    sizes = [(page.imagewidth, page.imagelength) for page in pages]
    halved = all(below == (-(-width // 2), -(-height // 2)) for (width, height), below in pairwise(sizes))
    plain = all(
        (page.dtype, page.samplesperpixel, page.planarconfig, page.photometric) == (np.uint8, 3, 1, 2)
        and (page.is_tiled, page.tilewidth, page.tilelength) == (True, TILE, TILE)
        for page in pages
    )
    if pages and halved and plain and max(sizes[-1]) <= TILE:
        return pages
    tiff.close()
    return []
