"""Tile mode: one network evaluation of the whole canvas as gather -> network on tile batches -> blend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tiledcore import ops
from tiledcore.geometry import TileGrid, Tiling

# Arguments of a denoiser's forward with one row per image of the batch; a tile batch repeats them.
PER_IMAGE = (
    "encoder_hidden_states",
    "timestep",
    "class_labels",
    "timestep_cond",
    "attention_mask",
    "encoder_attention_mask",
    "added_cond_kwargs",
)
# Arguments on the canvas' own pixels, which tile mode does not know how to cut.
REFUSED = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


@dataclass(frozen=True)
class TilingConfig:
    """How the canvas is cut into tiles and put together again. Sizes are latent pixels.

    Args:
        tile: side of a tile, or (height, width). Default: the size that the model was trained at.
        overlap: pixels shared by two adjacent tiles, or (y, x). Default: an eighth of the tile; 0 with ``shift``.
        window: how overlapping predictions are blended, see :func:`tiledcore.ops.blend_tiles`.
        ramp: width of the transition between two tiles for ``window="ramp"``. Default: the smaller overlap.
        shift: move the whole grid at random in every step instead of overlapping
            (SpotDiffusion, Frolov et al. 2024).
        wrap: the canvas is a torus: bool, or (along y, along x).
        tile_batch: tiles per network evaluation; bounds the memory.
        seed: of the random shifts.
        impl: implementation of gather and blend, see :mod:`tiledcore.ops`.

    Raises:
        ValueError: names the argument, its value and what is valid.
    """

    tile: int | tuple[int, int] | None = None
    overlap: int | tuple[int, int] | None = None
    window: ops.Window = "ramp"
    ramp: int | None = None
    shift: bool = False
    wrap: bool | tuple[bool, bool] = False
    tile_batch: int = 4
    seed: int = 0
    impl: ops.Impl | None = None

    def __post_init__(self) -> None:
        if self.window not in ops.WINDOWS:
            raise ValueError(f"window={self.window!r}: must be one of {', '.join(ops.WINDOWS)}")
        if self.tile_batch < 1:
            raise ValueError(f"tile_batch={self.tile_batch}: must be at least 1")
        if self.ramp is not None and self.ramp < 1:
            raise ValueError(f"ramp={self.ramp}: must be at least 1 (1 is a hard crop to the core)")
        if self.shift and self.overlap not in (None, 0, (0, 0)):
            raise ValueError(f"overlap={self.overlap}: shift=True replaces the overlap; give 0 or nothing")
        if self.tile is not None:  # the geometry's own checks, at once rather than in the first step
            self.grid(1, 1, native=1)

    def grid(self, height: int, width: int, native: int | tuple[int, int]) -> TileGrid:
        """The tiles of a canvas; ``native`` is the tile size where none was asked for."""
        h, w = _pair(native if self.tile is None else self.tile)
        default = (0, 0) if self.shift else (h // 8, w // 8)
        overlap = default if self.overlap is None else _pair(self.overlap)
        return TileGrid(height, width, tile=(h, w), overlap=overlap, wrap=self.wrap)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


class TileDenoiser:
    """A denoiser's forward over a canvas of any size, evaluated on overlapping tiles.

    Args:
        config: the tiling.
        native: tile size (latent pixels) where the config has none.
        pixels: image pixels per latent pixel, for SDXL's crop coordinates.
    """

    def __init__(self, config: TilingConfig, native: int | tuple[int, int], pixels: int) -> None:
        self.config, self.native, self.pixels = config, native, pixels
        self._grid: TileGrid | None = None
        self._offsets: torch.Tensor | None = None
        self._tiles: torch.Tensor | None = None

    def tiling(self, height: int, width: int, timestep: torch.Tensor | float) -> Tiling:
        """The tiles of this step: always the same ones, or shifted at random by the timestep."""
        if self._grid is None or (self._grid.height, self._grid.width) != (height, width):
            self._grid = self.config.grid(height, width, self.native)
            self._offsets = None
        if not self.config.shift:
            return self._grid
        # Seeded by the timestep itself: both guidance branches of a step see the same grid, whether
        # the pipeline evaluates them together or one after the other.
        step = round(1000 * float(torch.as_tensor(timestep).flatten()[0]))
        return self._grid.shifted(step, self.config.seed)

    def __call__(
        self, forward: Callable[..., Any], sample: torch.Tensor, timestep: torch.Tensor | float, **kwargs: Any
    ) -> torch.Tensor:
        """Predict for the whole canvas.

        Args:
            forward: the denoiser; called as ``forward(tiles, timestep, **kwargs)``, returns a tuple whose
                first entry is ``[N, C', h, w]``.
            sample: canvas ``[B, C, H, W]``.
            timestep: scalar, or ``[B]``.
            kwargs: the denoiser's other arguments.

        Returns:
            ``[B, C', H, W]``, the blended prediction, in the denoiser's dtype.
        """
        for name in REFUSED:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: ControlNet and adapter residuals cannot be tiled yet; remove the adapter")
        batch, _, height, width = sample.shape
        tiling = self.tiling(height, width, timestep)
        if len(tiling.offsets) == 1 and tiling.tile_size == (height, width):
            prediction: torch.Tensor = forward(sample, timestep, **kwargs)[0]
            return prediction
        offsets = self._device_offsets(tiling, sample.device)
        kwargs["timestep"] = timestep
        for start in range(0, len(offsets), self.config.tile_batch):
            part = slice(start, min(start + self.config.tile_batch, len(offsets)))
            inputs = ops.gather_tiles(sample, offsets[part], tiling.tile_size, impl=self.config.impl)
            out = forward(inputs, **self._repeat(kwargs, tiling, part, batch))[0]
            shape = (len(offsets) * batch, *out.shape[1:])
            # One buffer for all steps; the blend reads it and writes a new canvas.
            if self._tiles is None or self._tiles.shape != shape or self._tiles.dtype != out.dtype:
                self._tiles = torch.empty(shape, dtype=out.dtype, device=out.device)
            self._tiles[part.start * batch : part.stop * batch] = out
        assert self._tiles is not None
        return ops.blend_tiles(
            self._tiles,
            offsets,
            (height, width),
            window=self.config.window,
            ramp=self._ramp(),
            impl=self.config.impl,
        )

    def _ramp(self) -> int:
        assert self._grid is not None
        return self.config.ramp or max(1, min(self._grid.overlap))

    def _device_offsets(self, tiling: Tiling, device: torch.device) -> torch.Tensor:
        if self.config.shift or self._offsets is None or self._offsets.device != device:
            self._offsets = torch.tensor(tiling.offsets, dtype=torch.int32).to(device)
        return self._offsets

    def _repeat(self, kwargs: dict[str, Any], tiling: Tiling, part: slice, batch: int) -> dict[str, Any]:
        """The arguments of one tile batch: per-image tensors repeated, tile-major, and SDXL's crops moved."""
        count = part.stop - part.start

        def repeat(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                rows = value.ndim > 0 and value.shape[0] == batch
                return value.repeat(count, *[1] * (value.ndim - 1)) if rows else value
            if isinstance(value, list | tuple):
                return type(value)(repeat(v) for v in value)
            return {k: repeat(v) for k, v in value.items()} if isinstance(value, dict) else value

        out = {k: repeat(v) if k in PER_IMAGE else v for k, v in kwargs.items()}
        time_ids = (kwargs.get("added_cond_kwargs") or {}).get("time_ids")
        if time_ids is not None:
            out["added_cond_kwargs"]["time_ids"] = self._time_ids(time_ids, tiling, part)
        return out

    def _time_ids(self, time_ids: torch.Tensor, tiling: Tiling, part: slice) -> torch.Tensor:
        """SDXL's micro-conditioning (Podell et al. 2023, 2.2) of each tile: the tile is a crop of the canvas.

        Columns: original height and width, crop top and left, then target height and width (or, in the
        refiner, an aesthetic score). Image pixels; the caller's own crop and scale stay in force.
        """
        ids = time_ids.repeat(part.stop - part.start, 1)
        corners = torch.tensor(tiling.offsets[part], dtype=ids.dtype, device=ids.device) * self.pixels
        ids[:, 2:4] += corners.repeat_interleave(len(time_ids), 0)
        if ids.shape[1] == 6:
            share = [tiling.tile_size[0] / tiling.height, tiling.tile_size[1] / tiling.width]
            ids[:, 4:6] *= torch.tensor(share, dtype=ids.dtype, device=ids.device)
        return ids
