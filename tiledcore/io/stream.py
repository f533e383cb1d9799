"""The decode inside a pipeline's call as a stream of rows.

The pipeline's call stays as it is: it unpacks, scales and shifts the latents, casts the VAE and brings it to the
device. Where it then decodes, the rows go to their consumer instead, and the pipeline is given a stand-in of one pixel.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from tiledcore.feature import Feature
from tiledcore.io.writers import TILE, Band
from tiledcore.utils import replaced
from tiledcore.vae.exact import joined
from tiledcore.vae.wrap import Continuation

Rows = Callable[[Iterator[Band]], None]
"""Takes the image from top to bottom as bands ``[rows, W, 3]`` uint8."""

CPU_BUDGET = 3 << 29
"""Bytes of activations that the decoder may keep on a CPU, 1.5 GiB: rows are asked for to save memory."""


def why_not_streamed(pipe: Any) -> str | None:
    """Why the image must be whole at once, or None where it may leave as rows."""
    found = [name for name in ("safety_checker", "watermark") if getattr(pipe, name, None) is not None]
    return f"the pipeline's {found[0]} needs the whole image" if found else None


class Streamed(Feature):
    """Gives what the pipeline decodes to ``rows``, in the 8 bits that ``output_type="pil"`` would have.

    ``rows`` is called once, in the place of the decode; None: nothing changes. ``around``, which
    :func:`tiledcore.vae.wrap.wrapped` has added to the latents, is cut off.

    Raises:
        ValueError: the pipeline must see the whole image, or decodes several or none.
    """

    def __init__(self, pipe: Any, rows: Rows | None, around: Continuation) -> None:
        self.pipe, self.rows, self.around = pipe, rows, around
        self._height, self._decoded = 0, False

    def enter(self, stack: ExitStack) -> None:
        if self.rows is None:
            return
        if (reason := why_not_streamed(self.pipe)) is not None:
            raise ValueError(f"rows: {reason}; leave out one of them")
        self._decode = self.pipe.vae.decode
        stack.push(self._leave)
        stack.enter_context(replaced(self.pipe.vae, decode=self.decode))

    def _leave(self, kind: Any, *_: Any) -> None:
        if kind is None and not self._decoded:
            raise ValueError("rows: the pipeline decoded nothing; leave out output_type='latent'")

    def decode(self, latents: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Stands in for ``vae.decode``; returns as little as :func:`wrapped` can cut to one pixel."""
        if len(latents) != 1:
            raise ValueError(f"rows: one image at a time, not {len(latents)}")
        y, x = (reach * self.around.factor for reach in self.around.reach)
        self._height = latents.shape[-2] * self.around.factor - 2 * y
        image = self._decode(latents, return_dict=False)[0]
        if not self._decoded:  # it came whole; Qwen-Image's autoencoder is one of videos
            self._take((image[:, :, 0] if image.ndim == 5 else image).split(TILE, dim=2))
        small = latents.new_zeros(1, 3, *[1] * (latents.ndim - 4), 1 + 2 * y, 1 + 2 * x)
        return DecoderOutput(sample=small) if return_dict else (small,)

    def collect(self, bands: Iterator[Tensor], height: int) -> Tensor:
        """What :func:`tiledcore.vae.exact.exact_bands` does with decoded rows ``[1, 3, rows, W]``."""
        if self.rows is None or not self._height:  # not the pipeline's decode
            return joined(bands, height)
        self._take(bands)
        return torch.zeros(1, 3, 1, 1, device=self.pipe.vae.device)

    def _take(self, bands: Iterable[Tensor]) -> None:
        self._decoded = True
        assert self.rows is not None
        parts, convert = self.around.crop_rows(bands, self._height), self.pipe.image_processor.postprocess
        images = (convert(part, output_type="np")[0] for part in parts)
        self.rows((image * 255).round().astype(np.uint8) for image in images)  # as diffusers' numpy_to_pil
