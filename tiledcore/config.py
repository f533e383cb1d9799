"""TilingConfig: how a canvas is cut into tiles and put together again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tiledcore import ops
from tiledcore.geometry import TileGrid, both


@dataclass(frozen=True)
class TilingConfig:
    """How the canvas is cut into tiles and put together again. Sizes are latent pixels.

    Where a pipeline packs latents into tokens (FLUX, Qwen-Image), tiles consist of whole tokens: then
    ``tile`` and ``overlap`` must be multiples of a token's side, 2, and a ramp is rounded up to one.

    Args:
        tile: side of a tile, or (height, width). Default: the size that the model was trained at.
        overlap: pixels shared by two adjacent tiles, or (y, x). Default: an eighth of the tile; 0 with ``shift``.
        window: how overlapping predictions are blended, see :func:`tiledcore.ops.blend_tiles`.
        ramp: width of the transition between two tiles for ``window="ramp"``. Default: the smaller overlap.
        shift: partition the canvas anew in every step instead of overlapping
            (SpotDiffusion, Frolov et al. 2024).
        blend_steps: with ``shift``: the last so many steps take the plain grid of overlapping tiles instead, since
            no step comes after them to heal the seams of a partition. ``overlap`` is that of these steps.
        blend_first: with ``shift``: the first so many steps do, too. Tiles that keep their places while the composition
            arises each compose a picture of their own, as the network was trained to. A call of a
            :class:`~tiledcore.TiledPipeline` that starts from an image blends so many more of its last steps instead.
        fade: with ``shift``: on each side of a line so many pixels in which a prediction is faded into that of the step
            before, whose lines lay elsewhere, see ``fade``; at most a quarter of a tile, 0 is none. Only
            :class:`~tiledcore.TiledPipeline` does it, which knows both steps.
        mode: ``"tiles"``: a batch of windows through the unmodified model. ``"canvas"``: the network runs once over
            the whole canvas, and its self-attention is that of tiles to their neighbours
            (:mod:`tiledcore.canvas.attention`); nothing is evaluated twice.
        halo: for ``"canvas"``: latent pixels that a tile's self-attention sees of its neighbours on each side.
            Default: half a tile.
        guidance_batch: for ``"canvas"``: both guidance branches at once, or, to save memory, one after the other.
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
    mode: Literal["tiles", "canvas"] = "tiles"
    halo: int | tuple[int, int] | None = None
    guidance_batch: bool = True
    blend_steps: int = 0
    fade: int = 0
    blend_first: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("tiles", "canvas"):
            raise ValueError(f"mode={self.mode!r}: must be one of tiles, canvas")
        if self.mode == "canvas" and (self.shift or self.overlap not in (None, 0, (0, 0))):
            raise ValueError(f"mode='canvas' has neither overlap={self.overlap} nor shift={self.shift}: leave them out")
        if self.mode == "tiles" and self.halo is not None:
            raise ValueError(f"halo={self.halo!r}: only for mode='canvas'")
        for name, without in (
            ("blend_steps", "every step is blended"),
            ("blend_first", "every step is blended"),
            ("fade", "tiles do not move"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r}: must be an int of at least 0")
            if value and not self.shift:
                raise ValueError(f"{name}={value}: only with shift=True; without it {without}")
        if self.window not in ops.WINDOWS:
            raise ValueError(f"window={self.window!r}: must be one of {', '.join(ops.WINDOWS)}")
        if self.tile_batch < 1:
            raise ValueError(f"tile_batch={self.tile_batch}: must be at least 1")
        if self.ramp is not None and self.ramp < 1:
            raise ValueError(f"ramp={self.ramp}: must be at least 1 (1 is a hard crop to the core)")
        if self.shift and not self.blended_steps and self.overlap not in (None, 0, (0, 0)):
            raise ValueError(
                f"overlap={self.overlap}: shift=True replaces the overlap; give 0 or nothing, or blend_steps"
            )
        if self.tile is not None:  # the geometry's own checks, at once rather than in the first step
            self.grid(1, 1, native=1)

    @property
    def blended_steps(self) -> int:
        """How many of a call's steps have overlapping tiles among others that move."""
        return self.blend_first + self.blend_steps

    def refining(self) -> TilingConfig:
        """The same for a run that starts from an image."""
        return replace(self, blend_first=0, blend_steps=self.blended_steps)

    def area_factor(self, grid: TileGrid, steps: int) -> float:
        """Tile area evaluated over canvas area, the mean of so many steps; ``grid`` is :meth:`grid`'s."""
        if self.mode == "canvas":
            return 1.0
        share = min(1.0, self.blended_steps / steps) if self.shift else 1.0
        return 1.0 + share * (grid.area_factor - 1.0)

    def grid(self, height: int, width: int, native: int | tuple[int, int], unit: int = 1) -> TileGrid:
        """The tiles of a canvas.

        Args:
            height: of the canvas, in latent pixels.
            width: the same.
            native: the tile size where none was asked for, in latent pixels.
            unit: latent pixels per pixel of the grid, along each axis: a token's side for packed latents.

        Returns:
            The grid, in units; with ``blend_steps`` or ``blend_first``, that of those steps.

        Raises:
            ValueError: a size is no multiple of the unit, or :class:`~tiledcore.geometry.TileGrid` refuses it.
        """
        tile = both(native if self.tile is None else self.tile)
        h, w = tile
        blends = self.blended_steps or not (self.shift or self.mode == "canvas")
        default = (h // 8 // unit * unit, w // 8 // unit * unit) if blends else (0, 0)
        overlap = default if self.overlap is None else both(self.overlap)
        grid = TileGrid(height, width, tile=tile, overlap=overlap, wrap=self.wrap)
        if unit == 1:
            return grid
        for name, size in (("canvas", (height, width)), ("tile", tile), ("overlap", overlap)):
            if any(n % unit for n in size):
                raise ValueError(f"{name}={size}: must be multiples of {unit}, the latent pixels per token")
        return TileGrid(
            height // unit,
            width // unit,
            tile=(h // unit, w // unit),
            overlap=(overlap[0] // unit, overlap[1] // unit),
            wrap=self.wrap,
        )
