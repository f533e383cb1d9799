"""Family: how the forward of one class of networks maps to a canvas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from tiledcore.geometry import Pair

Arguments = dict[str, Any]
Shift = float | Callable[[int, int, Any], float]


def factor_of(pipe: Any) -> int:
    """Image pixels per latent pixel along an axis; TypeError for a pipeline that is not latent."""
    for name in ("vae_scale_factor", "vae_scale_factor_spatial", "movq_scale_factor"):
        if hasattr(pipe, name):
            return int(getattr(pipe, name))
    config = getattr(getattr(pipe, "vae", None) or getattr(pipe, "movq", None), "config", {})
    if "block_out_channels" in config:
        return int(2 ** (len(config["block_out_channels"]) - 1))
    raise TypeError(f"pipe={type(pipe).__name__}: has no autoencoder; tiling needs a latent pipeline")


def native_size(pipe: Any, network: Any) -> int | Pair:
    """Side of the images that a network was trained on, in latent pixels.

    From who opened the network (``network.native_size``), its configuration, its pipeline, or 1024 image pixels.
    """
    size = getattr(network, "native_size", None) or getattr(pipe, "default_sample_size", 1024 // factor_of(pipe))
    if "sample_size" in network.config and not hasattr(network, "native_size"):
        size = network.config.sample_size
    if size is None:
        raise ValueError(f"{type(network).__name__} names no native size (sample_size=None): it cannot be tiled")
    return size if isinstance(size, int) else (size[0], size[1])


def patch_size(network: Any) -> int:
    """Latent pixels per token along an axis; 1 for a UNet."""
    size = getattr(network.config, "patch_size", 1)
    return int(size if isinstance(size, int) else size[-1])


@dataclass(frozen=True)
class Family:
    """How one class of networks maps to a canvas ``[B, C, H, W]``.

    A *canvas pixel* is a latent pixel, or a token of ``patch`` x ``patch`` latent pixels where ``packed``.
    """

    model: type
    fits: Callable[[Any], bool] = lambda network: True  # Where networks of one class differ
    native: Callable[[Any, Any], int | Pair] = native_size  # Of ``(pipe, network)``
    patch: Callable[[Any], int] = patch_size
    packed: bool = False  # The pipeline passes tokens ``[B, H*W, C]``, row by row, in place of an image
    dynamic_shift: Shift | None = None
    """The shift ``mu`` that the pipeline gives the scheduler and that grows with the number of tokens: ``max_shift`` of
    the line where the scheduler's configuration has none, or ``(tokens, steps, configuration)`` -> ``mu``. None: the
    pipeline gives no ``mu``."""
    sample: str = "hidden_states"  # Name of the argument that holds the canvas
    timestep: str = "timestep"
    clock: Callable[[Tensor], Tensor] = lambda timesteps: timesteps
    """The scheduler's timesteps -> what the pipeline passes as :attr:`timestep`."""
    size: Callable[[Arguments], Pair] = lambda arguments: (0, 0)
    """(H, W) of the canvas in these arguments, where :attr:`read` needs it."""
    read: Callable[[Any, Pair], Tensor] = lambda value, size: value
    """``(the argument that holds the canvas or what forward predicted, (H, W))`` -> the image ``[B, C, H, W]``."""
    write: Callable[[Tensor], Any] = lambda image: image
    """An image ``[B, C, H, W]`` in the form in which forward takes and gives it."""
    also: Callable[[Tensor, Arguments, int], Arguments] = lambda tiles, arguments, pixels: {}
    """As :meth:`tiles`: arguments other than the canvas that differ."""
    output: type = Transformer2DModelOutput
    shifts: bool = False
    """Whether moving tiles are the default: ``bench/modes.py`` finds them nearly as good as overlap."""

    def unit(self, network: Any) -> int:
        """Latent pixels per canvas pixel along an axis."""
        return self.patch(network) if self.packed else 1

    def canvas(self, arguments: Arguments) -> Tensor:
        """The canvas in these arguments, which stay as they are."""
        found = self.read(arguments[self.sample], self.size(arguments))
        if found.ndim != 4:
            raise ValueError(
                f"{self.sample}: {tuple(found.shape)} is neither an image [B, C, H, W] nor tokens with positions, and "
                "cannot be tiled"
            )
        return found

    def tiles(self, tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
        """``([N, C, h, w], arguments of the tile batch, image pixels per canvas pixel)`` -> the arguments that differ.

        Among the arguments are ``references``, if there are any: tokens ``[N, R, C]`` of further images.
        """
        own, others = self.write(tiles), arguments.get("references")
        sample = own if others is None else torch.cat([own, others], 1)
        return {self.sample: sample} | self.also(tiles, arguments, pixels)

    def prediction(self, output: Any, size: Pair) -> Tensor:
        """``(what forward predicted, (h, w))`` -> ``[N, C', h, w]``."""
        return self.read(output, size)

    def result(self, prediction: Tensor, sample: Any) -> Any:
        """``([B, C', H, W], the argument that held the canvas)`` -> the form in which forward gives it."""
        return self.write(prediction)
