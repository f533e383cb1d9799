"""gather_tiles against slicing tile by tile and concatenating, in time and in bytes moved.

python -m bench.bench_gather_tiles [--device cuda] [--dtype float16] [--json out.json]
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench import timing
from bench.bench_blend_tiles import CASES, starts
from tiledcore import ops


def python_loop(canvas: Tensor, corners: list[tuple[int, int]], tile: int) -> Tensor:
    """One slice a tile, as pipelines that loop over views do; no wrapping."""
    return torch.cat([canvas[:, :, y : y + tile, x : x + tile] for y, x in corners])


def main() -> None:
    args = timing.parser(__doc__.split("\n")[0] if __doc__ else None).parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    print(timing.machine(device), args.dtype)
    rows = []
    for size, tile, stride, channels in CASES:
        line = starts(size, tile, stride)
        corners = [(y, x) for y in line for x in line]
        offsets = torch.tensor(corners, dtype=torch.int32, device=device)
        canvas = torch.randn(1, channels, size, size, device=device).to(dtype)
        tiles = torch.randn(len(corners), channels, tile, tile, device=device).to(dtype)
        candidates: dict[str, Callable[[], Tensor]] = {
            "copy": tiles.clone,
            "python loop": partial(python_loop, canvas, corners, tile),
        }
        implementations: tuple[ops.Impl, ...] = ("reference", "native", "triton")
        for impl in implementations:
            if ops.unavailable("gather_tiles", impl, device) is None:
                candidates[impl] = partial(ops.gather_tiles, canvas, offsets, (tile, tile), impl=impl)
        seconds = timing.interleaved(candidates, device, args.rounds)
        # The canvas is read about once, from the cache after that; the tiles are written once.
        moved = dict.fromkeys(candidates, canvas.nbytes + tiles.nbytes) | {"copy": 2 * tiles.nbytes}
        case = f"{len(corners)} tiles of {tile}x{tile}x{channels} from {size}x{size}"
        rows += timing.report(case, seconds, moved, "python loop")
    timing.save(args.json, device, rows)


if __name__ == "__main__":
    main()
