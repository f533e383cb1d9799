"""Cases of blend_tiles, against the loop over tiles of usual tiled-diffusion pipelines.

All are charged with the bytes that blending must move: every tile element with weight is read once and every canvas
element is written once. The loop moves much more.
"""

from collections.abc import Iterator
from functools import partial

import torch

from bench.case import Case, Ready, implementations
from bench.measure import Run
from bench.windows import Corner, average, grid
from tiledcore import ops
from tiledcore.ops.reference import axis_weights

CASES = [(512, 128, 64, 4), (1024, 128, 96, 4), (512, 64, 48, 16)]
"""Canvas side, tile side, stride, channels; in latent pixels."""
if torch.cuda.is_available():
    CASES.append((2048, 128, 96, 4))


def elements_weighed(corners: list[Corner], tile: int, size: int, channels: int, window: ops.Window) -> int:
    """Elements of the tiles whose weight is not zero: what blending must read."""
    starts = ([*dict.fromkeys(axis)] for axis in zip(*corners, strict=True))
    rows, columns = (int((axis_weights(axis, tile, size, window) > 0).sum()) for axis in starts)
    return channels * rows * columns


def prepare(size: int, tile: int, stride: int, channels: int, device: torch.device, dtype: torch.dtype) -> Ready:
    corners = grid((size, size), tile, stride)
    offsets = torch.tensor(corners, dtype=torch.int32, device=device)
    tiles = torch.randn(len(corners), channels, tile, tile, device=device).to(dtype)
    weight = torch.rand(tile, tile, device=device).to(dtype) + 0.1
    blend = partial(ops.blend_tiles, offsets=offsets, canvas_size=(size, size), window="ramp")
    ours, missing = implementations("blend_tiles", partial(blend, tiles), device)
    target, like = torch.empty_like(tiles), tiles.new_empty(1, channels, size, size)
    loop = partial(average, tiles, corners, like, weight)
    runs: dict[str, Run] = {"copy": partial(target.copy_, tiles), "python loop": loop, **ours}
    weighed = elements_weighed(corners, tile, size, channels, "ramp")
    moved = (weighed + channels * size * size) * dtype.itemsize
    return Ready(
        runs,
        baseline="python loop",
        bytes=dict.fromkeys(runs, moved) | {"copy": 2 * tiles.nbytes},
        flops=2 * weighed,  # a product and a sum each
        expected=lambda: blend(tiles.double(), impl="reference"),
        others={"python loop": lambda: average(tiles.double(), corners, like.double(), weight.double())},
        not_run=missing,
    )


def cases() -> Iterator[Case]:
    for size, tile, stride, channels in CASES:
        shapes = f"{len(grid((size, size), tile, stride))} tiles of {tile}x{tile}x{channels} on {size}x{size}"
        run = partial(prepare, size, tile, stride, channels)
        yield Case("blend_tiles", shapes, "the reference in float64", run, quick=size == 512)
