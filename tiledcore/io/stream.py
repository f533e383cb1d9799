"""The decode inside a pipeline's call as a stream of rows.

The pipeline's call stays as it is: it unpacks, scales and shifts the latents, casts the VAE and brings it to the
device. Where it then decodes, the rows go to their consumer instead, and the pipeline is given a stand-in of one pixel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from diffusers.models.autoencoders.vae import DecoderOutput
from numpy.typing import NDArray
from torch import Tensor

from tiledcore.utils import replaced
from tiledcore.vae.exact import decode_rows, why_not_exact
from tiledcore.vae.wrap import Continuation

logger = logging.getLogger(__name__)

Band = NDArray[np.uint8]
Rows = Callable[[Iterator[Band]], None]
"""Takes the image from top to bottom as bands ``[rows, W, 3]`` uint8."""

BAND_PX = 256
CPU_BUDGET = 3 << 29
"""Bytes of activations that the decoder may keep on a CPU, 1.5 GiB: rows are asked for to save memory."""
# What looks at, or changes, the decoded image as a whole. The pipeline's own names.
WHOLE = ("safety_checker", "watermark")


def why_not_streamed(pipe: Any) -> str | None:
    """Why the image must be whole at once, or None where it may leave as rows."""
    for name in WHOLE:
        if getattr(pipe, name, None) is not None:
            return f"the pipeline's {name} needs the whole image"
    return None


@contextmanager
def streamed(pipe: Any, rows: Rows | None, around: Continuation, whole_pixels: int, **exact: Any) -> Iterator[None]:
    """Give what the pipeline decodes in this block to ``rows``, in the 8 bits that ``output_type="pil"`` would have.

    ``rows`` is called once, in the place of the decode; None: nothing changes. ``around`` is what
    :func:`tiledcore.vae.wrap.wrapped` has added to the latents, and is cut off the rows. Up to ``whole_pixels`` the
    VAE's own decode is sliced, so that no bit differs; ``exact`` are arguments of
    :func:`~tiledcore.vae.exact.decode_rows` for larger images.

    Raises:
        ValueError: the pipeline must see the whole image, or decodes several or none.
    """
    if rows is None:
        yield
        return
    reason = why_not_streamed(pipe)
    if reason is not None:
        raise ValueError(f"rows: {reason}; leave out one of them")
    original, decoded = pipe.vae.decode, False

    def decode(latents: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        nonlocal decoded
        decoded = True
        if len(latents) != 1:
            raise ValueError(f"rows: one image at a time, not {len(latents)}")
        y, x = (reach * around.factor for reach in around.reach)
        parts = _decoded(pipe, original, latents, whole_pixels, exact)
        rows(_bands(pipe, around.crop_rows(parts, latents.shape[-2] * around.factor - 2 * y)))
        image = latents.new_zeros(1, 3, *[1] * (latents.ndim - 4), 1 + 2 * y, 1 + 2 * x)
        return DecoderOutput(sample=image) if return_dict else (image,)

    with replaced(pipe.vae, decode=decode):
        yield
    if not decoded:
        raise ValueError("rows: the pipeline decoded nothing; leave out output_type='latent'")


def _decoded(
    pipe: Any, decode: Callable[..., Any], latents: Tensor, whole_pixels: int, exact: dict[str, Any]
) -> Iterator[Tensor]:
    """``[1, C, (1,) h, w]`` -> ``[1, 3, rows, W]``, top to bottom; exact, or it says why not."""
    pixels = latents.shape[-2] * latents.shape[-1] * pipe.vae_scale_factor**2
    if pixels > whole_pixels:
        try:
            parts = _exact(pipe.vae, latents, pixels, exact)
        except ValueError as error:
            logger.warning("%d pixels: decoded whole before the rows are written: %s", pixels, error)
        else:
            yield from parts
            return
    image = decode(latents, return_dict=False)[0]
    if image.ndim == 5:  # Qwen-Image's autoencoder is one of videos
        image = image[:, :, 0]
    yield from image.split(BAND_PX, dim=2)


def _exact(vae: Any, latents: Tensor, pixels: int, options: dict[str, Any]) -> Iterator[Tensor]:
    """The exact rows; raises ValueError if there are none, which says why."""
    if getattr(vae, "use_tiling", False):
        raise ValueError("the autoencoder's own tiling is switched on")
    if (reason := why_not_exact(vae, pixels)) is not None:
        raise ValueError(reason)
    if options.get("budget") is None and vae.device.type == "cpu":
        options = {**options, "budget": CPU_BUDGET}
    return decode_rows(vae, latents, **options)


def _bands(pipe: Any, parts: Iterator[Tensor]) -> Iterator[Band]:
    for part in parts:
        image = pipe.image_processor.postprocess(part, output_type="np")[0]
        yield (image * 255).round().astype(np.uint8)  # as diffusers' numpy_to_pil
