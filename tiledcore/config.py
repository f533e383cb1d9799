"""TilingConfig: how a canvas is cut into tiles and put together again. Execution: how that is computed."""

from dataclasses import dataclass, replace
from typing import Literal, Self

from tiledcore import ops, validate
from tiledcore.geometry import Pair, TileGrid, both


@dataclass(frozen=True)
class Motion:
    """How tiles move: in each step the canvas is cut at other lines, and no pixel is evaluated twice.

    SpotDiffusion (Frolov et al. 2024). Besides, some steps overlap in place, and near its lines a prediction fades into
    that of the step before (:mod:`tiledcore.tiles.fade`).

    Args:
        blend_first: so many first steps overlap in place: tiles that do not move compose better. A call that starts
            from an image blends as many more of its last steps instead.
        blend_last: so many last steps overlap in place, as no step follows to heal a seam.
        fade: width on each side of a line, in latent pixels; cut to a quarter of a tile, 0 is none. Default: 3/16 of
            the model's own size; none where the scheduler or the pipeline cannot fade.
        seed: of the places of the lines.

    Raises:
        ValueError: names the argument, its value and what is valid.
    """

    blend_first: int = 2
    blend_last: int = 1
    fade: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("blend_first", "blend_last"):
            validate.integer(name, getattr(self, name), 0)
        if self.fade is not None:
            validate.integer("fade", self.fade, 0)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r} must be an int")

    @property
    def blended(self) -> int:
        """How many steps of a call overlap in place."""
        return self.blend_first + self.blend_last


@dataclass(frozen=True)
class Execution:
    """How an evaluation is computed; the image is the same up to rounding.

    Args:
        tile_batch: tiles per call of the network; bounds the memory.
        guidance_batch: both guidance branches in one call of the network, or one after the other. That needs less
            memory, and gives several processes twice as many calls to share. In tile mode with the fused loop only.
        impl: implementation of the ops, see :mod:`tiledcore.ops`; None picks the fastest.
    """

    tile_batch: int = 4
    guidance_batch: bool = True
    impl: ops.Impl | None = None

    def __post_init__(self) -> None:
        validate.integer("tile_batch", self.tile_batch, 1)
        validate.choice("guidance_batch", self.guidance_batch, (True, False))
        validate.choice("impl", self.impl, (None, "reference", "native", "triton", "sdpa"))


@dataclass(frozen=True)
class TilingConfig:
    """How the canvas is cut into tiles and put together again. Sizes are latent pixels, pairs are (y, x).

    Where a pipeline packs latents into tokens (FLUX, Qwen-Image), ``tile`` and ``overlap`` must be multiples of 2, a
    token's side; a ramp is rounded up.

    Args:
        mode: ``"tiles"``: batches of tiles go through the network. ``"canvas"``: the network runs once over the whole
            canvas, and a token attends to its own tile and a halo around it.
        tile: side of a tile, or a pair. Default: the size that the model was trained at; in canvas mode half of it on a
            larger canvas, so that a tile and its halo have that size.
        overlap: what adjacent tiles share at least, or a pair; a float below 1 is a share of the tile. Default: 1/8.
        window: how overlapping predictions are blended, see :func:`tiledcore.ops.blend_tiles`.
        ramp: width of the transition between two tiles, for ``window="ramp"``. Default: the smaller overlap.
        motion: ``"still"``: tiles keep their places. ``"moving"``: they move in each step. Or a :class:`Motion`.
        wrap: the canvas is a torus: a bool or a pair.
        halo: canvas mode: how far attention sees beyond a tile on each side, or a pair. Default: half a tile.

    Raises:
        ValueError: names the argument, its value and what is valid.
    """

    mode: Literal["tiles", "canvas"] = "tiles"
    tile: int | Pair | None = None
    overlap: int | float | Pair | None = None
    window: ops.Window = "ramp"
    ramp: int | None = None
    motion: Literal["still", "moving"] | Motion = "still"
    wrap: bool | tuple[bool, bool] = False
    halo: int | Pair | None = None

    @classmethod
    def fast(cls) -> Self:
        """Moving tiles: no pixel is evaluated twice, except in three blended steps."""
        return cls(motion="moving")

    @classmethod
    def best(cls) -> Self:
        """Tiles in place that overlap by a quarter, blended by a ramp: about 1.8 times the work of moving tiles."""
        return cls(overlap=0.25)

    def __post_init__(self) -> None:
        for name in ("tile", "overlap", "wrap", "halo"):  # lists, as JSON has them
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        validate.choice("mode", self.mode, ("tiles", "canvas"))
        if not isinstance(self.motion, Motion):
            validate.choice("motion", self.motion, ("still", "moving"))
        validate.choice("window", self.window, ops.WINDOWS)
        validate.flags("wrap", self.wrap)
        if self.tile is not None:
            validate.pair("tile", self.tile, 1)
        if isinstance(self.overlap, float):
            validate.real("overlap", self.overlap, 0, 0.99)
        elif self.overlap is not None:
            validate.pair("overlap", self.overlap, 0)
        if self.ramp is not None:  # 1 is a hard crop to the core
            validate.integer("ramp", self.ramp, 1)
        if self.halo is not None:
            validate.pair("halo", self.halo, 0)
        self._check_together()

    def _check_together(self) -> None:
        overlaps = self.overlap not in (None, 0, (0, 0))
        if self.mode == "canvas" and (self.moving or overlaps):
            raise ValueError(
                f"mode='canvas' has neither overlap={self.overlap} nor motion={self.motion!r}: leave them out"
            )
        if self.ramp is not None and (self.mode == "canvas" or self.window != "ramp"):
            raise ValueError(f"ramp={self.ramp}: only for mode='tiles' with window='ramp'; leave it out")
        if self.mode == "tiles" and self.halo is not None:
            raise ValueError(f"halo={self.halo!r}: only for mode='canvas'")
        if self.moving and not self.moving.blended and overlaps:
            raise ValueError(
                f"overlap={self.overlap}: tiles that always move do not overlap; leave it out, or blend some steps"
            )
        if self.tile is not None:  # the geometry's own checks, at once rather than in the first step
            self.grid(1, 1, native=1)

    @property
    def moving(self) -> Motion | None:
        """How tiles move; None where they do not."""
        named = {"still": None, "moving": Motion()}
        return named[self.motion] if isinstance(self.motion, str) else self.motion

    def refining(self) -> Self:
        """This tiling for a call that starts from an image: it has a composition, so only last steps are blended."""
        if (motion := self.moving) is None:
            return self
        return replace(self, motion=replace(motion, blend_first=0, blend_last=motion.blended))

    def area_factor(self, grid: TileGrid, steps: int) -> float:
        """Tile area evaluated over canvas area, averaged over the steps; ``grid`` is from :meth:`grid`."""
        if self.mode == "canvas":
            return 1.0
        share = 1.0 if self.moving is None else min(1.0, self.moving.blended / steps)
        return 1.0 + share * (grid.area_factor - 1.0)

    def grid(self, height: int, width: int, native: int | Pair, unit: int = 1, snap: int = 1) -> TileGrid:
        """The tiles of a canvas of latent pixels; for moving tiles, those of the blended steps.

        ``native``: tile size where the config has none. ``unit``: latent pixels per grid pixel along each axis, a
        token's side for packed latents. ``snap``: of :class:`~tiledcore.geometry.TileGrid`.

        Raises:
            ValueError: a size is no multiple of the unit, or :class:`~tiledcore.geometry.TileGrid` refuses it.
        """
        tile = self.tile_on((height, width), native)
        overlap = self._overlap(tile, unit)
        grid = TileGrid(height, width, tile=tile, overlap=overlap, wrap=self.wrap, snap=snap)
        if unit == 1:
            return grid
        sizes = {"canvas": (height, width), "tile": tile, "overlap": overlap}
        for name, size in sizes.items():
            if any(n % unit for n in size):
                raise ValueError(f"{name}={size}: must be multiples of {unit}, the latent pixels per token")
        canvas, tile, overlap = ((y // unit, x // unit) for y, x in sizes.values())
        return TileGrid(*canvas, tile, overlap, self.wrap)

    def tile_on(self, canvas: Pair, native: int | Pair) -> Pair:
        """The size of a tile on a canvas of latent pixels: as asked for, or the default.

        In canvas mode an axis that is no longer than the native size and does not wrap is one tile.
        """
        if self.tile is not None or self.mode == "tiles":
            return both(native if self.tile is None else self.tile)
        axes = zip(canvas, both(native), both(self.wrap), strict=True)
        y, x = (size if size <= own and not wraps else max(1, own // 2) for size, own, wraps in axes)
        return y, x

    def _overlap(self, tile: Pair, unit: int) -> Pair:
        if self.overlap is not None and not isinstance(self.overlap, float):
            return both(self.overlap)
        blends = self.mode == "tiles" and (self.moving is None or self.moving.blended > 0)
        share = 1 / 8 if self.overlap is None else self.overlap
        y, x = (int(side * share) // unit * unit if blends else 0 for side in tile)
        return y, x
