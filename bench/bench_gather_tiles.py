"""Cases of gather_tiles, against slicing tile by tile and concatenating."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.bench_blend_tiles import CASES
from bench.case import Case, Ready, implementations
from bench.measure import Run
from bench.windows import cut, grid
from tiledcore import ops


def prepare(size: int, tile: int, stride: int, channels: int, device: torch.device, dtype: torch.dtype) -> Ready:
    corners = grid((size, size), tile, stride)
    offsets = torch.tensor(corners, dtype=torch.int32, device=device)
    canvas = torch.randn(1, channels, size, size, device=device).to(dtype)
    tiles = torch.empty(len(corners), channels, tile, tile, device=device, dtype=dtype)
    gather = partial(ops.gather_tiles, canvas, offsets, (tile, tile))
    ours, missing = implementations("gather_tiles", gather, device)
    loop = partial(cut, canvas, corners, tile)
    runs: dict[str, Run] = {"copy": tiles.clone, "python loop": loop, **ours}
    # The canvas is read once from memory and then from the cache; the tiles are written once.
    moved = dict.fromkeys(runs, canvas.nbytes + tiles.nbytes) | {"copy": 2 * tiles.nbytes}
    return Ready(runs, "python loop", moved, expected=loop, not_run=missing)


def cases() -> Iterator[Case]:
    for size, tile, stride, channels in CASES:
        shapes = f"{len(grid((size, size), tile, stride))} tiles of {tile}x{tile}x{channels} from {size}x{size}"
        yield Case("gather_tiles", shapes, "slices", partial(prepare, size, tile, stride, channels), size == 512)
