"""Regions: parts of the canvas with their own prompts, and the share of each prompt in each pixel.

Blending the predictions of several prompts: Bar-Tal et al., MultiDiffusion, 2023, section 4.2; Jimenez, Mixture of
Diffusers, 2023. The code that runs regions is in :mod:`tiledcore.compose.regional`.
"""

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tiledcore import validate
from tiledcore.geometry import Pair
from tiledcore.io.images import load_image


@dataclass(frozen=True, eq=False)
class Region:
    """A part of the canvas with its own prompt; overlapping regions share in proportion to their weights.

    Args:
        prompt: of the region.
        box: (left, top, right, bottom), px. On an axis that wraps, right or bottom may lie past the canvas.
        mask: instead of a box: PIL image, or array or tensor ``[H, W]`` of the canvas' size in px; bool, float from 0
            to 1, or int from 0 to 255. Non-zero is inside.
        weight: above 0. From 1 on the region's prompt replaces the global one, below 1 they are mixed.
        feather: width in px of the transition at the region's border, half of it outside.
        seed: of the region's initial noise. In tile mode the region then has its own tiles, so its content moves with
            the box, by whole latent pixels. Default: the noise of the canvas.

    Raises:
        ValueError: names the argument, its value and what is valid.
    """

    prompt: str
    box: tuple[int, int, int, int] | None = None
    mask: Any = None
    weight: float = 1.0
    feather: int = 32
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"prompt={self.prompt!r}: must be a text")
        if (self.box is None) == (self.mask is None):
            given = "neither is" if self.box is None else "both are"
            raise ValueError(f"box, mask: {given} given, and a region has exactly one of them")
        if (box := self.box) is not None:
            valid = isinstance(box, tuple | list) and len(box) == 4 and all(type(n) is int for n in box)
            if not valid or box[2] <= box[0] or box[3] <= box[1]:
                raise ValueError(
                    f"box={box!r}: must be (left, top, right, bottom), ints with left < right and top < bottom"
                )
            object.__setattr__(self, "box", tuple(box))
        if validate.real("weight", self.weight, 0) == 0:
            raise ValueError(f"weight={self.weight!r} must be above 0")
        validate.integer("feather", self.feather, 0)
        if self.seed is not None and validate.integer("seed", self.seed, 0) >= 2**64:
            raise ValueError(f"seed={self.seed!r} must be at most 2**64 - 1")

    def bounds(self) -> tuple[int, int, int, int]:
        """The box, or the smallest one around the mask."""
        if self.box is not None:
            return self.box
        inside = _mask(self.mask) > 0
        rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    def describe(self) -> dict[str, Any]:
        """The region as in a scene file, without the pixels of a mask."""
        named = {key: value for key, value in vars(self).items() if value is not None}
        return named | ({} if self.mask is None else {"mask": str(getattr(self.mask, "filename", None) or "mask")})


def check_regions(regions: Sequence[Region], width: int, height: int, wrap: tuple[bool, bool]) -> None:
    """Check regions against a canvas in px; ``wrap`` is (y, x). A ValueError names the region by its index."""
    for i, region in enumerate(regions):
        try:
            _check_region(region, width, height, wrap)
        except ValueError as error:
            raise ValueError(f"regions[{i}].{error}") from None


def _check_region(region: Region, width: int, height: int, wrap: tuple[bool, bool]) -> None:
    canvas = f"the canvas of {width}x{height} px"
    if region.feather > min(width, height):
        raise ValueError(f"feather={region.feather}: at most the shorter side of {canvas}")
    if region.box is not None:
        for low, high, size, wraps in zip(region.box[:2], region.box[2:], (width, height), wrap[::-1], strict=True):
            if low < 0 or low >= size or (high > size and not wraps) or high - low > size:
                raise ValueError(f"box={region.box}: does not lie inside {canvas}")
        return
    mask = _mask(region.mask)
    if mask.shape != (height, width):
        raise ValueError(f"mask: is {mask.shape[1]}x{mask.shape[0]} px, and must be as {canvas}")
    if not mask.any():
        raise ValueError("mask: is empty: every pixel of it is 0")


def scale_regions(regions: Sequence[Region], size: Pair, new: Pair) -> list[Region]:
    """Regions of a canvas of ``size`` (height, width) px, for a smaller or larger canvas of ``new``."""
    y, x = new[0] / size[0], new[1] / size[1]

    def span(low: int, high: int, scale: float, length: int) -> tuple[int, int]:
        start = min(round(low * scale), length - 1)
        return start, min(max(round(high * scale), start + 1), start + length)

    scaled = []
    for region in regions:
        place: dict[str, Any] = {"feather": min(round(region.feather * math.sqrt(y * x)), *new)}
        if region.box is not None:
            left, top, right, bottom = region.box
            (left, right), (top, bottom) = span(left, right, x, new[1]), span(top, bottom, y, new[0])
            place["box"] = (left, top, right, bottom)
        else:
            place["mask"] = F.interpolate(torch.from_numpy(_mask(region.mask))[None, None], new, mode="area")[0, 0]
        scaled.append(replace(region, **place))
    return scaled


def region_weights(regions: Sequence[Region], size: Pair, pixels: int, wrap: tuple[bool, bool]) -> Tensor:
    """The share of each prompt in each pixel of a canvas; ``pixels`` is image pixels per canvas pixel.

    A region covers a pixel by ``c``: 1 inside, 0 outside, with a linear ramp of the feather's width. The global
    prompt's share is the product of ``1 - min(weight, 1) c`` over all regions; the regions divide the rest in
    proportion to ``weight c``. Returns ``[1 + len(regions), H, W]`` float32, the global prompt first, of sum 1.
    """
    weighted = torch.stack([region.weight * coverage(region, size, pixels, wrap) for region in regions])
    shown = torch.stack([1 - c / max(region.weight, 1.0) for region, c in zip(regions, weighted, strict=True)]).prod(0)
    shares = weighted * ((1 - shown) / weighted.sum(0).clamp_min(torch.finfo(torch.float32).tiny))
    return torch.cat([shown[None], shares])


def coverage(region: Region, size: Pair, pixels: int, wrap: tuple[bool, bool]) -> Tensor:
    """How much of each canvas pixel a region covers, with its feather: ``[H, W]`` float32 from 0 to 1."""
    width = region.feather / pixels
    if region.box is not None:
        left, top, right, bottom = region.box
        rows = _feather(_profile(top, bottom, size[0], pixels)[None], width, wrap[0])
        columns = _feather(_profile(left, right, size[1], pixels)[None], width, wrap[1])
        return rows.T * columns
    inside = torch.from_numpy(_mask(region.mask))
    pooled = F.avg_pool2d(inside[None], pixels)[0]
    return _feather(_feather(pooled, width, wrap[1]).T, width, wrap[0]).T.contiguous()


def seed_noise(noise: Tensor, regions: Sequence[Region], pixels: int, wrap: tuple[bool, bool]) -> Tensor:
    """The initial noise ``[B, C, H, W]`` of a canvas, in which each region with a seed has its own noise.

    That noise is drawn for the region's bounding box, so it does not depend on the position. A later region is in
    front. There is no feather, because a mix of two noises has too little variance. Errors of :func:`check_regions`.
    """
    noise = noise.clone()
    B, C, H, W = noise.shape
    check_regions(regions, W * pixels, H * pixels, wrap)
    for region in regions:
        if region.seed is None:
            continue
        left, top, right, bottom = region.bounds()
        rows = torch.arange(top // pixels, -(-bottom // pixels))[:, None] % H
        columns = torch.arange(left // pixels, -(-right // pixels)) % W
        # On the CPU, so that a seed gives the same noise on every device.
        generator = torch.Generator().manual_seed(region.seed)
        drawn = torch.stack([torch.randn(C, len(rows), len(columns), generator=generator) for _ in range(B)])
        drawn = drawn.to(noise)
        if region.mask is not None:
            here = F.avg_pool2d(torch.from_numpy(_mask(region.mask))[None], pixels)[0, rows, columns] >= 0.5
            drawn = torch.where(here.to(noise.device), drawn, noise[:, :, rows, columns])
        noise[:, :, rows, columns] = drawn
    return noise


def load_scene(path: Path, width: int, height: int, wrap: tuple[bool, bool]) -> list[Region]:
    """Read the regions of a canvas of ``width`` by ``height`` px from a TOML file; ``wrap`` is (y, x).

    Each ``[[region]]`` table has the arguments of :class:`Region` as keys. A mask is the name of an image file,
    relative to the scene's folder. A ValueError names the file, the region by its number from 1, and the key.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not TOML
        raise ValueError(f"{path}: is not TOML: {error}") from error
    if unknown := sorted(set(content) - {"region"}):
        raise ValueError(f"{path}: unknown key {unknown[0]!r}: a scene holds [[region]] tables and nothing else")
    tables = content.get("region")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{path}: holds no [[region]] table")
    regions = []
    for i, table in enumerate(tables, 1):
        try:
            regions.append(_read_region(path.parent, table))
            _check_region(regions[-1], width, height, wrap)
        except ValueError as error:
            raise ValueError(f"{path}: region {i}: {error}") from None
    return regions


def _read_region(folder: Path, table: dict[str, Any]) -> Region:
    known = Region.__dataclass_fields__
    if unknown := sorted(table.keys() - known.keys()):
        raise ValueError(f"unknown key {unknown[0]!r}: must be one of {', '.join(known)}")
    if (mask := table.get("mask")) is not None:
        if not isinstance(mask, str):
            raise ValueError(f"mask={mask!r}: must be the name of an image file")
        table["mask"] = load_image(folder / mask).convert("L")
        table["mask"].filename = str(folder / mask)
    return Region(**{"prompt": None} | table)


def _mask(mask: Any) -> NDArray[np.float32]:
    """A mask as ``[H, W]`` from 0 to 1."""
    if isinstance(mask, Image.Image):
        mask = mask.convert("L")
    if isinstance(mask, Tensor):
        mask = (mask.float() if mask.is_floating_point() else mask).detach().cpu().numpy()
    values = np.asarray(mask)
    if values.ndim != 2 or values.dtype.kind not in "buif":
        raise ValueError(f"mask: has shape {values.shape} and dtype {values.dtype}, and must be numbers [H, W]")
    scale = 255 if values.dtype.kind in "ui" else 1
    values = (values / scale).astype(np.float32)
    if not (np.isfinite(values).all() and values.min(initial=0) >= 0 and values.max(initial=0) <= 1):
        raise ValueError("mask: its values must lie from 0 to 1, or 0 to 255 for integers")
    return values


def _profile(low: int, high: int, size: int, pixels: int) -> Tensor:
    """The part of each canvas pixel, on one axis, from ``low`` to ``high`` in px; an axis that wraps is a circle."""
    inside = (torch.arange(size * pixels) - low) % (size * pixels) < high - low
    return inside.float().view(size, pixels).mean(1)


def _feather(values: Tensor, width: float, wrap: bool) -> Tensor:
    """Mean over a window of ``width`` along the last axis of ``[N, L]``: steps become linear ramps of that width."""
    reach = math.ceil(width / 2 - 0.5)
    if reach <= 0:
        return values
    places = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = (torch.clamp(places + 0.5, max=width / 2) - torch.clamp(places - 0.5, min=-width / 2)).clamp_min(0)
    kernel = (kernel / kernel.sum()).float()
    padded = F.pad(values[:, None], (reach, reach), mode="circular" if wrap else "replicate")
    ramp = F.conv1d(padded, kernel[None, None])[:, 0]
    # Exactly 0 and 1 outside and inside: a rounding error's worth of a prompt would cost an evaluation.
    return torch.where(ramp > 1 - 1e-6, 1.0, torch.where(ramp < 1e-6, 0.0, ramp))
