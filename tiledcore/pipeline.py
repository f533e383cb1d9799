"""The drop-in: a diffusers pipeline whose denoiser sees tiles."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from os import PathLike
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, UNet2DConditionModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from PIL import Image

from tiledcore.denoiser import TileDenoiser, TilingConfig
from tiledcore.models import EARTH

logger = logging.getLogger(__name__)

HOOK = "tiledcore"
# Larger images are decoded by diffusers' own tiled decoder, which is approximate: an untiled SDXL
# decoder needs 24 GiB of activations at 4096x4096.
EXACT_DECODE_PIXELS = 2048 * 2048


class TilingHook(ModelHook):
    """Replaces a UNet's forward by a :class:`~tiledcore.denoiser.TileDenoiser` around it."""

    def __init__(self, denoiser: TileDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def new_forward(
        self,
        module: torch.nn.Module,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        if args:
            raise TypeError("a tiled UNet takes only sample, timestep and encoder_hidden_states by position")
        prediction = self.denoiser(
            self._forward, sample, timestep, encoder_hidden_states=encoder_hidden_states, **kwargs
        )
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)

    def _forward(self, sample: torch.Tensor, timestep: Any, **kwargs: Any) -> Any:
        return self.fn_ref.original_forward(sample, timestep, return_dict=False, **kwargs)


def _unet(pipe: Any) -> Any:
    """The pipeline's UNet, compiled or not: what is compiled then is the network on one tile batch."""
    unet = getattr(pipe, "unet", None)
    if not isinstance(getattr(unet, "_orig_mod", unet), UNet2DConditionModel):
        raise TypeError(
            f"pipe={type(pipe).__name__}: tiling needs a pipeline with a UNet2DConditionModel named unet, "
            f"found {type(unet).__name__}"
        )
    return unet


def apply_tiling(pipe: Any, config: TilingConfig | None = None) -> Any:
    """Make a diffusers pipeline denoise in tiles; everything else of it stays as it is.

    Afterwards ``pipe(prompt, height=..., width=...)`` works at any size that its VAE factor allows. The
    scheduler still steps once for the whole canvas, so multistep schedulers, callbacks, generators, LoRA
    and guidance work unchanged. Overlapping predictions are averaged as in MultiDiffusion (Bar-Tal et
    al. 2023), by default with a ramp instead of equal weights.

    Args:
        pipe: any pipeline with a ``UNet2DConditionModel`` named ``unet``.
        config: the tiling; a second call replaces the first one's.

    Returns:
        ``pipe`` itself.

    Raises:
        TypeError: the pipeline has no such UNet.
    """
    unet = _unet(pipe)
    size = unet.config.sample_size
    native = (size, size) if isinstance(size, int) else (size[0], size[1])
    remove_tiling(pipe)
    denoiser = TileDenoiser(config or TilingConfig(), native, pipe.vae_scale_factor)
    HookRegistry.check_if_exists_or_initialize(unet).register_hook(TilingHook(denoiser), HOOK)
    return pipe


def remove_tiling(pipe: Any) -> Any:
    """Undo :func:`apply_tiling`: results are bit-identical to before. Without tiling, does nothing."""
    unet = _unet(pipe)
    if hasattr(unet, "_diffusers_hook"):
        unet._diffusers_hook.remove_hook(HOOK, recurse=False)
    return pipe


class TiledPipeline:
    """A diffusers pipeline that makes images of any size: the same call, the same output class.

    Components are read and set through it (``pipe.scheduler = ...``, ``pipe.load_lora_weights(...)``).
    With ``image=`` a text-to-image pipeline runs as its image-to-image sibling, on the same weights.
    """

    pipe: Any
    tiling: TilingConfig

    def __init__(self, pipe: Any, tiling: TilingConfig | None = None) -> None:
        _unet(pipe)
        self.__dict__.update(pipe=pipe, tiling=tiling or TilingConfig())

    @classmethod
    def from_pretrained(
        cls, model: str | PathLike[str] | None = None, *, tiling: TilingConfig | None = None, **kwargs: Any
    ) -> TiledPipeline:
        """Open a checkpoint: a hub id, a folder, or the embedded model if none is given.

        ``kwargs`` go to ``DiffusionPipeline.from_pretrained`` (``torch_dtype``, ``variant``, ...), whose
        errors are raised unchanged.
        """
        return cls(DiffusionPipeline.from_pretrained(EARTH if model is None else model, **kwargs), tiling)

    @classmethod
    def from_pipe(cls, pipe: Any, *, tiling: TilingConfig | None = None) -> TiledPipeline:
        """Wrap a pipeline that is already there; outside of this object it stays untiled."""
        return cls(pipe, tiling)

    def to(self, *args: Any, **kwargs: Any) -> TiledPipeline:
        self.pipe.to(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "pipe":  # not initialised yet, as while unpickling
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("pipe", "tiling"):
            self.__dict__[name] = value
        else:
            setattr(self.pipe, name, value)

    def __call__(self, *args: Any, image: Any = None, tiling: TilingConfig | None = None, **kwargs: Any) -> Any:
        """Run the wrapped pipeline tiled.

        Args:
            args: as for the wrapped pipeline.
            image: start from this picture (PIL, or a tensor as diffusers takes it). A PIL image is
                resized to ``height`` and ``width`` where these are given.
            tiling: for this call, instead of ``self.tiling``.
            kwargs: as for the wrapped pipeline.

        Returns:
            The wrapped pipeline's own output class.
        """
        pipe = self.pipe
        if image is not None:
            if "image" not in signature(type(pipe).__call__).parameters:
                pipe = AutoPipelineForImage2Image.from_pipe(pipe)
            height, width = kwargs.pop("height", None), kwargs.pop("width", None)
            if isinstance(image, Image.Image) and (height or width):
                size = (width or image.width, height or image.height)
                image = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            kwargs["image"] = image
        config = tiling or self.tiling
        with tiled(pipe, config), _bounded_vae(pipe, kwargs):
            return pipe(*args, **kwargs)


@contextmanager
def tiled(pipe: Any, config: TilingConfig | None = None) -> Iterator[Any]:
    """``apply_tiling`` for the length of a ``with`` block; a tiling that was there before comes back."""
    registry = getattr(_unet(pipe), "_diffusers_hook", None)
    before = registry.get_hook(HOOK) if registry else None
    try:
        yield apply_tiling(pipe, config)
    finally:
        remove_tiling(pipe)
        if before is not None:
            apply_tiling(pipe, before.denoiser.config)


@contextmanager
def _bounded_vae(pipe: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    """Switch the VAE to tiles where the whole image would not fit, and back afterwards."""
    image = kwargs.get("image")
    if isinstance(image, Image.Image):
        pixels = image.width * image.height
    elif isinstance(image, torch.Tensor):
        pixels = image.shape[-1] * image.shape[-2]
    else:
        pixels = (kwargs.get("height") or 0) * (kwargs.get("width") or 0)
    vae = pipe.vae
    if pixels <= EXACT_DECODE_PIXELS or getattr(vae, "use_tiling", True):
        yield
        return
    logger.warning("%d pixels: decoding in tiles, which is approximate (diffusers' VAE tiling)", pixels)
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()
