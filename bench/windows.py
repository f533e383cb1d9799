"""Windows of a canvas as usual tiled pipelines handle them: one slice after another, without the engine."""

from collections.abc import Sequence

import torch
from torch import Tensor

Corner = tuple[int, int]  # top left, (y, x)


def starts(size: int, window: int, stride: int) -> list[int]:
    """Offsets of windows along an axis, ``stride`` apart, the last flush with the end."""
    return [0] if size <= window else [*range(0, size - window, stride), size - window]


def grid(size: Sequence[int], window: int, stride: int) -> list[Corner]:
    """Where all windows of a canvas (height, width) lie, row by row."""
    rows, columns = (starts(side, window, stride) for side in size)
    return [(y, x) for y in rows for x in columns]


def cut(canvas: Tensor, corners: list[Corner], window: int) -> Tensor:
    """``[N, C, h, w]``: windows of a canvas ``[1, C, H, W]``."""
    return torch.cat([canvas[:, :, y : y + window, x : x + window] for y, x in corners])


def average(windows: Tensor, corners: list[Corner], like: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """The canvas, as large as ``like``, whose pixels are weighted means of the windows ``[N, C, h, w]`` over them.

    Values and weights are added up window by window, as diffusers' panorama pipeline does.
    """
    value, count = torch.zeros_like(like), torch.zeros_like(like)
    h, w = windows.shape[2:]
    for window, (y, x) in zip(windows, corners, strict=True):
        value[:, :, y : y + h, x : x + w] += weight * window
        count[:, :, y : y + h, x : x + w] += weight
    return value / count
