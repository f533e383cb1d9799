"""Cases of group_norm_silu on a band of an image, against torch's own operations.

The statistics are given. ``affine`` writes the normalisation out with elementwise operations and ``F.silu``;
``group_norm`` is ``F.group_norm`` and ``F.silu``, which computes statistics of the band that nobody needs.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Ready, implementations
from bench.measure import Run
from tiledcore import ops

CASES = [(128, 64, 1024), (256, 64, 1024), (512, 32, 512), (512, 16, 256)]
"""Channels, rows, width: bands of 64 px of an image 1024 px wide, in the levels of an SDXL decoder."""
if torch.cuda.is_available():
    CASES += [(128, 64, 4096), (128, 64, 16384)]
GROUPS = 32


def affine(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    B, C = x.shape[:2]
    scale = rstd.repeat_interleave(C // GROUPS, 1) * weight
    shift = bias - mean.repeat_interleave(C // GROUPS, 1) * scale
    return F.silu(x * scale.view(B, C, 1, 1).to(x.dtype) + shift.view(B, C, 1, 1).to(x.dtype))


def group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias, 1e-6))


def prepare(channels: int, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Ready:
    exact = torch.float64 if dtype == torch.float64 else torch.float32  # of the statistics
    x, out = (torch.randn(1, channels, height, width, device=device).to(dtype) for _ in range(2))
    mean = torch.randn(1, GROUPS, device=device, dtype=exact)
    rstd = torch.rand(1, GROUPS, device=device, dtype=exact) + 0.5
    weight, bias = (torch.randn(channels, device=device).to(dtype) for _ in range(2))
    norm = partial(ops.group_norm_silu, x, mean, rstd, weight, bias, out=out)
    ours, missing = implementations("group_norm_silu", norm, device)
    runs: dict[str, Run] = {
        "copy": partial(out.copy_, x),
        "affine": partial(affine, x, mean, rstd, weight, bias),
        "group_norm": partial(group_norm, x, weight, bias),
        **ours,
    }
    return Ready(
        runs,
        baseline="affine",
        bytes=dict.fromkeys(runs, 2 * x.nbytes),
        expected=lambda: affine(*(t.double() for t in (x, mean, rstd, weight, bias))),
        others={"group_norm": lambda: group_norm(x.double(), weight.double(), bias.double())},
        buffers=(out,),
        not_run=missing,
    )


def cases() -> Iterator[Case]:
    for channels, height, width in CASES:
        shapes = f"{channels} channels, {height} rows of {width}"
        run = partial(prepare, channels, height, width)
        yield Case("group_norm_silu", shapes, "torch in float64", run, quick=height < 64)
