"""TiledPipeline: a drop-in for a diffusers pipeline that makes images of any size."""

from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal, Self

from diffusers import AutoencoderKL, DiffusionPipeline

from tiledcore import validate
from tiledcore.call import Call, Options, bind
from tiledcore.compose.regions import Region
from tiledcore.compose.stages import Stages, from_pictures, staging
from tiledcore.compose.tile_prompts import PromptForTile
from tiledcore.config import Execution, TilingConfig
from tiledcore.geometry import TileGrid
from tiledcore.hook import default_tiling
from tiledcore.io.preview import Preview
from tiledcore.io.stream import Rows
from tiledcore.loop.checkpoint import Checkpoint
from tiledcore.loop.engine import Report
from tiledcore.loop.graph import Mode, StepGraphs
from tiledcore.memory.planner import Budget
from tiledcore.models import EARTH, EARTH_FLUX, EMBEDDED, NATIVE
from tiledcore.parallel.ranks import current
from tiledcore.schedulers.pull import Pull
from tiledcore.tiles.families import factor_of, network_of
from tiledcore.utils import replaced

SETTINGS = ("tiling", "execution", "fused", "cuda_graph", "memory_budget", "stages", "parallel")  # of the constructor


class TiledPipeline:
    """A diffusers pipeline that makes images of any size: same call, same output class.

    Components are read and set through it (``pipe.scheduler = ...``, ``pipe.load_lora_weights(...)``). With ``image=``
    a text-to-image pipeline runs as image-to-image, with ``mask_image=`` as inpainting, on the same weights.

    Args:
        pipe: a pipeline whose ``unet`` or ``transformer`` is of a class in :mod:`tiledcore.tiles.families`. The object
            itself is not changed.
        tiling: how images are cut into tiles. Default: chosen in each call for the model and the scheduler.
        execution: how the tiles are computed.
        fused: blend, guidance and scheduler run as one fused step, if pipeline and scheduler allow it.
        cuda_graph: capture the step as a CUDA graph: if it pays, always, or never.
        memory_budget: bytes, or a text such as ``"24GiB"``: each call is planned to stay within it
            (:class:`tiledcore.memory.planner.Planner`), or refused.
        stages: make images in stages, see :mod:`tiledcore.compose.stages`.
        parallel: ``"auto"``: where torch.distributed has a process group, its processes share each call's work, and
            must all make the same calls. False: never.

    Raises:
        TypeError: the pipeline has no network that can be tiled.
        ValueError: names the argument, its value and what is valid.
    """

    report: Report | None
    """How the last call ran: fused or not and why, graph replays."""

    def __init__(
        self,
        pipe: Any,
        tiling: TilingConfig | None = None,
        *,
        execution: Execution | None = None,
        fused: bool = True,
        cuda_graph: Mode = "auto",
        memory_budget: int | str | None = None,
        stages: Stages = None,
        parallel: Literal["auto", False] = "auto",
    ) -> None:
        self.__dict__["_running"] = None
        self.pipe, self.report = pipe, None
        self.tiling, self.execution, self.fused, self.cuda_graph = tiling, execution or Execution(), fused, cuda_graph
        self.memory_budget, self.stages, self.parallel = memory_budget, stages, parallel

    @classmethod
    def from_pretrained(cls, model: str | PathLike[str] | None = None, **kwargs: Any) -> Self:
        """Open a checkpoint: a hub id, a folder, or an embedded model: ``"earth"`` (default) or ``"earth-flux"``.

        ``kwargs`` are those of the constructor and those of ``DiffusionPipeline.from_pretrained`` (``torch_dtype``,
        ``variant``, ...), which also raises the errors.
        """
        own = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        folder = EARTH if model is None else EMBEDDED.get(str(model), model)
        if folder == EARTH_FLUX and not (EARTH_FLUX / "vae").is_dir():
            vae = AutoencoderKL.from_pretrained(EARTH, subfolder="vae", torch_dtype=kwargs.get("torch_dtype"))
            kwargs.setdefault("vae", vae)
        pipe = DiffusionPipeline.from_pretrained(folder, **kwargs)
        if folder == EARTH_FLUX:
            pipe.transformer.native_size = NATIVE
        return cls(pipe, **own)

    @classmethod
    def from_pipe(cls, pipe: Any, **kwargs: Any) -> Self:
        """Wrap an existing pipeline; ``kwargs`` are those of the constructor."""
        return cls(pipe, **kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The wrapped pipeline's class, so that ``isinstance(self, DiffusionPipeline)`` is true."""
        return type(self.__dict__["pipe"]) if "pipe" in self.__dict__ else type(self)

    @property
    def tiling(self) -> TilingConfig:
        """The tiling that was asked for, or the default for the pipeline as it is now. Set None for the default."""
        asked: TilingConfig | None = self.__dict__["_tiling"]
        return asked or default_tiling(self.pipe)

    @tiling.setter
    def tiling(self, tiling: TilingConfig | None) -> None:
        self.__dict__.update(_checked("tiling", tiling))

    def grid(self, height: int, width: int, tiling: TilingConfig | None = None) -> TileGrid:
        """The tiles of an image of ``height`` by ``width`` px, in latent pixels, before any shift."""
        network, family = network_of(self.pipe)
        factor = factor_of(self.pipe)
        return (tiling or self.tiling).grid(height // factor, width // factor, family.native(self.pipe, network))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        if self._budget is None or not self._budget.keeps_off(self.pipe, *args, **kwargs):
            self.pipe.to(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "pipe":  # not initialised yet, for example while unpickling
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SETTINGS or name in ("pipe", "report"):
            self.__dict__.update(_checked(name, value))
            return
        setattr(self.pipe, name, value)
        if self._running is not None and self._running is not self.pipe:  # for example _interrupt
            setattr(self._running, name, value)

    def __call__(
        self,
        *args: Any,
        tiling: TilingConfig | None = None,
        execution: Execution | None = None,
        regions: Sequence[Region] | None = None,
        prompt_for_tile: PromptForTile | None = None,
        rows: Rows | None = None,
        checkpoint: Checkpoint | str | PathLike[str] | None = None,
        pull: Pull | None = None,
        stages: Stages | Literal["default"] = "default",
        keep_colour: bool = False,
        preview: Preview | str | PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the wrapped pipeline tiled; returns an object of its output class.

        Args:
            args: as for the wrapped pipeline.
            tiling: for this call, instead of ``self.tiling``.
            execution: for this call, instead of ``self.execution``.
            regions: parts of the canvas with their own prompts, see :class:`tiledcore.Region`.
            prompt_for_tile: a function of a tile's box (left, top, right, bottom) in px that gives its prompt, or
                None for ``prompt``; for tiles that do not move also a list, row by row. Without ``regions``.
            rows: a function that takes the decoded image as an iterator of bands ``[rows, width, 3]`` uint8, top to
                bottom. The image is never in memory whole; the result has a placeholder of one pixel.
            checkpoint: a folder or a :class:`~tiledcore.loop.checkpoint.Checkpoint`: progress is saved there, and an
                interrupted run continues from there.
            pull: with ``image``: stay close to the image's low frequencies.
            stages: for this call, instead of ``self.stages``. With ``image``, the first stage enlarges that image.
            keep_colour: with ``image``: give the result the low frequencies of that image.
            preview: an image file (.png, .jpg, .webp) or a :class:`~tiledcore.Preview`: a small image of the canvas
                is written there every few steps.
            kwargs: as for the wrapped pipeline. ``image``: start from this image (PIL, array, tensor, latents, or a
                list), resized to ``height`` and ``width`` if given. ``mask_image``: change only its white part.
                ``use_resolution_binning`` (PixArt, Sana) is off by default.

        Raises:
            ValueError: names the argument, its value and what is valid.
        """
        _checked("tiling", tiling), _checked("execution", execution)
        given: dict[str, Any] = {"regions": regions, "prompt_for_tile": prompt_for_tile, "rows": rows, "pull": pull}
        given |= {"checkpoint": checkpoint, "preview": preview, "keep_colour": keep_colour}
        given |= {"tiling": tiling or self.__dict__["_tiling"], "execution": execution or self.execution}
        options = Options.of(stages=self.stages if stages == "default" else stages, **given)
        arguments = bind(self.pipe, args, kwargs)
        if options.preview is not None and self._budget is not None:
            raise ValueError("preview: its decode is not counted by the memory_budget; leave out one of them")
        if options.stages is not None or keep_colour:
            return from_pictures(self, arguments, options)
        ranks = current() if self.parallel == "auto" else None
        call = Call.resolve(self.pipe, arguments, options, self._budget, ranks)
        with replaced(self, _running=call.pipe):
            return call.run(self, self._graphs, self.fused)


def _checked(name: str, value: Any) -> dict[str, Any]:
    """A setting of a :class:`TiledPipeline` after a check, as its attributes. Raises as the constructor does."""
    kinds: dict[str, type] = {"tiling": TilingConfig, "execution": Execution}
    if name in kinds and not (value is None or isinstance(value, kinds[name])):
        raise TypeError(f"{name}={value!r}: must be a tiledcore.{kinds[name].__name__}, or None for the default")
    if name == "execution":
        return {name: value or Execution()}
    if name == "fused":
        validate.choice(name, value, (True, False))
    if name == "parallel":
        validate.choice(name, value, ("auto", False))
    if name == "stages":
        staging(value)
    if name == "pipe":
        if isinstance(value, TiledPipeline):
            raise TypeError("pipe: a TiledPipeline is tiled already; change its settings, or give its .pipe")
        network_of(value)
    if name == "cuda_graph":
        return {name: value, "_graphs": StepGraphs(value)}
    if name == "memory_budget":
        return {name: value, "_budget": None if value is None else Budget(value)}
    return {"_tiling" if name == "tiling" else name: value}
