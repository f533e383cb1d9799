"""The drop-in: a diffusers pipeline whose denoiser sees tiles."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
from PIL import Image

from tiledcore.compose.pictures import size_px
from tiledcore.compose.regional import seeded_latents
from tiledcore.compose.regions import Region
from tiledcore.compose.stage_plan import Stages, staging
from tiledcore.compose.stages import from_pictures
from tiledcore.compose.wrap import continuation, wrapped
from tiledcore.config import TilingConfig
from tiledcore.geometry import TileGrid, both
from tiledcore.hook import HOOK, default_tiling, regional, tiled
from tiledcore.io.preview import Preview, Previewing
from tiledcore.io.stream import Rows, streamed
from tiledcore.loop.checkpoint import Checkpoint
from tiledcore.loop.engine import Engine, Report
from tiledcore.loop.graph import CudaBackend, Mode, StepGraphs
from tiledcore.memory.budget import Budget, within
from tiledcore.memory.planner import Plan
from tiledcore.models import EARTH, EARTH_FLUX, EMBEDDED
from tiledcore.models.architecture import NATIVE
from tiledcore.schedulers.pull import Pull, Pulling
from tiledcore.tiles.families import network_of, registry
from tiledcore.utils import labelled
from tiledcore.vae.exact import exact_bands, why_not_exact

logger = logging.getLogger(__name__)

# Larger images are decoded and encoded in row bands, exactly to rounding; up to here the autoencoder runs as it
# is, bit for bit. An untiled SDXL decoder needs 24 GiB of activations at 4096x4096.
EXACT_DECODE_PIXELS = 2048 * 2048


class TiledPipeline:
    """A diffusers pipeline that makes images of any size: the same call, the same output class.

    Components are read and set through it (``pipe.scheduler = ...``, ``pipe.load_lora_weights(...)``).
    With ``image=`` a text-to-image pipeline runs as its image-to-image sibling, on the same weights.
    With ``memory_budget=`` (bytes, or such as ``"24GiB"``) each call is planned to stay within it
    (``plan``), and refused where that cannot be; ``report`` has the plan and the real peak.
    """

    pipe: Any
    tiling: TilingConfig
    stages: Stages
    """Whether images are made in stages, see :mod:`tiledcore.compose.stages`; None, the default, makes them in one."""
    fused: bool
    """Whether blend, guidance and scheduler are one fused step, where the pipeline and its scheduler allow it."""
    report: Report | None
    """How the last call ran: fused or not, graph replays, and why not."""

    def __init__(
        self,
        pipe: Any,
        tiling: TilingConfig | None = None,
        fused: bool = True,
        cuda_graph: Mode = "auto",
        memory_budget: int | str | None = None,
        stages: Stages = None,
    ) -> None:
        network_of(pipe)
        staging(stages)
        graphs = StepGraphs(cuda_graph)
        default = tiling or default_tiling(pipe, fades=True)
        self.__dict__.update(pipe=pipe, tiling=default, fused=fused, report=None, _graphs=graphs)
        # Of a tiling that was asked for the plan keeps the geometry; otherwise it chooses that, too.
        self.__dict__.update(_asked=tiling is not None, stages=stages)
        self.__dict__["_budget"] = None if memory_budget is None else Budget(memory_budget)

    @classmethod
    def from_pretrained(
        cls,
        model: str | PathLike[str] | None = None,
        *,
        tiling: TilingConfig | None = None,
        fused: bool = True,
        cuda_graph: Mode = "auto",
        memory_budget: int | str | None = None,
        stages: Stages = None,
        **kwargs: Any,
    ) -> TiledPipeline:
        """Open a checkpoint: a hub id, a folder, or an embedded model: ``"earth"``, the default, or ``"earth-flux"``.

        ``kwargs`` go to ``DiffusionPipeline.from_pretrained`` (``torch_dtype``, ``variant``, ...), whose
        errors are raised unchanged.
        """
        folder = EARTH if model is None else EMBEDDED.get(str(model), model)
        if folder == EARTH_FLUX:
            vae = AutoencoderKL.from_pretrained(EARTH, subfolder="vae", torch_dtype=kwargs.get("torch_dtype"))
            kwargs.setdefault("vae", vae)
        pipe = DiffusionPipeline.from_pretrained(folder, **kwargs)
        if folder == EARTH_FLUX:
            pipe.transformer.native_size = NATIVE
        return cls(pipe, tiling, fused, cuda_graph, memory_budget, stages)

    @classmethod
    def from_pipe(
        cls,
        pipe: Any,
        *,
        tiling: TilingConfig | None = None,
        fused: bool = True,
        cuda_graph: Mode = "auto",
        memory_budget: int | str | None = None,
        stages: Stages = None,
    ) -> TiledPipeline:
        """Wrap a pipeline that is already there; outside of this object it stays untiled."""
        return cls(pipe, tiling, fused, cuda_graph, memory_budget, stages)

    def grid(self, height: int, width: int, tiling: TilingConfig | None = None) -> TileGrid:
        """The tiles of an image of ``height`` by ``width`` px, in latent pixels; before any shift."""
        network, family = network_of(self.pipe)
        factor = self.pipe.vae_scale_factor
        return (tiling or self.tiling).grid(height // factor, width // factor, family.native(self.pipe, network))

    def to(self, *args: Any, **kwargs: Any) -> TiledPipeline:
        if self._budget is None or not self._budget.keeps_off(self.pipe, *args, **kwargs):
            self.pipe.to(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "pipe":  # not initialised yet, as while unpickling
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("pipe", "tiling", "fused", "report", "stages"):
            self.__dict__[name] = value
            self.__dict__["_asked"] |= name == "tiling"
        else:
            setattr(self.pipe, name, value)

    def __call__(
        self,
        *args: Any,
        image: Any = None,
        tiling: TilingConfig | None = None,
        regions: Sequence[Region] | None = None,
        rows: Rows | None = None,
        checkpoint: Checkpoint | str | PathLike[str] | None = None,
        pull: Pull | None = None,
        stages: Stages | Literal["default"] = "default",
        keep_colour: bool = False,
        preview: Preview | str | PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the wrapped pipeline tiled.

        Args:
            args: as for the wrapped pipeline.
            image: start from this picture (PIL, or a tensor as diffusers takes it). A PIL image is
                resized to ``height`` and ``width`` where these are given.
            tiling: for this call, instead of ``self.tiling``.
            regions: parts of the canvas with prompts of their own, see :class:`tiledcore.Region`.
            rows: is given the decoded image as an iterator of bands ``[rows, width, 3]`` uint8, top to bottom, and
                the image is never in memory whole; those of the result are then stand-ins of one pixel.
                :func:`tiledcore.io.writers.write_rows` writes them to a file.
            checkpoint: a folder, or a :class:`~tiledcore.loop.checkpoint.Checkpoint`: the run is saved there, and goes
                on from there if it was broken off. The file stays when the run is finished.
            pull: with ``image``, hold the picture to the image's low frequencies.
            stages: for this call, instead of ``self.stages``. With ``image``, that picture takes the place of the
                one of native size, and ``strength`` that of the stages.
            preview: a picture file (.png, .jpg, .webp), or a :class:`~tiledcore.Preview`: every few evaluations a
                small picture of the canvas is written there.
            keep_colour: with ``image``, give the result the low frequencies of that picture.
            mask_image: (one of ``kwargs``) with ``image``, change only where it is white, with the pipeline's
                inpainting sibling.
            kwargs: as for the wrapped pipeline. ``use_resolution_binning`` (PixArt, Sana) is off unless it
                is given: with it the picture is made at a trained size and resized.

        Returns:
            The wrapped pipeline's own output class.

        Raises:
            ValueError: ``rows``: the pipeline must see the whole image, or makes several. ``checkpoint``: it is
                damaged, belongs to another run, or this run cannot be saved. ``preview``: its folder is not there
                or its extension not known, or there is a ``memory_budget``, which does not count it.
        """
        if isinstance(preview, str | PathLike):
            preview = Preview(Path(preview))
        if preview is not None and self._budget is not None:
            raise ValueError("preview: its decode is not counted by the memory_budget; leave out one of them")
        staged = staging(self.stages if stages == "default" else stages)
        if staged is not None or keep_colour:
            for name, value in (("rows", rows), ("checkpoint", checkpoint), ("regions", regions or None)):
                if value is not None:
                    raise ValueError(f"{name}: is of one stage only; leave it out, or give stages=None")
            call = kwargs if preview is None else kwargs | {"preview": preview}
            return from_pictures(self, args, image, tiling or self.tiling, staged, pull, keep_colour, call)
        pipe = self.pipe
        masked = kwargs.get("mask_image") is not None
        if masked and image is None:
            raise ValueError("mask_image: needs an image to change; give image= too")
        if image is not None:
            if masked and "mask_image" not in signature(type(pipe).__call__).parameters:
                pipe = AutoPipelineForInpainting.from_pipe(pipe)
            if "image" not in signature(type(pipe).__call__).parameters:
                pipe = AutoPipelineForImage2Image.from_pipe(pipe)
            height, width = kwargs.pop("height", None), kwargs.pop("width", None)
            if masked and isinstance(image, torch.Tensor):  # else these pipelines take the native size
                height, width = height or image.shape[-2], width or image.shape[-1]
            if isinstance(image, Image.Image):
                width, height = width or image.width, height or image.height
                image = image.convert("RGB")
                if image.size != (width, height):
                    image = image.resize((width, height), Image.Resampling.LANCZOS)
            if "height" in signature(type(pipe).__call__).parameters:
                kwargs.update(height=height, width=width)
            kwargs["image"] = image
        if "use_resolution_binning" in signature(type(pipe).__call__).parameters:
            kwargs.setdefault("use_resolution_binning", False)
        config = tiling or self.tiling
        if image is not None:
            config = config.refining()
        if isinstance(checkpoint, str | PathLike):
            checkpoint = Checkpoint(Path(checkpoint))
        shown = None if preview is None else self._previewing(preview, pipe)
        plan = None
        if self._budget is not None:
            plan = self._budget.plan(pipe, args, kwargs, config if tiling or self._asked else None)
            config = plan.tiling
        if any(getattr(region, "seed", None) is not None for region in regions or ()):
            network, family = network_of(pipe)
            arguments = signature(type(pipe).__call__).bind_partial(pipe, *args, **kwargs).arguments
            kwargs["latents"] = seeded_latents(pipe, family, network, arguments, regions or (), config.wrap)
        with (
            within(self, pipe, plan),
            tiled(pipe, replace(config, fade=0)),
            regional(pipe, regions),
            _bounded_vae(pipe, kwargs, plan),
            streamed(pipe, rows, continuation(pipe.vae, config.wrap, pipe.vae_scale_factor), EXACT_DECODE_PIXELS),
            wrapped(pipe.vae, config.wrap, pipe.vae_scale_factor),
            labelled(pipe.vae, "decode", "decode"),
        ):
            if not self.fused and checkpoint is not None:
                raise ValueError("checkpoint: only the fused step can be resumed; leave out fused=False")
            if not self.fused and pull is None and shown is None and not config.fade:
                self.report = None
                return pipe(*args, **kwargs)
            if self._graphs.backend is None and torch.device(pipe._execution_device).type == "cuda":
                self._graphs.backend = CudaBackend()
            bound = signature(type(pipe).__call__).bind_partial(pipe, *args, **kwargs)
            bound.apply_defaults()
            pulling = self._pulling(pull, pipe, config, image)
            watching = pulling.watching() if pulling is not None else nullcontext()
            given = {**bound.arguments, "regions": [vars(region) for region in regions or ()]}
            engine = Engine(pipe, given, config, self._graphs, checkpoint, pulling, self.fused, shown)
            with watching, engine:
                hook = registry(network_of(pipe)[0]).get_hook(HOOK)
                hook.engine = engine
                try:
                    return pipe(*args, **kwargs)
                finally:
                    self.report = engine.report()
                    if hook.regions is not None:
                        self.report.region_tiles = hook.regions.tiles or None

    @staticmethod
    def _previewing(preview: Preview, pipe: Any) -> Previewing:
        network, family = network_of(pipe)
        unit = family.patch(network) if family.packed else 1
        return Previewing(preview, pipe, both(family.native(pipe, network)), unit)

    @staticmethod
    def _pulling(pull: Pull | None, pipe: Any, config: TilingConfig, image: Any) -> Pulling | None:
        if pull is None:
            return None
        if image is None:
            raise ValueError("pull: needs an image to pull to; give image= too")
        denoiser = registry(network_of(pipe)[0]).get_hook(HOOK).denoiser
        tile = denoiser.native if config.tile is None else config.tile
        side = tile if isinstance(tile, int) else min(tile)
        wrap = both(config.wrap)
        return Pulling(pull, pipe.scheduler, denoiser.unit, wrap, side / 16)


@contextmanager
def _bounded_vae(pipe: Any, kwargs: dict[str, Any], plan: Plan | None = None) -> Iterator[None]:
    """Run the VAE in exact bands where the whole image would not fit; in diffusers' tiles if bands cannot."""
    vae = pipe.vae
    if getattr(vae, "use_tiling", True):  # the caller's own choice, or not an autoencoder of this kind
        yield
        return
    height, width = size_px(kwargs.get("image"), pipe.vae_scale_factor) or (kwargs.get("height"), kwargs.get("width"))
    pixels = (height or 0) * (width or 0)
    if (reason := why_not_exact(vae, pixels)) is None:
        larger_than, band, room = EXACT_DECODE_PIXELS, None, None
        if plan is not None:  # which knows whether the whole image fits
            larger_than, band, room = sys.maxsize if plan.vae_band is None else 0, plan.vae_band, plan.vae_room
        with exact_bands(vae, larger_than, band, room):
            yield
        return
    if pixels <= EXACT_DECODE_PIXELS:
        yield
        return
    logger.warning("%d pixels: decoding in diffusers' tiles, which is approximate: %s", pixels, reason)
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()
