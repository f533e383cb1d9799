"""Run a pipeline with regions: each tile is evaluated once per prompt in it, and the predictions are mixed.

The pipeline's own ``encode_prompt`` encodes the regions' prompts, with the arguments of the global one. A region with a
seed has its own tiles, laid out from its box, so that its content does not depend on the position of the box.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from inspect import signature
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tiledcore import ops
from tiledcore._diffusers import device_of, pack, uncompiled
from tiledcore.canvas.processors import CrossProcessor
from tiledcore.canvas.windows import Prompt
from tiledcore.compose.regions import Region, check_regions, region_weights
from tiledcore.feature import Feature
from tiledcore.geometry import Pair, TileGrid, Tiling, both
from tiledcore.hook import NetworkHook
from tiledcore.tiles.conditioning import TileBatch
from tiledcore.tiles.denoiser import Forward, Prediction, TileDenoiser
from tiledcore.tiles.families import network_of
from tiledcore.utils import replaced

logger = logging.getLogger(__name__)

# The arguments of a network's forward that depend on the prompt, and their place in encode_prompt's result. A name
# with a dot is an entry of a dict.
TEXT: dict[type, dict[str, int]] = {
    diffusers.UNet2DConditionModel: {"encoder_hidden_states": 0, "added_cond_kwargs.text_embeds": 2},
    diffusers.SD3Transformer2DModel: {"encoder_hidden_states": 0, "pooled_projections": 2},
    diffusers.FluxTransformer2DModel: {"encoder_hidden_states": 0, "pooled_projections": 1},
    diffusers.PixArtTransformer2DModel: {"encoder_hidden_states": 0, "encoder_attention_mask": 1},
    diffusers.SanaTransformer2DModel: {"encoder_hidden_states": 0, "encoder_attention_mask": 1},
    diffusers.QwenImageTransformer2DModel: {"encoder_hidden_states": 0, "encoder_hidden_states_mask": 1},
}


class Layer(NamedTuple):
    """A part of the canvas with its own tiles: all of it, or what a region with a seed covers."""

    rows: Tensor  # On the canvas
    columns: Tensor
    shares: Tensor  # ``[P, h, w]`` of the prompts


class Part(NamedTuple):
    """Tiles of one size that the network gets in one call, with one prompt."""

    layer: int
    prompt: int
    tile: Pair
    chosen: list[int]  # Which tiles of their size
    offsets: Tensor  # ``[n, 2]`` int32, on the canvas
    shares: Tensor  # ``[n, h, w]`` of the prompt
    shape: tuple[int, int, int]  # ``(N, h, w)`` of its predictions ``[N, C, h, w]``


class Regional(Feature):
    """The regions of one call. While entered, ``encode_prompt`` encodes the regions' prompts too.

    Raises:
        TypeError: the network's prompts cannot be replaced; in canvas mode also an adapter that knows one text.
    """

    def __init__(self, hook: NetworkHook, regions: Sequence[Region]) -> None:
        self.hook, self.pipe, self.network = hook, hook.pipe, uncompiled(hook.network)
        found = [text for kind, text in TEXT.items() if isinstance(self.network, kind)]
        if not found or not hasattr(self.pipe, "encode_prompt"):
            name, known = type(self.pipe).__name__, ", ".join(kind.__name__ for kind in TEXT)
            raise TypeError(f"regions: {name} has no prompts that can be replaced; known are {known}")
        self.regions, self._text = tuple(regions), found[0]
        self._encoded: list[Any] = []
        self._negative: list[Tensor] = []
        self._used = False
        self._layers = lru_cache(maxsize=1)(self._layers_of)  # kept for all steps
        self._prompts = lru_cache(maxsize=1)(self._prompts_of)

    def enter(self, stack: ExitStack) -> None:
        if self.hook.denoiser.config.mode == "canvas":
            for name, layer in self.network.named_modules():
                if getattr(layer, "is_cross_attention", False) and not isinstance(layer.processor, CrossProcessor):
                    kind = type(layer.processor).__name__
                    raise TypeError(f"regions: {name}: {kind} knows one text; remove its adapter, or use mode='tiles'")
            if "pooled_projections" in self._text or self.network.config.get("addition_embed_type") == "text_time":
                logger.warning(
                    "regions: in canvas mode the pooled text, which can hold the style, is the global prompt's "
                    "everywhere; mode='tiles' gives each region its own"
                )
        stack.enter_context(replaced(self.hook, regions=self))
        original = self.pipe.encode_prompt
        parameters = signature(original)

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self._encoded and not self._used:  # the second call in one run is for the negative prompt
                self._negative.append(result[0])
                return result
            arguments = dict(parameters.bind(*args, **kwargs).arguments)
            arguments |= arguments.pop("kwargs", {})
            count = _images(arguments)
            texts = [n for n in arguments if "prompt" in n and "negative" not in n and n != "num_images_per_prompt"]
            arguments |= dict.fromkeys(texts)
            if "do_classifier_free_guidance" in parameters.parameters:  # the first call encoded the negative prompt
                arguments["do_classifier_free_guidance"] = False
            more = {"num_images_per_prompt": 1} & arguments.keys()
            self.encode = lambda texts: original(**{**arguments, **dict.fromkeys(more, 1), "prompt": texts})
            others = [original(**{**arguments, "prompt": [region.prompt] * count}) for region in self.regions]
            self._encoded, self._negative, self._used = [result, *others], [], False
            return result

        stack.enter_context(replaced(self.pipe, encode_prompt=encode_prompt))

    def prompts(self, conditions: dict[str, Any]) -> list[dict[str, Any]] | None:
        """For each prompt, the arguments of forward that it changes; the global prompt comes first and changes none.

        Rows of a negative prompt are kept. None if all rows are a negative prompt's, as in FLUX' second evaluation.
        """
        if not self._encoded:
            raise ValueError("regions: the pipeline was called without encoding a prompt")
        self._used = True
        images, rows = len(self._encoded[0][0]), len(conditions["encoder_hidden_states"])
        if rows not in (images, 2 * images):
            raise ValueError(f"regions: {rows} rows of prompts for {images} images cannot be told apart")
        pointer = conditions["encoder_hidden_states"].data_ptr()
        if rows == images and any(negative.data_ptr() == pointer for negative in self._negative):
            return None
        kept = rows - images

        def of_region(encoded: Any) -> dict[str, Any]:
            def change(name: str, place: int, old: Tensor | None) -> Tensor | None:
                if not kept and name.endswith("_mask"):
                    return encoded[place]  # or None, whatever the global prompt's is
                if old is None:
                    return None
                own: Tensor = encoded[place].to(old)  # which may be longer or shorter
                return torch.cat([old[:kept], own]) if kept else own

            return self._changed(conditions, change)

        return [{}, *map(of_region, self._encoded[1:])]

    def _changed(
        self, conditions: dict[str, Any], change: Callable[[str, int, Tensor | None], Tensor | None]
    ) -> dict[str, Any]:
        """The arguments that hold texts, changed: ``change(name, place in encode_prompt's result, value)``."""
        changed: dict[str, Any] = {}
        for name, place in self._text.items():
            name, _, entry = name.partition(".")
            value: Any = conditions.get(name)
            old = (value or {}).get(entry) if entry else value
            if old is not None or name.endswith("_mask"):
                new = change(name, place, old)
                changed[name] = {**value, entry: new} if entry else new
        return changed

    def _weights(self, size: Pair, pixels: int, wrap: tuple[bool, bool]) -> Tensor:
        """:func:`region_weights` of a canvas, on the CPU."""
        check_regions(self.regions, size[1] * pixels, size[0] * pixels, wrap)
        return region_weights(self.regions, size, pixels, wrap)

    def joined(
        self, denoiser: TileDenoiser, prompts: list[dict[str, Any]], size: Pair, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments of one evaluation of the whole canvas, for canvas mode: all texts one after the other.

        What a call has once stays the global prompt's: a pooled text, and with it the modulation.
        """
        texts = [{**kwargs, **changes} for changes in prompts]
        tokens = [text["encoder_hidden_states"] for text in texts]
        lengths = tuple(text.shape[1] for text in tokens)
        places = self._prompts(lengths, size, denoiser.pixels, both(denoiser.config.wrap))
        denoiser.attention.canvas.prompts = tuple(places.values())
        joined = {**kwargs, "encoder_hidden_states": torch.cat([tokens[p] for p in places], 1)}
        for name in self._text:
            if name.endswith("_mask"):  # None where all of a text counts
                masks = ((texts[p].get(name), tokens[p][..., 0]) for p in places)
                joined[name] = torch.cat([torch.ones_like(one) if mask is None else mask for mask, one in masks], 1)
        if (ids := kwargs.get("txt_ids")) is not None:  # FLUX' are all 0
            joined["txt_ids"] = ids.new_zeros(*ids.shape[:-2], sum(p.tokens for p in places.values()), ids.shape[-1])
        return joined

    def _prompts_of(
        self, lengths: tuple[int, ...], size: Pair, pixels: int, wrap: tuple[bool, bool]
    ) -> dict[int, Prompt]:
        """The prompts that have a share in the canvas; ``lengths`` are of all texts."""
        shares = zip(lengths, self._weights(size, pixels, wrap), strict=True)
        return {p: Prompt(tokens, share) for p, (tokens, share) in enumerate(shares) if share.any()}

    def _layers_of(self, size: Pair, pixels: int, tile: Pair, wrap: tuple[bool, bool]) -> list[Layer]:
        """The layer of the canvas, then one for each region with a seed; ``tile`` is in canvas pixels."""
        common, own = self._weights(size, pixels, wrap), []
        for p, region in enumerate(self.regions, 1):
            if region.seed is None:
                continue
            left, top, right, bottom = region.bounds()
            margin = -(-region.feather // (2 * pixels))
            rows, columns = (
                _extent(low // pixels - margin, -(-high // pixels) + margin, length, side, wraps)
                for low, high, length, side, wraps in zip((top, left), (bottom, right), size, tile, wrap, strict=True)
            )
            shares = torch.zeros(len(common), len(rows), len(columns))
            shares[p] = common[p][rows[:, None], columns]
            own.append(Layer(rows, columns, shares))
            common[p] = 0
        return [Layer(torch.arange(size[0]), torch.arange(size[1]), common), *own]

    def evaluate(
        self,
        denoiser: TileDenoiser,
        prompts: list[dict[str, Any]],
        forward: Forward,
        sample: Tensor,
        kwargs: dict[str, Any],
    ) -> Prediction:
        """:meth:`tiledcore.tiles.denoiser.TileDenoiser.evaluate` with several prompts, from :meth:`prompts`."""

        def run(part: Part) -> Tensor:
            offsets, execution = part.offsets.to(sample.device), denoiser.execution
            tiles = TileBatch(offsets, part.tile, size, len(sample), denoiser.pixels, execution.impl)
            return denoiser._tile_batch(forward, sample, tiles, {**kwargs, **prompts[part.prompt]})

        placed = denoiser.placed
        assert placed is not None
        size, wrap = (placed.height, placed.width), both(denoiser.config.wrap)
        layers = self._layers(size, denoiser.pixels, placed.tile_size, wrap)
        tilings = [placed, *(_own_tiling(denoiser, layer, kwargs["timestep"]) for layer in layers[1:])]
        parts = [
            part for i, layer in enumerate(layers) for part in _parts(i, layer, tilings[i], sample, denoiser.tile_batch)
        ]
        mixed: list[dict[Pair, Tensor]] = [{} for _ in layers]  # Per layer and size: tiles [T, B, C, h, w]
        for part, out in zip(parts, denoiser.deal(parts, run, sample), strict=True):
            tiles = mixed[part.layer].get(part.tile)
            if tiles is None:
                shape = (len(tilings[part.layer].groups[part.tile]), len(sample), *out.shape[1:])
                tiles = mixed[part.layer][part.tile] = out.new_zeros(shape)
            for t, share, one in zip(part.chosen, part.shares, out.split(len(sample)), strict=True):
                alone = bool((share == 1).all())  # the only prompt here: not multiplied, so no bit changes
                tiles[t] += one if alone else one * share.to(one)
        like = out.new_empty(len(sample), out.shape[1], 0, 0)
        first, *own = [_placed(denoiser, *one, like) for one in zip(tilings, mixed, strict=True)]
        if own:
            canvas = denoiser.blended(first)
            for layer, prediction in zip(layers[1:], own, strict=True):
                canvas[:, :, layer.rows[:, None], layer.columns] += denoiser.blended(prediction)
            first = denoiser.whole(canvas)
        return first


def _extent(low: int, high: int, size: int, tile: int, wrap: bool) -> Tensor:
    """Positions on one axis from ``low`` to ``high``, at least one tile long, all inside the canvas."""
    length = min(size, max(high - low, tile))
    low -= max(0, length - (high - low)) // 2
    if not wrap:
        low = min(max(low, 0), size - length)
    return torch.arange(low, low + length) % size


def _own_tiling(denoiser: TileDenoiser, layer: Layer, timestep: Any) -> Tiling:
    """The tiles of a part of the canvas, from its corner on; shifted like those of the canvas in this step."""
    unit, motion = denoiser.unit, denoiser.config.moving
    size = (unit * len(layer.rows), unit * len(layer.columns))
    grid = replace(denoiser.config, wrap=False).grid(*size, denoiser.native, unit)
    if motion is None or isinstance(denoiser.placed, TileGrid):
        return grid
    return TileGrid(grid.height, grid.width, grid.tile_size).shifted(denoiser.step(timestep)[0], motion.seed)


def _parts(number: int, layer: Layer, tiling: Tiling, sample: Tensor, batch: int) -> Iterator[Part]:
    """The calls of the network that the tiles of a layer need."""
    images, size = len(sample), torch.tensor(sample.shape[2:])
    corner = torch.tensor([int(layer.rows[0]), int(layer.columns[0])])
    for tile, places in tiling.groups.items():
        local = torch.tensor(places, dtype=torch.int32)
        offsets = ((local + corner) % size).to(torch.int32)
        shares = ops.gather_tiles(layer.shares[None], local, tile)  # [T, P, h, w]
        for p in range(shares.shape[1]):
            for at in (shares[:, p].amax((1, 2)) > 0).nonzero().flatten().split(batch):
                if len(at):
                    yield Part(number, p, tile, at.tolist(), offsets[at], shares[at, p], (len(at) * images, *tile))


def _placed(denoiser: TileDenoiser, tiling: Tiling, mixed: dict[Pair, Tensor], like: Tensor) -> Prediction:
    """The prediction of a layer from its tiles by size; 0 where no prompt has a share. ``like``: ``[B, C, 0, 0]``."""
    size = (tiling.height, tiling.width)
    canvas = like.new_zeros(*like.shape[:2], *size)
    for tile, tiles in mixed.items():
        offsets = torch.tensor(tiling.groups[tile], dtype=torch.int32, device=like.device)
        if len(tiling.groups) == 1:
            return Prediction(tiles.flatten(0, 1), offsets, size, denoiser.ramp(tiling))
        # Tiles of several sizes do not overlap, but may wrap.
        TileBatch(offsets, tile, size, len(like), denoiser.pixels).put(tiles, canvas)
    return denoiser.whole(canvas)


def drawn_latents(pipe: Any, call: dict[str, Any], change: Callable[[Tensor], Tensor]) -> Tensor:
    """The ``latents`` of a text-to-image call: the noise ``[B, C, H, W]`` that ``pipe`` would draw, after a change.

    ``call``: its arguments by name. They are tokens where the pipeline packs them.
    """
    for name in ("latents", "image"):
        if call.get(name) is not None:
            raise ValueError(f"{name}: a region's seed needs initial noise drawn here; leave one of them out")
    network, family = network_of(pipe)
    factor, native = pipe.vae_scale_factor, both(family.native(pipe, network))
    height, width = (call.get(name) or factor * n for name, n in zip(("height", "width"), native, strict=True))
    images = _images(call) * (call.get("num_images_per_prompt") or 1)
    channels = network.config.in_channels // family.unit(network) ** 2
    shape = (images, channels, height // factor, width // factor)
    noise = change(randn_tensor(shape, call.get("generator"), device_of(pipe), network.dtype))
    return pack(pipe, noise) if family.packed else noise


def _images(call: dict[str, Any]) -> int:
    """The number of prompts of a call."""
    given = call.get("prompt") if call.get("prompt_embeds") is None else call["prompt_embeds"]
    return len(given) if isinstance(given, list | Tensor) else 1
