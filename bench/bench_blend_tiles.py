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
from bench.case import Case, Ready, relative_error, why_not
from tiledcore import ops, reference

# canvas side, tile side, stride, channels: latent pixels
IMPLS: tuple[ops.Impl, ...] = ("reference", "native", "triton")
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


def prepare(
    size: int,
    tile: int,
    stride: int,
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
    window: ops.Window = "ramp",
) -> Ready:
    line = starts(size, tile, stride)
    corners = [(y, x) for y in line for x in line]
    offsets = torch.tensor(corners, dtype=torch.int32)
    weighed = bytes_moved(offsets, tile, size, channels, window)
    moved = weighed * dtype.itemsize
    offsets = offsets.to(device)
    tiles = torch.randn(len(corners), channels, tile, tile, device=device).to(dtype)
    weight = torch.rand(tile, tile, device=device).to(dtype) + 0.1
    target = torch.empty_like(tiles)
    runs: dict[str, Callable[[], Tensor]] = {
        "copy": partial(target.copy_, tiles),
        "python loop": partial(python_loop, tiles, corners, size, weight),
    }
    bytes_of = {"copy": 2 * tiles.nbytes, "python loop": moved}
    missing: dict[str, str] = {}
    for impl in IMPLS:
        reason = why_not("blend_tiles", impl, device)
        if reason is not None:
            missing[impl] = reason
            continue
        runs[impl] = partial(ops.blend_tiles, tiles, offsets, (size, size), window=window, impl=impl)
        bytes_of[impl] = moved

    def errors() -> dict[str, float]:
        exact = reference.blend_tiles(tiles.double(), offsets, (size, size), window)
        return {impl: relative_error(runs[impl](), exact) for impl in IMPLS if impl in runs}

    flops = 2 * (weighed - channels * size * size)  # a product and a sum for each element that has weight
    return Ready(runs, "python loop", bytes_of, flops, errors, missing)


def cases() -> list[Case]:
    return [
        Case(
            "blend_tiles",
            f"{len(starts(size, tile, stride)) ** 2} tiles of {tile}x{tile}x{channels} on {size}x{size}",
            "reference.blend_tiles in float64",
            partial(prepare, size, tile, stride, channels),
            quick=size == 512,
        )
        for size, tile, stride, channels in CASES
    ]


def main() -> None:
    options = timing.parser(__doc__.split("\n")[0] if __doc__ else None)
    options.add_argument("--window", default="ramp", choices=ops.WINDOWS)
    args = options.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    print(timing.machine(device), args.dtype, args.window)
    rows = []
    for case in cases():
        ready = case.prepare(device, dtype, window=args.window)  # type: ignore[call-arg]
        seconds = timing.interleaved(ready.runs, device, args.rounds)
        rows += timing.report(case.shapes, seconds, ready.bytes, ready.baseline)
    timing.save(args.json, device, rows)


if __name__ == "__main__":
    main()
