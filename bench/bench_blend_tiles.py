"""blend_tiles against the loop that tiled-diffusion pipelines use, in time and in bytes moved.

Bytes are predicted, not counted: each tile element that has weight is read once and each canvas
element is written once. The loop reads and writes much more; it is charged with the same bytes, so
its share of the copy's bandwidth says how far from necessary it is.

    python -m bench.bench_blend_tiles [--device cuda] [--dtype float16] [--json out.json]
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench import timing
from tiledcore import ops, reference

# canvas side, tile side, stride, channels: latent pixels
CASES = [(512, 128, 64, 4), (1024, 128, 96, 4), (512, 64, 48, 16)]


def starts(size: int, extent: int, stride: int) -> list[int]:
    return [*range(0, size - extent, stride), size - extent]


def python_loop(tiles: Tensor, corners: list[tuple[int, int]], size: int, weight: Tensor) -> Tensor:
    """Accumulate value and count tile by tile, as diffusers' panorama pipeline does."""
    value = tiles.new_zeros(1, tiles.shape[1], size, size)
    count = torch.zeros_like(value)
    h, w = weight.shape
    for tile, (y, x) in zip(tiles, corners, strict=True):
        value[:, :, y : y + h, x : x + w] += weight * tile
        count[:, :, y : y + h, x : x + w] += weight
    return value / count


def bytes_moved(offsets: Tensor, tile: int, size: int, channels: int, window: ops.Window) -> int:
    """Elements that blending must read and write, times one byte."""
    ys, xs = sorted(set(offsets[:, 0].tolist())), sorted(set(offsets[:, 1].tolist()))
    rows = int((reference.axis_weights(ys, tile, size, window) > 0).sum())
    columns = int((reference.axis_weights(xs, tile, size, window) > 0).sum())
    return channels * (rows * columns + size * size)


def main() -> None:
    options = timing.parser(__doc__.split("\n")[0] if __doc__ else None)
    options.add_argument("--window", default="ramp", choices=ops.WINDOWS)
    args = options.parse_args()
    device, dtype, window = torch.device(args.device), getattr(torch, args.dtype), args.window
    print(timing.machine(device), args.dtype, window)
    rows = []
    for size, tile, stride, channels in CASES:
        line = starts(size, tile, stride)
        corners = [(y, x) for y in line for x in line]
        offsets = torch.tensor(corners, dtype=torch.int32)
        moved = bytes_moved(offsets, tile, size, channels, window) * dtype.itemsize
        offsets = offsets.to(device)
        tiles = torch.randn(len(corners), channels, tile, tile, device=device).to(dtype)
        weight = torch.rand(tile, tile, device=device).to(dtype) + 0.1
        target = torch.empty_like(tiles)
        candidates: dict[str, Callable[[], Tensor]] = {
            "copy": partial(target.copy_, tiles),
            "python loop": partial(python_loop, tiles, corners, size, weight),
        }
        bytes_of = {"copy": 2 * tiles.nbytes, "python loop": moved}
        implementations: tuple[ops.Impl, ...] = ("reference", "native", "triton")
        for impl in implementations:
            if ops.unavailable("blend_tiles", impl, device) is None:
                candidates[impl] = partial(ops.blend_tiles, tiles, offsets, (size, size), window=window, impl=impl)
                bytes_of[impl] = moved
        seconds = timing.interleaved(candidates, device, args.rounds)
        case = f"{len(corners)} tiles of {tile}x{tile}x{channels} on {size}x{size}"
        rows += timing.report(case, seconds, bytes_of, "python loop")
    timing.save(args.json, device, rows)


if __name__ == "__main__":
    main()
