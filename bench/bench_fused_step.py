"""Cases of fused_step: all that a denoising step does outside the network (guidance, blending, scheduler).

``loop`` is guidance in eager torch, tiles added up one by one as in diffusers' panorama pipeline, then diffusers' own
``step`` and ``scale_model_input``. ``mean`` is the fused step with the same equal weights, ``ramp`` with the default
window, which reads less. They are charged with the least that they must move, the loop with what its operators do.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.bench_blend_tiles import elements_weighed
from bench.case import Case, Ready
from bench.windows import average, grid
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
    """The step as a pipeline without the fused op does it; ``tiles`` are ``[T, 2, C, h, w]``."""

    scheduler: Any
    sample: Tensor
    tiles: Tensor
    blend: Callable[[Tensor], Tensor]

    def __call__(self, evaluation: int = WARM) -> Tensor:
        unconditional, conditional = self.tiles.unbind(1)
        prediction = self.blend(unconditional + GUIDANCE * (conditional - unconditional))
        if hasattr(self.scheduler, "_step_index"):
            self.scheduler._step_index = evaluation  # timing repeats one step
        t = self.scheduler.timesteps[evaluation]
        self.sample = self.scheduler.step(prediction, t, self.sample, return_dict=False)[0]
        return self.scheduler.scale_model_input(self.sample, self.scheduler.timesteps[evaluation + 1])


class Fused:
    """The same by :func:`ops.fused_step`."""

    def __init__(
        self, solver: LinearSolver, sample: Tensor, tiles: Tensor, offsets: Tensor, window: ops.Window
    ) -> None:
        self.state = sample.new_zeros(solver.slots, *sample.shape)
        self.state[0] = sample
        self.model_input = sample.to(tiles.dtype, copy=True)
        # One for each evaluation: filling one anew would be timed too.
        self.steps = [torch.tensor([i], device=tiles.device) for i in range(WARM + 1)]
        inputs = (tiles.flatten(0, 1), offsets, self.state, solver.table, solver.input_scale)
        guidance = torch.tensor([GUIDANCE], device=tiles.device)
        more: dict[str, Any] = {"guidance_scale": guidance, "window": window}
        self.run: Callable[..., None] = partial(ops.fused_step, *inputs, model_input=self.model_input, **more)

    def __call__(self, evaluation: int = WARM) -> Tensor:
        self.run(self.steps[evaluation])
        return self.model_input


def scheduler(name: str) -> Any:
    kind = {"DDIM": partial(DDIMScheduler, clip_sample=False), "DPM++ 2M": DPMSolverMultistepScheduler}[name]
    result = kind(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    result.set_timesteps(STEPS)
    return result


def prepare(name: str, size: int, tile: int, stride: int, device: torch.device, dtype: torch.dtype) -> Ready:
    corners, canvas = grid((size, size), tile, stride), CHANNELS * size * size
    tiles = torch.randn(len(corners), 2, CHANNELS, tile, tile, device=device).to(dtype)
    sample = torch.randn(1, CHANNELS, size, size, device=device)
    solver = linear_solver(scheduler(name)).to(device)
    offsets = torch.tensor(corners, dtype=torch.int32, device=device)
    eager = Eager(scheduler(name), sample.to(dtype), tiles, partial(average, corners=corners, like=sample.to(dtype)))
    fused: dict[str, Fused] = {window: Fused(solver, sample, tiles, offsets, window) for window in WINDOWS}
    blend, wide = partial(ops.blend_tiles, offsets=offsets, canvas_size=(size, size), impl="reference"), tiles.double()
    exact = {w: Eager(scheduler(name), sample.double(), wide, partial(blend, window=w)) for w in WINDOWS}
    ways: list[Callable[[int], Tensor]] = [*exact.values(), *fused.values()]
    for evaluation in range(WARM):
        for way in ways:
            way(evaluation)
        with CountBytes() as counter:
            eager(evaluation)
    row, unit = solver.table[WARM], torch.eye(solver.slots, solver.slots + 2).to(solver.table)
    terms = row[(row != unit).any(1)] != 0  # of the sums that give the slots which a step changes
    read = int(terms[:, : solver.slots].any(0).sum())  # slots
    moved = {"copy": 2 * tiles.nbytes, "loop": counter.moved}  # of the last step, in which all operators run
    for window in WINDOWS:
        # Tile elements with weight and the model's input; the state that is read and written.
        weighed = elements_weighed(corners, tile, size, CHANNELS, window)
        moved[window] = (2 * weighed + canvas) * dtype.itemsize + (read + len(terms)) * sample.nbytes
    target = torch.empty_like(tiles)
    return Ready(
        {"copy": partial(target.copy_, tiles), "loop": eager, **fused},
        baseline="loop",
        bytes=moved,
        # Of the ramp: a product and a sum for each element with weight and branch; guidance; the terms.
        flops=4 * weighed + 3 * canvas + 2 * int(terms.sum()) * canvas,
        expected=exact["mean"],
        others={"ramp": exact["ramp"]},
        buffers=[one.model_input for one in fused.values()],
    )


def cases() -> Iterator[Case]:
    for name, (size, tile, stride) in product(("DDIM", "DPM++ 2M"), CASES):
        count = len(grid((size, size), tile, stride))
        yield Case(
            "fused_step",
            f"{name}, {count} tiles of {tile}x{tile}x{CHANNELS}, guidance, on {size}x{size}",
            f"the scheduler's own step after the loop in float64, step {WARM}",
            partial(prepare, name, size, tile, stride),
            quick=name == "DPM++ 2M" and size == 512,
        )
