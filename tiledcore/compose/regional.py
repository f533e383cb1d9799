"""Run a pipeline with regions: each tile is evaluated once per prompt in it, and the predictions are mixed.

The pipeline's own ``encode_prompt`` encodes the regions' prompts, with the arguments of the global one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tiledcore._diffusers import device_of, pack, uncompiled
from tiledcore.canvas.processors import CrossProcessor
from tiledcore.canvas.windows import Prompt
from tiledcore.compose.regional_tiles import evaluate, grid_of, split
from tiledcore.compose.regions import Region, check_regions, region_weights, seed_noise
from tiledcore.feature import Feature
from tiledcore.geometry import Pair, both
from tiledcore.loop.engine import Report
from tiledcore.tiles.families import network_of
from tiledcore.utils import replaced

if TYPE_CHECKING:
    from tiledcore.tiles.denoiser import Prediction, TileDenoiser

logger = logging.getLogger(__name__)

# The arguments of a network's forward that depend on the prompt, and their place in encode_prompt's result. A name
# with a dot is an entry of a dict.
TEXT: dict[type, dict[str, int]] = {
    UNet2DConditionModel: {"encoder_hidden_states": 0, "added_cond_kwargs.text_embeds": 2},
    SD3Transformer2DModel: {"encoder_hidden_states": 0, "pooled_projections": 2},
    FluxTransformer2DModel: {"encoder_hidden_states": 0, "pooled_projections": 1},
    PixArtTransformer2DModel: {"encoder_hidden_states": 0, "encoder_attention_mask": 1},
    SanaTransformer2DModel: {"encoder_hidden_states": 0, "encoder_attention_mask": 1},
    QwenImageTransformer2DModel: {"encoder_hidden_states": 0, "encoder_hidden_states_mask": 1},
}


class Regional(Feature):
    """The regions of one call. While entered, ``encode_prompt`` encodes the regions' prompts too.

    Raises:
        TypeError: the network's prompts cannot be replaced; in canvas mode also an adapter that knows one text.
    """

    def __init__(self, pipe: Any, network: Any, regions: Sequence[Region], hook: Any) -> None:
        inner = uncompiled(network)
        found = [text for kind, text in TEXT.items() if isinstance(inner, kind)]
        if not found or not hasattr(pipe, "encode_prompt"):
            known = ", ".join(kind.__name__ for kind in TEXT)
            raise TypeError(f"regions: {type(pipe).__name__} has no prompts that can be replaced; known are {known}")
        self.pipe, self.regions, self._text = pipe, tuple(regions), found[0]
        self.tiles = 0  # tiles evaluated in the last step, counted once per prompt
        self._encoded: list[Any] = []
        self._negative: list[Tensor] = []
        self._used = False
        self.weights = lru_cache(maxsize=1)(self._weights)  # checked once, and kept for all steps
        self._split = lru_cache(maxsize=1)(split)
        self._places = lru_cache(maxsize=1)(self._prompts)
        self._hook, self._network = hook, inner

    def enter(self, stack: ExitStack) -> None:
        if self._hook.denoiser.config.mode == "canvas":
            for name, layer in self._network.named_modules():
                if getattr(layer, "is_cross_attention", False) and not isinstance(layer.processor, CrossProcessor):
                    kind = type(layer.processor).__name__
                    raise TypeError(f"regions: {name}: {kind} knows one text; remove its adapter, or use mode='tiles'")
            if "pooled_projections" in self._text or self._network.config.get("addition_embed_type") == "text_time":
                logger.warning(
                    "regions: in canvas mode the pooled text, which can hold the style, is the global prompt's "
                    "everywhere; mode='tiles' gives each region its own"
                )
        stack.enter_context(replaced(self._hook, regions=self))
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

    def report(self, report: Report) -> None:
        report.region_tiles = self.tiles or None

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
        return [{}, *(self._changed(conditions, encoded, rows - images) for encoded in self._encoded[1:])]

    def _changed(self, conditions: dict[str, Any], encoded: Any, kept: int) -> dict[str, Any]:
        changed: dict[str, Any] = {}
        for name, place in self._text.items():
            name, _, entry = name.partition(".")
            value = conditions.get(name)
            if not kept and name.endswith("_mask"):
                changed[name] = encoded[place]  # of the region, or None, whatever the global prompt's is
                continue
            if value is None or (entry and entry not in value):
                continue
            old = value[entry] if entry else value
            own = encoded[place].to(old)
            new = torch.cat([old[:kept], own]) if kept else own  # which may be longer or shorter
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
        places = self._places(lengths, size, denoiser.pixels, both(denoiser.config.wrap))
        denoiser.attention.canvas.prompts = tuple(places.values())
        joined = {**kwargs, "encoder_hidden_states": torch.cat([tokens[p] for p in places], 1)}
        for name in self._text:
            if name.endswith("_mask"):  # None where all of a text counts
                masks = [(texts[p].get(name), tokens[p]) for p in places]
                whole = [text.new_ones(text.shape[:2]) if mask is None else mask for mask, text in masks]
                joined[name] = torch.cat(whole, 1)
        if (ids := kwargs.get("txt_ids")) is not None:  # FLUX' are all 0
            joined["txt_ids"] = ids.new_zeros(*ids.shape[:-2], sum(p.tokens for p in places.values()), ids.shape[-1])
        return joined

    def _prompts(self, lengths: tuple[int, ...], size: Pair, pixels: int, wrap: tuple[bool, bool]) -> dict[int, Prompt]:
        """The prompts that have a share in the canvas; ``lengths`` are of all texts."""
        shares = zip(lengths, self.weights(size, pixels, wrap), strict=True)
        return {p: Prompt(tokens, share) for p, (tokens, share) in enumerate(shares) if share.any()}

    def evaluate(
        self,
        denoiser: TileDenoiser,
        prompts: list[dict[str, Any]],
        forward: Callable[..., Any],
        sample: Tensor,
        kwargs: dict[str, Any],
    ) -> Prediction:
        """:meth:`tiledcore.tiles.denoiser.TileDenoiser.evaluate` with several prompts, from :meth:`prompts`."""
        size, wrap = (sample.shape[2], sample.shape[3]), both(denoiser.config.wrap)
        weights = self.weights(size, denoiser.pixels, wrap)
        shares = self._split(self.regions, weights, denoiser.pixels, grid_of(denoiser, size, wrap).tile_size, wrap)
        prediction, self.tiles = evaluate(denoiser, shares, prompts, forward, sample, kwargs)
        return prediction


def draw_noise(pipe: Any, call: dict[str, Any]) -> Tensor:
    """The noise ``[B, C, H, W]`` that a text-to-image pipeline would draw for ``call``, its arguments by name."""
    for name in ("latents", "image"):
        if call.get(name) is not None:
            raise ValueError(f"{name}: a region's seed needs initial noise drawn here; leave one of them out")
    network, family = network_of(pipe)
    factor, native = pipe.vae_scale_factor, both(family.native(pipe, network))
    height, width = (call.get(name) or factor * n for name, n in zip(("height", "width"), native, strict=True))
    images = _images(call) * (call.get("num_images_per_prompt") or 1)
    channels = network.config.in_channels // family.unit(network) ** 2
    shape = (images, channels, height // factor, width // factor)
    return randn_tensor(shape, generator=call.get("generator"), device=device_of(pipe), dtype=network.dtype)


def as_latents(pipe: Any, noise: Tensor) -> Tensor:
    """Noise ``[B, C, H, W]`` as the pipeline takes ``latents``: as tokens if it packs them."""
    return pack(pipe, noise) if network_of(pipe)[1].packed else noise


def seeded_latents(
    pipe: Any, call: dict[str, Any], regions: Sequence[Region], wrap: bool | tuple[bool, bool]
) -> Tensor:
    """The ``latents`` for a text-to-image call, in which regions with a seed have their own noise."""
    noise, factor = draw_noise(pipe, call), pipe.vae_scale_factor
    height, width = (factor * n for n in noise.shape[2:])
    check_regions(regions, width, height, both(wrap))
    return as_latents(pipe, seed_noise(noise, regions, factor))


def _images(arguments: dict[str, Any]) -> int:
    """The number of prompts of a call."""
    if arguments.get("prompt_embeds") is not None:
        return len(arguments["prompt_embeds"])
    prompt = arguments.get("prompt")
    return len(prompt) if isinstance(prompt, list) else 1
