"""The networks that can be tiled: how each one's forward maps to a canvas.

Arguments that all families share are in :mod:`tiledcore.tiles.conditioning`; where canvas and tiles are in the
arguments, in :mod:`tiledcore.tiles.layouts`.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import diffusers
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor

from tiledcore._diffusers import uncompiled
from tiledcore.geometry import Pair
from tiledcore.tiles import layouts
from tiledcore.tiles.layouts import IDS, SHAPES, Arguments
from tiledcore.tiles.layouts import to_image as to_image
from tiledcore.tiles.layouts import to_tokens as to_tokens

logger = logging.getLogger(__name__)

Shift = Callable[[int, int, Any], float]
"""``(tokens, steps, the scheduler's configuration)`` -> the shift ``mu`` that the pipeline computes."""


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
    """Side of the images that a network was trained on, in latent pixels; 1024 image pixels where nothing says it."""
    default = getattr(pipe, "default_sample_size", 1024 // factor_of(pipe))
    size = getattr(network, "native_size", network.config.get("sample_size", default))
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
    text_first: bool = False  # Tokens before the canvas' own are text; those behind are reference images
    dynamic_shift: Shift | None = None  # Where the pipeline gives the scheduler a shift that grows with the tokens
    sample: str = "hidden_states"  # Name of the argument that holds the canvas
    timestep: str = "timestep"
    clock: Callable[[Tensor], Tensor] = lambda timesteps: timesteps  # The scheduler's -> what the pipeline passes
    size: Callable[[Arguments], Pair] = lambda arguments: (0, 0)  # (H, W) of the canvas, where :attr:`read` needs it
    read: Callable[[Any, Pair], Tensor] = lambda value, size: value
    """``(the argument that holds the canvas or what forward predicted, (H, W))`` -> the image ``[B, C, H, W]``."""
    write: Callable[[Tensor], Any] = lambda image: image
    """An image ``[B, C, H, W]`` in the form in which forward takes and gives it."""
    also: Callable[[Tensor, Arguments, int], Arguments] = lambda tiles, arguments, pixels: {}
    """As :meth:`tiles`: arguments other than the canvas that differ."""
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
        found = self.read(output, size)
        if found.ndim != 4 or found.shape[2:] != size:
            raise ValueError(f"{self.model.__name__}: gives {tuple(found.shape)} for a canvas of {size[0]}x{size[1]}")
        return found

    def result(self, prediction: Tensor, sample: Any) -> Any:
        """``[B, C', H, W]`` in the form in which forward gives it, with 0 for the tokens of ``sample`` beside it.

        ``sample``: the argument that held the canvas; None: there are no others.
        """
        own = self.write(prediction)
        if not self.packed or sample is None:
            return own
        others = own.new_zeros(len(own), sample.shape[1] - own.shape[1], *own.shape[2:])
        return torch.cat([others, own] if self.text_first else [own, others], 1)


class Derived(Family):
    """Of a class that nobody has described: refuses further arguments that have a tensor of the canvas' size."""

    def tiles(self, tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
        changed = super().tiles(tiles, arguments, pixels)
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


def line(max_shift: float) -> Shift:
    """FLUX's: linear in the tokens; ``max_shift`` where the scheduler's configuration has none."""

    def shift(tokens: int, steps: int, config: Any) -> float:
        lengths = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        shifts = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
        return float(calculate_shift(tokens, *lengths, *shifts))

    return shift


def _cogview_shift(tokens: int, steps: int, config: Any) -> float:
    root = (tokens / config.get("base_image_seq_len", 256)) ** 0.5
    return float(root * config.get("max_shift", 0.75) + config.get("base_shift", 0.25))


FLUX, SD3 = line(1.15), line(1.16)
BRIA = IDS | {"patch": lambda network: 1, "clock": lambda timesteps: timesteps}  # tokens of one latent pixel
BACKWARDS: dict[str, Any] = {"clock": lambda timesteps: 1 - timesteps / 1000}
FRACTION: dict[str, Any] = {"clock": lambda timesteps: timesteps / 1000}

FAMILIES: tuple[Family, ...] = (
    Family(diffusers.UNet2DConditionModel, sample="sample", shifts=True),
    Family(diffusers.SD3Transformer2DModel, dynamic_shift=SD3),
    Family(diffusers.FluxTransformer2DModel, dynamic_shift=FLUX, shifts=True, **IDS),
    Family(diffusers.PixArtTransformer2DModel),
    Family(diffusers.SanaTransformer2DModel),
    Family(diffusers.ZImageTransformer2DModel, dynamic_shift=FLUX, **layouts.LIST),
    Family(diffusers.QwenImageTransformer2DModel, dynamic_shift=FLUX, **SHAPES),
)
"""Measured, predicted, and known to canvas mode."""

MORE: tuple[Family, ...] = (
    Family(
        diffusers.HunyuanImageTransformer2DModel,
        fits=lambda network: len(network.config.patch_size) == 3,  # the refiner's
        **layouts.FRAME,
    ),
    Family(diffusers.HunyuanImageTransformer2DModel),
    Family(
        diffusers.CosmosTransformer3DModel,
        clock=lambda timesteps: timesteps / (timesteps + 1000),
        **layouts.FRAME,
    ),
    Family(diffusers.UNetControlNetXSModel, sample="sample"),
    Family(diffusers.DreamLiteUNetModel, dynamic_shift=SD3, **layouts.SIDES),
    Family(diffusers.JoyImageEditPlusTransformer3DModel, **layouts.PATCHES),
    Family(diffusers.Ideogram4Transformer2DModel, **layouts.ROW),
    Family(diffusers.OmniGenTransformer2DModel, also=layouts.omnigen),
    Family(diffusers.GlmImageTransformer2DModel, dynamic_shift=_cogview_shift, **layouts.GLM),
    Family(
        diffusers.Flux2Transformer2DModel,
        dynamic_shift=lambda tokens, steps, config: compute_empirical_mu(tokens, steps),
        **IDS,
    ),
    Family(diffusers.ChromaTransformer2DModel, dynamic_shift=FLUX, **IDS),
    Family(diffusers.LongCatImageTransformer2DModel, dynamic_shift=FLUX, **IDS),
    Family(diffusers.OvisImageTransformer2DModel, dynamic_shift=FLUX, **IDS),
    Family(diffusers.BriaTransformer2DModel, dynamic_shift=FLUX, **BRIA),
    Family(diffusers.BriaFiboTransformer2DModel, dynamic_shift=FLUX, **BRIA),
    Family(diffusers.BriaFibo2Transformer2DModel, dynamic_shift=FLUX, **FRACTION),
    Family(diffusers.NucleusMoEImageTransformer2DModel, dynamic_shift=FLUX, **SHAPES),
    Family(diffusers.QwenImage21Transformer2DModel, dynamic_shift=FLUX, **layouts.QWEN21),
    Family(diffusers.Krea2Transformer2DModel, dynamic_shift=FLUX, **layouts.KREA),
    Family(
        diffusers.AuraFlowTransformer2DModel,
        native=lambda pipe, network: getattr(network, "native_size", 1024 // factor_of(pipe)),
        **FRACTION,
    ),
    Family(diffusers.CogView3PlusTransformer2DModel),
    Family(diffusers.CogView4Transformer2DModel, dynamic_shift=_cogview_shift),
    Family(diffusers.HiDreamImageTransformer2DModel, timestep="timesteps"),
    Family(diffusers.HunyuanDiT2DModel, also=layouts.hunyuan),
    Family(diffusers.Lumina2Transformer2DModel, **BACKWARDS),
    Family(diffusers.LuminaNextDiT2DModel, also=layouts.lumina, **BACKWARDS),
    Family(diffusers.PRXTransformer2DModel, **FRACTION),
    Family(diffusers.Kandinsky5Transformer3DModel, **layouts.LAST),
)
"""For tile mode alone. A class derived from another one comes first, here before :data:`FAMILIES`."""

REFUSED = {
    "VisualClozePipeline": "its canvas is a table of several pictures, of which each must see the others",
    "VisualClozeGenerationPipeline": "its canvas is a table of several pictures, of which each must see the others",
    "QwenImageLayeredPipeline": "it makes pictures of 640x640 or 1024x1024 px only",
    "JoyImageEditPipeline": "it makes pictures of listed sizes near 1024x1024 px only",
}
"""Pipelines that cannot be tiled, by class name, and why."""


def network_of(pipe: Any) -> tuple[Any, Family]:
    """The network of a pipeline, compiled or not, and its family.

    Raises:
        TypeError: the pipeline has none, or cannot be tiled.
    """
    name = type(pipe).__name__
    if name in REFUSED:
        raise TypeError(f"pipe={name}: cannot be tiled: {REFUSED[name]}")
    network = next((one for role in ("unet", "transformer") if (one := getattr(pipe, role, None)) is not None), None)
    if network is None:
        raise TypeError(f"pipe={name}: tiling needs a pipeline with a unet or a transformer; it has neither")
    factor_of(pipe)
    inner = uncompiled(network)
    for family in (*MORE, *FAMILIES):
        if isinstance(inner, family.model) and family.fits(inner):
            return network, family
    return network, derived(next(one for one in type(inner).__mro__ if "forward" in vars(one)))  # not our subclass


ROUNDED = 64  # px: pipelines may round a size by less than this
KEPT_BY = ("use_resolution_binning=False", "_auto_resize=False", "max_area={area}")
"""What keeps the size that was asked for, where a call has such an argument."""
SET_BY = {
    "HiDreamImagePipeline": "pipe.default_sample_size={side}",
    "Kandinsky5T2IPipeline": "pipe.resolutions=[({width}, {height})]",
    "Kandinsky5I2IPipeline": "pipe.resolutions=[({width}, {height})]",
}
"""Pipelines -> what must be set on them before the call."""


def check_size(pipe: Any, given: dict[str, Any], made: Pair) -> None:
    """ValueError where the ``height`` and ``width`` that the caller gave are not those of the canvas ``made``, px."""
    height, width = given.get("height"), given.get("width")
    if height is None or width is None or given.get("use_resolution_binning"):
        return
    if abs(height - made[0]) < ROUNDED and abs(width - made[1]) < ROUNDED:
        return
    name, takes, area = type(pipe).__name__, signature(type(pipe).__call__).parameters, height * width
    ways = [*(way for way in KEPT_BY if way.partition("=")[0] in takes), SET_BY.get(name)]
    sizes = {"area": area, "side": round(area**0.5 / factor_of(pipe)), "height": height, "width": width}
    way = ", ".join(filter(None, ways)).format(**sizes)
    raise ValueError(
        f"height={height}, width={width}: {name} denoises an image of {made[1]}x{made[0]} px (width x height) instead; "
        + (f"give {way}" if way else "leave height and width out")
    )


OWN = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "timestep", "guidance")
"""Arguments that mean the same in all networks: their sizes are not the canvas'."""


@cache
def derived(model: Any) -> Family:
    """The family of a class by the arguments of its forward, a TypeError if it has no canvas; warns once."""
    names = list(signature(model.forward).parameters)
    sample = next((name for name in ("hidden_states", "sample") if name in names), None)
    timestep = next((name for name in ("timestep", "timesteps", "t") if name in names), None)
    if sample is None or timestep is None:
        raise TypeError(f"network={model.__name__}: its forward{tuple(names[1:])} has no canvas or no timestep")
    layout = IDS if "img_ids" in names else SHAPES if "img_shapes" in names else {}
    logger.warning("%s is not a known network: tiles are taken as images of their own size", model.__name__)
    return Derived(model, sample=sample, timestep=timestep, **layout)
