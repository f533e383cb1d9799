"""Whether a pipeline denoises a canvas of the size that its caller asked for: some choose another one in silence."""

from __future__ import annotations

from inspect import signature
from typing import Any

from tiledcore.geometry import Pair
from tiledcore.tiles.family import factor_of

ROUNDED = 64  # px: pipelines may round a size by less than this
KEPT_BY = {
    "use_resolution_binning": "use_resolution_binning=False",
    "_auto_resize": "_auto_resize=False",
    "max_area": "max_area={area}",
}
"""Arguments of calls -> what keeps the size."""
SET_BY = {
    "HiDreamImagePipeline": "pipe.default_sample_size={side}",
    "Kandinsky5T2IPipeline": "pipe.resolutions=[({width}, {height})]",
    "Kandinsky5I2IPipeline": "pipe.resolutions=[({width}, {height})]",
}
"""Pipelines -> what must be set on them before the call."""


def check_size(pipe: Any, given: dict[str, Any], made: Pair) -> None:
    """Compare ``height`` and ``width`` that the caller gave, by name in ``given``, with the canvas ``made``, both px.

    Raises:
        ValueError: they differ by more than a rounding, and the caller did not ask for that.
    """
    height, width = given.get("height"), given.get("width")
    if height is None or width is None or given.get("use_resolution_binning"):
        return
    if abs(height - made[0]) < ROUNDED and abs(width - made[1]) < ROUNDED:
        return
    name, takes = type(pipe).__name__, signature(type(pipe).__call__).parameters
    ways = [way for argument, way in KEPT_BY.items() if argument in takes]
    ways += [SET_BY[name]] if name in SET_BY else []
    area = height * width
    way = ", ".join(ways).format(area=area, side=round(area**0.5 / factor_of(pipe)), height=height, width=width)
    raise ValueError(
        f"height={height}, width={width}: {name} denoises an image of {made[1]}x{made[0]} px (width x height) instead; "
        + (f"give {way}" if way else "leave height and width out")
    )
