"""group_norm_silu against torch's own operations on the same band, in time and in bytes moved.

The statistics are given to all of them: "affine" is the normalisation written out with torch's elementwise
operations and F.silu, "group_norm" is F.group_norm, which computes statistics of the band that a band has
no use for, and F.silu.

    python -m bench.bench_group_norm_silu [--device cuda] [--dtype float16] [--json out.json]
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import timing
from tiledcore import ops

# channels, rows, width: bands of 64 px of a 1024 px wide image, from the last level of an SDXL decoder up
CASES = [(128, 64, 1024), (256, 64, 1024), (512, 32, 512), (512, 16, 256)]
GROUPS = 32


def affine(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    B, C = x.shape[:2]
    scale = rstd.repeat_interleave(C // GROUPS, 1) * weight
    shift = bias - mean.repeat_interleave(C // GROUPS, 1) * scale
    return F.silu(x * scale.view(B, C, 1, 1).to(x.dtype) + shift.view(B, C, 1, 1).to(x.dtype))


def group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias, 1e-6))


def main() -> None:
    args = timing.parser(__doc__.split("\n")[0] if __doc__ else None).parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    print(timing.machine(device), args.dtype)
    rows = []
    for channels, height, width in CASES:
        x = torch.randn(1, channels, height, width, device=device).to(dtype)
        mean = torch.randn(1, GROUPS, device=device, dtype=exact)
        rstd = torch.rand(1, GROUPS, device=device, dtype=exact) + 0.5
        weight, bias = (torch.randn(channels, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(x)
        candidates: dict[str, Callable[[], Tensor]] = {
            "copy": partial(out.copy_, x),
            "affine": partial(affine, x, mean, rstd, weight, bias),
            "group_norm": partial(group_norm, x, weight, bias),
        }
        implementations: tuple[ops.Impl, ...] = ("reference", "native", "triton")
        for impl in implementations:
            if ops.unavailable("group_norm_silu", impl, device) is None:
                candidates[impl] = partial(ops.group_norm_silu, x, mean, rstd, weight, bias, out=out, impl=impl)
        seconds = timing.interleaved(candidates, device, args.rounds)
        # Read once and written once: the others move more, and are charged with this.
        moved = dict.fromkeys(candidates, 2 * x.nbytes)
        rows += timing.report(f"{channels} channels, {height} rows of {width}", seconds, moved, "affine")
    timing.save(args.json, device, rows)


if __name__ == "__main__":
    main()
