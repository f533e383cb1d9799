"""Compute which patches of keys each patch of queries sees: integers in CSR form, once per geometry.

All queries of a tile have the same window, so there is one list of keys per tile.
"""

from itertools import product

import torch
from torch import Tensor

from tiledcore.utils import remembered

Pair = tuple[int, int]

SIDE_LIMIT = 1 << 15  # tokens: row and column of a patch share an int32


def cut_axis(size: int, tile: int, halo: int, wrap: bool, patch: int) -> list[list[Pair]]:
    """For each tile of one axis, the (start, length) of the patches of its window.

    A window that crosses the border of a wrapped axis is cut there, so that no patch crosses it; a window larger than
    the axis is the whole axis. Cuts start at the start of the window, which gives the fewest patches.
    """
    windows = []
    for start in range(0, size, tile):
        low, high = start - halo, min(start + tile, size) + halo
        if not wrap or high - low >= size:
            pieces = [(max(low, 0), min(high, size))] if not wrap else [(0, size)]
        elif low < 0:
            pieces = [(low + size, size), (0, high)]
        elif high > size:
            pieces = [(low, size), (0, high - size)]
        else:
            pieces = [(low, high)]
        window = []
        for begin, last in pieces:
            window += [(at, min(patch, last - at)) for at in range(begin, last, patch)]
        windows.append(window)
    return windows


@remembered
def patch_lists(
    canvas: Pair,
    tile: Pair,
    halo: Pair,
    wrap: tuple[bool, bool],
    query_patch: Pair,
    key_patch: Pair,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The two lists that the kernel reads, on the device.

    Returns:
        ``blocks [n, 8]`` int32, per patch of queries: first row and column, rows and columns inside its tile, the
        positions ``begin``, ``whole``, ``end`` in the second list, and the canvas width. Patches from ``begin`` to
        ``whole`` are completely inside the window, those from ``whole`` to ``end`` partly.
        ``patches [m, 2]`` int32: first row ``<< 16 |`` first column, valid rows ``<< 16 |`` valid columns.

    Raises:
        ValueError: the canvas has a side that does not fit.
    """
    if max(canvas) > SIDE_LIMIT:
        raise ValueError(f"canvas={canvas} is longer than the Triton kernel's {SIDE_LIMIT} tokens a side")
    key_rows, key_columns = (cut_axis(*axis) for axis in zip(canvas, tile, halo, wrap, key_patch, strict=True))
    # Queries have no halo, and are cut from the tile's corner.
    query_rows, query_columns = (
        cut_axis(size, t, 0, False, patch) for size, t, patch in zip(canvas, tile, query_patch, strict=True)
    )
    blocks, patches = list[tuple[int, ...]](), list[Pair]()
    for rows, window_rows in zip(query_rows, key_rows, strict=True):
        for columns, window_columns in zip(query_columns, key_columns, strict=True):
            seen = [((y << 16) | x, (h << 16) | w) for (y, h), (x, w) in product(window_rows, window_columns)]
            full = (key_patch[0] << 16) | key_patch[1]
            # sorted() is stable, so both the complete and the partial patches stay row-major.
            seen.sort(key=lambda patch: patch[1] != full)
            begin, whole = len(patches), len(patches) + sum(extent == full for _, extent in seen)
            patches += seen
            blocks += [(y, x, h, w, begin, whole, len(patches), canvas[1]) for (y, h), (x, w) in product(rows, columns)]
    # A copy from pageable memory is ordered with what runs on the device's current stream.
    return (
        torch.tensor(blocks, dtype=torch.int32).to(device),
        torch.tensor(patches, dtype=torch.int32).to(device),
    )
