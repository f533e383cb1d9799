"""The denoising loop inside a diffusers pipeline's own: gather -> network -> one fused step.

The pipeline's call stays as it is: it encodes, prepares, counts, shows progress, calls back and decodes. What it does
with the canvas between two evaluations (scale, repeat, guide, step) is taken over: while the engine runs, the
pipeline holds stand-ins of one pixel for latents and predictions, on which all of that costs nothing, and the canvas
itself stays in the engine's buffers, moved on by :func:`tiledcore.ops.fused_step`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiledcore import ops
from tiledcore.config import TilingConfig
from tiledcore.geometry import both
from tiledcore.io.preview import Previewing
from tiledcore.loop.checkpoint import Checkpoint, Run
from tiledcore.loop.eligible import fusable, why_not
from tiledcore.loop.fallback import OwnLoop
from tiledcore.loop.graph import Counters, Entry, StepGraphs, clone, identity, refill
from tiledcore.ops.step import guidance_rescale
from tiledcore.schedulers.pull import Pulling
from tiledcore.schedulers.solver import LinearSolver, NotLinear
from tiledcore.tiles.denoiser import TileDenoiser
from tiledcore.tiles.fade import Fading, fade_coefficients
from tiledcore.tiles.families import Family, network_of
from tiledcore.utils import label

if TYPE_CHECKING:
    from tiledcore.memory.planner import Plan

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """How the last call ran."""

    fused: bool
    """Whether the engine moved the canvas; otherwise the pipeline's own loop and the scheduler's ``step`` did."""
    reason: str | None
    """Why it did not."""
    evaluations: int
    """Of the network on the whole canvas, by the engine."""
    graph: Counters
    resumed: int = 0
    """Evaluations before them that a checkpoint spared."""
    reductions: tuple[str, ...] = ()
    """What was lowered because memory ran out, in the order in which it was."""
    plan: Plan | None = None
    """What a ``memory_budget`` led to, with its predicted peak."""
    measured_bytes: int | None = None
    """With a plan: the peak of tensors alive on the device, weights included."""
    region_tiles: int | None = None
    """With regions, in tile mode: tiles evaluated in the last step, each as often as there are prompts in it."""


@dataclass
class Buffers:
    """All that a step reads and writes, at addresses that stay."""

    state: Tensor  # [S, B, C, H, W]
    model_input: Tensor  # [B, C, H, W]
    table: Tensor  # [n, S, S + 2]
    input_scale: Tensor  # [n + 1]
    step: Tensor  # [1] int64
    guidance: Tensor  # [1]
    noise: Tensor | None  # [B, C, H, W]
    arguments: dict[str, Any]
    denoiser: TileDenoiser | None = None  # its offsets and its tiles' predictions
    clean: Tensor | None = None  # [branches * B, C, H, W], of a fade


class Engine:
    """One call of a pipeline. A context: inside of it, the pipeline's scheduler is the engine's.

    Args:
        pipe: the pipeline.
        call: the arguments of its call.
        config: the tiling.
        graphs: of the steps, kept from call to call.
        checkpoint: where the call is saved, and goes on from.
        pulling: a low-frequency pull, applied to every prediction whether the step is fused or the pipeline's own.
        fused: whether the step may be fused.
        preview: shown after evaluations, whether the step is fused or the pipeline's own.

    Raises:
        ValueError: the call cannot be saved, or go on from what is there.
    """

    def __init__(
        self,
        pipe: Any,
        call: dict[str, Any],
        config: TilingConfig,
        graphs: StepGraphs,
        checkpoint: Checkpoint | None = None,
        pulling: Pulling | None = None,
        fused: bool = True,
        preview: Previewing | None = None,
    ) -> None:
        self.pulling, self.preview = pulling, preview
        self.fading = _fading(pipe, config) if config.fade else None
        self.own = OwnLoop(pipe, self.fading, pulling, preview)
        self.pipe, self.config, self.graphs, self.scheduler = pipe, config, graphs, pipe.scheduler
        self.generator = call.get("generator")
        self.eta = call.get("eta", 0.0)
        # A callback must see each step's latents; otherwise only the last ones are needed.
        self.shows_latents = any(call.get(name) is not None for name in ("callback_on_step_end", "callback"))
        self.index = 0
        self.denoiser: TileDenoiser | None = None  # what evaluates, once it is known
        self.reason = why_not(pipe, call) if fused else "fused=False"
        self._decided = False
        self._solver: LinearSolver | None = None  # once decided, where the engine runs
        self._shown: Tensor | None = None
        self._saves = None if checkpoint is None else Run(checkpoint, pipe, call, config)
        self._resumed = 0 if self._saves is None else self._saves.done
        self._check_saves()
        graphs.counters = Counters()

    def report(self) -> Report:
        evaluations = max(0, self.index - self._resumed)
        reductions = () if self.denoiser is None else tuple(self.denoiser.reductions)
        return Report(self.index > 0, self.reason, evaluations, self.graphs.counters, self._resumed, reductions)

    def _check_saves(self) -> None:
        if self._saves is not None and self.reason is not None:
            raise ValueError(f"checkpoint: only the fused step can be resumed, and here: {self.reason}")

    def __enter__(self) -> Engine:
        self._before = {name: vars(self.scheduler).get(name) for name in ("step", "scale_model_input")}
        if self.reason is None or self.own.watches:
            own_step, own_scale = self.scheduler.step, getattr(self.scheduler, "scale_model_input", None)

            @wraps(own_step)  # pipelines look at its signature
            def step(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
                if self.reason is None:
                    return (self._latents(sample),)
                result = own_step(self.own.before(model_output, timestep, sample), timestep, sample, *args, **kwargs)
                self.own.after(result[0])
                return result

            self.scheduler.step = step
            if own_scale is not None:

                @wraps(own_scale)
                def scale(sample: Tensor, timestep: Any) -> Any:
                    return sample if self.runs(timestep) else own_scale(sample, timestep)

                self.scheduler.scale_model_input = scale
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back(self.scheduler)

    def _put_back(self, scheduler: Any) -> None:
        """Give it, or a copy of it, the methods that it had before the engine's."""
        for name, value in self._before.items():
            vars(scheduler).pop(name, None)
            if value is not None:
                setattr(scheduler, name, value)

    def runs(self, timestep: Any) -> bool:
        """Whether the engine moves the canvas. Decided at the first evaluation, when the timesteps are known."""
        if not self._decided and self.reason is None:
            self._decided = True
            plain = copy.copy(self.scheduler)
            self._put_back(plain)
            first = float(torch.as_tensor(timestep).flatten()[0])
            solver = fusable(self.pipe, plain, first, self.eta, pulled=self.pulling is not None)
            if isinstance(solver, NotLinear):
                self.reason = solver.reason
                self._check_saves()
                logger.warning("the scheduler's own step is used: %s", self.reason)
            else:
                self._solver = solver
        return self.reason is None

    def look(self, arguments: dict[str, Any], family: Family) -> None:
        """Take from the arguments of the network's forward what the pipeline has changed."""
        self.branches = 2 if getattr(self.pipe, "do_classifier_free_guidance", False) else 1
        if self.index == 0:
            self._begin(family.canvas(arguments), arguments[family.sample], arguments, family)
        elif self._shown is not None:
            self._take_back(family.canvas(arguments).chunk(self.branches)[0])

    def _begin(self, canvas: Tensor, sample: Tensor, arguments: dict[str, Any], family: Family) -> None:
        assert self._solver is not None
        latents = canvas.chunk(self.branches)[0]
        dtype = torch.promote_types(latents.dtype, torch.float32)
        solver = self._solver.to(latents.device, dtype)
        self.family, self._solver = family, solver

        def make() -> Buffers:
            state = torch.zeros(solver.slots, *latents.shape, dtype=dtype, device=latents.device)
            return Buffers(
                state=state,
                model_input=torch.empty_like(latents, memory_format=torch.contiguous_format),
                table=solver.table.clone(),
                input_scale=solver.input_scale.clone(),
                step=torch.zeros(1, dtype=torch.int64, device=latents.device),
                guidance=torch.ones(1, dtype=dtype, device=latents.device),
                noise=torch.empty_like(state[0]) if any(solver.uses_noise) else None,
                arguments={},
                clean=torch.cat([state[0]] * self.branches) if self.fading is not None else None,
            )

        shapes = (tuple(latents.shape), latents.dtype, latents.device, tuple(solver.table.shape), self.branches)
        key = (identity(_network(self.pipe)), self.config, shapes, self._rescale(), solver.uses_noise)
        self.entry: Entry = self.graphs.entry(key, make)
        self.buffers: Buffers = self.entry.buffers
        self.buffers.table.copy_(solver.table)
        self.buffers.input_scale.copy_(solver.input_scale)
        self.buffers.step.zero_()
        if self.fading is not None:
            self.fading.start(fade_coefficients(self.scheduler, solver.timesteps))
            self.fading.clean = self.buffers.clean
        if self.pulling is not None:
            self.pulling.start(solver.timesteps)
            # The pull is added to the prediction; so where the kernel adds noise, with the prediction's coefficients.
            pulled = sum(self.pulling.active(i) for i in range(len(solver)))
            self.buffers.table[:pulled, :, -1] = self.buffers.table[:pulled, :, -2]
        self._take_back(latents)
        if self._saves is not None:
            self._saves.restore(self.buffers)
        # What the pipeline holds meanwhile: as many images, of one pixel, or one token.
        self._stand_in = latents.new_zeros(latents.shape[0], *[1] * (sample.ndim - 1))

    def _take_back(self, latents: Tensor) -> None:
        """The canvas as the pipeline has it; a callback may have changed it."""
        if self._shown is not None and torch.equal(latents, self._shown):
            return  # unchanged: the engine's own is more precise
        self.buffers.state[0].copy_(latents)
        scale = self.buffers.input_scale[self.index]
        self.buffers.model_input.copy_(self.buffers.state[0] * scale)

    def _rescale(self) -> float:
        return float(getattr(self.pipe, "guidance_rescale", 0.0) or 0.0) if self.branches == 2 else 0.0

    def run_step(
        self, denoiser: TileDenoiser, forward: Callable[..., Any], timestep: Any, conditions: dict[str, Any]
    ) -> Tensor:
        """One evaluation of the canvas and the step after it.

        Args:
            denoiser: the tiling.
            forward: the network, as :meth:`~tiledcore.tiles.denoiser.TileDenoiser.evaluate` calls it.
            timestep: as the pipeline gives it.
            conditions: the other arguments of the network's forward.

        Returns:
            The stand-in for the prediction.
        """
        assert self._solver is not None
        buffers, index = self.buffers, self.index
        if index < self._resumed:
            if self.fading is not None:
                height, width = buffers.model_input.shape[2:]
                self.fading.tiles = denoiser.tiling(height, width, timestep)
            self.index += 1
            return self._prediction()
        if buffers.denoiser is not None and buffers.denoiser is not denoiser:
            denoiser = buffers.denoiser.renewed(denoiser)
        self.denoiser = buffers.denoiser = denoiser
        size, device = (buffers.model_input.shape[2], buffers.model_input.shape[3]), buffers.model_input.device
        uniform = denoiser.place(size, timestep, device)
        refusal = (
            self._graph_refusal() if uniform else "the tiles of a step have several sizes, or differ from step to step"
        )
        if conditions.get("regions") is not None:
            refusal = "regions: which prompts a tile has is decided on the host"
        if self.fading is not None:
            refusal = refusal or "fade: its weights differ from step to step"
        pulling = self.pulling if self.pulling is not None and self.pulling.active(index) else None
        if pulling is not None:
            refusal = refusal or "a pulled step has one input more than the others"
        if refusal is None and self.graphs.backend is not None:
            given = {**conditions, "": timestep}
            if not buffers.arguments:
                buffers.arguments = clone(given)
            elif not refill(buffers.arguments, given):
                refusal = "the conditions have other shapes than before"
            if refusal is None:
                conditions = {k: v for k, v in buffers.arguments.items() if k}
                timestep = buffers.arguments[""]
        if self.branches == 2:
            buffers.guidance.fill_(float(self.pipe.guidance_scale))
        if self._solver.uses_noise[index]:
            assert buffers.noise is not None
            buffers.noise.copy_(self._solver.noise(self.generator, buffers.model_input))

        def body() -> None:
            canvas = torch.cat([buffers.model_input] * self.branches)
            tiles, offsets, size, ramp = denoiser.attempt(forward, canvas, timestep, **conditions)
            options: dict[str, Any] = {"window": self.config.window, "ramp": ramp, "impl": self.config.impl}
            if self.fading is not None and self.fading.watches(index) and denoiser.placed is not None:
                canvas = tiles if len(offsets) == 1 else ops.blend_tiles(tiles, offsets, size, **options)
                with label("fade"):
                    canvas = self.fading(index, canvas, buffers.state[0], denoiser.placed)
                tiles, offsets, size, ramp = denoiser.whole(canvas)
            guidance = buffers.guidance if self.branches == 2 else None
            rescale = None
            if guidance is not None and self._rescale() > 0:
                rescale = guidance_rescale(tiles, offsets, size, guidance, self._rescale(), **options)
            noise = buffers.noise if self._solver.uses_noise[index] else None  # type: ignore[union-attr]
            if pulling is not None:
                with label("pull"):
                    prediction = ops.blend_tiles(tiles, offsets, size, **options).to(buffers.state.dtype)
                    if guidance is not None:
                        unconditional, conditional = prediction.chunk(2)
                        prediction = unconditional + guidance * (conditional - unconditional)
                    if rescale is not None:
                        prediction = prediction * rescale.view(-1, 1, 1, 1)
                    noise = pulling.correction(index, prediction, buffers.state[0])
            with label("step"):
                ops.fused_step(
                    tiles.contiguous(),
                    offsets,
                    buffers.state,
                    buffers.table,
                    buffers.input_scale,
                    buffers.step,
                    model_input=buffers.model_input,
                    guidance_scale=guidance,
                    noise=noise,
                    rescale=rescale,
                    **options,
                )
            buffers.step.add_(1)

        self.graphs.run(self.entry, body, refusal)
        self.index += 1
        if self._saves is not None:
            self._saves.after(self.index, len(self._solver), buffers)
        if self.preview is not None:
            self.preview.after(self.index, self._solver.timesteps, self.scheduler, buffers.state[0])
        return self._prediction()

    def _prediction(self) -> Tensor:
        return self._stand_in.repeat(self.branches, *[1] * (self._stand_in.ndim - 1))

    def _graph_refusal(self) -> str | None:
        if getattr(_network(self.pipe), "_hf_hook", None) is not None:
            return "CPU offload moves the weights between steps"
        if self.shows_latents:
            return "a callback may change what the next step reads"
        return None

    def _latents(self, sample: Tensor) -> Tensor:
        """What the pipeline is given for its latents after a step."""
        assert self._solver is not None
        if not self.shows_latents and self.index < len(self._solver):
            return self._stand_in.to(sample.dtype)
        self._shown = self.buffers.state[0].to(self.buffers.model_input.dtype, copy=True)
        return self.family.result(self._shown)


def _fading(pipe: Any, config: TilingConfig) -> Fading:
    network, family = network_of(pipe)
    unit = family.patch(network) if family.packed else 1
    tile = min(both(family.native(pipe, network) if config.tile is None else config.tile))
    return Fading(min(config.fade, tile / 4) / unit, both(config.wrap))


def _network(pipe: Any) -> Any:
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
