"""Families for tile mode alone, and one derived from the signature of a network that nobody has described."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from torch import Tensor

from tiledcore.tiles.family import Family, factor_of
from tiledcore.tiles.layouts import IDS, SHAPES, Arguments, sized, to_image

logger = logging.getLogger(__name__)


def _hunyuan_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    height, width = tiles.shape[2:]
    cosine = arguments["image_rotary_emb"][0]
    grid, base = (height // 2, width // 2), 512 // 8 // 2  # tokens of 2x2; the size that positions are scaled to
    region = get_resize_crop_region_for_grid(grid, base)
    rotary = get_2d_rotary_pos_embed(cosine.shape[1], region, grid, device=cosine.device, output_type="pt")
    size = arguments["image_meta_size"].clone()  # original, target, crop: a tile is an image of its own size
    size[:, 2], size[:, 3] = height * pixels, width * pixels
    return {"hidden_states": tiles, "image_rotary_emb": rotary, "image_meta_size": size}


def _lumina_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    # Those of an image of the native size: the canvas' are scaled to its size.
    rotary = get_2d_rotary_pos_embed_lumina(2 * arguments["image_rotary_emb"].shape[-1], 384, 384)
    return {"hidden_states": tiles, "image_rotary_emb": rotary.to(tiles.device)}


def _hidream_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    text = arguments["encoder_hidden_states_llama3"]  # [layers, B, L, D]
    return {
        "hidden_states": tiles,
        "encoder_hidden_states_llama3": text.repeat_interleave(len(tiles) // text.shape[1], 1),
    }


def _kandinsky_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    frame, rows, columns = arguments["visual_rope_pos"]
    return {
        "hidden_states": tiles.movedim(1, -1).unsqueeze(1),
        "visual_rope_pos": [frame, rows[: tiles.shape[2] // 2], columns[: tiles.shape[3] // 2]],
    }


def _krea_canvas(arguments: Arguments) -> Tensor:
    text = arguments["encoder_hidden_states"].shape[1]
    canvas: Tensor = IDS["canvas"]({**arguments, "img_ids": arguments["position_ids"][text:]})
    return canvas


def _krea_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    ids, text = arguments["position_ids"], arguments["encoder_hidden_states"].shape[1]
    changed = IDS["tiles"](tiles, {**arguments, "img_ids": ids[text:]}, pixels)
    return {"hidden_states": changed["hidden_states"], "position_ids": torch.cat([ids[:text], changed["img_ids"]])}


def _qwen21_canvas(arguments: Arguments) -> Tensor:
    if len(arguments["img_shapes"][0]) > 1:
        raise ValueError("img_shapes: reference images before the canvas cannot be tiled; leave them out")
    if arguments.get("kv_cache") is not None:
        raise ValueError("kv_cache: tiles cannot share it; call the pipeline with use_kv_cache=False")
    canvas: Tensor = SHAPES["canvas"](arguments)
    return canvas


def _qwen21_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    # A mask of the text's tokens and of each 2x2 of the canvas'.
    text, kept = arguments["encoder_hidden_states"].shape[1], tiles.shape[2] * tiles.shape[3] // 4
    mask = arguments["img_mask"][:, : text + kept]
    return SHAPES["tiles"](tiles, arguments, pixels) | {"img_mask": mask}


def cogview_shift(tokens: int, steps: int, config: Any) -> float:
    root = (tokens / config.get("base_image_seq_len", 256)) ** 0.5
    return float(root * config.get("max_shift", 0.75) + config.get("base_shift", 0.25))


BRIA: dict[str, Any] = {**IDS, "patch": lambda network: 1, "clock": lambda timesteps: timesteps}
"""Tokens of one latent pixel."""
QWEN21: dict[str, Any] = {**SHAPES, "patch": lambda network: 1, "canvas": _qwen21_canvas, "tiles": _qwen21_tiles}
QWEN21["prediction"] = lambda output, size: to_image(output[:, -size[0] * size[1] :], size)  # the text is before it
KREA: dict[str, Any] = {**IDS, "canvas": _krea_canvas, "tiles": _krea_tiles}
BACKWARDS: dict[str, Any] = {"clock": lambda timesteps: 1 - timesteps / 1000}
FRACTION: dict[str, Any] = {"clock": lambda timesteps: timesteps / 1000}

MORE: tuple[Family, ...] = (
    Family(
        diffusers.Flux2Transformer2DModel,
        dynamic_shift=lambda tokens, steps, config: compute_empirical_mu(tokens, steps),
        **IDS,
    ),
    Family(diffusers.ChromaTransformer2DModel, dynamic_shift=1.15, **IDS),
    Family(diffusers.LongCatImageTransformer2DModel, dynamic_shift=1.15, **IDS),
    Family(diffusers.OvisImageTransformer2DModel, dynamic_shift=1.15, **IDS),
    Family(diffusers.BriaTransformer2DModel, dynamic_shift=1.15, **BRIA),
    Family(diffusers.BriaFiboTransformer2DModel, dynamic_shift=1.15, **BRIA),
    Family(diffusers.NucleusMoEImageTransformer2DModel, dynamic_shift=1.15, **SHAPES),
    Family(diffusers.QwenImage21Transformer2DModel, dynamic_shift=1.15, **QWEN21),
    Family(diffusers.Krea2Transformer2DModel, dynamic_shift=1.15, **KREA),
    Family(
        diffusers.AuraFlowTransformer2DModel,
        native=lambda pipe, network: getattr(network, "native_size", 1024 // factor_of(pipe)),
        **FRACTION,
    ),
    Family(diffusers.CogView3PlusTransformer2DModel, tiles=sized),
    Family(diffusers.CogView4Transformer2DModel, tiles=sized, dynamic_shift=cogview_shift),
    Family(diffusers.HiDreamImageTransformer2DModel, timestep="timesteps", tiles=_hidream_tiles),
    Family(diffusers.HunyuanImageTransformer2DModel),
    Family(diffusers.HunyuanDiT2DModel, tiles=_hunyuan_tiles),
    Family(diffusers.Lumina2Transformer2DModel, **BACKWARDS),
    Family(diffusers.LuminaNextDiT2DModel, tiles=_lumina_tiles, **BACKWARDS),
    Family(diffusers.PRXTransformer2DModel, **FRACTION),
    Family(
        diffusers.Kandinsky5Transformer3DModel,
        canvas=lambda arguments: arguments["hidden_states"].squeeze(1).movedim(-1, 1),
        tiles=_kandinsky_tiles,
        prediction=lambda output, size: output.squeeze(1).movedim(-1, 1),
        result=lambda prediction, sample: prediction.movedim(1, -1).unsqueeze(1),
    ),
)

# ----------------------------------------------------------------------------- a class that nobody has described

OWN = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "timestep", "guidance")
"""Arguments that mean the same in all networks: their sizes are not the canvas'."""


@cache
def derived(model: Any) -> Family:
    """The family of a class by the arguments of its forward; warns once.

    Raises:
        TypeError: forward has no canvas or no timestep.
    """
    names = list(signature(model.forward).parameters)
    sample = next((name for name in ("hidden_states", "sample") if name in names), None)
    timestep = next((name for name in ("timestep", "timesteps", "t") if name in names), None)
    if sample is None or timestep is None:
        raise TypeError(f"network={model.__name__}: its forward{tuple(names[1:])} has no canvas or no timestep")
    layout = IDS if "img_ids" in names else SHAPES if "img_shapes" in names else {}
    logger.warning("%s is not a known network: tiles are taken as images of their own size", model.__name__)
    parts = {**layout, "sample": sample, "timestep": timestep}
    parts |= {"tiles": _checked(sample, parts.get("tiles")), "canvas": _image(sample, parts.get("canvas"))}
    parts["prediction"] = _like_tiles(model, parts.get("prediction"))
    return Family(model, **parts)


def _image(sample: str, canvas: Callable[[Arguments], Tensor] | None) -> Callable[[Arguments], Tensor]:
    def look(arguments: Arguments) -> Tensor:
        found = canvas(arguments) if canvas is not None else arguments[sample]
        if found.ndim != 4:
            raise ValueError(
                f"{sample}: {tuple(found.shape)} is neither an image [B, C, H, W] nor tokens with positions"
            )
        return found

    return look


def _checked(sample: str, tiles: Callable[..., Arguments] | None) -> Callable[[Tensor, Arguments, int], Arguments]:
    """Replaces the canvas by tiles, and refuses other arguments that have a tensor of the canvas' size."""

    def cut(parts: Tensor, arguments: Arguments, pixels: int) -> Arguments:
        changed = {sample: parts} if tiles is None else tiles(parts, arguments, pixels)
        if "canvas_size" not in arguments:  # in the fused loop, whose pipelines are known
            return changed
        height, width = arguments["canvas_size"]
        counts = {height * width, (height // 2) * (width // 2)}  # latent pixels, tokens, and both behind the text
        text = arguments["encoder_hidden_states"].shape[1] if "encoder_hidden_states" in arguments else 0
        sizes = counts | {n + text for n in counts} | {n * side for n in (1, pixels) for side in (height, width)}
        for name, value in arguments.items():
            if name in changed or name in OWN or not isinstance(value, Tensor):
                continue
            if sizes & set(value.shape[1:-1] if value.ndim > 2 else value.shape[1:]) or "size" in name:
                raise ValueError(f"{name}: {tuple(value.shape)} has the canvas' size, and how to cut it is not known")
        return changed

    return cut


def _like_tiles(model: type, prediction: Callable[..., Tensor] | None) -> Callable[[Any, tuple[int, int]], Tensor]:
    def check(output: Any, size: tuple[int, int]) -> Tensor:
        found: Tensor = output if prediction is None else prediction(output, size)
        if found.ndim != 4 or tuple(found.shape[2:]) != tuple(size):
            raise ValueError(f"{model.__name__}: gives {tuple(found.shape)} for a canvas of {size[0]}x{size[1]}")
        return found

    return check
