"""TileDenoiser: one network evaluation of the whole canvas as gather -> network on tile batches -> blend."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiledcore import ops
from tiledcore.config import Execution, TilingConfig
from tiledcore.geometry import Pair, TileGrid, Tiling
from tiledcore.tiles.conditioning import TileBatch, check_residuals, conditions, swap_major
from tiledcore.utils import label, to_device

logger = logging.getLogger(__name__)

Forward = Callable[..., Any]  # of the network
Time = Tensor | float  # a timestep: a scalar, or ``[B]``


class Prediction(NamedTuple):
    """What a network gave for a canvas, before it is blended."""

    tiles: Tensor  # ``[T*B, C, h, w]``, tile-major
    offsets: Tensor  # ``[T, 2]`` int32
    size: Pair  # Of the canvas
    ramp: int


def run_all(batches: Sequence[Any], run: Callable[[Any], Tensor], sample: Tensor) -> Iterable[Tensor]:
    """The predictions of all tile batches of a canvas ``sample``, in order.

    With several processes, another function with this signature stands here: it runs a part of the batches, and gets
    the others' predictions. A batch has a ``shape``, see :class:`~tiledcore.tiles.conditioning.TileBatch`.
    """
    return map(run, batches)


@dataclass(eq=False)
class TileDenoiser:
    """A denoiser's forward over a canvas of any size, evaluated on overlapping tiles."""

    config: TilingConfig
    execution: Execution
    native: int | Pair  # Tile size (latent pixels) where the config has none
    pixels: int  # Given: image pixels per latent pixel; kept: per canvas pixel
    patch: int = 1  # Latent pixels per token along an axis, of which a tile must be a multiple
    unit: int = 1  # Latent pixels per canvas pixel along an axis: ``patch`` for packed latents
    snap: int = 1  # Tiles begin at multiples of so many latent pixels, where tile and canvas are such multiples

    attention: Any = None  # Of canvas mode: its guidance_batch is what can be lowered
    branches: int = 1  # Of guidance, where the network's rows are known to be independent
    deal: Callable[[Sequence[Any], Callable[[Any], Tensor], Tensor], Iterable[Tensor]] = run_all
    timesteps: Callable[[], Sequence[float]] | None = None
    """Those of the running schedule, as the network gets them; what shifts and blended steps count."""

    def __post_init__(self) -> None:
        self.pixels *= self.unit
        self.tile_batch = self.execution.tile_batch  # as long as it fits
        self.reductions: list[str] = []
        self.placed: Tiling | None = None  # The tiles of the step that is running
        self._parts: tuple[Tensor, ...] = ()  # Their offsets, for each size of tiles
        self._there: dict[Tiling, tuple[Tensor, ...]] = {}  # Those of all steps of the schedule

    def tiling(self, height: int, width: int, timestep: Time) -> Tiling:
        """The tiles of this step: always the same ones, or shifted from step to step."""
        grid, motion = self._grid((height * self.unit, width * self.unit)), self.config.moving
        if motion is None:
            return grid
        index, steps = self.step(timestep)
        if self.timesteps is not None and not motion.blend_first <= index < steps - motion.blend_last:
            return grid
        return TileGrid(grid.height, grid.width, grid.tile_size, wrap=grid.wrap).shifted(index, motion.seed)

    def _grid(self, size: Pair) -> TileGrid:
        """The grid of a canvas of latent pixels, whose tiles must be whole tokens."""
        grid = self.config.grid(*size, self.native, self.unit, self.snap)
        tile = (grid.tile_size[0] * self.unit, grid.tile_size[1] * self.unit)
        moves = self.config.moving is not None and self.unit == 1
        # Lines that move do so by eighths of a tile, and what is left at the canvas' end is a tile too.
        eighths = moves and self.patch > 1 and tile == self.config.tile_on(size, self.native)  # else nothing moves
        least = 8 * self.patch if eighths else self.patch
        if any(n % least for n in tile) or (moves and any(n % self.patch for n in size)):
            raise ValueError(
                f"tile={tile} on a canvas of {size[0]}x{size[1]} latent pixels: a token has "
                f"{self.patch}x{self.patch} of them, so that a tile's sides must be multiples of {least}"
            )
        return grid

    def step(self, timestep: Time) -> tuple[int, int]:
        """Which step of the running schedule this is, and of how many; of an unknown schedule, some step of many.

        Told by the timestep: guidance branches and schedulers that evaluate a timestep twice then see the same tiles.
        """
        time = float(torch.as_tensor(timestep).flatten()[0])
        if self.timesteps is None:
            return Random(str(round(1000 * time))).getrandbits(16), 2**16
        # By the nearest one: pipelines round timesteps to the network's precision.
        steps = list(dict.fromkeys(self.timesteps()))
        return min(range(len(steps)), key=lambda i: abs(steps[i] - time)), len(steps)

    def __call__(
        self, forward: Forward, sample: Tensor, timestep: Time, *, time: float | None = None, **kwargs: Any
    ) -> Tensor:
        """Predict for the whole canvas: :meth:`attempt`, then blend. ``[B, C', H, W]`` in the denoiser's dtype.

        ``time``: the timestep, where the host knows it without asking the device.
        """
        self.place((sample.shape[2], sample.shape[3]), timestep if time is None else time, sample.device)
        return self.blended(self.attempt(forward, sample, timestep, **kwargs))

    def blended(self, prediction: Prediction) -> Tensor:
        """The canvas ``[B, C', H, W]`` of a prediction."""
        tiles, offsets, size, ramp = prediction
        if len(offsets) == 1:  # as it came, so that no bit changes
            return tiles
        with label("blend"):
            return ops.blend_tiles(tiles, offsets, size, window=self.config.window, ramp=ramp, impl=self.execution.impl)

    def place(self, size: Pair, timestep: Time, device: torch.device) -> bool:
        """Put a step's tile offsets where its kernels read them; returns whether one CUDA graph fits all steps."""
        tiling = self.tiling(*size, timestep)
        if tiling not in self._there or self._there[tiling][0].device != device:
            times = self.timesteps() if self.config.moving and self.timesteps is not None else ()
            self._there = {
                one: tuple(to_device(torch.tensor(at, dtype=torch.int32), device) for at in one.groups.values())
                for one in {tiling, *(self.tiling(*size, time) for time in times)}
            }
        given = self._there[tiling]
        if [(one.shape, one.device) for one in given] != [(one.shape, one.device) for one in self._parts]:
            with torch.inference_mode(False):  # the next call may be outside of it
                self._parts = tuple(torch.empty_like(one) for one in given)
        for kept, one in zip(self._parts, given, strict=True):
            kept.copy_(one)  # a graph reads these tensors
        self.placed = tiling
        alike = all(len(one.groups) == 1 and len(one) == len(tiling) for one in self._there)  # of all steps
        return alike and not (self.config.moving and self.config.moving.blended)

    def evaluate(self, forward: Forward, sample: Tensor, timestep: Time, **kwargs: Any) -> Prediction:
        """Predict for all tiles of a canvas ``[B, C, H, W]``, where :meth:`place` has put them.

        ``forward(tiles, timestep, **kwargs)`` returns a tuple, first ``[N, C', h, w]``. ``kwargs`` are the other
        arguments of the network, and ``regions``: a ``Regional``, or None.
        """
        batch, _, height, width = sample.shape
        size = (height, width)
        regions = kwargs.pop("regions", None)
        prompts = regions.prompts(kwargs) if regions is not None else None
        if self.config.mode == "canvas":
            if self.attention is not None:
                self.attention.canvas.prompts = ()
                self.attention.grid = (size, self.unit) if self.unit > 1 else None
            if prompts is not None:
                kwargs = regions.joined(self, prompts, size, kwargs)
            return self._evaluate_whole(forward, sample, timestep, kwargs)
        tiling = self.placed
        assert tiling is not None, "place() comes first"
        if prompts is not None:
            return regions.evaluate(self, prompts, forward, sample, {**kwargs, "timestep": timestep})
        if len(tiling) == 1 and not kwargs.get("per_tile"):
            return self._evaluate_whole(forward, sample, timestep, kwargs)
        check_residuals(kwargs, tiling)
        kwargs["timestep"] = timestep

        def run(part: TileBatch) -> Tensor:
            return self._tile_batch(forward, sample, part, kwargs)

        parts, uniform, buffer = self.batches(tiling, batch), len(self._parts) == 1, None
        for part, out in zip(parts, self.deal(parts, run, sample), strict=True):
            if buffer is None:
                shape = (len(tiling) * batch, out.shape[1], *part.tile)
                buffer = out.new_empty(shape if uniform else (batch, out.shape[1], height, width))
            if (out.shape[1], out.dtype) != (buffer.shape[1], buffer.dtype):
                got, first = (f"{x.shape[1]} channels of {x.dtype}" for x in (out, buffer))
                raise ValueError(f"the network gave {got} for some tiles, and {first} for others")
            tiles = out.unflatten(0, (len(part.offsets), -1))
            if uniform:
                buffer.unflatten(0, (-1, batch))[part.first : part.first + len(tiles), part.images] = tiles
            else:
                part.put(tiles, buffer)
        assert buffer is not None
        if not uniform:  # tiles of several sizes do not overlap: each is in its place
            return self.whole(buffer)
        return Prediction(buffer, self._parts[0], size, self.ramp(tiling))

    def batches(self, tiling: Tiling, batch: int) -> list[TileBatch]:
        """The tile batches of a step, in order; with ``guidance_batch=False`` each has one guidance branch."""
        count = batch // (1 if self.execution.guidance_batch else self.branches)
        branches = [slice(i, i + count) for i in range(0, batch, count)] if count < batch else [slice(None)]
        size, most = (tiling.height, tiling.width), self.tile_batch
        return [
            TileBatch(offsets[i : i + most], tile, size, batch, self.pixels, self.execution.impl, images, first=i)
            for tile, offsets in zip(tiling.groups, self._parts, strict=True)
            for i in range(0, len(offsets), most)
            for images in branches
        ]

    def _evaluate_whole(self, forward: Forward, sample: Tensor, timestep: Time, kwargs: dict[str, Any]) -> Prediction:
        """The canvas in one call of the network, as it is."""
        size = (sample.shape[2], sample.shape[3])
        part = TileBatch(torch.zeros(1, 2), size, size, len(sample), self.pixels)
        [out] = self.deal([part], lambda _: self._network(forward, sample, timestep=timestep, **kwargs), sample)
        return self.whole(out)

    def ramp(self, tiling: Tiling) -> int:
        """Width of the transition between two tiles, in canvas pixels; 1 is none."""
        return max(1, min(tiling.overlap)) if self.config.ramp is None else -(-self.config.ramp // self.unit)

    def attempt(self, forward: Forward, sample: Tensor, timestep: Time, **kwargs: Any) -> Prediction:
        """:meth:`evaluate`; out of memory, again with half the tile batch, or one guidance branch at a time."""
        while True:
            try:
                return self.evaluate(forward, sample, timestep, **kwargs)
            except torch.OutOfMemoryError:
                # What was recorded of a CUDA graph cannot be taken back: its owner drops it and runs eagerly.
                capturing = sample.is_cuda and torch.cuda.is_current_stream_capturing()
                if capturing or not self._reduce(len(sample)):
                    raise
            # Outside of the handler, whose traceback holds the tensors of the failed attempt.
            if sample.is_cuda:
                torch.cuda.empty_cache()

    def renewed(self, other: "TileDenoiser") -> "TileDenoiser":
        """This one, for another call that made ``other``; what was lowered before stays."""
        if other.attention is not None and self.reductions:
            other.attention.guidance_batch = False
        self.attention, self.timesteps, self.deal = other.attention, other.timesteps, other.deal
        return self

    def _reduce(self, batch: int) -> bool:
        """Lower what an evaluation takes at a time; False if it is the least already."""
        if self.config.mode == "canvas":
            if self.attention is None or not self.attention.guidance_batch or batch == 1:
                return False
            self.attention.guidance_batch = False
            change = "guidance branches one after the other"
        else:
            assert self.placed is not None
            if (now := min(self.tile_batch, len(self.placed))) == 1:
                return False
            self.tile_batch = now // 2
            change = f"tile_batch {now} -> {self.tile_batch}"
        self.reductions.append(change)
        logger.warning("out of memory: %s, from this step on", change)
        return True

    def whole(self, prediction: Tensor) -> Prediction:
        """A prediction of the canvas as one tile."""
        origin = torch.zeros(1, 2, dtype=torch.int32, device=prediction.device)
        return Prediction(prediction, origin, (prediction.shape[2], prediction.shape[3]), 1)

    def _tile_batch(self, forward: Forward, sample: Tensor, part: TileBatch, kwargs: dict[str, Any]) -> Tensor:
        """Predictions of some tiles, tile-major: all images of the first tile, then all of the next."""
        with label("gather"):
            inputs = part.gather(sample)
        count = len(part.offsets)
        return swap_major(self._network(forward, inputs, **conditions(kwargs, part)), len(inputs) // count, count)

    @staticmethod
    def _network(forward: Forward, inputs: Tensor, **kwargs: Any) -> Tensor:
        with label("network"):
            prediction: Tensor = forward(inputs, **kwargs)[0]
        return prediction
