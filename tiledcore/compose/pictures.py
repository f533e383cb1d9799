"""Images as tensors: conversion, size, resizing, and transfer of colours."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from tiledcore.io.images import to_rgb
from tiledcore.schedulers.pull import low_pass, low_pass_matrix


def to_tensor(image: Any) -> Tensor:
    """An image as ``[B, 3, H, W]``, float32 in 0..1.

    ``image`` is a PIL image or a list of them, an array ``[B, H, W, 3]`` or ``[H, W, 3]`` (uint8, or float in 0..1), or
    a float tensor ``[B, 3, H, W]`` or ``[3, H, W]`` in 0..1; ValueError for anything else.
    """
    if isinstance(image, list | tuple) and len({getattr(one, "size", None) for one in image}) == 1:
        return torch.cat([to_tensor(one) for one in image])
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB"))  # writable, as torch asks
    if isinstance(image, np.ndarray) and image.ndim >= 3:
        image = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, -3)
        image = image.float() / 255 if image.dtype == torch.uint8 else image
    if isinstance(image, Tensor) and image.ndim in (3, 4) and image.shape[-3] == 3 and image.is_floating_point():
        low, high = (float(value) for value in image.aminmax())
        if low < -0.25 or high > 1.25:  # what a resize overshoots is cut
            raise ValueError(f"image: has values from {low:g} to {high:g}; floats must be in 0..1")
        return image.reshape(-1, *image.shape[-3:]).float().clamp(0, 1)
    shape = f" of shape {tuple(image.shape)}" if isinstance(image, Tensor) else ""
    raise ValueError(f"image={type(image).__name__}{shape}: must be RGB: PIL, or a tensor [B, 3, H, W] in 0..1")


def size_px(image: Any, factor: int) -> tuple[int, int] | None:
    """(height, width) in px of an ``image`` argument, which may be latents or a list; None if unknown.

    Latents are tensors whose channels are not 3; ``factor`` is image pixels per latent pixel.
    """
    if isinstance(image, list | tuple) and image:
        return size_px(image[0], factor)
    if isinstance(image, Image.Image):
        return image.height, image.width
    if isinstance(image, np.ndarray) and image.ndim in (3, 4):
        return image.shape[-3], image.shape[-2]
    if isinstance(image, Tensor) and image.ndim >= 3:
        unit = 1 if image.shape[-3] == 3 else factor
        return unit * image.shape[-2], unit * image.shape[-1]
    return None


def resized(image: Any, size: tuple[int, int], factor: int) -> Any:
    """The same image in the same form at ``size`` (height, width) px; latents are not changed.

    PIL images become RGB and are resized by Lanczos, arrays and tensors by bicubic interpolation.
    """
    if isinstance(image, list | tuple):
        return [resized(one, size, factor) for one in image]
    if isinstance(image, Image.Image):
        image = to_rgb(image)
        return image if image.size == size[::-1] else image.resize(size[::-1], Image.Resampling.LANCZOS)
    if size_px(image, factor) == size or not isinstance(image, np.ndarray | Tensor):
        return image
    if isinstance(image, np.ndarray):
        pixels = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, -3)
        made = resized(pixels.float(), size, factor).movedim(-3, -1).numpy()
        return made.round().astype(np.uint8) if image.dtype == np.uint8 else made.astype(image.dtype)
    if image.shape[-3] != 3:
        return image
    made = F.interpolate(image.reshape(-1, *image.shape[-3:]).float(), size, mode="bicubic", antialias=True)
    return made.clamp(float(image.min()), float(image.max())).to(image.dtype).reshape(*image.shape[:-2], *size)


def match_colour(images: Any, source: Tensor, cycles: float = 4.0, wrap: tuple[bool, bool] = (False, False)) -> Any:
    """Images with the low frequencies of ``source``: ``image + LowPass(source - image)``, clipped to 0..1.

    ``images`` are PIL images, an array ``[B, H, W, 3]`` or a tensor ``[B, 3, H, W]``; the result has the same form.
    ``source`` is ``[B, 3, h, w]`` or ``[1, 3, h, w]`` in 0..1, of any size. At ``cycles`` per shorter side the Gaussian
    low-pass has half of its amplitude. ``wrap``: whether the image wraps, (y, x).
    """
    pixels = to_tensor(images)
    height, width = pixels.shape[2:]
    scale = min(1.0, 256 / max(height, width))  # low frequencies are compared at 256 px
    grid = (max(1, round(height * scale)), max(1, round(width * scale)))
    small, wanted = (F.interpolate(x.to(pixels.device), grid, mode="area") for x in (pixels, source))
    sigma = 0.1874 * min(grid) / cycles  # exp(-2 (pi sigma f)^2) = 1/2
    filters = [low_pass_matrix(n, sigma, w).to(small) for n, w in zip(grid, wrap, strict=True)]
    change = F.interpolate(low_pass(wanted - small, *filters), (height, width), mode="bilinear")
    matched = pixels.add_(change).clamp_(0, 1)
    if isinstance(images, Tensor):
        return matched.to(images.dtype)
    form = "np" if isinstance(images, np.ndarray) else "pil"
    return VaeImageProcessor().postprocess(matched, form, [False] * len(matched))
