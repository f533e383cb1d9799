"""Running a pipeline with regions: each tile is evaluated once for every prompt that has a share in it.

The predictions are then mixed by those shares, before tiles are blended. A tile of one prompt alone costs what it
always does. The pipeline encodes the regions' prompts itself, by the same arguments as the global one's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tiledcore._diffusers import device_of, pack, uncompiled
from tiledcore.compose.regional_canvas import CanvasRegions
from tiledcore.compose.regional_tiles import Shares, evaluate, grid_of, split
from tiledcore.compose.regions import Region, check_are_regions, check_regions, region_weights, seed_noise
from tiledcore.feature import Feature
from tiledcore.geometry import Pair, both

if TYPE_CHECKING:
    from tiledcore.tiles.denoiser import Prediction, TileDenoiser

Wrap = bool | tuple[bool, bool]

# Which arguments of a network's forward are a prompt's, and where the pipeline's encode_prompt returns them. A name
# with a dot is an entry of a dict.
TEXT: dict[type, dict[str, int]] = {
    UNet2DConditionModel: {"encoder_hidden_states": 0, "added_cond_kwargs.text_embeds": 2},
    SD3Transformer2DModel: {"encoder_hidden_states": 0, "pooled_projections": 2},
    FluxTransformer2DModel: {"encoder_hidden_states": 0, "pooled_projections": 1},
    PixArtTransformer2DModel: {"encoder_hidden_states": 0, "encoder_attention_mask": 1},
    SanaTransformer2DModel: {"encoder_hidden_states": 0, "encoder_attention_mask": 1},
}


class Regional(Feature):
    """The regions of one call. While it is entered, ``encode_prompt`` encodes the regions' prompts too.

    Args:
        pipe: the pipeline.
        network: its denoiser.
        regions: at least one.
        hook: of the network, which is told of the regions.

    Raises:
        TypeError: the network's prompts cannot be replaced yet, or something in ``regions`` is no region.
        ValueError: not in canvas mode.
    """

    def __init__(self, pipe: Any, network: Any, regions: Sequence[Region], hook: Any) -> None:
        check_are_regions(regions)
        inner = uncompiled(network)
        found = [text for kind, text in TEXT.items() if isinstance(inner, kind)]
        if not found or not hasattr(pipe, "encode_prompt"):
            known = ", ".join(kind.__name__ for kind in TEXT)
            raise TypeError(f"regions: {type(pipe).__name__} has no prompts that can be replaced; known are {known}")
        self.pipe, self.regions, self._text = pipe, tuple(regions), found[0]
        self.tiles = 0  # evaluated in the last step, each as often as there are prompts in it
        self._encoded: list[Any] = []
        self._negative: list[Tensor] = []
        self._used = False
        self._weights: tuple[Any, Tensor] | None = None
        self._shares: tuple[Tensor, Shares] | None = None
        self._hook, self._network = hook, network
        self._canvas: CanvasRegions | None = None

    def __enter__(self) -> Regional:
        if self._hook.denoiser.config.mode == "canvas":
            self._canvas = CanvasRegions(self._network)
        self._hook.regions = self
        self._own = vars(self.pipe).get("encode_prompt")
        original = self.pipe.encode_prompt
        parameters = signature(original)

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self._encoded and not self._used:  # the same call's second: a negative prompt
                self._negative.append(result[0])
                return result
            arguments = dict(parameters.bind(*args, **kwargs).arguments)
            arguments |= arguments.pop("kwargs", {})
            count = _images(arguments)
            texts = [n for n in arguments if "prompt" in n and "negative" not in n and n != "num_images_per_prompt"]
            arguments |= dict.fromkeys(texts)
            if "do_classifier_free_guidance" in parameters.parameters:  # the negative prompt is there already
                arguments["do_classifier_free_guidance"] = False
            others = [original(**{**arguments, "prompt": [region.prompt] * count}) for region in self.regions]
            self._encoded, self._negative, self._used = [result, *others], [], False
            return result

        vars(self.pipe)["encode_prompt"] = encode_prompt
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.regions = None
        if self._canvas is not None:
            self._canvas.restore()
        del vars(self.pipe)["encode_prompt"]
        if self._own is not None:
            vars(self.pipe)["encode_prompt"] = self._own

    def prompts(self, conditions: dict[str, Any]) -> list[dict[str, Any]] | None:
        """What each prompt changes in the arguments of the network's forward, the global one (nothing) first.

        Only rows of the prompt itself: those of a negative prompt stay. None where all rows are a negative prompt's,
        as in FLUX' second evaluation.
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
            if value is None or (entry and entry not in value):
                continue
            old = value[entry] if entry else value
            new = torch.cat([old[:kept], encoded[place].to(old)])
            changed[name] = {**value, entry: new} if entry else new
        return changed

    def weights(self, size: Pair, pixels: int, wrap: Wrap) -> Tensor:
        """``region_weights`` of a canvas, on the CPU; checked, and kept from step to step."""
        wraps = both(wrap)
        key = (size, pixels, wraps)
        if self._weights is None or self._weights[0] != key:
            check_regions(self.regions, size[1] * pixels, size[0] * pixels, wraps)
            self._weights = (key, region_weights(self.regions, size, pixels, wraps))
        return self._weights[1]

    def joined(
        self, denoiser: TileDenoiser, prompts: list[dict[str, Any]], size: Pair, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments of one evaluation of the whole canvas, in canvas mode."""
        assert self._canvas is not None
        return self._canvas.joined(prompts, self.weights(size, denoiser.pixels, denoiser.config.wrap), kwargs)

    def evaluate(
        self,
        denoiser: TileDenoiser,
        prompts: list[dict[str, Any]],
        forward: Callable[..., Any],
        sample: Tensor,
        kwargs: dict[str, Any],
    ) -> Prediction:
        """As :meth:`tiledcore.tiles.denoiser.TileDenoiser.evaluate`, with :meth:`prompts` in place of one."""
        size, wrap = (sample.shape[2], sample.shape[3]), denoiser.config.wrap
        weights = self.weights(size, denoiser.pixels, wrap)
        if self._shares is None or self._shares[0] is not weights:
            wraps = both(wrap)
            tile = grid_of(denoiser, size, wraps).tile_size
            self._shares = (weights, split(self.regions, weights, denoiser.pixels, tile, wraps))
        prediction, self.tiles = evaluate(denoiser, self._shares[1], prompts, forward, sample, kwargs)
        return prediction


def draw_noise(pipe: Any, family: Any, network: Any, call: dict[str, Any]) -> Tensor:
    """The noise ``[B, C, H, W]`` that a text-to-image pipeline would draw for this call.

    Args:
        pipe: the pipeline.
        family: how its network maps to a canvas.
        network: the denoiser.
        call: the arguments of the pipeline's call.

    Raises:
        ValueError: the call brings its own latents, or starts from an image.
    """
    for name in ("latents", "image"):
        if call.get(name) is not None:
            raise ValueError(f"{name}: a region's seed needs initial noise drawn here; leave one of them out")
    factor, native = pipe.vae_scale_factor, family.native(pipe, network)
    natives = (native, native) if isinstance(native, int) else native
    height, width = (call.get(name) or factor * n for name, n in zip(("height", "width"), natives, strict=True))
    images = _images(call) * (call.get("num_images_per_prompt") or 1)
    channels = network.config.in_channels // (4 if family.packed else 1)
    return randn_tensor(
        (images, channels, height // factor, width // factor),
        generator=call.get("generator"),
        device=device_of(pipe),
        dtype=network.dtype,
    )


def as_latents(pipe: Any, family: Any, noise: Tensor) -> Tensor:
    """Noise ``[B, C, H, W]`` in the form in which the pipeline takes ``latents``: packed, where it packs."""
    return pack(pipe, noise) if family.packed else noise


def seeded_latents(
    pipe: Any, family: Any, network: Any, call: dict[str, Any], regions: Sequence[Region], wrap: Wrap
) -> Tensor:
    """The ``latents`` that a text-to-image pipeline's call starts from, with the regions' own noise in them.

    Elsewhere it is the noise that the pipeline would draw itself. Arguments and errors are those of
    :func:`draw_noise`; ``wrap`` says whether the canvas is a torus, as one bool or (along y, along x).
    """
    noise, factor = draw_noise(pipe, family, network, call), pipe.vae_scale_factor
    height, width = (factor * n for n in noise.shape[2:])
    check_regions(regions, width, height, both(wrap))
    return as_latents(pipe, family, seed_noise(noise, regions, factor))


def _images(arguments: dict[str, Any]) -> int:
    """How many prompts a call has."""
    if arguments.get("prompt_embeds") is not None:
        return len(arguments["prompt_embeds"])
    prompt = arguments.get("prompt")
    return len(prompt) if isinstance(prompt, list) else 1
