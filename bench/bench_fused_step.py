"""All that a denoising step does outside the network: blend, guidance, scheduler. Fused against eager.

``loop`` is guidance in eager torch, then tiles accumulated one by one as diffusers' panorama pipeline does,
then diffusers' own ``step`` and ``scale_model_input``. ``blend op`` is ``ops.blend_tiles`` and the rest eager.
Both blend with equal weights; so does ``mean``, the fused step of the same arithmetic. ``ramp`` is the fused
step with the default window, which reads less. Before anything is timed, all of the first three must agree
over some evaluations.

Bytes of the fused step are the minimum: each tile element that has weight and each state slot in use is read
once, each slot that changes and the model's input is written once. Bytes of the eager ways are counted while
they run: what every operator is given and gives back, less views.

    python -m bench.bench_fused_step [--device cuda] [--dtype float16] [--json out.json]
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import timing
from bench.bench_blend_tiles import bytes_moved, starts
from bench.case import Case, Ready
from tiledcore import ops
from tiledcore.schedulers.solver import LinearSolver, linear_solver

# tile side, stride: latent pixels on a canvas of SIZE; the last is canvas mode
CASES = [(128, 96), (64, 32), (512, 512)]
SIZE, CHANNELS, GUIDANCE = 512, 4, 7.5
STEPS, WARM = 20, 3  # evaluations in the table, and how many are run before the timed one


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
    offsets: Tensor
    blend_op: bool = False

    def __call__(self, evaluation: int) -> Tensor:
        unconditional, conditional = self.tiles.unbind(1)
        guided = unconditional + GUIDANCE * (conditional - unconditional)
        prediction = self.blend_by_op(guided) if self.blend_op else self.blend_by_loop(guided)
        if hasattr(self.scheduler, "_step_index"):
            self.scheduler._step_index = evaluation  # the timed evaluation is repeated
        t = self.scheduler.timesteps[evaluation]
        self.sample = self.scheduler.step(prediction, t, self.sample, return_dict=False)[0]
        return self.scheduler.scale_model_input(self.sample, self.scheduler.timesteps[evaluation + 1])

    def blend_by_op(self, tiles: Tensor) -> Tensor:
        return ops.blend_tiles(tiles, self.offsets, (SIZE, SIZE), window="mean")

    def blend_by_loop(self, tiles: Tensor) -> Tensor:
        value = tiles.new_zeros(1, CHANNELS, SIZE, SIZE)
        count = torch.zeros_like(value)
        h, w = tiles.shape[-2:]
        for tile, (y, x) in zip(tiles, self.corners, strict=True):
            value[:, :, y : y + h, x : x + w] += tile
            count[:, :, y : y + h, x : x + w] += 1
        return value / count


@dataclass
class Fused:
    """The same through :func:`ops.fused_step`."""

    solver: LinearSolver
    state: Tensor
    tiles: Tensor  # [T*2, C, h, w]
    offsets: Tensor
    step: Tensor
    guidance_scale: Tensor
    model_input: Tensor
    window: ops.Window

    def __call__(self) -> Tensor:
        ops.fused_step(
            *(self.tiles, self.offsets, self.state, self.solver.table, self.solver.input_scale, self.step),
            model_input=self.model_input,
            guidance_scale=self.guidance_scale,
            window=self.window,
        )
        return self.model_input


def fused_bytes(fused: Fused, offsets: Tensor, tile: int) -> int:
    """The least that the timed evaluation must move."""
    rows = fused.solver.table[WARM].cpu()
    written = fused.solver.writes(WARM)
    read = {j for s in written for j in range(fused.solver.slots) if rows[s, j] != 0}
    canvas = CHANNELS * SIZE * SIZE
    weighed = bytes_moved(offsets, tile, SIZE, CHANNELS, fused.window) - canvas  # in elements
    network = (2 * weighed + canvas) * fused.tiles.element_size()
    return network + (len(read) + len(written)) * canvas * fused.state.element_size()


def agreement(eager: list[Eager], fused: list[Fused]) -> float:
    """Run the first evaluations; the largest relative difference of the canvases."""
    for evaluation in range(WARM):
        for way in eager:
            way(evaluation)
        for other in fused:
            other.step.fill_(evaluation)
            other()
    for other in fused:
        other.step.fill_(WARM)
    reference = eager[0].sample.double()
    samples = [way.sample for way in eager[1:]] + [fused[0].state[0]]
    return max(float((s.double() - reference).abs().max() / reference.abs().max()) for s in samples)


def schedulers() -> dict[str, Callable[[], Any]]:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

    def ready(kind: Any, **settings: Any) -> Any:
        scheduler = kind(**betas, **settings)
        scheduler.set_timesteps(STEPS)
        return scheduler

    return {
        "DDIM": partial(ready, DDIMScheduler, clip_sample=False),
        "DPM++ 2M": partial(ready, DPMSolverMultistepScheduler),
    }


def prepare(
    name: str, make: Callable[[], Any], tile: int, stride: int, device: torch.device, dtype: torch.dtype
) -> Ready:
    line = starts(SIZE, tile, stride)
    corners = [(y, x) for y in line for x in line]
    on_host = torch.tensor(corners, dtype=torch.int32)
    offsets = on_host.to(device)
    tiles = torch.randn(len(corners), 2, CHANNELS, tile, tile, device=device).to(dtype)
    sample = torch.randn(1, CHANNELS, SIZE, SIZE, device=device)
    solver = linear_solver(make())
    if not isinstance(solver, LinearSolver):
        raise RuntimeError(f"{name} has no table: {solver.reason}")
    solver = solver.to(device)
    scale = torch.tensor([GUIDANCE], device=device)

    def fused(window: ops.Window) -> Fused:
        state = sample.new_zeros(solver.slots, *sample.shape)
        state[0] = sample
        step = torch.zeros(1, dtype=torch.int64, device=device)
        return Fused(solver, state, tiles.flatten(0, 1), offsets, step, scale, sample.to(dtype), window)

    loop = Eager(make(), sample.to(dtype), tiles, corners, offsets)
    blend = Eager(make(), sample.to(dtype), tiles, corners, offsets, blend_op=True)
    mean, ramp = fused("mean"), fused("ramp")
    difference = agreement([loop, blend], [mean, ramp])

    target = torch.empty_like(tiles)
    runs: dict[str, Callable[[], Any]] = {
        "copy": partial(target.copy_, tiles),
        "loop": partial(loop, WARM),
        "blend op": partial(blend, WARM),
        "mean": mean,
        "ramp": ramp,
    }
    moved = {"copy": 2 * tiles.nbytes}
    moved |= {f"{way.window}": fused_bytes(way, on_host, tile) for way in (mean, ramp)}
    for key in ("loop", "blend op"):
        with CountBytes() as counter:
            runs[key]()
        moved[key] = counter.moved
    # Of the default window: a product and a sum for each element that has weight, guidance, and the table's row.
    canvas = CHANNELS * SIZE * SIZE
    weighed = bytes_moved(on_host, tile, SIZE, CHANNELS, "ramp") - canvas
    terms = int((solver.table[WARM][list(solver.writes(WARM))] != 0).sum())
    flops = 4 * weighed + 3 * canvas + 2 * terms * canvas
    return Ready(runs, "loop", moved, flops, lambda: {"blend op, mean": difference})


def cases() -> list[Case]:
    return [
        Case(
            "fused_step",
            f"{name}, {len(starts(SIZE, tile, stride)) ** 2} tiles of {tile}x{tile}x{CHANNELS}, guidance, "
            f"on {SIZE}x{SIZE}",
            f"the scheduler's own step after the loop, over {WARM} evaluations",
            partial(prepare, name, make, tile, stride),
            quick=name == "DPM++ 2M",
        )
        for name, make in schedulers().items()
        for tile, stride in CASES
    ]


def main() -> None:
    args = timing.parser(__doc__.split("\n")[0] if __doc__ else None).parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    print(timing.machine(device), args.dtype)
    rows, allowed = [], 100 * torch.finfo(dtype).eps
    for case in cases():
        ready = case.prepare(device, dtype)
        difference = max(ready.errors().values())
        if not difference <= allowed:
            raise RuntimeError(f"{case.name}: the ways differ by {difference:.2g}, where {allowed:.2g} is rounding")
        seconds = timing.interleaved(ready.runs, device, args.rounds)
        rows += timing.report(case.shapes, seconds, ready.bytes, ready.baseline)
        print(f"largest relative difference of loop, blend op and mean over {WARM} evaluations: {difference:.2g}")
    timing.save(args.json, device, rows)


if __name__ == "__main__":
    main()
