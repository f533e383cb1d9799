"""The networks that can be tiled: how each one's forward maps to a canvas.

Every tile is an image of its own size whose positions start at 0, so no position is outside of what the network was
trained on. Where a pipeline passes positions (FLUX, Qwen-Image), the tile's replace the canvas'. Arguments that all
families share are in :mod:`tiledcore.tiles.conditioning`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tiledcore._diffusers import uncompiled

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How one class of networks maps to a canvas ``[B, C, H, W]``.

    A *canvas pixel* is a latent pixel, or a token of ``patch`` x ``patch`` latent pixels where ``packed``.
    """

    model: type
    native: Callable[[Any, Any], int | tuple[int, int]]
    """``(pipe, network)`` -> side of the images that the network was trained on, in latent pixels."""
    patch: Callable[[Any], int] = lambda network: 1
    """``network`` -> latent pixels per token along one axis; 1 for a UNet."""
    packed: bool = False  # The pipeline passes tokens ``[B, H*W, C]``, row by row, in place of an image
    dynamic_shift: float | None = None
    """``max_shift`` of the shift ``mu`` that the pipeline gives the scheduler and that grows with the number of tokens,
    where the scheduler's configuration has none. None: the pipeline gives no ``mu``."""
    sample: str = "hidden_states"  # Name of the argument that holds the canvas
    timestep: str = "timestep"
    clock: Callable[[Tensor], Tensor] = lambda timesteps: timesteps
    """The scheduler's timesteps -> what the pipeline passes as :attr:`timestep`."""
    canvas: Callable[[Arguments], Tensor] = lambda arguments: arguments["hidden_states"]
    """The canvas in these arguments, which stay as they are."""
    tiles: Callable[[Tensor, Arguments, int], Arguments] = lambda tiles, arguments, pixels: {"hidden_states": tiles}
    """``([N, C, h, w], arguments of the tile batch, image pixels per canvas pixel)`` -> the arguments that differ."""
    prediction: Callable[[Any, tuple[int, int]], Tensor] = lambda output, size: output
    """``(what forward predicted, (h, w))`` -> ``[N, C', h, w]``."""
    result: Callable[[Tensor], Any] = lambda prediction: prediction
    """``[B, C', H, W]`` -> the form in which forward gives it."""
    output: type = Transformer2DModelOutput
    shifts: bool = False
    """Whether moving tiles are the default: ``bench/modes.py`` finds them nearly as good as overlap."""

    def unit(self, network: Any) -> int:
        """Latent pixels per canvas pixel along an axis."""
        return self.patch(network) if self.packed else 1


def network_of(pipe: Any) -> tuple[Any, Family]:
    """The network of a pipeline, compiled or not, and its family.

    Raises:
        TypeError: the pipeline has none that can be tiled.
    """
    found = {name: getattr(pipe, name, None) for name in ("unet", "transformer")}
    for network in found.values():
        inner = uncompiled(network)
        for family in FAMILIES:
            if isinstance(inner, family.model):
                if not hasattr(pipe, "vae_scale_factor"):
                    raise TypeError(f"pipe={type(pipe).__name__}: has no autoencoder; tiling needs a latent pipeline")
                return network, family
    there = ", ".join(f"{name}: {type(value).__name__}" for name, value in found.items() if value is not None)
    known = ", ".join(family.model.__name__ for family in FAMILIES)
    raise TypeError(
        f"pipe={type(pipe).__name__}: tiling needs a pipeline whose unet or transformer is one of {known}; "
        f"found {there or 'neither'}"
    )


def to_tokens(image: Tensor) -> Tensor:
    """``[B, C, H, W]`` -> ``[B, H*W, C]``, row by row."""
    return image.flatten(2).transpose(1, 2).contiguous()


def to_image(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, H*W, C]`` -> ``[B, C, H, W]``."""
    return tokens.transpose(1, 2).unflatten(2, size).contiguous()


_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # FLUX's ids -> width, and how many are out of place


def _flux_canvas(arguments: Arguments) -> Tensor:
    tokens, given = arguments["hidden_states"], arguments["img_ids"]
    ids = given[0] if given.ndim == 3 else given
    if given not in _read:  # a pipeline passes the same ids in every step
        # Width = tokens with the row of the first one. Not the last id plus one: ids come in the network's
        # dtype, and bfloat16 has no odd numbers above 256.
        width, at = (ids[:, 1] == ids[0, 1]).sum(), torch.arange(len(ids), device=ids.device)
        wanted = torch.stack([torch.zeros_like(at), at // width, at % width], 1).to(ids.dtype)
        _read[given] = torch.stack([width, (ids != wanted).any(1).sum()]).tolist()
    width, others = _read[given]
    if others or tokens.shape[1] != len(ids) or len(ids) % width:
        raise ValueError(
            f"img_ids of {len(ids)} tokens, {others} of them of another image, for {tokens.shape[1]} tokens: "
            "reference images inside the sequence (FLUX Kontext) cannot be tiled"
        )
    return to_image(tokens, (len(ids) // width, width))


def _flux_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    rows, columns = (torch.arange(n, device=tiles.device) for n in tiles.shape[2:])
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    ids = torch.stack([torch.zeros_like(y), y, x], dim=-1).flatten(0, 1)
    return {"hidden_states": to_tokens(tiles), "img_ids": ids.to(arguments["img_ids"].dtype)}


def _qwen_canvas(arguments: Arguments) -> Tensor:
    tokens, shapes = arguments["hidden_states"], arguments["img_shapes"]
    images = shapes[0] if isinstance(shapes[0], list) else [shapes[0]]
    frames, height, width = images[0]
    if len(images) > 1 or frames != 1 or tokens.shape[1] != height * width:
        raise ValueError(
            f"img_shapes={images} for {tokens.shape[1]} tokens: reference images and layers inside the sequence "
            "(Qwen-Image Edit, Layered) cannot be tiled"
        )
    return to_image(tokens, (height, width))


def _qwen_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    return {"hidden_states": to_tokens(tiles), "img_shapes": [[(1, *tiles.shape[2:])]] * len(tiles)}


def _pixart_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    changed: Arguments = {"hidden_states": tiles}
    conditions = arguments.get("added_cond_kwargs") or {}
    if conditions.get("resolution") is not None:
        # PixArt-α's micro-conditions, in image pixels: a tile is an image of its own size.
        height, width = (pixels * n for n in tiles.shape[2:])
        column = (len(tiles), 1)
        full = conditions["resolution"].new_full
        changed["added_cond_kwargs"] = {
            **conditions,
            "resolution": torch.cat([full(column, height), full(column, width)], 1),
            "aspect_ratio": full(column, height / width),
        }
    return changed


def _z_image_canvas(arguments: Arguments) -> Tensor:
    images = arguments["x"]
    if isinstance(images[0], list) or images[0].shape[1] != 1 or len({image.shape for image in images}) > 1:
        raise ValueError("x: reference images, frames and several sizes (Z-Image Omni) cannot be tiled")
    return torch.stack(list(images)).squeeze(2)


def _z_image_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    captions = arguments["cap_feats"]  # one tensor [L, D] per image
    return {
        "x": list(tiles.unsqueeze(2).unbind(0)),
        "cap_feats": [text for text in captions for _ in range(len(tiles) // len(captions))],
    }


def _patch_size(network: Any) -> int:
    return int(network.config.patch_size)


def _sample_size(pipe: Any, network: Any) -> int | tuple[int, int]:
    size = network.config.sample_size
    if size is None:
        raise ValueError(f"{type(network).__name__} names no native size (sample_size=None): it cannot be tiled")
    return size if isinstance(size, int) else (size[0], size[1])


FAMILIES: tuple[Family, ...] = (
    Family(
        diffusers.UNet2DConditionModel,
        native=_sample_size,
        sample="sample",
        canvas=lambda arguments: arguments["sample"],
        tiles=lambda tiles, arguments, pixels: {"sample": tiles},
        output=UNet2DConditionOutput,
        shifts=True,
    ),
    Family(diffusers.SD3Transformer2DModel, native=_sample_size, patch=_patch_size, dynamic_shift=1.16),
    Family(
        diffusers.FluxTransformer2DModel,
        # A constant of the pipeline's class, unless whoever opened the network knows better.
        native=lambda pipe, network: getattr(network, "native_size", pipe.default_sample_size),
        patch=lambda network: 2,  # packed by the pipeline: the network's own patch_size is 1
        packed=True,
        shifts=True,
        dynamic_shift=1.15,
        clock=lambda timesteps: timesteps / 1000,
        canvas=_flux_canvas,
        tiles=_flux_tiles,
        prediction=to_image,
        result=to_tokens,
    ),
    Family(diffusers.PixArtTransformer2DModel, native=_sample_size, patch=_patch_size, tiles=_pixart_tiles),
    Family(diffusers.SanaTransformer2DModel, native=_sample_size, patch=_patch_size),
    Family(
        diffusers.ZImageTransformer2DModel,
        # Neither the network nor the pipeline holds the size: the pipeline's default is 1024 image pixels.
        native=lambda pipe, network: 1024 // pipe.vae_scale_factor,
        patch=lambda network: network.config.all_patch_size[0],
        dynamic_shift=1.15,
        sample="x",
        timestep="t",
        clock=lambda timesteps: (1000 - timesteps) / 1000,
        canvas=_z_image_canvas,
        tiles=_z_image_tiles,
        prediction=lambda output, size: torch.stack(list(output)).squeeze(2),
        result=lambda prediction: list(prediction.unsqueeze(2).unbind(0)),
    ),
    Family(
        diffusers.QwenImageTransformer2DModel,
        native=lambda pipe, network: pipe.default_sample_size,
        patch=lambda network: 2,
        packed=True,
        dynamic_shift=1.15,
        clock=lambda timesteps: timesteps / 1000,
        canvas=_qwen_canvas,
        tiles=_qwen_tiles,
        prediction=to_image,
        result=to_tokens,
    ),
)
