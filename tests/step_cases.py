"""Random arguments of the op fused_step."""

from typing import Any

import torch
from grids import Grid

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def problem(
    grid: Grid, slots: int, halves: int, dtype: torch.dtype = torch.float32, C: int = 3, n: int = 3
) -> dict[str, Any]:
    """Random arguments for :func:`ops.fused_step`, on the device; some coefficients are 0."""
    B, (H, W), tile, offsets = 2, *grid
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    table = torch.randn(n, slots, slots + 2, dtype=torch.float64)
    table *= torch.rand_like(table) < 0.7
    arguments = {
        "tiles": torch.randn(len(offsets) * halves * B, C, *tile).to(dtype),
        "offsets": offsets,
        "state": torch.randn(slots, B, C, H, W).to(exact),
        "table": table.to(exact),
        "input_scale": torch.rand(n + 1).to(exact) + 0.5,
        "step": torch.tensor([1]),
        "model_input": torch.full((B, C, H, W), torch.nan, dtype=dtype),
        "guidance_scale": (torch.rand(B) * 5).to(exact) if halves == 2 else None,
        "noise": torch.randn(B, C, H, W).to(exact),
    }
    return {name: None if value is None else value.to(DEVICE) for name, value in arguments.items()}
