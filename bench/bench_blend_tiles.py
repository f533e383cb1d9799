"""Cases of blend_tiles, against the loop over tiles of usual tiled-diffusion pipelines.

All are charged with the bytes that blending must move: every tile element with weight is read once and every canvas
element is written once. The loop moves much more.
"""

from functools import partial

import torch
from torch import Tensor

from bench.case import Case, Ready, implementations
from bench.measure import Run
from tiledcore import ops
from tiledcore.ops.reference import axis_weights

CASES = [(512, 128, 64, 4), (1024, 128, 96, 4), (512, 64, 48, 16)]
"""Canvas side, tile side, stride, channels; in latent pixels."""
if torch.cuda.is_available():
    CASES.append((2048, 128, 96, 4))


def starts(size: int, tile: int, stride: int) -> list[int]:
    """Where tiles start along an axis. The last one ends with the canvas."""
    return [*range(0, size - tile, stride), size - tile]


def grid(size: int, tile: int, stride: int) -> list[tuple[int, int]]:
    """Top left corners (y, x) of all tiles of a square canvas."""
    line = starts(size, tile, stride)
    return [(y, x) for y in line for x in line]


def python_loop(tiles: Tensor, corners: list[tuple[int, int]], size: int, weight: Tensor) -> Tensor:
    """Add up values and weights tile by tile, as diffusers' panorama pipeline does."""
    value = tiles.new_zeros(1, tiles.shape[1], size, size)
    count = torch.zeros_like(value)
    h, w = weight.shape
    for tile, (y, x) in zip(tiles, corners, strict=True):
        value[:, :, y : y + h, x : x + w] += weight * tile
        count[:, :, y : y + h, x : x + w] += weight
    return value / count


def elements_weighed(corners: list[tuple[int, int]], tile: int, size: int, channels: int, window: ops.Window) -> int:
    """Elements of the tiles whose weight is not zero: what blending must read."""
    rows, columns = (
        int((axis_weights(sorted({corner[axis] for corner in corners}), tile, size, window) > 0).sum())
        for axis in (0, 1)
    )
    return channels * rows * columns


def prepare(size: int, tile: int, stride: int, channels: int, device: torch.device, dtype: torch.dtype) -> Ready:
    corners = grid(size, tile, stride)
    offsets = torch.tensor(corners, dtype=torch.int32, device=device)
    tiles = torch.randn(len(corners), channels, tile, tile, device=device).to(dtype)
    weight = torch.rand(tile, tile, device=device).to(dtype) + 0.1
    blend = partial(ops.blend_tiles, offsets=offsets, canvas_size=(size, size), window="ramp")
    ours, missing = implementations("blend_tiles", partial(blend, tiles), device)
    target = torch.empty_like(tiles)
    runs: dict[str, Run] = {
        "copy": partial(target.copy_, tiles),
        "python loop": partial(python_loop, tiles, corners, size, weight),
        **ours,
    }
    weighed = elements_weighed(corners, tile, size, channels, "ramp")
    moved = (weighed + channels * size * size) * dtype.itemsize
    return Ready(
        runs,
        baseline="python loop",
        bytes=dict.fromkeys(runs, moved) | {"copy": 2 * tiles.nbytes},
        flops=2 * weighed,  # a product and a sum each
        expected=lambda: blend(tiles.double(), impl="reference"),
        others={"python loop": lambda: python_loop(tiles.double(), corners, size, weight.double())},
        not_run=missing,
    )


def cases() -> list[Case]:
    return [
        Case(
            "blend_tiles",
            f"{len(grid(size, tile, stride))} tiles of {tile}x{tile}x{channels} on {size}x{size}",
            "the reference in float64",
            partial(prepare, size, tile, stride, channels),
            quick=size == 512,
        )
        for size, tile, stride, channels in CASES
    ]
