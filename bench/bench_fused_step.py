"""Cases of fused_step: all that a denoising step does outside the network (guidance, blending, scheduler).

``loop`` is guidance in eager torch, tiles added up one by one as in diffusers' panorama pipeline, then diffusers' own
``step`` and ``scale_model_input``. It gives all tiles equal weights, and so does ``mean``, the fused step with the same
arithmetic. ``ramp`` is the fused step with the default window, which reads less.

The fused step is charged with the least that it must move. Bytes of the loop are counted: what each operator
reads and writes.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.bench_blend_tiles import elements_weighed, grid, python_loop
from bench.case import Case, Ready
from tiledcore import ops
from tiledcore.schedulers.solver import LinearSolver, linear_solver

CASES = [(512, 128, 96), (512, 64, 32), (512, 512, 512)]
"""Canvas side, tile side and stride in latent pixels. The last is canvas mode."""
if torch.cuda.is_available():
    CASES += [(1024, 128, 96), (2048, 128, 96)]
CHANNELS, GUIDANCE = 4, 7.5
WINDOWS: tuple[ops.Window, ...] = ("mean", "ramp")
STEPS, WARM = 20, 3  # steps of the schedule, and how many are done before the one that is timed


class CountBytes(TorchDispatchMode):
    """Adds up what operators read and write."""

    moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.moved += sum(tensor.nbytes for tensor in tensors)
        return result


@dataclass
class Eager:
    """The step as a pipeline without the fused op does it."""

    scheduler: Any
    sample: Tensor
    tiles: Tensor  # [T, 2, C, h, w]
    corners: list[tuple[int, int]]
    window: ops.Window = "mean"

    def __call__(self, evaluation: int = WARM) -> Tensor:
        unconditional, conditional = self.tiles.unbind(1)
        guided = unconditional + GUIDANCE * (conditional - unconditional)
        size = self.sample.shape[-1]
        if self.window == "mean":
            prediction = python_loop(guided, self.corners, size, torch.ones_like(guided[0, 0]))
        else:
            offsets = torch.tensor(self.corners, dtype=torch.int32, device=guided.device)
            prediction = ops.blend_tiles(guided, offsets, (size, size), window=self.window, impl="reference")
        if hasattr(self.scheduler, "_step_index"):
            self.scheduler._step_index = evaluation  # timing repeats one step
        t = self.scheduler.timesteps[evaluation]
        self.sample = self.scheduler.step(prediction, t, self.sample, return_dict=False)[0]
        return self.scheduler.scale_model_input(self.sample, self.scheduler.timesteps[evaluation + 1])


@dataclass
class Fused:
    """The same by :func:`ops.fused_step`."""

    solver: LinearSolver
    state: Tensor
    tiles: Tensor  # [T*2, C, h, w]
    offsets: Tensor
    step: Tensor
    guidance_scale: Tensor
    model_input: Tensor
    window: ops.Window

    def __call__(self, evaluation: int = WARM) -> Tensor:
        if evaluation < WARM:
            self.step.fill_(evaluation)
        ops.fused_step(
            *(self.tiles, self.offsets, self.state, self.solver.table, self.solver.input_scale, self.step),
            model_input=self.model_input,
            guidance_scale=self.guidance_scale,
            window=self.window,
        )
        if evaluation < WARM:
            self.step.fill_(WARM)
        return self.model_input

    def least_bytes(self, weighed: int) -> int:
        """Tile elements with weight, the state that is read and written, and the model's input."""
        rows, slots = self.solver.table[WARM].cpu(), written(self.solver)
        read = {j for s in slots for j in range(self.solver.slots) if rows[s, j] != 0}
        canvas = self.state[0].numel()
        network = (2 * weighed + canvas) * self.tiles.element_size()
        return network + (len(read) + len(slots)) * canvas * self.state.element_size()


def written(solver: LinearSolver) -> list[int]:
    """The slots that a step in the middle of the schedule changes."""
    unit = torch.eye(solver.slots, solver.slots + 2).to(solver.table)
    return (solver.table[WARM] != unit).any(dim=1).nonzero().flatten().tolist()


def scheduler(name: str) -> Any:
    kind = {"DDIM": DDIMScheduler, "DPM++ 2M": DPMSolverMultistepScheduler}[name]
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    result = kind(**betas, **({"clip_sample": False} if name == "DDIM" else {}))
    result.set_timesteps(STEPS)
    return result


def fused_way(solver: LinearSolver, window: ops.Window, tile: int, stride: int, sample: Tensor, tiles: Tensor) -> Fused:
    device = tiles.device
    offsets = torch.tensor(grid(sample.shape[-1], tile, stride), dtype=torch.int32, device=device)
    state = sample.new_zeros(solver.slots, *sample.shape)
    state[0] = sample
    step = torch.zeros(1, dtype=torch.int64, device=device)
    guidance = torch.tensor([GUIDANCE], device=device)
    return Fused(solver, state, tiles.flatten(0, 1), offsets, step, guidance, sample.to(tiles.dtype, copy=True), window)


def prepare(name: str, size: int, tile: int, stride: int, device: torch.device, dtype: torch.dtype) -> Ready:
    corners, canvas = grid(size, tile, stride), CHANNELS * size * size
    tiles = torch.randn(len(corners), 2, CHANNELS, tile, tile, device=device).to(dtype)
    sample = torch.randn(1, CHANNELS, size, size, device=device)
    found = linear_solver(scheduler(name))
    assert isinstance(found, LinearSolver), found
    solver = found.to(device)
    eager = Eager(scheduler(name), sample.to(dtype), tiles, corners)
    exact = {w: Eager(scheduler(name), sample.double(), tiles.double(), corners, w) for w in WINDOWS}
    fused: dict[str, Fused] = {window: fused_way(solver, window, tile, stride, sample, tiles) for window in WINDOWS}
    moved = {"copy": 2 * tiles.nbytes}
    for evaluation in range(WARM):
        for reference in exact.values():
            reference(evaluation)
        for way in fused.values():
            way(evaluation)
        with CountBytes() as counter:
            eager(evaluation)
        moved["loop"] = counter.moved  # of the last one, in which all operators run
    weighed = {window: elements_weighed(corners, tile, size, CHANNELS, window) for window in WINDOWS}
    moved |= {window: fused[window].least_bytes(weighed[window]) for window in WINDOWS}
    terms = int((solver.table[WARM][written(solver)] != 0).sum())
    target = torch.empty_like(tiles)
    return Ready(
        {"copy": partial(target.copy_, tiles), "loop": eager, **fused},
        baseline="loop",
        bytes=moved,
        # A product and a sum for each element with weight and branch; guidance; the rows of the table.
        flops=4 * weighed["ramp"] + 3 * canvas + 2 * terms * canvas,
        expected=exact["mean"],
        others={"ramp": exact["ramp"]},
        buffers=[way.model_input for way in fused.values()],
    )


def cases() -> list[Case]:
    return [
        Case(
            "fused_step",
            f"{name}, {len(grid(size, tile, stride))} tiles of {tile}x{tile}x{CHANNELS}, guidance, on {size}x{size}",
            f"the scheduler's own step after the loop in float64, step {WARM}",
            partial(prepare, name, size, tile, stride),
            quick=name == "DPM++ 2M" and size == 512,
        )
        for name in ("DDIM", "DPM++ 2M")
        for size, tile, stride in CASES
    ]
