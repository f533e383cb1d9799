"""The loop of one call: fused, where each step is gather -> network -> one fused step; else the pipeline's own.

Fused, guidance and the scheduler's step are done on the engine's own buffers. The pipeline gets predictions of one
pixel, which cost nothing, and a copy of the canvas after each step. In the pipeline's own loop, the features run before
and after the scheduler's ``step``.
"""

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, wraps
from inspect import signature
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tiledcore import ops
from tiledcore._diffusers import FUSABLE, acts_within, places_of
from tiledcore.feature import Features
from tiledcore.geometry import Pair
from tiledcore.loop.checkpoint import CALLBACKS, Checkpoint, Run
from tiledcore.loop.graph import Counters, Entry, StepGraphs, identity, refill
from tiledcore.ops.fused_step import MAX_SLOTS
from tiledcore.schedulers.solver import LinearSolver, NotLinearError, linear_solver
from tiledcore.tiles.denoiser import Forward, Prediction, TileDenoiser, run_all
from tiledcore.tiles.families import network_of, to_image, to_tokens
from tiledcore.utils import label, replaced

logger = logging.getLogger(__name__)

# Arguments of a pipeline's call with which its loop does what the fused one does not.
REFUSED = ("denoising_start", "denoising_end", "skip_guidance_layers", "ip_adapter_image", "ip_adapter_image_embeds")


@dataclass
class Report:
    """How a call ran."""

    fused: bool  # The engine moved the canvas; otherwise the pipeline's own loop and the scheduler's ``step`` did
    reason: str | None  # Why it did not
    evaluations: int  # Of the network on the whole canvas, by the engine
    graph: Counters
    resumed: int = 0  # Evaluations before them that a checkpoint spared
    reductions: tuple[str, ...] = ()  # What was lowered because memory ran out, in order
    plan: Any = None  # With a ``memory_budget``: the :class:`~tiledcore.memory.planner.Plan`, with its predicted peak
    measured_bytes: int | None = None  # With a plan: the peak of tensors alive on the device, weights included
    ranks: Any = None  # With several processes: the :class:`~tiledcore.parallel.ranks.Times` of each


def why_not(pipe: Any, call: dict[str, Any]) -> str | None:
    """Why the fused loop cannot run this call, or None where it can."""
    name = type(pipe).__name__
    if name not in FUSABLE:
        return f"{name} keeps its own loop"
    for argument in REFUSED:
        if call.get(argument) is not None:
            return f"{argument} changes the pipeline's loop"
    if (call.get("guidance_rescale") or 0.0) > 0 and (call.get("guidance_scale") or 0.0) > 1:  # else not guided
        return "guidance_rescale needs the spread of the whole prediction"
    if name.startswith("Flux") and (call.get("true_cfg_scale") or 1.0) > 1 and call.get("negative_prompt") is not None:
        return "true_cfg_scale: FLUX evaluates the two branches in two calls"
    return None


def solver_of(pipe: Any, timestep: float, eta: float) -> LinearSolver:
    """Coefficients of a call's steps for the fused step. NotLinearError: why the scheduler must step itself."""
    scheduler = pipe.scheduler
    eta_too = "eta" in signature(scheduler.step).parameters and hasattr(pipe, "prepare_extra_step_kwargs")
    places = places_of(scheduler, timestep)
    if len(places) != 1:
        raise NotLinearError(f"timestep {timestep:g} is none, or several, of its timesteps")
    solver = linear_solver(scheduler, begin=places[0], **({"eta": eta} if eta_too else {}))
    if solver.slots > MAX_SLOTS:
        raise NotLinearError(f"needs {solver.slots} canvases of history, more than {MAX_SLOTS}")
    if any(solver.uses_noise) and type(pipe).__name__.startswith("Flux"):
        raise NotLinearError("draws noise in the shape of packed latents")
    return solver


class Buffers:
    """All that the steps of a call read and write, at addresses that stay. ``solver`` is on the latents' device."""

    def __init__(self, solver: LinearSolver, latents: Tensor) -> None:
        self.table, self.input_scale = solver.table.clone(), solver.input_scale.clone()  # [n, S, S + 2], [n + 1]
        self.state = self.table.new_zeros(solver.slots, *latents.shape)  # [S, B, C, H, W]
        self.model_input = torch.empty_like(latents, memory_format=torch.contiguous_format)  # [B, C, H, W]
        self.step = torch.zeros(1, dtype=torch.int64, device=latents.device)
        self.guidance = self.table.new_ones(1)
        self.noise = torch.zeros_like(self.state[0]) if any(solver.uses_noise) else None
        self.given: Any = None  # The timestep and the conditions, where a graph reads them
        self.denoiser: TileDenoiser | None = None  # its offsets, which a graph reads
        # What goes from one evaluation to the next. The input could be had from the state, up to rounding.
        self.carried = {"state": self.state, "model_input": self.model_input}

    def advance(self, predicted: Prediction, **options: Any) -> None:
        """Make the step from the tiles' predictions; ``options`` are those of :func:`tiledcore.ops.fused_step`."""
        options |= {"model_input": self.model_input, "noise": self.noise, "ramp": predicted.ramp}
        given = (predicted.tiles.contiguous(), predicted.offsets, self.state, self.table, self.input_scale, self.step)
        ops.fused_step(*given, **options)
        self.step.add_(1)


class Engine:
    """The loop of one call. A context: inside it, the pipeline's scheduler is the engine's.

    ``call``: the arguments of the pipeline's call, by name. ``settings``: what else the image depends on, by name; a
    checkpoint compares it. ``features``: of the call, entered already. ``fused=False``: the pipeline's own loop.

    Raises:
        ValueError: the call cannot be saved in the checkpoint, or cannot go on from there.
    """

    canvas_size: Pair = (0, 0)  # In canvas pixels; in the pipeline's own loop known once the network has been called
    denoiser: TileDenoiser | None = None  # What evaluates, once it is known

    def __init__(
        self,
        pipe: Any,
        call: dict[str, Any],
        settings: dict[str, Any],
        graphs: StepGraphs,
        features: Features,
        checkpoint: Checkpoint | None = None,
        fused: bool = True,
    ) -> None:
        self.pipe, self.call, self.graphs, self.features = pipe, call, graphs, features
        self.scheduler, (self.network, self.family) = pipe.scheduler, network_of(pipe)
        self.shows_latents = any(call.get(name) is not None for name in CALLBACKS)  # which may change them
        self._watching = ExitStack()
        self.index = 0  # Evaluations that are done; in the pipeline's own loop, steps
        self.reason = why_not(pipe, call) if fused else "fused=False"
        self._solver: LinearSolver | None = None  # once decided, where the engine runs
        self._shown: Tensor | None = None
        self._saves = None if checkpoint is None else Run(checkpoint, pipe, call, settings)
        self._resumed = 0 if self._saves is None else self._saves.saved.index  # Evaluations that a checkpoint spares
        self._check_saves()
        graphs.counters = Counters()

    def report(self) -> Report:
        done = self.index if self.reason is None else 0
        reductions = () if self.denoiser is None else tuple(self.denoiser.reductions)
        evaluations = max(0, done - self._resumed)
        return Report(done > 0, self.reason, evaluations, self.graphs.counters, self._resumed, reductions)

    def _check_saves(self) -> None:
        if self._saves is not None and self.reason is not None:
            raise ValueError(f"checkpoint: only the fused step can be resumed, and here: {self.reason}")

    def __enter__(self) -> Self:
        if self.reason is not None and not self.features.watches:
            return self
        scheduler = self.scheduler
        own_step, own_scale = scheduler.step, getattr(scheduler, "scale_model_input", None)

        @wraps(own_step)  # pipelines look at its signature
        def step(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            if self.reason is None:
                return (self._latents(),)
            result = own_step(self._changed(model_output, timestep, sample), timestep, sample, *args, **kwargs)
            self.index += 1
            self.features.after_step(self.index, self._canvas(result[0]))
            return result

        self._watching.enter_context(replaced(scheduler, step=step))
        if own_scale is not None:

            @wraps(own_scale)
            def scale(sample: Tensor, timestep: Any) -> Any:
                return sample if self.runs(timestep) else own_scale(sample, timestep)

            self._watching.enter_context(replaced(scheduler, scale_model_input=scale))
        return self

    def __exit__(self, *_: object) -> None:
        self._watching.close()

    def runs(self, timestep: Any) -> bool:
        """Whether the engine moves the canvas. Decided at the first evaluation, when the timesteps are known."""
        if self.reason is None and self._solver is None:
            first = float(torch.as_tensor(timestep).flatten()[0])
            self._watching.close()  # for a moment: the scheduler's own methods are read
            try:
                self._solver = solver_of(self.pipe, first, self.call.get("eta", 0.0))
            except NotLinearError as error:
                self.reason = f"{type(self.scheduler).__name__}: {error}"
                self._check_saves()
                logger.warning("the scheduler's own step is used: %s", self.reason)
            self.__enter__()
        return self.reason is None

    def _changed(self, prediction: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        """What the scheduler's own ``step`` is given for its prediction: the features have changed it."""
        if self.index == 0:
            # A timestep that is there twice has one noise level.
            timesteps = self.scheduler.timesteps[places_of(self.scheduler, timestep)[0] :]
            self.features.begin(self.scheduler, timesteps)
        if not self.features.active(self.index):
            return prediction
        assert self.denoiser is not None and self.denoiser.placed is not None
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        canvas, predicted = self._canvas(sample), self._canvas(prediction).to(dtype)
        changed = self.features.after_prediction(self.index, canvas, self.denoiser.placed, predicted)
        return (to_tokens(changed) if self.family.packed else changed).to(prediction.dtype)

    def _canvas(self, latents: Tensor) -> Tensor:
        return to_image(latents, self.canvas_size) if self.family.packed else latents

    def look(self, arguments: dict[str, Any], denoiser: TileDenoiser) -> None:
        """Take from the arguments of the network's forward what the pipeline has changed."""
        self.branches = 2 if getattr(self.pipe, "do_classifier_free_guidance", False) else 1
        if self.index == 0:
            self._begin(arguments, denoiser)
        elif self._shown is not None:
            self._take_back(self.family.canvas(arguments).chunk(self.branches)[0])

    def _begin(self, arguments: dict[str, Any], denoiser: TileDenoiser) -> None:
        assert self._solver is not None
        latents = self.family.canvas(arguments).chunk(self.branches)[0]
        timesteps = self._solver.timesteps  # still on the host
        self._times: list[float] = self.family.clock(timesteps.float()).tolist()
        dtype = torch.promote_types(latents.dtype, torch.float32)
        self._solver = solver = self._solver.to(latents.device, dtype)
        self._acts_within = acts_within(self.network)
        forms = [(t.shape, t.dtype, t.device) for t in tree_leaves(arguments) if isinstance(t, Tensor)]
        shapes = (tuple(latents.shape), latents.dtype, tuple(solver.table.shape), self.branches, *forms)
        key = (identity(self.network), denoiser.config, denoiser.execution, any(solver.uses_noise), shapes)
        self.entry: Entry = self.graphs.entry(key, lambda: Buffers(solver, latents))
        self.buffers: Buffers = self.entry.buffers
        self.buffers.table.copy_(solver.table)
        self.buffers.input_scale.copy_(solver.input_scale)
        self.buffers.step.zero_()
        self.features.begin(self.scheduler, timesteps)
        self._take_back(latents)
        if self._saves is not None:
            self._saves.restore(self.buffers.carried)
            self.buffers.step.fill_(self._resumed)
        # What the pipeline gets for a prediction: as many images, of one pixel, or one token.
        self._stand_in = latents.new_zeros(latents.shape[0], *[1] * (arguments[self.family.sample].ndim - 1))

    def _take_back(self, latents: Tensor) -> None:
        """The canvas as the pipeline has it; a callback may have changed it. Decided on the device, without waiting."""
        state, model_input = self.buffers.state[0], self.buffers.model_input
        new = latents.to(state.dtype)
        scaled = (new * self.buffers.input_scale[self.index]).to(model_input.dtype)
        if self._shown is not None:
            same = (latents == self._shown).all()  # unchanged: the engine's own is more precise
            new, scaled = torch.where(same, state, new), torch.where(same, model_input, scaled)
        state.copy_(new)
        model_input.copy_(scaled)

    def run_step(self, denoiser: TileDenoiser, forward: Forward, timestep: Any, conditions: dict[str, Any]) -> Tensor:
        """One evaluation of the canvas and the step after it; returns the stand-in for the prediction.

        ``conditions``: the arguments of the network's forward except the canvas and the timestep.
        """
        assert self._solver is not None
        buffers, index = self.buffers, self.index
        size = (buffers.model_input.shape[2], buffers.model_input.shape[3])
        if index < self._resumed:
            if index + 1 == self._resumed and self._saves is not None:
                self.features.resume(self._saves.saved.tensors, denoiser.tiling(*size, self._times[index]))
            self.index += 1
            return self._prediction()
        if buffers.denoiser is not None and buffers.denoiser is not denoiser:
            denoiser = buffers.denoiser.renewed(denoiser)
        self.denoiser = buffers.denoiser = denoiser
        denoiser.branches = self.branches
        uniform = denoiser.place(size, self._times[index], buffers.model_input.device)
        refusal = self._graph_refusal(denoiser, uniform, conditions)
        if refusal is None and self.graphs.backend is not None:
            if buffers.given is None:
                buffers.given = tree_map_only(Tensor, torch.clone, (timestep, conditions))
            if refill(buffers.given, (timestep, conditions)):
                timestep, conditions = buffers.given
            else:
                refusal = "the conditions have other shapes than before"
        if self.branches == 2:
            buffers.guidance.fill_(float(self.pipe.guidance_scale))
        if self._solver.uses_noise[index]:
            assert buffers.noise is not None
            buffers.noise.copy_(self._solver.noise(self.call.get("generator"), buffers.model_input))
        body = partial(self._step, denoiser, forward, timestep, conditions, index)
        self.graphs.run(self.entry, body, refusal, keeps=denoiser.attention)
        self.index += 1
        if self.index == len(self._solver) and self.call.get("output_type") != "latent":  # it is decoded next
            self.graphs.release()
        if self._saves is not None:
            self._saves.after(self.index, len(self._solver), buffers.carried | self.features.tensors())
        self.features.after_step(self.index, buffers.state[0])
        return self._prediction()

    def _step(
        self, denoiser: TileDenoiser, forward: Forward, timestep: Any, conditions: dict[str, Any], index: int
    ) -> None:
        """What a graph captures: it touches nothing but the buffers."""
        buffers = self.buffers
        canvas = torch.cat([buffers.model_input] * self.branches)
        predicted = denoiser.attempt(forward, canvas, timestep, **conditions)
        guidance = buffers.guidance if self.branches == 2 else None
        options: dict[str, Any] = {"window": denoiser.config.window, "impl": denoiser.execution.impl}
        if self.features.active(index):
            assert denoiser.placed is not None
            canvas = denoiser.blended(predicted).to(buffers.state.dtype)
            if guidance is not None:
                unconditional, conditional = canvas.chunk(2)
                canvas = unconditional + guidance * (conditional - unconditional)
            canvas = self.features.after_prediction(index, buffers.state[0], denoiser.placed, canvas)
            predicted, guidance = denoiser.whole(canvas.to(buffers.model_input.dtype)), None
        with label("step"):
            buffers.advance(predicted, guidance_scale=guidance, **options)

    def _prediction(self) -> Tensor:
        return self._stand_in.repeat(self.branches, *[1] * (self._stand_in.ndim - 1))

    def _graph_refusal(self, denoiser: TileDenoiser, uniform: bool, conditions: dict[str, Any]) -> str | None:
        """Why this step cannot be captured in a CUDA graph, or None."""
        if denoiser.deal is not run_all:
            return "several processes exchange the predictions of a step"
        if self.shows_latents:
            return "a callback may change what the next step reads"
        if self._acts_within is not None:
            return self._acts_within
        if not uniform:
            return "the tiles of a step have several sizes, or differ from step to step"
        if conditions.get("regions") is not None:
            return "regions: which prompts a tile has is decided on the host"
        if self.features.active(self.index):
            return "what a fade or a pull does differs from step to step"
        return None

    def _latents(self) -> Tensor:
        """What the pipeline is given for its latents after a step."""
        shown = self.buffers.state[0].to(self.buffers.model_input.dtype, copy=True)
        if self.shows_latents:
            self._shown = shown.clone()  # a callback may change what it is given in place
        return self.family.result(shown, None)
