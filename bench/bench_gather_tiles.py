"""gather_tiles against slicing tile by tile and concatenating, in time and in bytes moved.

python -m bench.bench_gather_tiles [--device cuda] [--dtype float16] [--json out.json]
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench import timing
from bench.bench_blend_tiles import CASES, IMPLS, starts
from bench.case import Case, Ready, relative_error, why_not
from tiledcore import ops


def python_loop(canvas: Tensor, corners: list[tuple[int, int]], tile: int) -> Tensor:
    """One slice a tile, as pipelines that loop over views do; no wrapping."""
    return torch.cat([canvas[:, :, y : y + tile, x : x + tile] for y, x in corners])


def prepare(size: int, tile: int, stride: int, channels: int, device: torch.device, dtype: torch.dtype) -> Ready:
    line = starts(size, tile, stride)
    corners = [(y, x) for y in line for x in line]
    offsets = torch.tensor(corners, dtype=torch.int32, device=device)
    canvas = torch.randn(1, channels, size, size, device=device).to(dtype)
    tiles = torch.randn(len(corners), channels, tile, tile, device=device).to(dtype)
    runs: dict[str, Callable[[], Tensor]] = {
        "copy": tiles.clone,
        "python loop": partial(python_loop, canvas, corners, tile),
    }
    missing: dict[str, str] = {}
    for impl in IMPLS:
        reason = why_not("gather_tiles", impl, device)
        if reason is None:
            runs[impl] = partial(ops.gather_tiles, canvas, offsets, (tile, tile), impl=impl)
        else:
            missing[impl] = reason

    def errors() -> dict[str, float]:
        exact = python_loop(canvas, corners, tile)
        return {impl: relative_error(runs[impl](), exact) for impl in IMPLS if impl in runs}

    # The canvas is read about once, from the cache after that; the tiles are written once.
    moved = dict.fromkeys(runs, canvas.nbytes + tiles.nbytes) | {"copy": 2 * tiles.nbytes}
    return Ready(runs, "python loop", moved, 0, errors, missing)


def cases() -> list[Case]:
    return [
        Case(
            "gather_tiles",
            f"{len(starts(size, tile, stride)) ** 2} tiles of {tile}x{tile}x{channels} from {size}x{size}",
            "slices, which must be the same bits",
            partial(prepare, size, tile, stride, channels),
            quick=size == 512,
        )
        for size, tile, stride, channels in CASES
    ]


def main() -> None:
    args = timing.parser(__doc__.split("\n")[0] if __doc__ else None).parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    print(timing.machine(device), args.dtype)
    rows = []
    for case in cases():
        ready = case.prepare(device, dtype)
        seconds = timing.interleaved(ready.runs, device, args.rounds)
        rows += timing.report(case.shapes, seconds, ready.bytes, ready.baseline)
    timing.save(args.json, device, rows)


if __name__ == "__main__":
    main()
