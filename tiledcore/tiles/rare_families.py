"""Families whose canvas is in a place of its own: a frame, beside another image, or in one row with the text."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.controlnets.controlnet_xs import ControlNetXSOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from tiledcore.tiles.family import Family
from tiledcore.tiles.layouts import (
    IDS,
    Arguments,
    raster,
    sized,
    to_image,
    to_tokens,
    token_places,
)
from tiledcore.tiles.more_families import FRACTION, cogview_shift

FRAME: dict[str, Any] = {
    "canvas": lambda arguments: arguments["hidden_states"].squeeze(2),
    "tiles": lambda tiles, arguments, pixels: {"hidden_states": tiles.unsqueeze(2)},
    "prediction": lambda output, size: output.squeeze(2),
    "result": lambda prediction, sample: prediction.unsqueeze(2),
}
"""A video of one frame, ``[B, C, 1, H, W]``."""


def _cosmos_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    height, width = (pixels * n for n in tiles.shape[2:])  # nothing of the canvas is padding
    return {"hidden_states": tiles.unsqueeze(2), "padding_mask": arguments["padding_mask"][..., :height, :width]}


# ----------------------------------------------------------------------------- DreamLite: two images side by side


def _pair_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    size = [[tiles.shape[3] * pixels, tiles.shape[2] * pixels]] * len(tiles)  # a tile is an image of its own size
    more = arguments["added_cond_kwargs"]
    sizes = more["time_ids"].new_tensor(size)
    return {"sample": torch.cat(tiles.chunk(2, 1), 3), "added_cond_kwargs": {**more, "time_ids": sizes}}


PAIR: dict[str, Any] = {
    "sample": "sample",
    "patch": lambda network: 2,  # in which the pipeline counts tokens for the schedule
    "canvas": lambda arguments: torch.cat(arguments["sample"].chunk(2, 3), 1),
    "tiles": _pair_tiles,
    "prediction": lambda output, size: output[..., : size[1]],
    "output": UNet2DConditionOutput,
}
"""The canvas and, to its right, the image to edit; both are cut at the same places."""

# ----------------------------------------------------------------------------- JoyImage Edit Plus: tokens as patches


def _patches_canvas(arguments: Arguments) -> Tensor:
    return to_image(arguments["hidden_states"].flatten(2), arguments["shape_list"][0][0][1:])


def _patches_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    own, shapes = (1, *tiles.shape[2:]), arguments["shape_list"]
    tokens = to_tokens(tiles).unflatten(2, (-1, 1, 2, 2))
    if (others := arguments.get("references")) is not None:
        tokens = torch.cat([tokens, others], 1)
    each = len(tiles) // len(shapes)
    return {"hidden_states": tokens, "shape_list": [[own, *one[1:]] for one in shapes for _ in range(each)]}


def _patches_result(prediction: Tensor, sample: Tensor) -> Tensor:
    whole = torch.zeros_like(sample)  # the pipeline puts its references back in each step
    whole[:, : prediction.shape[2] * prediction.shape[3]] = to_tokens(prediction).unflatten(2, sample.shape[2:])
    return whole


PATCHES: dict[str, Any] = {
    **IDS,
    "clock": lambda timesteps: timesteps,
    "canvas": _patches_canvas,
    "tiles": _patches_tiles,
    "prediction": lambda output, size: to_image(output.flatten(2), size),
    "result": _patches_result,
}
"""Tokens ``[B, N, C, 1, 2, 2]``, and ``shape_list``: (frames, height, width) of the canvas and of references."""

# ----------------------------------------------------------------------------- Ideogram 4: text before the canvas


def _row_canvas(arguments: Arguments) -> Tensor:
    ids = arguments["position_ids"][0]
    # Tokens of the canvas come last; those before them are text, whose three positions are the same.
    own = ids[int((arguments["indicator"][0] != arguments["indicator"][0, -1]).sum()) :]
    return to_image(arguments["hidden_states"][:, -len(own) :], raster(own))


def _row_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    height, width = arguments["canvas_size"]
    text, count = arguments["position_ids"].shape[1] - height * width, tiles.shape[2] * tiles.shape[3]
    kept = ("encoder_hidden_states", "segment_ids", "indicator")
    changed: Arguments = {name: arguments[name][:, : text + count] for name in kept}
    ids = arguments["position_ids"].repeat_interleave(len(tiles) // len(arguments["position_ids"]), 0)
    own = ids[:, text : text + 1].repeat(1, count, 1)  # from the canvas' first position on
    for column, place in zip((1, 2), token_places(tiles), strict=True):
        own[..., column] += place
    changed["position_ids"] = torch.cat([ids[:, :text], own], 1)
    changed["hidden_states"] = torch.cat([tiles.new_zeros(len(tiles), text, tiles.shape[1]), to_tokens(tiles)], 1)
    return changed


def _row_result(prediction: Tensor, sample: Tensor) -> Tensor:
    tokens = to_tokens(prediction)
    return torch.cat([tokens.new_zeros(len(tokens), sample.shape[1] - tokens.shape[1], tokens.shape[2]), tokens], 1)


ROW: dict[str, Any] = {
    **IDS,
    "clock": lambda timesteps: 1 - timesteps / 1000,
    "canvas": _row_canvas,
    "tiles": _row_tiles,
    "prediction": lambda output, size: to_image(output[:, -size[0] * size[1] :], size),
    "result": _row_result,
}
"""One row of tokens: text, then the canvas, with ``position_ids [B, L, 3]``."""

# ----------------------------------------------------------------------------- OmniGen: positions are one count


def _omnigen_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    height, width = arguments["canvas_size"]
    positions, mask = arguments["position_ids"], arguments["attention_mask"]
    kept = positions.shape[1] - height * width // 4 + tiles.shape[2] * tiles.shape[3] // 4
    given, images = arguments["input_image_sizes"], iter(arguments["input_img_latents"])
    each = len(tiles) // len(positions)
    places, latents = {}, []
    for row, found in given.items():
        own = [next(images) for _ in found]
        for tile in range(row * each, (row + 1) * each):
            places[tile] = found
            latents += own
    changed = {"hidden_states": tiles, "position_ids": positions[:, :kept].repeat_interleave(each, 0)}
    changed["attention_mask"] = mask[:, :kept, :kept]
    return changed | {"input_image_sizes": places, "input_img_latents": latents}


# ----------------------------------------------------------------------------- GLM-Image


def _glm_canvas(arguments: Arguments) -> Tensor:
    caches = arguments.get("kv_caches")
    if caches is not None and caches[0].mode in ("write", "read"):
        raise ValueError("image: GLM-Image keeps keys of reference images from step to step, which tiles cannot share")
    canvas: Tensor = arguments["hidden_states"]
    return canvas


RARE: tuple[Family, ...] = (
    Family(
        diffusers.HunyuanImageTransformer2DModel,
        fits=lambda network: len(network.config.patch_size) == 3,  # the refiner's
        **FRAME,
    ),
    Family(
        diffusers.CosmosTransformer3DModel,
        clock=lambda timesteps: timesteps / (timesteps + 1000),
        **{**FRAME, "tiles": _cosmos_tiles},
    ),
    Family(diffusers.BriaFibo2Transformer2DModel, dynamic_shift=1.15, **FRACTION),
    Family(
        diffusers.UNetControlNetXSModel,  # its hint is cut with the tile
        sample="sample",
        canvas=lambda arguments: arguments["sample"],
        tiles=lambda tiles, arguments, pixels: {"sample": tiles},
        output=ControlNetXSOutput,
    ),
    Family(diffusers.DreamLiteUNetModel, dynamic_shift=1.16, **PAIR),
    Family(diffusers.JoyImageEditPlusTransformer3DModel, **PATCHES),
    Family(diffusers.Ideogram4Transformer2DModel, **ROW),
    Family(diffusers.OmniGenTransformer2DModel, tiles=_omnigen_tiles),
    Family(diffusers.GlmImageTransformer2DModel, canvas=_glm_canvas, tiles=sized, dynamic_shift=cogview_shift),
)
